"""One process, which torch.distributed does not know of, and the accelerator that a process is given."""

import pytest
import torch

from hf_dis import DISDistillationTrainer
from hf_dis.distributed import processes


def test_one_process_is_the_first_and_waits_for_nobody():
    assert processes.num_processes() == 1 and processes.process_index() == 0
    assert processes.is_first_of_machine()
    processes.wait_for_everyone()
    assert processes.of_first_process(lambda: "mine") == "mine"


def test_without_a_launcher_no_process_is_started():
    assert processes.start_processes().type in ("cpu", "cuda", "mps", "xpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("local_rank", "index"),
    [("0", 0), ("2", 2), ("3", 0), (None, 1)],
    ids=["first", "last", "one accelerator shown to each process", "no launcher"],
)
def test_a_process_has_the_accelerator_of_its_local_rank(monkeypatch, local_rank, index):
    """Three accelerators, the second of which the user has chosen."""
    current = [1]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    assert processes.start_processes() == torch.device("cuda", index)
    assert current[-1] == index


@pytest.mark.parametrize("ignored", [None, ["body.weight"]])
def test_a_module_is_kept_from_ddp_only_within_the_context(ignored):
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 3)})
    if ignored is not None:
        model._ddp_params_and_buffers_to_ignore = ignored
    before = dict(vars(model))
    with pytest.raises(KeyError), processes.kept_from_ddp(model, ["head"]):
        assert model._ddp_params_and_buffers_to_ignore == [*(ignored or []), "head.weight", "head.bias"]
        raise KeyError
    assert vars(model) == before


def test_processes_that_accelerate_does_not_count_are_refused(make_trainer, monkeypatch):
    """Sums would be over both, and each would train on all data."""
    create = DISDistillationTrainer.create_accelerator_and_postprocess

    def created(trainer):
        create(trainer)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    monkeypatch.setattr(DISDistillationTrainer, "create_accelerator_and_postprocess", created)
    with pytest.raises(ValueError, match=r"torch.distributed runs 2 processes and accelerate counts 1.*use_cpu=True"):
        make_trainer()
