"""The cache that the tests of this folder share: 23 images of 40 classes in five shards."""

import torch
from tiny_models import labelled_images
from transformers import default_data_collator

C, ITEMS, SHARD = 40, 23, 5
SETTINGS = {"depth": 6, "sample_size": 8, "shard_examples": SHARD, "batch_size": 3, "show_progress": False}


class Augmented(torch.utils.data.Dataset):
    """Adds noise to its images at random."""

    def __init__(self):
        self.items = labelled_images(6, C)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        return {**item, "pixel_values": item["pixel_values"] + 0.1 * torch.randn(3, 8, 8)}


def batch(*examples):
    data = labelled_images(ITEMS, C)
    return default_data_collator([data[example] for example in examples])


def shards(path):
    return sorted(path.glob("*.arrow"))


def times(path):
    """When each shard was written."""
    return {file.name: file.stat().st_mtime_ns for file in shards(path)}
