"""Language models on two real processes, one of which has no supervised token in some steps, against one process."""

import pytest
import text_worker
import torch
from launch import two_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each of two processes that ran text_worker.py."""
    return two_processes(text_worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process with two accumulation steps."""
    folder = tmp_path_factory.mktemp("one")
    text_worker.run(folder)
    return torch.load(folder / "rank_0.pt")


@pytest.mark.parametrize("run", text_worker.RUNS)
def test_a_process_without_a_supervised_token_adds_nothing_and_hangs_nobody(ranks, alone, run):
    expected = alone[run]["student"]
    untrained = {n: p.detach() for n, p in text_worker.RUNS[run][0](text_worker.V).named_parameters()}
    assert max(float((expected[name] - untrained[name]).abs().max()) for name in expected) > 1e-3
    for rank in ranks:
        assert rank[run]["losses"] == pytest.approx(alone[run]["losses"], rel=1e-4)
        for name, parameter in expected.items():
            torch.testing.assert_close(rank[run]["student"][name], parameter, rtol=0, atol=2e-6, msg=name)
