"""SamplerSpec: the settings of a sampler, with the defaults of each task."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import log2
from typing import Any, Literal

from hf_dis.checks import require, require_number

PROPOSALS = ("dis", "teacher", "uniform", "topk")
DESIGNS = ("pps", "replacement")
# The default of U is K_t divided by this number: with 16 tails and 512 items every sampled class.
UPDATED_SHARE = 32


def setting(default: Any, text: str, **of_parser: Any) -> Any:
    """A field with a help text, and further arguments of argparse, for the command line."""
    return field(default=default, metadata={"help": text, **of_parser})


@dataclass(frozen=True)
class SamplerSpec:
    """Settings of the sampler: sizes, proposal and design. A size of None takes the default of the task.

    Args:
        num_sampled_classes: K >= 1, classes sampled per item from the teacher's ranking. None: 96 with shared tails,
            128 without, 16 for language models. From a cache with shared tails: how many classes of an item's stored
            sample a step uses; None uses all of them. From a cache without: classes besides the stored ones; None:
            512.
        num_shared_classes: K_t >= 0, classes of a shared tail, sampled from all classes below the top of the ranking.
            0 is the layout of arXiv 1812.00914: all K classes of an item come from all C ranks. None: 416, and 512
            from a cache; for language models the power of two nearest to C/128, from 1,024 to 4,096; 0 with
            ``design="replacement"`` or ``proposal="topk"``.
        num_tails: G >= 1, shared tails per step; item i uses tail ``i mod G``. More tails make the gradient of a batch
            less noisy and touch up to G·K_t rows of the head. None: 16, 1 without shared tails.
        num_updated_classes: U >= 1. At most U·N of the distinct sampled classes update a row-sparse head; they are
            sampled in backward in proportion to the size of their gradient, which stays unbiased. None: K_t/32, and
            at least 16, or 32 for language models; all classes where the head is dense or there is no shared tail.
        rank_depth: m >= 1, ranks that are resolved one by one. With shared tails the K classes of an item come from
            its m best-ranked ones, so m >= K. None: K with shared tails, so that all m classes are certain; 2 K
            without.
        proposal: ``"dis"`` (fitted during training), or a fixed baseline: ``"teacher"`` (FTIS), ``"uniform"``,
            ``"topk"`` (truncation, biased).
        design: ``"pps"``: distinct classes, the likeliest ones certain. ``"replacement"``: independent samples, as in
            arXiv 1812.00914; needs ``num_shared_classes=0``.
        proposal_floor: uniform share of the proposals, in (0, 1]. It bounds every importance weight.
        proposal_decay: decay of the running means that the proposals are fitted to, in [0, 1).

    Raises:
        TypeError: if a value is not a number where a number is expected.
        ValueError: if a value is outside its range, or two values exclude each other.
    """

    num_sampled_classes: int | None = setting(
        None, "Classes sampled per item; if not given 96, or 16 for language models."
    )
    num_shared_classes: int | None = setting(
        None,
        "Classes of a shared tail; 0: no shared tail, all classes are sampled item by item. "
        "If not given 416, or 1,024 to 4,096 for language models, by their vocabulary.",
    )
    num_tails: int | None = setting(None, "Shared tails per step, used by the items in turn; if not given 16.")
    num_updated_classes: int | None = setting(
        None,
        "Classes per item that update a row-sparse head; if not given 1/32 of num_shared_classes, at least 16, or 32 "
        "for language models.",
    )
    rank_depth: int | None = setting(
        None, "Ranks that are resolved one by one; if not given K, or 2 K without a shared tail."
    )
    proposal: Literal["dis", "teacher", "uniform", "topk"] = setting(
        "dis", "Where classes are sampled: fitted during training, or a fixed baseline."
    )
    design: Literal["pps", "replacement"] = setting(
        "pps", "Distinct classes, or independent samples with replacement."
    )
    proposal_floor: float = setting(0.05, "Uniform share of the proposals, in (0, 1].")
    proposal_decay: float = setting(0.95, "Decay of the running means that the proposals are fitted to, in [0, 1).")

    def __post_init__(self) -> None:
        for name in ("num_sampled_classes", "num_shared_classes", "num_tails", "num_updated_classes", "rank_depth"):
            value, lowest = getattr(self, name), 0 if name == "num_shared_classes" else 1
            if value is not None:
                require_number(name, value, int)
                require(value >= lowest, name, value, f"{lowest} or more, or None for the default of the task")
        for name in ("proposal_floor", "proposal_decay"):
            require_number(name, getattr(self, name), float)
        require(self.proposal in PROPOSALS, "proposal", self.proposal, f"one of {', '.join(PROPOSALS)}")
        require(self.design in DESIGNS, "design", self.design, f"one of {', '.join(DESIGNS)}")
        require(0 < self.proposal_floor <= 1, "proposal_floor", self.proposal_floor, "in (0, 1]; 0.05 is usual")
        require(0 <= self.proposal_decay < 1, "proposal_decay", self.proposal_decay, "in [0, 1); 0.95 is usual")
        has_tail = self._num_shared() > 0
        require(
            has_tail or self.num_tails in (None, 1),
            "num_tails",
            self.num_tails,
            "1 without a shared tail; set num_shared_classes to the size of a tail",
        )
        require(
            self.design == "pps" or not has_tail or self.proposal == "topk",
            "design",
            self.design,
            "'pps' with shared tails; set num_shared_classes=0 to sample with replacement",
        )

    def _num_shared(self, vocab_size: int | None = None, is_stored: bool = False) -> int:
        if self.num_shared_classes is not None:
            return self.num_shared_classes
        if self.proposal == "topk" or self.design == "replacement":
            return 0
        if vocab_size is None:
            # 96 certain classes and 416 of a tail leave half of the distance to exact distillation that 32 of 64
            # ranks and 512 leave (benchmarks/parity.py, glyphs at x20).
            return 512 if is_stored else 416
        # At 262,144 tokens and 512 items per step 1,024 leave the student 4% of KL behind, 2,048 1%
        # (benchmarks/large_vocabulary.py). Up to 185,000 tokens 1,024 suffice.
        return min(max(2 ** round(log2(vocab_size / 128)), 1024), 4096)

    def resolved(
        self, *, vocab_size: int | None = None, row_sparse: bool = False, stored_sample_size: int | None = None
    ) -> SamplerSpec:
        """The same specification with every default of the task filled in.

        ``num_updated_classes`` stays None where all sampled classes update the head, and ``rank_depth`` stays None
        with a cache, whose depth is fixed.

        Args:
            vocab_size: C of a language model; None: the classes are not a vocabulary.
            row_sparse: the gradient of the head is row-sparse.
            stored_sample_size: T of the cache that is trained from; None where the teacher is loaded.
        """
        num_shared, is_lm = self._num_shared(vocab_size, stored_sample_size is not None), vocab_size is not None
        if stored_sample_size is not None:
            num_sampled = max(1, stored_sample_size) if num_shared else 512
        elif is_lm:
            num_sampled = 16
        else:
            num_sampled = 96 if num_shared else 128
        if self.num_sampled_classes is not None:
            num_sampled = self.num_sampled_classes
        num_updated, depth = self.num_updated_classes, self.rank_depth
        if num_updated is None and row_sparse and num_shared:
            num_updated = max(32 if is_lm else 16, num_shared // UPDATED_SHARE)
        if depth is None and stored_sample_size is None:
            depth = num_sampled if num_shared else 2 * num_sampled
        return replace(
            self,
            num_sampled_classes=num_sampled,
            num_shared_classes=num_shared,
            num_tails=self.num_tails or (16 if num_shared else 1),
            num_updated_classes=num_updated,
            rank_depth=depth,
        )
