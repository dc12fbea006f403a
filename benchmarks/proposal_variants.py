"""What might lower the error of the default layout at the same rows of W: knowing more, learning faster, other shares.

    python benchmarks/proposal_variants.py --teacher runs/glyphs/teacher --json proposal_variants.json
    python benchmarks/proposal_variants.py --task lm --teacher runs/clm/_teacher --json proposal_variants_lm.json

Tasks, students, steps and columns are those of estimator_error.py, whose default layouts are varied:

oracle       a density over ranks, over classes, or both that knows s - p
sketch r     the same from a rank-r approximation of the batch's logits, the best there is: no projection of the head
             to r dimensions can know more
started      the class memory starts from the teacher's class marginal instead of 1/C
counted      a class's first samples renew its memory by 1, 1/2, 1/3, then 0.3, instead of 0.3 at once
aged         what is known of classes that were not sampled is scaled as those that were sampled have changed
updates      more classes sampled, of which no more update W than are distinct in the default (num_updated_classes)
shares       other allocations of the same rows of W between ranked classes and tails; the best of them at a step is
             what an allocation by measured disagreement (Neyman) could reach

After each table: what an allocation of the ranked classes between rows in proportion to the root of their error
could save of it, were all of the error theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from estimator_error import Method, OracleProposal, glyphs, lm, run
from torch import Tensor

from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.sampling.proposal import DISProposal
from hf_dis.sampling.sample import ClassSample, Statistics
from hf_dis.teacher.targets import TeacherTargets

MEMORIES = ("started", "counted", "started and counted", "aged", "renewed faster")


class KnowingProposal(DISProposal):
    """DIS that is told s - p, or an approximation of it, where it samples: over ranks, over classes, or both."""

    def __init__(self, of: DISProposal, knows: str):
        super().__init__(of.num_classes, of.num_ranks, of.num_ranks, of.floor, of.memory.decay)
        self.knows, self.oracle = knows, OracleProposal(of.num_classes, of.num_ranks, of.num_ranks)

    def look(self, signal: Tensor, targets: TeacherTargets) -> None:
        self.oracle.look(signal, targets)

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        return super().rank_density(targets) if self.knows == "tail" else self.oracle.rank_density(targets)

    def class_density(self) -> Tensor:
        return super().class_density() if self.knows == "ranks" else self.oracle.class_density()


class VariedMemory(ClassMemory):
    """A class memory that starts elsewhere, or learns at another pace."""

    def __init__(self, num_classes: int, decay: float, how: str):
        super().__init__(num_classes, decay)
        self.how = how
        self.times_drawn = torch.zeros(num_classes)
        self.is_new = True

    def update(self, statistics: Statistics) -> None:
        if self.is_new and "started" in self.how:
            self.squared_signal += (statistics["class_mass"] / statistics["rows"]).float().square()
        self.is_new = False
        tail = statistics["tail"].coalesce()
        ids, (squared, rows) = tail.indices()[0], tail.values().unbind(1)
        known = self.squared_signal[ids]
        super().update(statistics)
        mean = torch.where(rows > 0, squared / rows.clamp_min(1), known)
        if "faster" in self.how:
            self.squared_signal[ids] = known.lerp(mean, 0.6)
        if "counted" in self.how:
            self.times_drawn[ids] += (rows > 0).float()
            renewal = (1 / self.times_drawn[ids].clamp_min(1)).clamp_min(self.RENEWAL)
            self.squared_signal[ids] = known.lerp(mean, renewal)
        if "aged" in self.how:
            sampled = self.squared_signal[ids]
            change = (squared / rows.clamp_min(1)).sqrt().sum() / known[rows > 0].sqrt().sum()
            self.squared_signal *= change**2
            self.squared_signal[ids] = sampled


@dataclass
class Variant(Method):
    """A layout with a proposal that is not in the library; ``proposal`` is what the table calls it.

    ``knows``: what it is told of s - p; ``rank``: by way of an approximation of the logits of that rank; ``memory``:
    how the class memory is varied.
    """

    knows: str = ""
    rank: int = 0
    memory: str = ""

    def build(self, num_classes: int) -> None:
        self.drawer = self.sampler_of(num_classes, "dis")
        fitted = self.drawer.proposal
        if self.knows:
            self.drawer.proposal = KnowingProposal(fitted, self.knows)
        if self.memory:
            fitted.memory = VariedMemory(num_classes, fitted.memory.decay, self.memory)

    def sample(self, teacher_logits: Tensor, signal: Tensor, temperature: float) -> ClassSample:
        targets = TeacherTargets(teacher_logits, temperature, self.drawer.rank_depth)
        if self.knows:
            teacher = (teacher_logits / temperature).softmax(1)
            if self.rank:
                signal = approximated(signal + teacher, self.rank) - teacher
            self.drawer.proposal.look(signal, targets)
        return self.drawer.sample([targets])

    def learn(self, teacher_logits: Tensor, logits: Tensor, temperature: float) -> None:
        if self.knows == "both":
            return
        student, teacher = ((values / temperature).softmax(1) for values in (logits, teacher_logits))
        self.learn_from(self.sample(teacher_logits, student - teacher, temperature), logits, temperature)


def approximated(probabilities: Tensor, rank: int) -> Tensor:
    """Softmax of the best approximation of the logits by a matrix of a rank, rows and columns centred."""
    logits = probabilities.clamp_min(1e-30).log()
    logits = logits - logits.mean(1, keepdim=True)
    mean = logits.mean(0)
    left, values, right = torch.svd_lowrank(logits - mean, rank, niter=4)
    return (mean + left * values @ right.T).softmax(1)


def variants(default: tuple[int, ...], others: list[tuple[int, ...]]) -> list[Method]:
    """The default layout (K, K_t, m, G), what is tried of it, and other layouts, with U where it is given."""
    knowing = [Variant("oracle, both", "pps", *default, knows="both")]
    if default[0] < default[2]:  # else the ranked classes are certain, whatever the density over ranks
        knowing += [
            Variant(f"oracle, over {name}", "pps", *default, knows=knows)
            for knows, name in (("ranks", "ranks"), ("tail", "classes"))
        ]
    knowing += [Variant(f"sketch {rank}", "pps", *default, knows="both", rank=rank) for rank in (4, 16)]
    memories = [Variant(f"memory {how}", "pps", *default, memory=how) for how in MEMORIES]
    return [Method("dis", "pps", *default), *knowing, *memories, *(Method("dis", "pps", *layout) for layout in others)]


# 6,144 sampled classes for the 128 glyphs, of which some 2,900 are distinct (U = 22: 2,816), and 12,288 for 512 tokens.
LAYOUTS = {
    "glyphs": variants(
        (32, 512, 64, 4),
        [
            (32, 256, 64, 8),
            (32, 1024, 64, 2),
            (24, 768, 48, 4),
            (16, 1024, 32, 4),
            (40, 256, 80, 4),
            (44, 128, 88, 4),
            (32, 512, 128, 4),
            (48, 512, 96, 4, 22),
            (64, 512, 128, 4, 22),
            (64, 1024, 128, 4, 22),
        ],
    ),
    "lm": variants(
        (16, 1024, 16, 4),
        [
            (8, 2048, 8, 4),
            (20, 512, 20, 4),
            (16, 512, 16, 8),
            (16, 2048, 16, 2),
            (16, 1024, 32, 4),
        ],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["glyphs", "lm"], default="glyphs")
    parser.add_argument("--teacher", type=Path, required=True, help="saved by run_glyphs.py or run_clm.py")
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    task = {"glyphs": glyphs, "lm": lm}[arguments.task](arguments)
    steps = tuple(step for step in task.steps if arguments.task == "glyphs" or step <= 80)
    task = replace(task, methods=LAYOUTS[arguments.task], steps=steps)
    task.teacher.eval()
    records = run(task)
    for step in task.steps:
        default = next(record for record in records if record["step"] == step)
        print(f"step {step}: an allocation between rows could save {default['between_rows']:.0%} of the error")
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
