"""Time and memory of a distillation step from two configurations: no weight is loaded and nothing is timed.

The estimate is of a device that has the kernels of Triton. It counts operations, bytes and launches.
``benchmarks/accelerator_counts.py`` counts the same for two shapes, and the constants are taken from its counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hf_dis.autotune import MARGIN
from hf_dis.errors import DataError, first_line
from hf_dis.loss.exact_head import DEVICE_BLOCK_BYTES
from hf_dis.models.head_search import find_heads
from hf_dis.models.tasks import Task, find_task, num_outputs
from hf_dis.sampler_spec import SamplerSpec
from hf_dis.teacher.targets import KERNEL_CHUNKS, chunk_items

# The mappings that a model without a named class is looked up in.
MAPPINGS = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)
# Bytes that a step reads and writes per teacher's logit: in passes of plain torch over all classes, in blocks on all
# classes, and where the logits are ranked. The last one is per feature of each row of the head that an item samples.
PLAIN_BYTES, EXACT_BYTES, RANKED_BYTES, ROW_BYTES = 165, 16, 2, 28
# Bytes held per logit. Plain autograd holds two tensors in the type of the models and four in float32. The other
# values are for a block (with the teacher's), the teacher's ranked chunk, and the sampled logits.
TENSOR_BYTES, BLOCK_HELD, CHUNK_HELD, SAMPLED_HELD = 20, 4, 4, 32
# Kernels that a step launches: the exact step and each of its blocks, and the sampled step; and seconds of a launch.
EXACT_LAUNCHES, BLOCK_LAUNCHES, SAMPLED_LAUNCHES, LAUNCH = 22, 6, 80, 5e-6
# Bytes of a parameter: in the models' type, as a gradient, in training (weight, gradient and AdamW's moments in
# float32), and what AdamW reads and writes of it.
WEIGHT, GRADIENT, TRAINED, STEPPED = 2, 4, 16, 28
# A row-sparse gradient is advised where the optimizer's pass over the head takes more than this share of a step.
LARGE_SHARE = 0.1


class Device(NamedTuple):
    """Speed that a device reaches in practice.

    Attributes:
        name: of the device.
        flops: operations per second, of matrix products in bfloat16.
        bandwidth: bytes per second, of its memory.
    """

    name: str
    flops: float
    bandwidth: float


# The data sheet has 312 TFLOP/s and 2,039 GB/s; half of the one and three quarters of the other are taken.
A100 = Device("NVIDIA A100 80GB", 156e12, 1500e9)


@dataclass(frozen=True)
class Outline:
    """Sizes of a model.

    Attributes:
        name: of the checkpoint.
        kind: name of the class.
        task: of the model.
        num_classes: width of the head.
        num_features: input of the head.
        parameters: all of them.
        body: those outside the head and the input embeddings.
        head_is_tied: the head is the input embedding.
        example_flops: of a forward of the body on one example, or None where they are 2 operations per parameter and
            token.
    """

    name: str
    kind: str
    task: Task
    num_classes: int
    num_features: int
    parameters: int
    body: int
    head_is_tied: bool
    example_flops: int | None

    def flops(self, tokens: int, examples: int) -> float:
        """Operations of a forward of the body.

        Args:
            tokens: of the batch.
            examples: of the batch.
        """
        return 2 * self.body * tokens if self.example_flops is None else self.example_flops * examples


class Cost(NamedTuple):
    """A kind of step.

    Attributes:
        head: seconds of the student's head and the loss, forward and backward.
        step: seconds of the whole step, with both bodies, the teacher's head and AdamW.
        memory: bytes of the logits and the loss.
    """

    head: float
    step: float
    memory: float


class HeadCost(NamedTuple):
    """The head and the loss of a kind of step.

    Attributes:
        seconds: of the student's head and the loss, forward and backward.
        memory: bytes of the logits and the loss.
    """

    seconds: float
    memory: float


class HeadEstimate(NamedTuple):
    """The head and the loss of the kinds of steps, as :class:`Estimate` has them."""

    tensor: HeadCost
    blocks: HeadCost
    sampled: HeadCost


class Estimate(NamedTuple):
    """The kinds of steps, and what follows.

    Attributes:
        tensor: on all classes, with [N, C] tensors as plain autograd has them.
        blocks: on all classes, in blocks, as this library computes all classes.
        sampled: on sampled classes.
        num_classes: C.
        num_items: N.
        spec: of the sampled step.
        row_sparse: a row-sparse gradient of the head is advised.
    """

    tensor: Cost
    blocks: Cost
    sampled: Cost
    num_classes: int
    num_items: int
    spec: SamplerSpec
    row_sparse: bool

    @property
    def columns(self) -> int:
        """Student logits of the sampled step per item."""
        return self.spec.num_sampled_classes + self.spec.num_shared_classes

    @property
    def sampling_pays(self) -> bool:
        """True if the head's step is faster by more than the margin of ``head_mode="auto"``, with fewer classes."""
        return self.columns < self.num_classes and self.blocks.head > MARGIN * self.sampled.head


def outline(name: str) -> Outline:
    """Reads the configuration of a model and lays the model out without weights.

    Args:
        name: of a checkpoint, on the Hub or a folder.

    Raises:
        DataError: if there is no such configuration, its model cannot be made, or its model has neither a vocabulary
            nor labels.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the config of {name!r} cannot be read: {first_line(error)}. Give the name of a model on the Hub, or a "
            "folder with a config.json of transformers"
        ) from error
    kind = _class_of(config, name)
    model = _laid_out(kind, config, name)
    try:
        task = find_task(model)
        num_classes = num_outputs(model, task)
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"the config of {name!r} is of a {kind.__name__}, which has neither a vocabulary nor labels: give a "
            "language model or a classifier"
        ) from error
    if num_classes < 1:
        raise DataError(
            f"the config of {name!r} has {num_classes} classes: num_labels or vocab_size has to be 1 or more"
        )
    heads = [model.get_submodule(head) for head in find_heads(model, num_classes)]
    embeddings = _input_embeddings(model)
    outside = {id(one) for head in heads for one in head.parameters()} | {id(one) for one in embeddings}
    return Outline(
        name,
        kind.__name__,
        task,
        num_classes,
        heads[0].weight.shape[1],
        parameters=sum(one.numel() for one in model.parameters()),
        body=sum(one.numel() for one in model.parameters() if id(one) not in outside),
        head_is_tied=any(heads[0].weight is one for one in embeddings),
        example_flops=_image_flops(model, name) if model.main_input_name == "pixel_values" else None,
    )


def _class_of(config: transformers.PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    named = (config.architectures or [None])[0]
    if named is None:
        named = next((mapping[config.model_type] for mapping in MAPPINGS if config.model_type in mapping), None)
    kind = getattr(transformers, named, None) if isinstance(named, str) else None
    if kind is None:
        raise DataError(
            f"the config of {name!r} names {named or config.model_type}, and transformers has no language model or "
            "classifier of this name: give another model, or add its class under 'architectures' in config.json"
        )
    return kind


def _laid_out(kind: type[PreTrainedModel], config: transformers.PreTrainedConfig, name: str) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # each model checks its sizes in a way of its own, or not at all
        raise DataError(
            f"the config of {name!r} describes a {kind.__name__} that cannot be made: {error}; correct its sizes, "
            "such as vocab_size"
        ) from error


def _input_embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return []
    # The patches of an image are computed, tokens are looked up.
    return list(found.parameters()) if isinstance(found, nn.Embedding) else []


def _image_flops(model: PreTrainedModel, name: str) -> int:
    """Operations of a forward on one image of the configured size, 224 where there is none."""
    size = getattr(model.config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    image = torch.empty(1, getattr(model.config, "num_channels", 3), height, width, device="meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(pixel_values=image)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise DataError(f"the operations of {name!r} cannot be counted without weights: {error}") from error
    return counter.get_total_flops()


def estimate(
    teacher: Outline, student: Outline, batch_size: int, sequence_length: int, device: Device = A100
) -> Estimate:
    """Estimates a step of a distillation with the default sizes of the sample.

    Args:
        teacher: its sizes, by :func:`outline`.
        student: its sizes, by :func:`outline`.
        batch_size: examples per step on a device.
        sequence_length: tokens of an example where the models take text.
        device: its speed.

    Raises:
        DataError: if the tasks differ, or the classes of two classifiers.
    """
    num_classes = _shared_classes(teacher, student)
    tokens = batch_size * sequence_length
    num_items = tokens if student.task.has_token_items else batch_size
    spec = SamplerSpec().resolved(vocab_size=num_classes if student.task.is_lm else None)
    sample = spec.num_sampled_classes, spec.num_shared_classes
    heads = estimate_head(num_items, num_classes, student.num_features, *sample, device)
    logits = num_items * num_classes
    common = (
        _seconds(device, teacher.flops(tokens, batch_size), WEIGHT * teacher.body)
        + _seconds(device, 2 * logits * teacher.num_features, WEIGHT * num_classes * teacher.num_features)
        + _seconds(device, 3 * student.flops(tokens, batch_size), 3 * WEIGHT * student.body)
        + STEPPED * student.parameters / device.bandwidth
    )
    costs = {name: Cost(one.seconds, common + one.seconds, one.memory) for name, one in heads._asdict().items()}
    head_pass = STEPPED * num_classes * student.num_features / device.bandwidth
    row_sparse = head_pass > LARGE_SHARE * costs["sampled"].step
    return Estimate(**costs, num_classes=num_classes, num_items=num_items, spec=spec, row_sparse=row_sparse)


def estimate_head(
    num_items: int,
    num_classes: int,
    num_features: int,
    num_sampled: int,
    num_shared: int,
    device: Device = A100,
    ranks_teacher: bool = True,
) -> HeadEstimate:
    """Estimates head and loss of a step, whose teacher's logits are already computed.

    Args:
        num_items: N.
        num_classes: C.
        num_features: d, the width of the features.
        num_sampled: K, classes that the sampled step computes for one item alone.
        num_shared: K_t, classes that it computes for all items of a tail.
        device: its speed.
        ranks_teacher: the sampled step ranks the teacher's logits; False for stored targets.
    """
    logits, head = num_items * num_classes, num_classes * num_features
    columns = min(num_classes, num_sampled + num_shared)
    flops, sampled_flops = 6 * logits * num_features, 6 * num_items * columns * num_features
    blocks = max(1, -(-logits * WEIGHT // DEVICE_BLOCK_BYTES))
    block_bytes = EXACT_BYTES * logits + blocks * (2 * WEIGHT + 2 * GRADIENT) * head  # W twice, and its sum
    rows = num_items * min(num_classes, num_sampled) * num_features
    sampled_bytes = ranks_teacher * RANKED_BYTES * logits + ROW_BYTES * rows + GRADIENT * head
    plain_bytes = PLAIN_BYTES * logits + (WEIGHT + 2 * GRADIENT) * head
    launches, block = EXACT_LAUNCHES + blocks * BLOCK_LAUNCHES, min(logits, DEVICE_BLOCK_BYTES // WEIGHT)
    chunk = min(num_items, chunk_items(num_items, num_classes, torch.device("cuda"), KERNEL_CHUNKS)) * num_classes
    held = ranks_teacher * CHUNK_HELD * chunk + SAMPLED_HELD * num_items * columns
    tensor = HeadCost(_seconds(device, flops, plain_bytes), TENSOR_BYTES * logits)
    in_blocks = HeadCost(_seconds(device, flops, block_bytes, launches), BLOCK_HELD * block)
    return HeadEstimate(
        tensor, in_blocks, HeadCost(_seconds(device, sampled_flops, sampled_bytes, SAMPLED_LAUNCHES), held)
    )


def _seconds(device: Device, flops: float, num_bytes: float, launches: int = 0) -> float:
    return max(flops / device.flops, num_bytes / device.bandwidth, launches * LAUNCH)


def _shared_classes(teacher: Outline, student: Outline) -> int:
    if teacher.task is not student.task:
        raise DataError(
            f"the teacher {teacher.name} is a {teacher.task.value}, the student {student.name} a "
            f"{student.task.value}: both have to be of one kind"
        )
    if not student.task.is_lm and teacher.num_classes != student.num_classes:
        raise DataError(
            f"the teacher {teacher.name} has {teacher.num_classes:,} classes, the student {student.name} "
            f"{student.num_classes:,}: both need the same classes; set num_labels in the config of one of them"
        )
    return min(teacher.num_classes, student.num_classes)
