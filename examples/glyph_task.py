"""The glyph task: 3,375 characters in fourteen typefaces as tensors, augmentation, and a teacher and a student."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.data import load_glyphs
from hf_dis.metrics import TopKAccuracy

LEARNING_RATE = 4e-3
AFFINE = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.85, 1.1), shear=10)
NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.15], [0.3])])
NOISE = v2.GaussianNoise(sigma=0.1, clip=False)
# Images that share one random affine map: a call for each image would take longer than the student's step.
AFFINE_GROUP = 16


def augment(images: Tensor) -> Tensor:
    """Random affine maps and noise for a batch: uint8 ``[N, 1, 32, 32]`` to normalised float."""
    moved = torch.cat([AFFINE(group) for group in images.split(AFFINE_GROUP)])
    return NOISE(NORMALISE(moved))


class GlyphImages(torch.utils.data.Dataset):
    """Images and labels in memory; a batch is fetched and augmented as a whole.

    Args:
        split: a split that :func:`hf_dis.data.load_glyphs` returned.
        transform: turns uint8 ``[N, 1, 32, 32]`` into the model's ``pixel_values``.
    """

    def __init__(self, split, transform):
        self.images = torch.from_numpy(np.stack([np.asarray(image) for image in split["image"]]))[:, None]
        self.labels = torch.tensor(split["label"])
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices)
        return {"pixel_values": self.transform(self.images[index]), "labels": self.labels[index]}


def whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The data collator for :class:`GlyphImages`, which returns whole batches."""
    return batch


def load_task() -> tuple[GlyphImages, GlyphImages, list[str]]:
    """The augmented training set, the test set of other typefaces, and the names of the classes."""
    glyphs = load_glyphs()
    names = glyphs["train"].features["label"].names
    return GlyphImages(glyphs["train"], augment), GlyphImages(glyphs["test"], NORMALISE), names


def build_model(num_classes: int, hidden_sizes: list[int], seed: int) -> ResNetForImageClassification:
    """A small ResNet for one-channel images; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=hidden_sizes,
        depths=[1] * len(hidden_sizes),
        layer_type="basic",
        num_labels=num_classes,
    )
    return ResNetForImageClassification(config).to(memory_format=torch.channels_last)


def name_classes(model: ResNetForImageClassification, names: list[str]) -> None:
    """Writes the names of the classes into a model's configuration."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}


def build_teacher(num_classes: int) -> ResNetForImageClassification:
    """The larger model."""
    return build_model(num_classes, hidden_sizes=[32, 64, 128], seed=0)


def build_student(num_classes: int, seed: int = 1) -> ResNetForImageClassification:
    """The smaller model."""
    return build_model(num_classes, hidden_sizes=[16, 32, 64], seed=seed)


def load_teacher(path: str | Path) -> ResNetForImageClassification:
    """A teacher that run_glyphs.py saved."""
    return ResNetForImageClassification.from_pretrained(path).to(memory_format=torch.channels_last)


def train_teacher(model, train_dataset: GlyphImages, epochs: float, output_dir: str) -> None:
    """Trains the teacher on the labels with the stock Trainer."""
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=256,
        dataloader_drop_last=True,
        num_train_epochs=epochs,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.2,
        weight_decay=0.05,
        logging_steps=50,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    )
    Trainer(model=model, args=args, train_dataset=train_dataset, data_collator=whole_batch).train()


def student_trainer(teacher, task, head_rate: float, teacher_cache=None, **settings) -> DISDistillationTrainer:
    """The trainer of one student, on the schedule that all methods share.

    Args:
        teacher: a trained teacher from :func:`build_teacher`.
        task: the result of :func:`load_task`.
        head_rate: the head's learning rate as a multiple of ``LEARNING_RATE``.
        teacher_cache: stored targets of the training set to train on; the teacher then only evaluates.
        **settings: fields of DISConfig; ``output_dir`` is required.
    """
    train_dataset, test_dataset, names = task
    student = build_student(len(names))
    name_classes(student, names)
    common = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 256,
        "per_device_eval_batch_size": 512,
        "dataloader_drop_last": True,
        "learning_rate": LEARNING_RATE,
        "head_learning_rate": LEARNING_RATE * head_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.2,
        "weight_decay": 0.02,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "head_mode": "sampled",
        "hard_label_weight": 0.0,
    }
    return DISDistillationTrainer(
        model=student,
        teacher_model=teacher,
        teacher_cache=teacher_cache,
        args=DISConfig(**{**common, **settings}),
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        data_collator=whole_batch,
        compute_metrics=lambda predicted: TopKAccuracy().compute(
            predictions=predicted.predictions, references=predicted.label_ids
        ),
        preprocess_logits_for_metrics=lambda logits, labels: logits.topk(5).indices,
    )
