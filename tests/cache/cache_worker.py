"""Writes a cache in a process of its own, as slowly as is said: ``cache_worker.py FOLDER SECONDS_A_FORWARD``."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_models import labelled_images, vit

from hf_dis import cache_teacher_targets

NUM_SHARDS = 9


def write(path: str | Path, pause: float = 0.0) -> None:
    torch.set_num_threads(1)
    teacher = vit(40, seed=1, spread=30)
    teacher.register_forward_pre_hook(lambda *_: time.sleep(pause))
    data = labelled_images(4 * NUM_SHARDS - 1, 40)
    cache_teacher_targets(teacher, data, path, shard_examples=4, batch_size=2, show_progress=False)


if __name__ == "__main__":
    write(sys.argv[1], float(sys.argv[2]))
