"""Runs of test_fsdp_trainer in one process and, forked by launch.py, in two: trainings of language models by FSDP2.

transformers shards a student that is loaded with ``DistributedConfig(fsdp_size=...)``. accelerate's plug-in shards
a student when the training starts.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import tensor_parallel_worker as models
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from equality_worker import data
from fsdp_sampled_worker import counting
from replicas_worker import EVEN, share_groups

from hf_dis import cache_teacher_targets

EXAMPLES, WINDOW = 32, 16  # of an optimizer step
BY = ("transformers", "accelerate")
CASES = [
    (False, "whole", "forward_kl", "sampled"),
    (False, "whole", "reverse_kl", "per item"),
    (False, "cached", "forward_kl", "sampled"),
    (False, "whole", "forward_kl", "warm-up"),
    (True, "whole", "forward_kl", "sampled"),
    (False, "whole", "forward_kl", "exact"),
    (True, "whole", "forward_kl", "row-sparse"),
    (False, "whole", "reverse_kl", "row-sparse"),
    (False, "cached", "forward_kl", "row-sparse"),
]
FLOAT32, BF16 = [*CASES[:2], CASES[4], CASES[6]], [CASES[0], CASES[4], CASES[6]]
RESUMED = [(CASES[0], "FULL_STATE_DICT"), (CASES[6], "FULL_STATE_DICT"), (CASES[6], "SHARDED_STATE_DICT")]
BEST = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
BEST |= {"learning_rate": 0.5, "lr_scheduler_type": "constant"}


@contextmanager
def sharding(by: str):
    """Lets trainings shard whole students, which have no accelerator, by accelerate's plug-in."""
    if by == "transformers" or models.processes() == 1:
        yield {}
        return
    # Without an accelerator accelerate runs plain data parallelism.
    backend = {"_prepare_backend": lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)}
    backend["set_device"] = lambda state: setattr(state, "device", torch.device("cpu"))
    own = models.load
    with (
        mock.patch.multiple(PartialState, **backend),
        mock.patch.object(models, "load", lambda path, _=True, dtype=torch.float64, **__: own(path, False, dtype)),
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True),
        mock.patch.dict(os.environ),
    ):
        yield {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2}}


def train(folders: dict[str, Path], folder: Path, by: str, case: tuple, **keywords) -> dict:
    sizes = {"fsdp_size": 2} if models.processes() > 1 else {}
    settings = {
        "per_device_train_batch_size": WINDOW // 2 // models.processes(),
        "train_sampling_strategy": "sequential",
        "num_tails": 1,
        "proposal": "uniform",
        **keywords,
    }
    given = {"data": data("causal LM")[:EXAMPLES], "one_sample": True, "sizes": sizes}
    kept: list[int] = []
    with sharding(by) as added, counting(kept):
        settings["fsdp_config"] = added.pop("fsdp_config", {}) | settings.pop("fsdp_config", {}) or None
        found = models.train(folders, folder, case, **given, **settings, **added)
    return found | {"kept": kept}


def resumed(folders: dict[str, Path], folder: Path, case: tuple, kind: str) -> list[dict]:
    """Students of a training, and of its second half once more."""
    given = {"save_strategy": "steps", "save_steps": 3, "save_only_model": False, "saves": False}
    given["fsdp_config"] = {"state_dict_type": kind}
    first = train(folders, folder, "accelerate", case, **given)
    own = models.DISDistillationTrainer.train
    checkpoint = str(folder / "out" / "checkpoint-3")
    with mock.patch.object(
        models.DISDistillationTrainer, "train", lambda self: own(self, resume_from_checkpoint=checkpoint)
    ):
        second = train(folders, folder, "accelerate", case, **given)
    return [first["student"], second["student"]]


def run(folder: Path) -> None:
    PartialState(cpu=True)
    share_groups()
    results, folders = {"world_size": models.processes()}, models.saved(folder, EVEN)
    own = folder / "own"
    cached = {"depth": 8, "sample_size": 6, "show_progress": False}
    cache_teacher_targets(
        models.load(folders["teacher"], False), data("causal LM")[:EXAMPLES], own / "cache", **cached
    )
    for by in BY if models.processes() > 1 else BY[:1]:
        for case in CASES:
            results[by, case] = train(folders, own, by, case)
        for case in FLOAT32:
            results[by, case, "float32"] = train(folders, own, by, case, dtype=torch.float32)
        for case in BF16:
            results[by, case, "bf16"] = train(folders, own, by, case, dtype=torch.float32, bf16=True)
    results["best"] = train(folders, folder / "best", "transformers", CASES[0], **BEST)
    if models.processes() > 1:
        efficient = {"fsdp_config": {"cpu_ram_efficient_loading": "true"}}
        results["efficient"] = train(folders, own, "accelerate", CASES[0], **efficient)
        for number, given in enumerate(RESUMED):
            results[("resumed", *given)] = resumed(folders, folder / f"resumed_{number}", *given)
    torch.save(results, folder / f"rank_{int(os.environ.get('RANK', 0))}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()  # its threads, alive at the exit, can abort the process
