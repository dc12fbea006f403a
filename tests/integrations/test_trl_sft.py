"""SFT with the step of the method is exact distillation where all classes have part in it, however SFT prepares."""

from types import SimpleNamespace

import chats
import pytest
import sft_worker as worker
import torch
from launch import two_processes
from reference import distillation

SETTINGS = SimpleNamespace(temperature=2.0, hard_label_weight=0.3)
LEARNING_RATE = 0.1
TWO_PROCESSES = list(worker.cases())
# Each way to prepare the data is met in both modes and with both accumulations.
ONE_PROCESS = [(data, *rest) for data in worker.DATA for rest in (("exact", 4), ("shared tails", 1))]
ONE_PROCESS += [("messages", "per item", 4), ("packed", "per item", 1), ("packed", "exact", 1)]


def assert_exact(runs, accumulation, kd, ce):
    """The runs, one of each process, against SGD on the exact loss of their batches: losses, gradients, students."""
    student, teacher = (chats.in_float64(model) for model in (chats.student(), chats.teacher()))
    for step in range(worker.STEPS):
        window = slice(step * accumulation, (step + 1) * accumulation)
        batches = [batch for run in runs for batch in run["batches"][window]]
        assert len(batches) == accumulation * len(runs)
        loss = distillation(batches, student, teacher, SETTINGS, kd, ce)
        found = sum(sum(run["losses"][window]) for run in runs) / len(runs)
        assert loss > 0.1 and abs(found - float(loss.detach())) < 1e-10
        gradients = dict(zip(names(student), torch.autograd.grad(loss, list(student.parameters())), strict=True))
        for run in runs:
            assert_near(run["gradients"][step], gradients)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter -= LEARNING_RATE * gradients[name]
    for run in runs:
        assert_near(run["student"], student.state_dict())


def names(model):
    return [name for name, _ in model.named_parameters()]


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(("data", "mode", "accumulation"), ONE_PROCESS, ids=str)
def test_one_process(tmp_path, dense_kd, dense_ce, data, mode, accumulation):
    run = worker.run(tmp_path, data, mode, accumulation)
    assert_exact([run], accumulation, dense_kd, dense_ce)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "mode", "accumulation"), TWO_PROCESSES, ids=str)
def test_two_processes(of_two_processes, dense_kd, dense_ce, data, mode, accumulation):
    runs = [results[data, mode, accumulation] for results in of_two_processes]
    assert_exact(runs, accumulation, dense_kd, dense_ce)


@pytest.mark.slow
def test_two_processes_count_each_token_once(of_two_processes, tmp_path):
    """In training, and in an evaluation whose last batches are filled up with examples that were there before."""
    alone, ranks = worker.evaluate(tmp_path, packing=False), [results[False] for results in of_two_processes]
    assert [rank["num_tokens"] for rank in ranks] == [alone["num_tokens"]] * 2
    for packing in (False, True):
        alone = worker.evaluate(tmp_path, packing)
        for rank in (results[packing] for results in of_two_processes):
            for name in ("eval_loss", "eval_kd_loss", "eval_kl", "eval_ce_loss"):
                assert rank[name] == pytest.approx(alone[name], rel=1e-5), name
