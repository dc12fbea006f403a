"""Runs of test_four in one process and, forked by launch.py, in four: models that a plan or FSDP2 alone spreads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tensor_parallel_worker as models
import torch
from accelerate import ParallelismConfig, PartialState
from equality_worker import data
from replicas_worker import EVEN, share_groups

from hf_dis import cache_teacher_targets

EXAMPLES, WINDOW = 32, 16  # of an optimizer step
LAYOUTS = {"tensor parallel": {"tp_size": 4}, "FSDP": {"fsdp_size": 4}}
CASES = [
    (True, "spread", "forward_kl", "row-sparse"),
    (False, "spread", "reverse_kl", "sampled"),
    (True, "cached", "forward_kl", "sampled"),
    (False, "cached", "forward_kl", "row-sparse"),
    (False, "whole", "reverse_kl", "row-sparse"),
    (True, "whole", "reverse_kl", "exact"),
]
FLOAT32 = [CASES[0], CASES[1]]
UNEVEN = 50  # tokens: 13, 13, 13 and 11 per process
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def train(folders: dict[str, Path], folder: Path, layout: str, case: tuple, **keywords) -> dict:
    """A training in which all processes together take the same items per micro-batch."""
    is_several = models.processes() > 1
    copies = models.processes() if layout == "FSDP" else 1
    given = {"data": data("causal LM")[:EXAMPLES], "one_sample": True, "sizes": LAYOUTS[layout] if is_several else {}}
    settings = {
        "per_device_train_batch_size": WINDOW // 2 // copies,
        "train_sampling_strategy": "sequential",
        "num_tails": 1,
        "proposal": "uniform",
    }
    return models.train(folders, folder, case, **given, **settings, **keywords)


def run(folder: Path) -> None:
    # accelerate runs tensor parallelism on accelerators alone, and needs nothing of them.
    ParallelismConfig._validate_accelerator = lambda *_: None
    PartialState(cpu=True)
    share_groups()
    results, own = {"world_size": models.processes()}, folder / "own"
    folders = {
        "tensor parallel": models.saved(folder, UNEVEN, **HEADS),
        "FSDP": models.saved(folder / "even", EVEN, **HEADS),
    }
    for layout, sizes in LAYOUTS.items():
        teacher = models.load(folders[layout]["teacher"], **(sizes if models.processes() > 1 else {}))
        cached = {"depth": 8, "sample_size": 6, "show_progress": False}
        cache_teacher_targets(teacher, data("causal LM")[:EXAMPLES], own / layout / "cache", **cached)
        for case in CASES:
            results[layout, case] = train(folders[layout], own / layout, layout, case)
        for case in FLOAT32:
            found = train(folders[layout], own / layout, layout, case, dtype=torch.float32)
            results[layout, case, "float32"] = found
    torch.save(results, folder / f"rank_{int(os.environ.get('RANK', 0))}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
