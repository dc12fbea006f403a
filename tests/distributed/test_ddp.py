"""Two real processes (gloo) against one: the same gradient, one proposal, different samples, the same metrics."""

import pytest
import torch
import worker
from launch import two_processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each of two processes that ran worker.py."""
    return two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process with two accumulation steps."""
    folder = tmp_path_factory.mktemp("one")
    worker.run(folder)
    return torch.load(folder / "rank_0.pt", weights_only=False)


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("run", ["exact", "fixed sample"])
def test_two_processes_train_as_one_that_accumulates(ranks, alone, run):
    untrained = worker.vit(40).state_dict()
    assert not torch.allclose(alone[run]["student"]["classifier.weight"], untrained["classifier.weight"], atol=1e-3)
    for rank in ranks:
        assert_near(rank[run]["student"], alone[run]["student"], 1e-6)


@pytest.mark.parametrize("run", ["exact", "fixed sample"])
def test_logged_losses_are_means_over_processes(ranks, alone, run):
    for mine, reference in zip(ranks[0][run]["logs"], alone[run]["logs"], strict=True):
        names = [name for name in reference if name.startswith(("kd_", "ce_", "dis/"))]
        assert {"kd_loss", "ce_loss"} <= set(names)
        for name in names:
            assert mine[name] == pytest.approx(reference[name], rel=1e-4), name


def test_the_loss_itself_is_logged_on_the_scale_of_one_process(ranks, alone):
    for mine, reference in zip(ranks[0]["exact"]["logs"], alone["exact"]["logs"], strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_processes_share_the_proposal_and_sample_differently(ranks):
    one, other = (rank["dis"] for rank in ranks)
    assert_near(one["student"], other["student"], 0)
    assert one["proposal"].keys() == other["proposal"].keys() and len(one["proposal"]) == 5
    for name, value in one["proposal"].items():
        assert torch.equal(value, other["proposal"][name]), name
    assert len(one["ids"]) == len(other["ids"]) == 4

    def ranked(ids):  # without the label's column: labels differ anyway
        return [step[:, :-1].sort(1).values for step in ids]

    assert not any(torch.equal(a, b) for a, b in zip(ranked(one["ids"]), ranked(other["ids"]), strict=True))


def test_seeds_differ_by_process(ranks):
    """The samples differ by the generator, not only by the items."""
    assert not torch.equal(ranks[0]["saved"]["generator"], ranks[1]["saved"]["generator"])


@pytest.mark.parametrize("run", ["exact", "fixed sample"])
def test_evaluation_counts_every_item_once(ranks, alone, run):
    """13 items on two processes: the loader repeats some to fill the last batches."""
    names = ["eval_loss", "eval_kd_loss", "eval_ce_loss", "eval_kl"]
    expected = [alone[run]["metrics"][name] for name in names]
    for rank in ranks:
        assert [rank[run]["metrics"][name] for name in names] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("run", ["exact", "fixed sample"])
def test_every_process_has_the_features_of_all_items_in_their_order(ranks, alone, run):
    expected = alone[run]["features"]
    assert expected.shape == (13, 16) and len(expected.unique(dim=0)) == 13
    for rank in ranks:
        torch.testing.assert_close(rank[run]["features"], expected, rtol=0, atol=1e-4)


def test_every_process_writes_and_resumes_its_own_state(ranks):
    for rank in ranks:
        whole, resumed = rank["resume"]
        assert whole.keys() == resumed.keys()
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
        assert rank["saved"].keys() < whole.keys()


def test_nothing_is_left_patched(ranks):
    assert all(rank[run]["patched"] == [] for rank in ranks for run in worker.RUNS)
