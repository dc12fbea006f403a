"""CIFAR-100 for paper_cifar.py: residual networks for small images, and views stored with a teacher's logits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_dis.cache import SeededViews

# Of the training images, in parts of 1.
MEAN, STD = [0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762]
# Of stored views.
ARRAYS = {"images": np.uint8, "labels": np.int16, "logits": np.float16}
AUGMENT = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
# On whole batches, since the two operations take 0.1 ms for a single image.
NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class CifarResNetConfig(PretrainedConfig):
    """Settings of a :class:`CifarResNet`.

    Args:
        depth: 6 n + 2 layers with weights.
        num_labels: classes.
        **kwargs: as for ``PretrainedConfig``.

    Raises:
        ValueError: if ``depth`` is not 6 n + 2 for n >= 1.
    """

    model_type = "cifar_resnet"

    def __init__(self, depth: int = 20, num_labels: int = 100, **kwargs):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}: it has to be 6 n + 2, such as 8, 14, 20 or 56")
        self.depth = depth
        super().__init__(num_labels=num_labels, **kwargs)


class CifarResNet(PreTrainedModel):
    """The residual network for 32x32 images of He et al. (arXiv 1512.03385, section 4.2), 16 to 64 channels.

    A block that changes the shape has a 1x1 convolution on its shortcut.
    """

    config_class = CifarResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        layers, channels = [_convolution(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()], 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range((config.depth - 2) // 6):
                layers.append(_Block(channels, width, stride=2 if stage and not block else 1))
                channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Computes the logits of images, and the cross-entropy where labels are given.

        Args:
            pixel_values: ``[B, 3, 32, 32]``, uint8.
            labels: class ids, ``[B]``.
        """
        # Convolutions of processors are a third faster with the channels last.
        images = NORMALISE(pixel_values).contiguous(memory_format=torch.channels_last)
        logits = self.classifier(self.body(images))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        first = _convolution(channels, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()
        self.residual = nn.Sequential(*first, _convolution(width, width, 3), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(_convolution(channels, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.residual(images) + self.shortcut(images))


def _convolution(channels: int, width: int, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, side, stride, padding=side // 2, bias=False)


class Images(torch.utils.data.Dataset):
    """Images and labels in memory.

    Args:
        split: with ``img`` and ``fine_label``.
        is_augmented: crop and flip each image at random.
    """

    def __init__(self, split: Dataset, is_augmented: bool):
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in split["img"]])
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        self.labels, self.is_augmented = split["fine_label"], is_augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        image = self.images[index]
        return {"pixel_values": AUGMENT(image) if self.is_augmented else image, "labels": self.labels[index]}


class StoredViews(torch.utils.data.Dataset):
    """Views with the teacher's logits, which a folder keeps in three arrays.

    Args:
        folder: that :func:`stored_views` wrote.
    """

    def __init__(self, folder: Path):
        self.images, self.labels, self.logits = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {
            "pixel_values": torch.from_numpy(self.images[index].copy()),
            "labels": int(self.labels[index]),
            "stored_logits": torch.from_numpy(self.logits[index].astype(np.float32)),
        }


class StoredTeacher(nn.Module):
    """A teacher whose logits are a column of the batch."""

    def forward(self, stored_logits: Tensor) -> ImageClassifierOutput:
        """Returns the logits ``[B, C]``."""
        return ImageClassifierOutput(logits=stored_logits)


@torch.no_grad()
def stored_views(teacher: CifarResNet, views: SeededViews, folder: Path) -> StoredViews:
    """Makes all views and the teacher's logits of them once, for all students.

    Args:
        teacher: in evaluation mode, on its device.
        views: of the images.
        folder: of the arrays: uint8 images, labels, and float16 logits. A whole folder is read, not made again.
    """
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        shapes = (3, 32, 32), (), (teacher.config.num_labels,)
        arrays = [
            np.lib.format.open_memmap(unfinished / f"{name}.npy", mode="w+", dtype=dtype, shape=(len(views), *shape))
            for (name, dtype), shape in zip(ARRAYS.items(), shapes, strict=True)
        ]
        done = 0
        for batch in DataLoader(views, batch_size=256):
            images, labels = batch["pixel_values"], batch["labels"]
            logits = teacher(images.to(teacher.device)).logits.cpu()
            for array, values in zip(arrays, (images, labels, logits), strict=True):
                array[done : done + len(labels)] = values
            done += len(labels)
        for array in arrays:
            array.flush()
        unfinished.rename(folder)
    return StoredViews(folder)
