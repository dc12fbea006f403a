"""The teacher's targets of run_next_item.py, stored once for the students that train without the teacher."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from item_task import collate
from transformers import LlamaForCausalLM

from hf_dis import TeacherCache, cache_teacher_targets

BATCH = 96


class StoredTargets(NamedTuple):
    """A cache of the teacher's targets, and the time that its writing took.

    Attributes:
        cache: of the training windows.
        seconds, cpu_seconds: of writing; the second is of all threads.
    """

    cache: TeacherCache
    seconds: float
    cpu_seconds: float


def stored_targets(
    teacher: LlamaForCausalLM, windows: Dataset, temperature: float, folder: Path, batch_size: int = BATCH
) -> StoredTargets:
    """Writes the teacher's targets to a folder, or takes them from it.

    Args:
        teacher: over the items.
        windows: of the training parts.
        temperature: of the distillation.
        folder: of the cache; the time of writing stands in ``written.json`` beside it.
        batch_size: windows of a batch of the teacher.
    """
    started = time.perf_counter(), time.process_time()
    # Alike lengths in a batch save padding, and a cache does not depend on the order.
    lengths = [len(one) for one in windows["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cache = cache_teacher_targets(
        teacher,
        windows.select(order),
        folder,
        temperature=temperature,
        data_collator=collate,
        batch_size=batch_size,
        show_progress=False,
    )
    spent = {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
    written = folder.parent / f"{folder.name}.written.json"
    if not written.exists():
        written.write_text(json.dumps(spent) + "\n")
    return StoredTargets(cache, **json.loads(written.read_text()))
