"""DISConfig: every knob of the method, on top of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class DISConfig(TrainingArguments):
    """Arguments of :class:`hf_dis.DISDistillationTrainer`: those of ``TrainingArguments``, and the method's.

    Args:
        temperature: τ > 0, divides teacher's and student's logits; the loss carries τ² (arXiv 1503.02531).
        hard_label_weight: λ in [0, 1]: loss = (1 - λ) KD + λ CE. Without labels in the batch there is no CE.
        num_sampled_classes: K >= 1, classes drawn for each row from the teacher's ranking.
        num_shared_classes: K_t >= 0, classes drawn once a step from the rest, for all rows of it. 0 is the
            paper's layout: all K of a row from all C ranks.
        rank_depth: m >= 1, ranks that the teacher's ranking resolves one by one; with ``num_shared_classes`` the
            K classes of a row come from its m best-ranked ones.
        proposal: ``"dis"`` (fitted during training), or a fixed one to compare with: ``"teacher"`` (FTIS),
            ``"uniform"``, ``"topk"`` (truncation: biased).
        sampler: ``"pps"``: distinct classes, the likeliest drawn for certain. ``"replacement"``: independent
            draws, the paper's; needs ``num_shared_classes=0``.
        proposal_floor: share of the proposals that is uniform, in (0, 1]; keeps every weight bounded.
        proposal_decay: of the running means that the proposals are fitted to, in [0, 1).
        head_mode: ``"sampled"``, ``"exact"`` (every logit), or ``"auto"``: sampled where that is faster.
        head_name: the output head among ``model.named_modules()``, where it is not found by itself.
        head_learning_rate: learning rate of the output head; ``learning_rate`` if None. A head that is drawn from
            wants one several times larger, and exact distillation gains from it too: see docs/how-it-works.md.
        probe_steps: every so many steps, compare the sampled loss and gradient with the exact ones; 0 is never.
    """

    temperature: float = field(
        default=2.0,
        metadata={"help": "Divides teacher's and student's logits; above 0. The loss carries its square."},
    )
    hard_label_weight: float = field(
        default=0.1,
        metadata={"help": "Share of cross-entropy in the loss, within [0, 1]; the rest is distillation."},
    )
    num_sampled_classes: int = field(
        default=64, metadata={"help": "Classes drawn for each row from the teacher's ranking."}
    )
    num_shared_classes: int = field(
        default=512,
        metadata={"help": "Classes drawn once a step for all rows; 0: the paper's layout, all drawn row by row."},
    )
    rank_depth: int = field(default=128, metadata={"help": "Ranks that the teacher's ranking resolves one by one."})
    proposal: Literal["dis", "teacher", "uniform", "topk"] = field(
        default="dis",
        metadata={"help": "Where classes are drawn: fitted during training, or a fixed baseline."},
    )
    sampler: Literal["pps", "replacement"] = field(
        default="pps",
        metadata={"help": "Distinct classes, or independent draws with replacement (the paper's)."},
    )
    proposal_floor: float = field(default=0.05, metadata={"help": "Uniform share of the proposals, in (0, 1]."})
    proposal_decay: float = field(
        default=0.95,
        metadata={"help": "Decay of the running means that the proposals are fitted to, in [0, 1)."},
    )
    head_mode: Literal["auto", "sampled", "exact"] = field(
        default="auto", metadata={"help": "Compute drawn classes only, all of them, or whichever is faster."}
    )
    head_name: str | None = field(
        default=None, metadata={"help": "Name of the student's output head, where it is not found by itself."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the output head; that of the rest if not given."}
    )
    probe_steps: int = field(
        default=0,
        metadata={"help": "Every so many steps compare sampled and exact loss and gradient; 0: never."},
    )

    def __post_init__(self):
        super().__post_init__()
        _require(self.temperature > 0, "temperature", self.temperature, "above 0; 1 to 4 is usual")
        _require(0 <= self.hard_label_weight <= 1, "hard_label_weight", self.hard_label_weight, "within [0, 1]")
        _require(self.num_sampled_classes >= 1, "num_sampled_classes", self.num_sampled_classes, "1 or more")
        _require(self.num_shared_classes >= 0, "num_shared_classes", self.num_shared_classes, "0 or more")
        _require(self.rank_depth >= 1, "rank_depth", self.rank_depth, "1 or more")
        _require(0 < self.proposal_floor <= 1, "proposal_floor", self.proposal_floor, "in (0, 1]; 0.05 is usual")
        _require(0 <= self.proposal_decay < 1, "proposal_decay", self.proposal_decay, "in [0, 1); 0.95 is usual")
        _require(self.probe_steps >= 0, "probe_steps", self.probe_steps, "0 (never) or more")
        _require(
            self.head_learning_rate is None or self.head_learning_rate >= 0,
            "head_learning_rate",
            self.head_learning_rate,
            "0 or more, or None for learning_rate",
        )
        for name, choices in (
            ("proposal", ("dis", "teacher", "uniform", "topk")),
            ("sampler", ("pps", "replacement")),
            ("head_mode", ("auto", "sampled", "exact")),
        ):
            _require(vars(self)[name] in choices, name, vars(self)[name], f"one of {', '.join(choices)}")
        _require(
            self.sampler == "pps" or self.num_shared_classes == 0,
            "sampler",
            self.sampler,
            "'pps' when classes are shared by rows; set num_shared_classes=0 to draw with replacement",
        )


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}: it has to be {expected}")
