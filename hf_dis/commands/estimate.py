"""``hf-dis estimate``: time and memory of a distillation from two configurations, and whether sampling pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_dis.checks import require
from hf_dis.commands.parsing import CommandParser
from hf_dis.estimate import A100, TRAINED, WEIGHT, Cost, Device, Estimate, Outline, estimate, outline

DESCRIPTION = "Estimate time and memory from the configs of teacher and student, without loading weights."


@dataclass
class EstimateArguments:
    """Arguments of ``hf-dis estimate``.

    Raises:
        ValueError: if a number is not above 0.
    """

    teacher: str = field(metadata={"help": "Name or folder of the teacher; only its config is read."})
    student: str = field(metadata={"help": "Name or folder of the student; only its config is read."})
    batch_size: int = field(default=8, metadata={"help": "Examples per step on a device."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens of an example, for models of text."})
    tflops: float = field(
        default=A100.flops / 1e12,
        metadata={"help": f"TFLOP/s that the device reaches; by default half of the data sheet of {A100.name}."},
    )
    bandwidth: float = field(
        default=A100.bandwidth / 1e9,
        metadata={"help": "GB/s that its memory reaches; by default three quarters of that data sheet."},
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "tflops", "bandwidth"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")


def run(argv: Sequence[str]) -> None:
    """Prints the estimate.

    Args:
        argv: the words after ``hf-dis estimate``.

    Raises:
        ValueError: if an argument or a config cannot be used.
    """
    arguments, _ = CommandParser(EstimateArguments, "hf-dis estimate", DESCRIPTION).parse(argv)
    device = Device("the device", arguments.tflops * 1e12, arguments.bandwidth * 1e9)
    teacher, student = outline(arguments.teacher), outline(arguments.student)
    found = estimate(teacher, student, arguments.batch_size, arguments.sequence_length, device)
    print("\n".join(described(teacher, student, found, arguments)))


def described(teacher: Outline, student: Outline, found: Estimate, arguments: EstimateArguments) -> list[str]:
    """The lines of an estimate.

    Args:
        teacher, student: the models.
        found: the estimate.
        arguments: of the command.
    """
    unit = "tokens" if student.task.has_token_items else "examples"
    lines = [
        f"teacher   {teacher.name}: {_model(teacher)}",
        f"student   {student.name}: {_model(student)}",
        f"step      {found.num_items:,} {unit}, {found.num_classes:,} classes; "
        f"{found.columns:,} student logits per item are sampled",
        "",
        f"{'':24}{'head and loss':>15}{'whole step':>15}{'logits and loss':>17}",
        _row("exact, one tensor", found.tensor),
        _row("exact, in blocks", found.blocks),
        _row("sampled", found.sampled),
        "",
        _verdict(found),
        f"Use: DISConfig({_arguments(found)})",
    ]
    if teacher.num_classes != student.num_classes:
        lines.append(
            f"Note: the vocabularies have {teacher.num_classes:,} and {student.num_classes:,} entries; pass both "
            "tokenizers to the trainer, which compares them."
        )
    weights = _bytes(WEIGHT * teacher.parameters), _bytes(TRAINED * student.parameters)
    return [
        *lines,
        "",
        f"Assumed: {arguments.tflops:g} TFLOP/s and {arguments.bandwidth:g} GB/s reached (--tflops, --bandwidth), "
        "bfloat16 products, dense AdamW in float32,",
        "2 operations per parameter and token in a body of text, counted ones for images, kernels of Triton.",
        f"Besides: {weights[0]} for the teacher's weights, {weights[1]} for the student's weights, gradients and "
        "AdamW, and the activations of the student.",
        'The estimate can be wrong by a factor of two: head_mode="auto" times both steps on your device.',
    ]


def _model(model: Outline) -> str:
    tied = ", tied to the embeddings" if model.head_is_tied else ""
    return (
        f"{model.kind}, {model.parameters / 1e6:,.4g} M parameters, head of {model.num_classes:,} x "
        f"{model.num_features:,}{tied}"
    )


def _row(name: str, cost: Cost) -> str:
    return f"{name:24}{1000 * cost.head:>12,.3g} ms{1000 * cost.step:>12,.4g} ms{_bytes(cost.memory):>17}"


def _verdict(found: Estimate) -> str:
    if found.columns >= found.num_classes:
        return "Sampling does not pay: there are no more classes than the step would sample."
    head, step = found.blocks.head / found.sampled.head, found.blocks.step / found.sampled.step
    saved = f"the head and the loss are {head:.2g} times as fast as in blocks, a whole step {step:.3g} times"
    return f"Sampling pays: {saved}." if found.sampling_pays else f"Sampling does not pay: {saved}."


def _arguments(found: Estimate) -> str:
    if not found.sampling_pays:
        return 'head_mode="exact"'
    spec = found.spec
    chosen = (
        f'head_mode="sampled", num_sampled_classes={spec.num_sampled_classes}, '
        f"num_shared_classes={spec.num_shared_classes}, num_tails={spec.num_tails}"
    )
    return f"{chosen}, row_sparse_head=True" if found.row_sparse else chosen


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.3g} GB" if number >= 1e8 else f"{number / 1e6:,.3g} MB"
