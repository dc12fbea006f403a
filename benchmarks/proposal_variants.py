"""Variants of the default layout at the same rows of W: proposals that know more or learn faster, other shares.

    python benchmarks/proposal_variants.py --teacher runs/glyphs/teacher --json proposal_variants.json
    python benchmarks/proposal_variants.py --task lm --teacher runs/clm/_teacher --json proposal_variants_lm.json

Tasks, students, steps, columns and --device are those of estimator_error.py. The default layouts are varied:

oracle       a density over ranks, over classes, or both, computed from s - p
sketch r     the same from the best rank-r approximation of the batch's logits; no projection of the head to r
             dimensions can know more
started      the class memory starts from the teacher's class marginal instead of 1/C
counted      a class's first samples renew its memory by 1, 1/2, 1/3, then 0.3, instead of 0.3 at once
aged         the memory of classes that were not sampled is scaled by the change of the sampled ones
updates      more classes sampled; no more update W than are distinct in the default (num_updated_classes)
shares       other allocations of the same rows of W between ranked classes and tails. The best one at a step is the
             limit of an allocation by the measured signal (Neyman)

After each table: the share of the error that an allocation of the ranked classes between items could save. The classes
are in proportion to the root of an item's error, and all of the error counts as that of the ranked classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import machine, parse, parser, write
from estimator_error import glyphs, lm, run
from sampling_methods import Method, OracleProposal
from torch import Tensor

from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.sampling.proposal import DISProposal
from hf_dis.sampling.sample import ClassSample, Statistics
from hf_dis.sampling.tails import ClassDensity
from hf_dis.teacher.targets import TeacherTargets

MEMORIES = ("started", "counted", "started and counted", "aged", "renewed faster")


class KnowingProposal(DISProposal):
    """DIS that is given s - p, or an approximation of s - p, for its samples of ranks, of classes, or both."""

    def __init__(self, of: DISProposal, knows: str):
        super().__init__(of.num_classes, of.num_ranks, of.num_ranks, of.floor, of.memory.decay, of.device)
        self.knows, self.oracle = knows, OracleProposal(of.num_classes, of.num_ranks, of.num_ranks, of.device)

    def look(self, signal: Tensor, targets: TeacherTargets) -> None:
        """Reads the whole ``s - p [N, C]`` of the items whose classes are sampled next."""
        self.oracle.look(signal, targets)

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        return super().rank_density(targets) if self.knows == "tail" else self.oracle.rank_density(targets)

    def class_density(self) -> ClassDensity:
        return super().class_density() if self.knows == "ranks" else self.oracle.class_density()


class VariedMemory(ClassMemory):
    """A class memory that starts elsewhere, or learns at another pace."""

    def __init__(self, num_classes: int, decay: float, how: str, device: torch.device):
        super().__init__(num_classes, decay, device)
        self.how = how
        self.times_sampled = torch.zeros(num_classes, device=device)
        self.is_new = True

    def update(self, statistics: Statistics) -> None:
        if self.is_new and "started" in self.how:
            self.squared_signal += (statistics["class_mass"] / statistics["items"]).float().square()
        self.is_new = False
        tail = statistics["tail"].coalesce()
        ids, (squared, items) = tail.indices()[0], tail.values().unbind(1)
        known = self.squared_signal[ids]
        super().update(statistics)
        mean = torch.where(items > 0, squared / items.clamp_min(1), known)
        if "faster" in self.how:
            self.squared_signal[ids] = known.lerp(mean, 0.6)
        if "counted" in self.how:
            self.times_sampled[ids] += (items > 0).float()
            renewal = (1 / self.times_sampled[ids].clamp_min(1)).clamp_min(self.RENEWAL)
            self.squared_signal[ids] = known.lerp(mean, renewal)
        if "aged" in self.how:
            sampled = self.squared_signal[ids]
            change = (squared / items.clamp_min(1)).sqrt().sum() / known[items > 0].sqrt().sum()
            self.squared_signal *= change**2
            self.squared_signal[ids] = sampled


@dataclass
class Variant(Method):
    """A layout with a proposal that is not in the library; ``proposal`` is its name in the table.

    Attributes:
        knows: the densities that are given s - p: ``"ranks"``, ``"tail"``, ``"both"``, or none.
        rank: of the approximation of the logits that s - p is computed from; 0: the logits themselves.
        memory: the variation of the class memory, one of ``MEMORIES``, or none.
    """

    knows: str = ""
    rank: int = 0
    memory: str = ""

    def build(self, num_classes: int, device: torch.device) -> None:
        self.sampler = self.sampler_of(num_classes, "dis", device)
        fitted = self.sampler.proposal
        if self.knows:
            self.sampler.proposal = KnowingProposal(fitted, self.knows)
        if self.memory:
            fitted.memory = VariedMemory(num_classes, fitted.memory.decay, self.memory, device)

    def sample(
        self, teacher_logits: Tensor, signal: Tensor, temperature: float, labels: Tensor | None = None
    ) -> ClassSample:
        targets = TeacherTargets(teacher_logits, temperature, self.sampler.rank_depth)
        if self.knows:
            teacher = (teacher_logits / temperature).softmax(1)
            if self.rank:
                signal = approximated(signal + teacher, self.rank) - teacher
            self.sampler.proposal.look(signal, targets)
        return self.sampler.sample([targets], labels)

    def learn(self, teacher_logits: Tensor, logits: Tensor, temperature: float, labels: Tensor | None = None) -> None:
        if self.knows == "both":
            return
        student, teacher = ((values / temperature).softmax(1) for values in (logits, teacher_logits))
        self.learn_from(self.sample(teacher_logits, student - teacher, temperature, labels), logits, temperature)


def approximated(probabilities: Tensor, rank: int) -> Tensor:
    """Softmax of the best approximation of the logits by a matrix of a rank, items and classes centred."""
    logits = probabilities.clamp_min(1e-30).log()
    logits = logits - logits.mean(1, keepdim=True)
    mean = logits.mean(0)
    left, values, right = torch.svd_lowrank(logits - mean, rank, niter=4)
    return (mean + left * values @ right.T).softmax(1)


def variants(default: tuple[int, ...], others: list[tuple[int, ...]]) -> list[Method]:
    """The default layout (K, K_t, m, G), its variants, and other layouts (K, K_t, m, G, U)."""
    knowing = [Variant("oracle, both", "pps", *default, knows="both")]
    if default[0] < default[2]:  # otherwise the ranked classes are certain, whatever the density over ranks
        knowing += [
            Variant(f"oracle, over {name}", "pps", *default, knows=knows)
            for knows, name in (("ranks", "ranks"), ("tail", "classes"))
        ]
    knowing += [Variant(f"sketch {rank}", "pps", *default, knows="both", rank=rank) for rank in (4, 16)]
    memories = [Variant(f"memory {how}", "pps", *default, memory=how) for how in MEMORIES]
    return [Method("dis", "pps", *default), *knowing, *memories, *(Method("dis", "pps", *layout) for layout in others)]


# 6,144 sampled classes for the 128 glyphs, some 2,900 of them distinct (U = 22: 2,816), and 12,288 for 512 tokens.
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
    made = parser(__doc__)
    made.add_argument("--task", choices=["glyphs", "lm"], default="glyphs")
    made.add_argument("--teacher", type=Path, required=True, help="saved by run_glyphs.py or run_clm.py")
    arguments = parse(made)
    print(machine(arguments.device))
    task = {"glyphs": glyphs, "lm": lm}[arguments.task](arguments)
    steps = tuple(step for step in task.steps if arguments.task == "glyphs" or step <= 80)
    task = replace(task, methods=LAYOUTS[arguments.task], steps=steps)
    task.teacher.eval()
    records = run(task)
    for step in task.steps:
        default = next(record for record in records if record["step"] == step)
        print(f"step {step}: an allocation between items could save {default['between_items']:.0%} of the error")
    write(records, arguments.json, arguments.device)


if __name__ == "__main__":
    main()
