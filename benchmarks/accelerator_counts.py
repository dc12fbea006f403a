"""Counts what a step launches, waits for, moves and holds on an accelerator, without one; prints a table.

    python benchmarks/accelerator_counts.py --json counts.jsonl

A step is the head's: teacher's targets, sample, student's head, loss, backward, clipping and optimizer. The bodies of
student and teacher are an embedding and a layer norm, whose few launches count and whose bytes do not. Shapes, on
fake CUDA tensors (benchmarks/fake_cuda.py): ``lm`` has 8,192 tokens, 151,936 classes and 2,048 features,
``classifier`` 1,024 examples, 1,000,000 classes and 512 features. The teacher's logits are given, stored in a cache,
or computed by a teacher of the same width. Head modes are ``sampled``, with row-sparse gradients of the head, and
``exact``, with dense ones. A row-sparse gradient is taken to have 16 rows per item. Dense parameters are stepped by
torch's fused AdamW. ``--operations`` prints what each operation moves.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from fake_cuda import Counts, fake_cuda
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_dis import DISArguments, DISLoss, RowSparseAdamW, build_distiller, make_sampler
from hf_dis.distiller import Distiller
from hf_dis.head.row_gradients import clip_grad_norm_
from hf_dis.loss.exact_head import exact_head_loss
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.teacher.cached import TARGETS, CachedTeacher
from hf_dis.teacher.compact import TargetLayout


@dataclass(frozen=True)
class Shape:
    """A head step: items, classes, features, and the sample of the defaults."""

    name: str
    num_items: int
    num_classes: int
    num_features: int
    is_lm: bool

    @property
    def vocab_size(self):
        return self.num_classes if self.is_lm else None

    @property
    def spec(self):
        return DISArguments(row_sparse_head=True).sampler_spec().resolved(vocab_size=self.vocab_size, row_sparse=True)


SHAPES = {
    "lm": Shape("lm", 8192, 151_936, 2048, True),
    "classifier": Shape("classifier", 1024, 1_000_000, 512, False),
}
TARGETS_KINDS = ("given", "cached", "online")
KERNELS = ("torch", "triton")
MODES = ("sampled", "exact")
# Operations of the bodies, which stand for those of a model.
BODY = {"embedding", "native_layer_norm", "native_layer_norm_backward"}
BODY_PLACES = ("outside", "models/head_features.py")
TOKENS = 128  # of a sequence; the number of sequences follows from the items


@contextmanager
def head_is_known(name: str) -> Iterator[None]:
    """The search for the head refuses a weight that is not a plain parameter, as a fake one is not."""
    with (
        mock.patch("hf_dis.build.find_head_layers", lambda *args: (name,)),
        mock.patch("hf_dis.build.check_row_sparse_head", lambda *args: None),
    ):
        yield


class Embedded(nn.Module):
    """The least body of a language model: a frozen embedding and a layer norm."""

    def __init__(self, num_classes: int, num_features: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(num_classes, num_features)
        self.embed_tokens.requires_grad_(False)  # its gradient would be larger than all that the head needs
        self.norm = nn.LayerNorm(num_features, bias=False)

    def forward(self, input_ids: Tensor, **others: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.norm(self.embed_tokens(input_ids)))


def bodiless(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """A language model with the least body."""
    config = LlamaConfig(
        vocab_size=shape.num_classes,
        hidden_size=shape.num_features,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
            model.model = Embedded(shape.num_classes, shape.num_features)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def of_given(shape: Shape, counts: Counts, row_sparse: bool, mode: str) -> dict[str, float]:
    """A step of DISLoss, or of the loss on all classes, with the teacher's logits given in bfloat16."""
    features = torch.empty(shape.num_items, shape.num_features, device="cuda", requires_grad=True)
    weight = nn.Parameter(torch.empty(shape.num_classes, shape.num_features, device="cuda"))
    logits = torch.empty(shape.num_items, shape.num_classes, device="cuda", dtype=torch.bfloat16)
    labels = torch.empty(shape.num_items, dtype=torch.long, device="cuda")
    sampler = make_sampler(shape.num_classes, shape.spec, device="cuda")
    dis_loss = DISLoss(sampler, row_sparse_head=row_sparse)
    dis_loss._has_checked_values = True  # a look at made-up values would find what is not there
    optimizer = optimizer_of([weight], mode)
    for _ in range(2):  # the first step makes the moments
        counts.start()
        with torch.autocast("cuda", torch.bfloat16):
            if mode == "exact":
                loss = exact_head_loss(features, weight, None, lambda: [logits], labels, 1.0, 0.5)[0].mean()
            else:
                loss = dis_loss(features, weight, None, logits, labels)
        measured = measure(counts, loss, weight, mode)
        finish([weight], optimizer)
        features.grad = None
    return measured


def of_student(shape: Shape, counts: Counts, row_sparse: bool, targets: str, mode: str) -> dict[str, float]:
    """A step of a Distiller, with a teacher beside the student or a cache of its targets."""
    student = bodiless(shape, torch.float32).train()
    teacher = bodiless(shape, torch.bfloat16) if targets == "online" else bodiless(tiny(shape), torch.bfloat16)
    distiller = distiller_of(student, teacher, shape, row_sparse, targets, mode)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(parameters, mode)
    batch, positions = batch_of(shape, distiller)
    options = {"check_values": False, "positions": positions, "holds_logits": False}
    for _ in range(2):
        counts.start()
        with torch.autocast("cuda", torch.bfloat16), distiller.step(batch, **options) as step:
            loss, _ = step.loss(student(**step.inputs))
            measured = measure(counts, loss.sum() / shape.num_items, student.lm_head.weight, mode)
        finish(parameters, optimizer)
    return measured


def measure(counts: Counts, loss: Tensor, weight: nn.Parameter, mode: str) -> dict[str, float | dict[str, float]]:
    """Runs backward; the peak beyond the gradient of W, and the bytes moved by the loss and the head, in GB.

    The bytes are those of all operations, and of each name of an operation.
    """
    forward = counts.peak() if mode == "sampled" else 0  # an exact forward computes the gradient of W
    loss.backward()
    rows = counts.sizes["tolist"][0] if weight.grad.is_sparse else len(weight)  # a fake sparse tensor holds nothing
    peak = max(forward, counts.peak() - rows * weight[0].nbytes)
    of_body = {key for key in counts.moved if key[1] in BODY and key[0].split(":")[0] in BODY_PLACES}
    operations = Counter()
    for key, number in counts.moved.items():
        if key not in of_body:
            operations[key[1]] += number
    return {
        "peak_gb": round(peak / 1e9, 3),
        "moved_gb": round(operations.total() / 1e9, 2),
        "operations": {name: round(number / 1e9, 3) for name, number in operations.most_common()},
    }


def tiny(shape: Shape) -> Shape:
    return Shape(shape.name, shape.num_items, shape.num_classes, 8, shape.is_lm)


def distiller_of(
    student: nn.Module, teacher: nn.Module, shape: Shape, row_sparse: bool, targets: str, mode: str
) -> Distiller:
    # The model is a language model for both shapes: the sample is that of the shape.
    names = ("num_sampled_classes", "num_shared_classes", "num_tails", "num_updated_classes", "rank_depth")
    sizes = {} if targets == "cached" or mode == "exact" else {name: getattr(shape.spec, name) for name in names}
    settings = DISArguments(head_mode=mode, row_sparse_head=row_sparse, **sizes)
    with head_is_known("lm_head"):
        distiller = build_distiller(student, teacher, settings, device=torch.device("cuda", 0))
    distiller._head_is_checked = distiller._splits = True
    for stream in (distiller.student_stream, distiller.online_teacher.stream):
        stream._head, stream._is_compared = stream.model.lm_head, True
    if targets == "cached":
        layout = TargetLayout.within(60 if shape.is_lm else 300, shape.num_classes, 2 if shape.is_lm else 32)
        spec = settings.sampler_spec().resolved(
            vocab_size=shape.vocab_size, row_sparse=row_sparse, stored_sample_size=layout.sample_size
        )
        distiller.sampler = make_cached_sampler(layout, spec, device="cuda")
        distiller.teacher = CachedTeacher(layout, "")
    return distiller


def batch_of(shape: Shape, distiller: Distiller) -> tuple[dict[str, Tensor], Tensor]:
    """Sequences supervised from their second token on, and the places of the items, as a Trainer has them."""
    ids = torch.ones(shape.num_items // TOKENS, TOKENS + 1, dtype=torch.long, device="cuda")
    batch = {"input_ids": ids, "labels": ids.clone()}
    if isinstance(distiller.teacher, CachedTeacher):
        size = distiller.teacher.layout.item_bytes
        batch[TARGETS] = torch.empty(len(ids), TOKENS, size, dtype=torch.uint8, device="cuda")
    return batch, torch.empty(shape.num_items, dtype=torch.long, device="cuda")


def optimizer_of(parameters: list[nn.Parameter], mode: str) -> torch.optim.Optimizer:
    """AdamW with the defaults of ``TrainingArguments``, which decays no weight."""
    kind = torch.optim.AdamW if mode == "exact" else RowSparseAdamW
    return kind(parameters, weight_decay=0.0, fused=True)


def finish(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def count(
    shape: Shape, targets: str, row_sparse: bool = True, kernels: str = "torch", mode: str = "sampled"
) -> dict[str, str | int | float | dict[str, float]]:
    """The counts of one step in its steady state, as a record.

    Args:
        shape: one of ``SHAPES``.
        targets: one of ``TARGETS_KINDS``.
        row_sparse: give the head a row-sparse gradient; without effect in exact mode.
        kernels: ``"torch"`` or ``"triton"``.
        mode: one of ``MODES``.
    """
    unique = min(shape.num_classes, shape.num_items * 16)
    contributions = shape.num_items * (shape.spec.num_sampled_classes + 1)
    sizes = {"tolist": [unique, contributions]}
    obstacle = None if kernels == "triton" else "only torch is counted"
    with mock.patch("hf_dis.kernels.obstacle", lambda device: obstacle), fake_cuda(sizes) as counts:
        if targets == "given":
            measured = of_given(shape, counts, row_sparse, mode)
        else:
            measured = of_student(shape, counts, row_sparse and mode == "sampled", targets, mode)
        return {
            "shape": shape.name,
            "targets": targets,
            "mode": mode,
            "kernels": kernels,
            "launches": sum(counts.launches.values()),
            "waits": sum(counts.waits.values()),
            **measured,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="Append the records to this file, one per line.")
    parser.add_argument("--operations", action="store_true", help="Print the GB of each operation, too.")
    arguments = parser.parse_args()
    names = ("shape", "targets", "mode", "kernels", "launches", "waits", "peak_gb", "moved_gb")
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for shape in SHAPES.values():
        for targets, mode, kernels in product(TARGETS_KINDS, MODES, KERNELS):
            record = count(shape, targets, kernels=kernels, mode=mode)
            print("| " + " | ".join(str(record[name]) for name in names) + " |", flush=True)
            if arguments.operations:
                print(", ".join(f"{name} {size}" for name, size in record["operations"].items() if size > 0.02))
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps({**record, "sample": asdict(shape.spec)}) + "\n")


if __name__ == "__main__":
    main()
