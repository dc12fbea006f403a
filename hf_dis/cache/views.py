"""Augmentation that can be replayed: the same view of an example, whoever asks for it and however often."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededViews(Dataset):
    """A data set that augments at random, as n fixed views of each example: n times as long, and repeatable.

    Item ``v * len(dataset) + i`` is view v of example i, made with the generators of Python, NumPy and PyTorch seeded
    by (seed, v, i) and put back as they were. One epoch over it is n epochs over the data set. The views repeat
    with the same versions of the libraries on the same kind of machine.

    Args:
        dataset: whose items are augmented, with a length.
        number: n >= 1, views of each example.
        seed: of the views.
    """

    def __init__(self, dataset: Dataset, number: int, seed: int = 0):
        if number < 1:
            raise ValueError(f"number is {number}: an example needs 1 view or more")
        self.dataset, self.number, self.seed = dataset, number, seed

    def __len__(self) -> int:
        return self.number * len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no item {index} among {len(self)}")
        view, example = divmod(index, len(self.dataset))
        with seeded((self.seed, view, example)):
            return self.dataset[example]


@contextmanager
def seeded(entropy: tuple[int, ...]) -> Iterator[None]:
    """Within it the CPU generators of Python, NumPy and PyTorch are seeded; after it they are as they were."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.random.default_generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
