"""Seeded views: the same view whoever asks, other views for other numbers, and no trace in the global generators."""

import random

import numpy as np
import pytest
import torch

from hf_dis.cache import SeededViews


class Noisy(torch.utils.data.Dataset):
    """Augments with all three generators."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index + torch.rand(2).sum().item() + random.random() + np.random.rand()


def test_a_view_is_the_same_whenever_it_is_asked_for():
    views = SeededViews(Noisy(), 3)
    assert len(views) == 15
    forward = [views[index] for index in range(15)]
    assert [views[index] for index in reversed(range(15))] == forward[::-1]
    assert len(set(forward)) == 15
    assert [int(value) for value in forward] != [int(value) for value in SeededViews(Noisy(), 3, seed=1)]


def test_workers_give_the_same_views():
    views = SeededViews(Noisy(), 2)
    loaded = torch.cat(list(torch.utils.data.DataLoader(views, batch_size=3, num_workers=2)))
    assert torch.equal(loaded, torch.tensor([views[index] for index in range(10)], dtype=torch.float64))


def test_the_generators_are_left_as_they_were():
    views = SeededViews(Noisy(), 2)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    views[3]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_bad_numbers():
    with pytest.raises(ValueError, match="number is 0"):
        SeededViews(Noisy(), 0)
    with pytest.raises(IndexError, match="no view 10 among 10"):
        SeededViews(Noisy(), 2)[10]
