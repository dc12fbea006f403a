"""The maths of the demo: the answers of a teacher and its student, and the error of a sampled gradient by budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.models.head_features import head_features
from hf_dis.models.head_search import find_head
from hf_dis.teacher.targets import TeacherTargets

# Height and width of an image, and its normalisation, as NORMALISE of examples/glyph_task.py has it.
SIZE, MEAN, SPREAD = 32, 0.15, 0.3
TEMPERATURE = 2.0
# Samples that the error is a mean of, batches that the proposal is fitted to before, and items of a batch.
REPEATS, FITTED, BATCH = 64, 4, 24
MAKE_GLYPHS = "make demo"
MAKE_TEXT = "accelerate launch --num_processes 1 examples/run_clm.py --output_dir runs/clm"


class Item(NamedTuple):
    """Items, and the answers of both models to them.

    Attributes:
        features: input of the student's head, ``[N, d]``.
        teacher: logits, ``[N, C]``.
        student: logits, ``[N, C]``.
    """

    features: Tensor
    teacher: Tensor
    student: Tensor

    def last(self) -> Item:
        """The last item alone."""
        return Item(*(values[-1:] for values in self))


class Budget(NamedTuple):
    """A sample of classes for one item, and the error of its gradient.

    Attributes:
        ranks: of the sampled classes in the teacher's order, ``[K]``; 0 is the likeliest class.
        classes: their ids, ``[K]``.
        certain: true where the class is in every sample, ``[K]``.
        error: ‖ĝ - g‖ / ‖g‖ of the gradient on the head's input, as a root mean square over samples; 0 or more.
        num_features: d.
    """

    ranks: Tensor
    classes: Tensor
    certain: Tensor
    error: float
    num_features: int

    @property
    def products(self) -> int:
        """Multiplications of the student's head for the item, forward and backward."""
        return 3 * len(self.classes) * self.num_features


@dataclass
class Glyphs:
    """A teacher and its student for images of characters, and some images.

    Attributes:
        teacher, student: the models.
        names: of the classes, such as ``U+0041``.
        examples: files of images.
        asked: the examples, to which the proposal is fitted.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    names: list[str]
    examples: list[Path]
    asked: Item

    @staticmethod
    def load(folder: Path) -> Glyphs:
        """Loads what ``make demo`` saved.

        Args:
            folder: with the folders ``teacher``, ``dis`` and ``examples``.

        Raises:
            FileNotFoundError: if a part is missing; names the command that makes the parts.
        """
        examples = sorted((folder / "examples").glob("*.png"))
        missing = [name for name in ("teacher", "dis") if not (folder / name / "config.json").is_file()]
        if missing or not examples:
            names = ", ".join([*missing, *([] if examples else ["examples"])])
            raise FileNotFoundError(
                f"{folder} has no trained student: {names} missing. Run `{MAKE_GLYPHS}` first, which takes some "
                "minutes, or name the folder of a run with --folder"
            )
        teacher, student = (
            AutoModelForImageClassification.from_pretrained(folder / name) for name in ("teacher", "dis")
        )
        names = [student.config.id2label[number] for number in range(student.config.num_labels)]
        images = np.stack([np.asarray(Image.open(path).convert("L")) for path in examples])
        return Glyphs(teacher.eval(), student.eval(), names, examples, _asked(teacher, student, _pixels(images)))

    def ask(self, image: np.ndarray) -> Item:
        """Asks both models for a character.

        Args:
            image: ink from 0 to 255, uint8 ``[32, 32]``.
        """
        return _asked(self.teacher, self.student, _pixels(image[None]))

    def label(self, number: int) -> str:
        """The character of a class, and its name where it is a code point."""
        name = self.names[number]
        return f"{chr(int(name[2:], 16))} {name}" if name.startswith("U+") else name


@dataclass
class Texts:
    """A teacher and its student that continue a text.

    Attributes:
        teacher, student: the models.
        tokenizer: of both.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @staticmethod
    def load(folder: Path) -> Texts:
        """Loads what ``examples/run_clm.py`` saved.

        Args:
            folder: its ``output_dir``, with the student and the folder ``_teacher``.

        Raises:
            FileNotFoundError: if a part is missing; names the command that makes the parts.
        """
        for part in (folder, folder / "_teacher"):
            if not (part / "config.json").is_file():
                raise FileNotFoundError(
                    f"{folder} has no trained student of text: {part / 'config.json'} is missing. Run `{MAKE_TEXT}`, "
                    "or name the folder of a run with --text_folder"
                )
        teacher, student = (AutoModelForCausalLM.from_pretrained(part) for part in (folder / "_teacher", folder))
        return Texts(teacher.eval(), student.eval(), AutoTokenizer.from_pretrained(folder))

    def ask(self, text: str) -> Item:
        """Asks both models for the token that follows each token of a text.

        Args:
            text: of one token or more; the last 256 tokens count.

        Raises:
            ValueError: if the text is empty.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][-256:]
        if not ids:
            raise ValueError("the text is empty: type a word or more")
        return _asked(self.teacher, self.student, {"input_ids": torch.tensor([ids])})

    def label(self, number: int) -> str:
        """A token as text, with its spaces visible."""
        return repr(self.tokenizer.decode([number]))


@torch.no_grad()
def _asked(teacher: PreTrainedModel, student: PreTrainedModel, inputs: dict[str, Tensor]) -> Item:
    head = find_head(student, student.config.vocab_size if "input_ids" in inputs else student.config.num_labels)
    features = head_features(student, student.get_submodule(head), inputs)
    values = features, teacher(**inputs).logits, student(**inputs).logits
    return Item(*(value.flatten(0, -2).float() for value in values))


def _pixels(images: np.ndarray) -> dict[str, Tensor]:
    return {"pixel_values": (torch.from_numpy(np.array(images)).float()[:, None] / 255 - MEAN) / SPREAD}


def drawn(ink: np.ndarray) -> np.ndarray:
    """Makes the image of a model from a sketch.

    Args:
        ink: from 0 to 255, uint8 ``[H, W]``.

    Returns:
        uint8 ``[32, 32]``, each pixel the mean of its part of the sketch.

    Raises:
        ValueError: if there is no ink.
    """
    if not ink.any():
        raise ValueError("the sketch is empty: draw a character, or choose an example")
    return np.asarray(Image.fromarray(ink).resize((SIZE, SIZE), Image.Resampling.BOX))


def head_of(student: PreTrainedModel, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a student's head, without gradient.

    Args:
        student: the model.
        num_classes: C.
    """
    layer = student.get_submodule(find_head(student, num_classes))
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def measure(student: PreTrainedModel, item: Item, fitting: Item, num_sampled: int, seed: int = 0) -> Budget:
    """Samples classes for an item, and measures the error of the sampled gradient.

    Args:
        student: the model.
        item: one item.
        fitting: items that the proposal is fitted to before.
        num_sampled: K >= 1; more than all classes count as all.
        seed: of the samples.
    """
    num_classes = item.teacher.shape[1]
    head = head_of(student, num_classes)
    spec = SamplerSpec(num_sampled_classes=min(num_sampled, num_classes), num_shared_classes=0, rank_depth=num_classes)
    sampler = make_sampler(num_classes, spec, seed=seed)
    loss = DISLoss(sampler, TEMPERATURE, hard_label_weight=0.0)
    for _ in range(FITTED):
        loss(fitting.features[-BATCH:], *head, fitting.teacher[-BATCH:])
    with torch.no_grad():
        targets = TeacherTargets(item.teacher, TEMPERATURE, sampler.rank_depth)
        sample = sampler.sample([targets])
    many = _gradients(loss, item, head, REPEATS)
    exact = _gradients(exact_loss(num_classes), item, head, 1)
    error = (many - exact).square().sum(1).mean().sqrt() / exact.norm().clamp_min(1e-12)
    return Budget(sample.ranks[0], sample.item_ids[0], sample.certain[0], float(error), head[0].shape[1])


def exact_loss(num_classes: int) -> DISLoss:
    """The loss whose sample is all classes.

    Args:
        num_classes: C.
    """
    spec = SamplerSpec(num_sampled_classes=num_classes, num_shared_classes=0, rank_depth=num_classes)
    return DISLoss(make_sampler(num_classes, spec), TEMPERATURE, hard_label_weight=0.0)


def _gradients(loss: DISLoss, item: Item, head: tuple[Tensor, Tensor | None], repeats: int) -> Tensor:
    """Gradients on the head's input of as many samples, ``[repeats, d]``."""
    features = item.features.repeat(repeats, 1).requires_grad_()
    (repeats * loss(features, *head, item.teacher.repeat(repeats, 1))).backward()
    return features.grad
