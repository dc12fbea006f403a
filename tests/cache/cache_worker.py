"""Writes caches in a process of its own: ``cache_worker.py FOLDER SECONDS_PER_FORWARD GROUP [FOLDER]``.

GROUP is ``ours`` where this script starts a process group and ends it, ``none`` where the writer has to.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_models import labelled_images, vit

from hf_dis import cache_teacher_targets

NUM_SHARDS = 9


def write(path: str | Path, pause: float = 0.0) -> int:
    """Writes a cache and returns the number of forwards of the teacher, two per shard and those of its comparison."""
    torch.set_num_threads(1)
    teacher = vit(40, seed=1, spread=30)
    forwards = []
    teacher.register_forward_pre_hook(lambda *_: forwards.append(time.sleep(pause)))
    data = labelled_images(4 * NUM_SHARDS - 1, 40)
    cache_teacher_targets(teacher, data, path, shard_examples=4, batch_size=2, show_progress=False)
    return len(forwards)


def main(first: str, pause: str, group: str, *others: str) -> None:
    if group == "ours":
        torch.distributed.init_process_group()
    for folder in (first, *others):
        forwards = write(folder, float(pause))
        assert int(os.environ.get("WORLD_SIZE", 1)) == 1 or 0 < forwards < 2 * NUM_SHARDS
        assert torch.distributed.is_initialized() == (group == "ours")
    if group == "ours":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
