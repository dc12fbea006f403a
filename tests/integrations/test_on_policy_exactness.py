"""Where all classes have part in the loss, the trainer of the method is TRL's: gradients, losses, normalisation."""

import chats
import own_text_worker as worker
import pytest
import torch
from divergences_by_definition import definition
from launch import two_processes
from reference import supervised

from hf_dis.loss.f_divergence import JensenShannon

# TRL computes the divergence in float32 whatever the models are in.
TOLERANCE = 1e-6
ONE_PROCESS = [(name, mode, 4) for name in worker.TRL for mode in ("exact", "shared tails")]
ONE_PROCESS += [("reverse", "per item", 4), ("reverse", "shared tails", 1), ("between", "per item", 1)]


def assert_same(found, expected, tolerance=TOLERANCE):
    """Two runs: losses, gradients of every step, and students."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5) and min(found["losses"]) > 0
    assert len(found["gradients"]) == len(expected["gradients"]) == worker.STEPS
    pairs = list(zip(found["gradients"], expected["gradients"], strict=True))
    for ours, theirs in [*pairs, (found["student"], expected["student"])]:
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda t, n=name: n + t)
    assert max(gradient.abs().max() for gradient in found["gradients"][0].values()) > 1e-2


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL's own runs, each made once."""
    made, folder = {}, tmp_path_factory.mktemp("trl")

    def of(name, accumulation):
        if (name, accumulation) not in made:
            made[name, accumulation] = worker.run_trl(folder, name, accumulation)
        return made[name, accumulation]

    return of


@pytest.mark.parametrize(("name", "mode", "accumulation"), ONE_PROCESS, ids=str)
def test_one_process(tmp_path, trl, name, mode, accumulation):
    assert_same(worker.run(tmp_path, name, mode, accumulation), trl(name, accumulation))


def test_the_entropy_is_trls_where_all_classes_are_sampled(tmp_path, trl):
    found = [log["entropy_estimate"] for log in worker.run(tmp_path, "reverse", "shared tails", 1)["logs"][:-1]]
    assert found == pytest.approx([log["entropy"] for log in trl("reverse", 1)["logs"][:-1]], rel=1e-4)


def test_logs_are_trls(tmp_path, trl):
    found, expected = worker.run(tmp_path, "reverse", "exact", 4)["logs"][0], trl("reverse", 4)["logs"][0]
    assert set(expected) - set(found) == {"entropy"}  # which needs all classes, and is not estimated in exact mode
    kept = {name for name in expected if name.startswith("completions/") or name in ("num_tokens", "grad_norm")}
    assert len(kept) == 9
    assert {name: found[name] for name in kept} == pytest.approx({name: expected[name] for name in kept}, rel=1e-5)


# Two processes


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode", "accumulation"), worker.CASES, ids=str)
def test_two_processes(of_two_processes, name, mode, accumulation):
    for results in of_two_processes:
        assert_same(results[name, mode, accumulation], results["trl", name, accumulation])


@pytest.mark.slow
def test_two_processes_divide_by_the_tokens_of_both(of_two_processes):
    for results in of_two_processes:
        assert_same(results["apart"], results["trl", "reverse", 4])


# GKD


def assert_exact_gkd(runs, accumulation=4):
    """The runs, one of each process, against the mean Jensen-Shannon divergence over the tokens of their batches."""
    student, teacher = (chats.in_float64(model) for model in (chats.student(), chats.teacher()))
    batches = [batch for run in runs for batch in run["batches"][:accumulation]]
    found = [supervised(batch, student, teacher) for batch in batches]
    losses = [definition(JensenShannon(), ours, theirs.detach(), 1.0) for _, ours, theirs in found]
    loss = torch.cat(losses).mean()
    assert sum(sum(run["losses"][:accumulation]) for run in runs) / len(runs) == pytest.approx(float(loss.detach()))
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for run in runs:
        for name in names:
            torch.testing.assert_close(run["gradients"][0][name], expected[name], rtol=0, atol=1e-10)
    every = sum(int((batch["labels"][:, 1:] != -100).sum()) for run in runs for batch in run["batches"])
    assert all(run["items"] == every for run in runs)


@pytest.mark.parametrize("mode", worker.MODES)
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_gkd_divides_by_the_tokens_that_are_distilled(tmp_path, lmbda, mode):
    assert_exact_gkd([worker.run_gkd(tmp_path, mode, 4, lmbda=lmbda)])


@pytest.mark.slow
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_gkd_in_two_processes(of_two_processes, lmbda):
    assert_exact_gkd([results["gkd", lmbda] for results in of_two_processes])
