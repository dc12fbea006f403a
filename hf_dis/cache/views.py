"""Random augmentation that can be replayed: an example's view is the same for every reader and every time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class SeededViews(Dataset):
    """A dataset with random augmentation, as n fixed views of each example: n times as long, and repeatable.

    Element ``v * len(dataset) + i`` is view v of example i. The generators of Python, NumPy and PyTorch are seeded by
    (seed, v, i) for each view and restored after it. One epoch over the views is n epochs over the dataset. The views
    repeat with the same versions of the libraries on the same kind of machine.

    Args:
        dataset: with a length, whose elements are augmented at random.
        number: n >= 1, views of each example.
        seed: of the views.

    Raises:
        ValueError: if ``number`` is below 1.
    """

    def __init__(self, dataset: Dataset, number: int, seed: int = 0):
        if number < 1:
            raise ValueError(f"number is {number}: an example needs 1 view or more")
        self.dataset, self.number, self.seed = dataset, number, seed

    def __len__(self) -> int:
        return self.number * len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(
                f"there is no view {index} among {len(self)}: the index has to be from 0 to {len(self) - 1}"
            )
        view, example = divmod(index, len(self.dataset))
        with seeded((self.seed, view, example)):
            return self.dataset[example]


@contextmanager
def seeded(entropy: tuple[int, ...]) -> Iterator[None]:
    """Seeds the CPU generators of Python, NumPy and PyTorch within the context, and restores their state after it."""
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
