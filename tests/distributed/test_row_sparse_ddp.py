"""Row-sparse gradients over two real processes (gloo): the same training as one that accumulates."""

import pytest
import row_sparse_worker as worker
import torch
from launch import two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    worker.run(folder)
    return torch.load(folder / "rank_0.pt", weights_only=False)


def test_two_processes_train_as_one_that_accumulates(ranks, alone):
    untrained = alone["untrained"]["classifier.weight"]
    assert not torch.allclose(alone["student"]["classifier.weight"], untrained, atol=1e-2)
    assert 1 == alone["steps"].min() < alone["steps"].max()  # the exact step, and the steps that sampled the row
    for rank in ranks:
        for name, expected in alone["student"].items():
            torch.testing.assert_close(rank["student"][name], expected, rtol=0, atol=2e-6, msg=name)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert torch.equal(rank["steps"], alone["steps"])


def test_the_processes_agree_to_the_bit(ranks):
    one, other = (rank["student"] for rank in ranks)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
