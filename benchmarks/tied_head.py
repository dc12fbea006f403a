"""Time and memory of a training step of a student whose head is tied to its embedding, at the shape of Gemma-3-270M.

    python benchmarks/tied_head.py --json tied_head.json

The student is a Gemma 3 with random weights: d = 640, 18 layers, 262,144 tokens, 268 M parameters, of which the
embedding has 168 M. The teacher is a Gemma 3 of 64 features and 2 layers with the same vocabulary, so that its own
answers cost little beside the student's step. A step is the whole one of a loop: teacher, student, loss, backward and
optimizer. Methods, stepped in turn, each with a student and an optimizer of its own:

exact             every logit, in blocks from the head's input; dense AdamW
dis, dense        sampled classes, a dense gradient of the tied weight; dense AdamW
dis, row-sparse   sampled classes, a gradient of the rows of sampled classes and input tokens; RowSparseAdamW

All have the default layout, and no hard labels. seconds is the median of a step, ratio that of exact to the method's.
peak_mb is the most memory that a step takes beyond weights, moments and dense gradients. On a processor it is measured
on Linux only.
"""

from __future__ import annotations

import gc
import statistics

import torch
from common import header, machine, parse, parser, row, write
from timing import peak_memory, stopwatch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.utils import logging

from hf_dis import DISArguments, Distiller, RowSparseAdamW, build_distiller
from hf_dis.distributed import average_rows

SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "head_dim": 256,
}
TEACHER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 64,
}
METHODS = {
    "exact": {"head_mode": "exact"},
    "dis, dense": {"head_mode": "sampled"},
    "dis, row-sparse": {"head_mode": "sampled", "row_sparse_head": True},
}
VOCABULARY, LENGTH = 262_144, 128


def gemma(sizes: dict[str, int], seed: int) -> Gemma3ForCausalLM:
    """A student or teacher with random weights; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **sizes))


class Training:
    """The training of one student by one method."""

    def __init__(self, method: str, teacher: Gemma3ForCausalLM, device: torch.device):
        self.student = gemma(SHAPE, 0).to(device).train()
        settings = DISArguments(hard_label_weight=0.0, temperature=1.0, **METHODS[method])
        self.distiller: Distiller = build_distiller(self.student, teacher, settings)
        kind = RowSparseAdamW if settings.row_sparse_head else torch.optim.AdamW
        self.optimizer = kind(self.student.parameters(), lr=1e-4, fused=True)

    def step(self, ids: torch.Tensor) -> None:
        """One step: teacher, student, loss, backward, optimizer."""
        with self.distiller.step({"input_ids": ids, "labels": ids}, holds_logits=False) as step:
            losses, _ = step.loss(self.student(**step.inputs))
            losses.mean().backward()
        if self.distiller.row_sparse:
            average_rows(self.distiller.head.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Bytes of the dense gradients that the optimizer gets."""
        tied = self.student.lm_head.weight
        whole = sum(one.numel() * one.element_size() for one in self.student.parameters())
        return whole - self.distiller.row_sparse * tied.numel() * tied.element_size()


def measure(methods: list[str], tokens: int, steps: int, device: torch.device) -> list[dict]:
    """Records of the methods at a number of tokens per step."""
    teacher = gemma(TEACHER, 1).eval().to(device)
    trainings = {method: Training(method, teacher, device) for method in methods}
    generator = torch.Generator().manual_seed(0)
    watch, times, peaks = stopwatch(device), {method: [] for method in methods}, {}
    for number in range(steps + 2):  # the first makes the moments, the second touches further pages
        ids = torch.randint(VOCABULARY, (tokens // LENGTH, LENGTH), generator=generator).to(device)
        for method, training in trainings.items():
            gc.collect()
            peak = peak_memory(device)
            milliseconds = watch.milliseconds(lambda training=training, ids=ids: training.step(ids))
            if number > 1:
                times[method].append(milliseconds)
                peaks[method] = None if peak is None else peak.megabytes() - training.held_bytes() / 2**20
    medians = {method: statistics.median(values) for method, values in times.items()}
    return [
        {
            "method": method,
            "tokens": tokens,
            "seconds": medians[method] / 1000,
            "ratio": medians["exact"] / medians[method] if "exact" in medians else None,
            "peak_mb": peaks[method],
        }
        for method in methods
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--methods", choices=list(METHODS), nargs="+", default=list(METHODS))
    made.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="per step, multiples of 128")
    made.add_argument("--steps", type=int, default=5, help="per method, that count")
    arguments = parse(made)
    logging.set_verbosity_error()
    print(machine(arguments.device))
    print(header("tokens", "method", "seconds", "exact / method", "peak MB"))
    records = []
    for tokens in arguments.tokens:
        for record in measure(arguments.methods, tokens, arguments.steps, arguments.device):
            records.append(record)
            ratio = None if record["ratio"] is None else f"{record['ratio']:.2f}"
            peak = None if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
            print(row(f"{tokens:,}", record["method"], f"{record['seconds']:.2f}", ratio, peak), flush=True)
    write(records, arguments.json, arguments.device)


if __name__ == "__main__":
    main()
