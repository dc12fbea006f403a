"""Settings of the method: ``SamplerSpec`` for how classes are sampled, ``DISArguments`` for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import ceil, inf, log2
from typing import Any, Literal

from hf_dis.checks import require, require_number

PROPOSALS = ("dis", "teacher", "uniform", "topk")
DESIGNS = ("pps", "replacement")
HEAD_MODES = ("auto", "sampled", "exact")
MOMENT_DTYPES = ("float32", "bfloat16", None)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


def _setting(default: Any, text: str, **of_parser: Any) -> Any:
    """A field with a help text, and further arguments of argparse, for the command line."""
    return field(default=default, metadata={"help": text, **of_parser})


@dataclass(frozen=True)
class SamplerSpec:
    """Settings of the sampler: sizes, proposal and design. A size of None takes the default of the task.

    Args:
        num_sampled_classes: K >= 1, classes sampled per item from the teacher's ranking. None: 32 with shared tails,
            128 without, 16 for language models. From a cache with shared tails: how many classes of an item's stored
            sample a step uses; None uses all of them. From a cache without: classes besides the stored ones; None:
            512.
        num_shared_classes: K_t >= 0, classes of a shared tail, sampled from all classes below the top of the ranking.
            0 is the layout of arXiv 1812.00914: all K classes of an item come from all C ranks. None: 512; for
            language models the power of two nearest to C/128, from 1,024 to 4,096; 0 with ``design="replacement"`` or
            ``proposal="topk"``.
        num_tails: G >= 1, shared tails per step; item i uses tail ``i mod G``. More tails make the gradient of a batch
            less noisy and touch up to G·K_t rows of the head. None: 16, 1 without shared tails.
        num_updated_classes: U >= 1. At most U·N of the distinct sampled classes update a row-sparse head; they are
            sampled in backward in proportion to the size of their gradient, which stays unbiased. None: K_t/32, and
            at least 16, or 32 for language models; all classes where the head is dense or there is no shared tail.
        rank_depth: m >= 1, ranks that are resolved one by one. With shared tails the K classes of an item come from
            its m best-ranked ones, so m >= K. None: 2 K; K for language models with shared tails.
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

    num_sampled_classes: int | None = _setting(
        None, "Classes sampled per item; if not given 32, or 16 for language models."
    )
    num_shared_classes: int | None = _setting(
        None,
        "Classes of a shared tail; 0: no shared tail, all classes are sampled item by item. "
        "If not given 512, or 1,024 to 4,096 for language models, by their vocabulary.",
    )
    num_tails: int | None = _setting(None, "Shared tails per step, used by the items in turn; if not given 16.")
    num_updated_classes: int | None = _setting(
        None,
        "Classes per item that update a row-sparse head; if not given 1/32 of num_shared_classes, at least 16, or 32 "
        "for language models.",
    )
    rank_depth: int | None = _setting(
        None, "Ranks that are resolved one by one; if not given 2 K, or K for language models."
    )
    proposal: Literal["dis", "teacher", "uniform", "topk"] = _setting(
        "dis", "Where classes are sampled: fitted during training, or a fixed baseline."
    )
    design: Literal["pps", "replacement"] = _setting(
        "pps", "Distinct classes, or independent samples with replacement."
    )
    proposal_floor: float = _setting(0.05, "Uniform share of the proposals, in (0, 1].")
    proposal_decay: float = _setting(0.95, "Decay of the running means that the proposals are fitted to, in [0, 1).")

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
        has_tail = self._num_shared(vocab_size=None) > 0
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

    def _num_shared(self, vocab_size: int | None) -> int:
        if self.num_shared_classes is not None:
            return self.num_shared_classes
        if self.proposal == "topk" or self.design == "replacement":
            return 0
        if vocab_size is None:
            return 512
        # At 262,144 tokens and 512 items per step 1,024 leave the student 8% of KL behind, 2,048 5%
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
        num_shared, is_lm = self._num_shared(vocab_size), vocab_size is not None
        if stored_sample_size is not None:
            num_sampled = max(1, stored_sample_size) if num_shared else 512
        elif is_lm:
            num_sampled = 16
        else:
            num_sampled = 32 if num_shared else 128
        if self.num_sampled_classes is not None:
            num_sampled = self.num_sampled_classes
        num_updated, depth = self.num_updated_classes, self.rank_depth
        if num_updated is None and row_sparse and num_shared:
            num_updated = max(32 if is_lm else 16, num_shared // 32)  # 16 tails of 512 items: every sampled class
        if depth is None and stored_sample_size is None:
            depth = num_sampled if is_lm and num_shared else 2 * num_sampled
        return replace(
            self,
            num_sampled_classes=num_sampled,
            num_shared_classes=num_shared,
            num_tails=self.num_tails or (16 if num_shared else 1),
            num_updated_classes=num_updated,
            rank_depth=depth,
        )


def check_divergence(divergence: str, jsd_beta: float | None = None, skew_alpha: float | None = None) -> None:
    """Checks the settings that choose a divergence.

    Args:
        divergence, jsd_beta, skew_alpha: as for :class:`DISArguments`.

    Raises:
        TypeError: if ``jsd_beta`` or ``skew_alpha`` is neither a number nor None.
        ValueError: if a value is outside its range, or is given beside another divergence than its own.
    """
    require(divergence in DIVERGENCES, "divergence", divergence, f"one of {', '.join(DIVERGENCES)}")
    for name, value, its_own in (("jsd_beta", jsd_beta, "jsd"), ("skew_alpha", skew_alpha, "skew_kl")):
        if value is None:
            continue
        require_number(name, value, float)
        require(
            divergence == its_own,
            name,
            value,
            f"None with divergence={divergence!r}, which does not read it; set divergence={its_own!r} to use it",
        )
        limits = "0.5 is usual; for the limits 0 and 1 set 'forward_kl' and 'reverse_kl'"
        require(
            0 < value < 1,
            name,
            value,
            f"in (0, 1), both excluded; {limits if its_own == 'jsd' else '0.1 is usual'}",
        )


def _of_spec(name: str) -> Any:
    """A field of :class:`SamplerSpec` with the default and the help text that it has there."""
    found = SamplerSpec.__dataclass_fields__[name]
    return field(default=found.default, metadata=found.metadata)


@dataclass
class DISArguments:
    """Settings of the method, for any host: the fields of :class:`SamplerSpec` and those below.

    Args:
        temperature: τ > 0, divides the logits of teacher and student.
        hard_label_weight: λ in [0, 1]; loss = (1 - λ) KD + λ CE. Without labels there is no CE.
        divergence: of the student s from the teacher p. ``"forward_kl"``: KL(p ‖ s). ``"reverse_kl"``: KL(s ‖ p).
            ``"jsd"``: the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649). ``"skew_kl"``: the skew KL
            of DistiLLM (arXiv 2402.03898). See docs/divergences.md.
        jsd_beta: β in (0, 1) of ``"jsd"``, the teacher's share of the mixture. None: 0.5.
        skew_alpha: α in (0, 1) of ``"skew_kl"``, the teacher's share of the mixture. None: 0.1.
        scale_by_temperature: multiply the divergence by τ², so that the size of its gradient does not depend on τ.
        head_mode: ``"sampled"``, ``"exact"`` (every logit), or ``"auto"``: both are timed at set-up, and sampled is
            taken where it is clearly faster (:mod:`hf_dis.autotune`).
        head_name: the output head among ``model.named_modules()``, where it is not found automatically; two names
            with a comma between them where the logits are the mean of two heads.
        head_learning_rate: learning rate of the output head; None: ``learning_rate``. A sampled head needs a rate
            several times larger, and exact distillation gains from it too (docs/how-it-works.md).
        row_sparse_head: give the head gradients of the sampled rows only and step only these rows with
            :class:`hf_dis.RowSparseAdamW`, a lazy AdamW (docs/optimizer.md). None: True in a trainer that makes its
            optimizer, if ``optim`` is ``adamw_torch`` or ``adamw_torch_fused`` and the head allows row-sparse
            gradients. False in a loop of your own.
        offload_moments: a trainer's optimizer keeps the moments of a row-sparse head in host memory, as
            :class:`hf_dis.RowSparseAdamW` does. In a loop of your own, give that class the argument of this name.
        moment_dtype: type of the moments of a row-sparse head's weight: ``"float32"``, or ``"bfloat16"``, which is
            rounded at random without bias (docs/optimizer.md). None: the type of the weight. As ``offload_moments``.
        exact_warmup_steps: steps at the start that compute all classes while the proposals learn; below 1 a share of
            all steps. These steps cost the time and memory of exact distillation (docs/choosing-k.md).
        probe_steps: steps between two comparisons of the sampled loss and gradient with the exact ones; 0: never.

    Raises:
        TypeError: if a value is not a number where a number is expected.
        ValueError: if a value is outside its range, or two values exclude each other.
    """

    temperature: float = _setting(2.0, "Divides the logits of teacher and student; above 0.")
    hard_label_weight: float = _setting(
        0.1, "Share of cross-entropy in the loss, within [0, 1]; the rest is distillation."
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = _setting(
        "forward_kl", "The divergence of the student from the teacher."
    )
    jsd_beta: float | None = _setting(
        None, "The teacher's share of the mixture in divergence 'jsd', in (0, 1); if not given 0.5."
    )
    skew_alpha: float | None = _setting(
        None, "The teacher's share of the mixture in divergence 'skew_kl', in (0, 1); if not given 0.1."
    )
    scale_by_temperature: bool = _setting(True, "Multiply the divergence by the square of the temperature.")
    num_sampled_classes: int | None = _of_spec("num_sampled_classes")
    num_shared_classes: int | None = _of_spec("num_shared_classes")
    num_tails: int | None = _of_spec("num_tails")
    num_updated_classes: int | None = _of_spec("num_updated_classes")
    rank_depth: int | None = _of_spec("rank_depth")
    proposal: Literal["dis", "teacher", "uniform", "topk"] = _of_spec("proposal")
    design: Literal["pps", "replacement"] = _of_spec("design")
    proposal_floor: float = _of_spec("proposal_floor")
    proposal_decay: float = _of_spec("proposal_decay")
    head_mode: Literal["auto", "sampled", "exact"] = _setting(
        "auto", "Compute sampled classes only, all of them, or whichever is faster."
    )
    head_name: str | None = _setting(None, "Name of the student's output head, where it is not found automatically.")
    head_learning_rate: float | None = _setting(
        None, "Learning rate of the output head; if not given, that of all other parameters."
    )
    row_sparse_head: bool | None = _setting(
        None,
        "Gradients and optimizer steps for the sampled rows of the head only (lazy AdamW); if not given, wherever "
        "optimizer and head allow it.",
        nargs="?",  # a flag alone is True
        const=True,
    )
    offload_moments: bool = _setting(
        False, "Keep the optimizer's moments of a row-sparse head in host memory; only the rows of a step travel."
    )
    moment_dtype: Literal["float32", "bfloat16"] | None = _setting(
        None, "Type of the optimizer's moments of a row-sparse head; if not given, that of the head's weight."
    )
    exact_warmup_steps: float = _setting(
        0.0, "Steps at the start that compute all classes; below 1: a share of all steps."
    )
    probe_steps: int = _setting(0, "Steps between two comparisons of sampled and exact loss and gradient; 0: never.")

    def __post_init__(self) -> None:
        for name in ("temperature", "hard_label_weight", "exact_warmup_steps"):
            require_number(name, getattr(self, name), float)
        require_number("probe_steps", self.probe_steps, int)
        if self.head_learning_rate is not None:
            require_number("head_learning_rate", self.head_learning_rate, float)
        require(0 < self.temperature < inf, "temperature", self.temperature, "above 0 and finite; 1 to 4 is usual")
        require(0 <= self.hard_label_weight <= 1, "hard_label_weight", self.hard_label_weight, "within [0, 1]")
        check_divergence(self.divergence, self.jsd_beta, self.skew_alpha)
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
        if self.row_sparse_head and self.head_mode == "exact":
            raise ValueError(
                "row_sparse_head is set and head_mode is 'exact', which touches every row of the head: set "
                "row_sparse_head=False, or another head_mode"
            )
        require(self.moment_dtype in MOMENT_DTYPES, "moment_dtype", self.moment_dtype, "'float32', 'bfloat16' or None")
        for name in self.moment_settings():
            if self.row_sparse_head is False or self.head_mode == "exact":
                given = "row_sparse_head is False" if self.row_sparse_head is False else "head_mode is 'exact'"
                raise ValueError(
                    f"{name} is set and {given}: a step of a dense gradient reads the moments of every row; "
                    f"leave {name} out, or make the head row-sparse"
                )
        self.sampler_spec()
        require(
            self.num_updated_classes is None or self.row_sparse_head is not False,
            "num_updated_classes",
            self.num_updated_classes,
            "None with row_sparse_head=False: a dense gradient touches every row of the head anyway",
        )

    def settings(self) -> DISArguments:
        """The settings of the method alone, as a :class:`hf_dis.Distiller` reads them; a copy."""
        return DISArguments(**{one.name: getattr(self, one.name) for one in fields(DISArguments)})

    def moment_settings(self) -> list[str]:
        """The names of those settings of a row-sparse head's moments that are set."""
        return [name for name in ("offload_moments", "moment_dtype") if getattr(self, name)]

    def sampler_spec(self) -> SamplerSpec:
        """The settings of the sampler, as they were given."""
        return SamplerSpec(**{spec.name: getattr(self, spec.name) for spec in fields(SamplerSpec)})

    def get_exact_warmup_steps(self, num_training_steps: int) -> int:
        """Steps at the start that compute all classes.

        Args:
            num_training_steps: of the whole training.
        """
        steps = self.exact_warmup_steps
        return ceil(steps * num_training_steps) if steps < 1 else int(steps)
