"""DISConfig: every knob of the method, on top of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, inf
from typing import Literal

from transformers import TrainingArguments

from .checks import check_sampling_arguments, require, require_number
from .sampler import usual_tails

HEAD_MODES = ("auto", "sampled", "exact")


@dataclass
class DISConfig(TrainingArguments):
    """Arguments of :class:`hf_dis.DISDistillationTrainer`: those of ``TrainingArguments``, and the method's.

    Args:
        temperature: τ > 0, divides teacher's and student's logits; the loss carries τ² (arXiv 1503.02531).
        hard_label_weight: λ in [0, 1]: loss = (1 - λ) KD + λ CE. Without labels in the batch there is no CE.
        num_sampled_classes: K >= 1, classes drawn for each row from the teacher's ranking. None: 32, 16 for language
            models, 128 where no classes are shared. From a cache: with shared classes, how many of a row's stored tail
            a step uses, in each step others, all if None; without, classes beyond the stored ones, 512 if None.
        num_shared_classes: K_t >= 0, classes drawn from the rest that rows share: a tail. 0 is the paper's layout: all
            K of a row from all C ranks. None: 512, 1,024 for language models, 0 where the sampler or proposal
            named cannot share.
        num_tails: G >= 1, tails drawn a step; row i uses tail ``i mod G``. With more the gradient of a batch is less
            noisy for the same product, and up to G·K_t rows of the head are touched. None: 4.
        num_updated_classes: U >= 1: of the distinct classes that N rows and their tails drew, at most U N update a
            row-sparse head, drawn in backward in proportion to the size of their gradient, which stays unbiased. None:
            16 where classes are shared, 32 for language models, all where none are.
        rank_depth: m >= 1, ranks that the teacher's ranking resolves one by one; where classes are shared the K
            classes of a row come from its m best-ranked ones, so m is K or more. None: 2 K, and K for language
            models with shared classes, so that the best-ranked ones are drawn for certain.
        proposal: ``"dis"`` (fitted during training), or a fixed one to compare with: ``"teacher"`` (FTIS),
            ``"uniform"``, ``"topk"`` (truncation: biased).
        sampler: ``"pps"``: distinct classes, the likeliest drawn for certain. ``"replacement"``: independent
            draws, the paper's; needs ``num_shared_classes=0``.
        proposal_floor: share of the proposals that is uniform, in (0, 1]; keeps every weight bounded.
        proposal_decay: of the running means that the proposals are fitted to, in [0, 1).
        head_mode: ``"sampled"``, ``"exact"`` (every logit), or ``"auto"``: both are timed for a moment at set-up, and
            sampled is taken where that is clearly faster (:mod:`hf_dis.cost`); name one to have no clock decide.
        head_name: the output head among ``model.named_modules()``, where it is not found by itself; two with a comma
            between them where the logits are their mean.
        head_learning_rate: learning rate of the output head; ``learning_rate`` if None. A head that is drawn from
            wants one several times larger, and exact distillation gains from it too: see docs/how-it-works.md.
        row_sparse_head: give the head's parameters gradients of the drawn rows only, and step only these, with
            :class:`hf_dis.RowSparseAdamW`, so that a step costs the same however many classes there are. A lazy
            AdamW, see docs/optimizer.md; ``optim`` has to be ``adamw_torch`` or ``adamw_torch_fused``.
        exact_warmup_steps: steps at the start in which all classes are computed, the proposals learning meanwhile;
            below 1 a share of all steps. A student that starts from random weights disagrees everywhere at first, and
            then learns faster (docs/choosing-k.md). They cost the time and memory of exact distillation.
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
    num_sampled_classes: int | None = field(
        default=None,
        metadata={"help": "Classes drawn for each row; if not given 32, or 16 for language models."},
    )
    num_shared_classes: int | None = field(
        default=None,
        metadata={
            "help": "Classes that rows share, a tail; 0: the paper's layout, all drawn row by row. If not given, 512, "
            "or 1,024 for language models."
        },
    )
    num_tails: int | None = field(
        default=None,
        metadata={"help": "Tails drawn a step, which rows take in turn; if not given 4, where classes are shared."},
    )
    num_updated_classes: int | None = field(
        default=None,
        metadata={
            "help": "Classes that update a row-sparse head, for each row; if not given 16, 32 for language models, or "
            "all of them where no classes are shared."
        },
    )
    rank_depth: int | None = field(
        default=None,
        metadata={
            "help": "Ranks that the teacher's ranking resolves one by one; 2 K, K for language models, if not given."
        },
    )
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
    row_sparse_head: bool = field(
        default=False,
        metadata={"help": "Gradients and optimizer steps for the head's drawn rows only (lazy AdamW)."},
    )
    exact_warmup_steps: float = field(
        default=0.0,
        metadata={"help": "Steps at the start that compute all classes; below 1: a share of all steps."},
    )
    probe_steps: int = field(
        default=0,
        metadata={"help": "Every so many steps compare sampled and exact loss and gradient; 0: never."},
    )

    def __post_init__(self):
        super().__post_init__()
        require_number("temperature", self.temperature, float)
        require_number("hard_label_weight", self.hard_label_weight, float)
        require_number("probe_steps", self.probe_steps, int)
        require_number("exact_warmup_steps", self.exact_warmup_steps, float)
        if self.head_learning_rate is not None:
            require_number("head_learning_rate", self.head_learning_rate, float)
        require(0 < self.temperature < inf, "temperature", self.temperature, "above 0 and finite; 1 to 4 is usual")
        require(0 <= self.hard_label_weight <= 1, "hard_label_weight", self.hard_label_weight, "within [0, 1]")
        require(self.head_mode in HEAD_MODES, "head_mode", self.head_mode, f"one of {', '.join(HEAD_MODES)}")
        require(
            0 <= self.exact_warmup_steps < 1 or self.exact_warmup_steps % 1 == 0 < self.exact_warmup_steps < inf,
            "exact_warmup_steps",
            self.exact_warmup_steps,
            "a whole number of steps, or a share of them within [0, 1)",
        )
        require(self.probe_steps >= 0, "probe_steps", self.probe_steps, "0 (never) or more")
        require(
            self.head_learning_rate is None or self.head_learning_rate >= 0,
            "head_learning_rate",
            self.head_learning_rate,
            "0 or more, or None for learning_rate",
        )
        check_sampling_arguments(**self.sampling_arguments())
        require(
            self.num_updated_classes is None or self.row_sparse_head,
            "num_updated_classes",
            self.num_updated_classes,
            "None without row_sparse_head=True: a dense gradient touches every row of the head anyway",
        )

    def get_exact_warmup_steps(self, num_training_steps: int) -> int:
        """How many steps at the start compute all classes.

        Args:
            num_training_steps: of the whole training.
        """
        steps = self.exact_warmup_steps
        return ceil(steps * num_training_steps) if steps < 1 else int(steps)

    def sampling_arguments(
        self, is_lm: bool = False, stored_draws: int | None = None
    ) -> dict[str, int | float | str | None]:
        """The arguments for :func:`hf_dis.make_sampler`, or :func:`hf_dis.cached_teacher.make_cached_sampler`.

        Args:
            is_lm: whether the layout, where it is not given, is that of a language model.
            stored_draws: T of the cache that is trained from, if one is.
        """
        num_shared = 1024 if is_lm else 512
        if self.num_shared_classes is not None:
            num_shared = self.num_shared_classes
        elif self.proposal == "topk" or self.sampler == "replacement":
            num_shared = 0
        if stored_draws is not None:
            num_sampled = max(1, stored_draws) if num_shared else 512
        elif is_lm:
            num_sampled = 16
        else:
            num_sampled = 32 if num_shared else 128
        if self.num_sampled_classes is not None:
            num_sampled = self.num_sampled_classes
        num_tails = usual_tails(num_shared) if self.num_tails is None else self.num_tails
        num_updated = self.num_updated_classes
        if num_updated is None and self.row_sparse_head and num_shared:
            num_updated = 32 if is_lm else 16
        depth = num_sampled if self.rank_depth is None and is_lm and num_shared else self.rank_depth
        return {
            "num_sampled_classes": num_sampled,
            "num_shared_classes": num_shared,
            "num_tails": num_tails,
            "num_updated_classes": num_updated,
            "rank_depth": depth,
            "proposal": self.proposal,
            "sampler": self.sampler,
            "proposal_floor": self.proposal_floor,
            "proposal_decay": self.proposal_decay,
        }
