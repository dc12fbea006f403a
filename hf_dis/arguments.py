"""DISArguments: the settings of the method, for any host."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import ceil, inf
from typing import Any, Literal

from hf_dis.checks import require, require_number
from hf_dis.sampler_spec import SamplerSpec, setting

HEAD_MODES = ("auto", "sampled", "exact")
MOMENT_DTYPES = ("float32", "bfloat16", None)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


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
        gradient_error: relative error ‖ĝ - g‖ / ‖g‖ of the gradient on the head's input that is accepted, above 0. K
            and K_t follow the error, estimated from the sample, by powers of two; where no sample will do, all classes
            are computed (docs/choosing-k.md). Sizes given by hand are kept. None: the sizes are fixed.
        exact_warmup_steps: steps at the start that compute all classes while the proposals learn; below 1 a share of
            all steps. These steps cost the time and memory of exact distillation (docs/choosing-k.md).
        probe_steps: steps between two comparisons of the sampled loss and gradient with the exact ones; 0: never.

    Raises:
        TypeError: if a value is not a number where a number is expected.
        ValueError: if a value is outside its range, or two values exclude each other.
    """

    temperature: float = setting(2.0, "Divides the logits of teacher and student; above 0.")
    hard_label_weight: float = setting(
        0.1, "Share of cross-entropy in the loss, within [0, 1]; the rest is distillation."
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = setting(
        "forward_kl", "The divergence of the student from the teacher."
    )
    jsd_beta: float | None = setting(
        None, "The teacher's share of the mixture in divergence 'jsd', in (0, 1); if not given 0.5."
    )
    skew_alpha: float | None = setting(
        None, "The teacher's share of the mixture in divergence 'skew_kl', in (0, 1); if not given 0.1."
    )
    scale_by_temperature: bool = setting(True, "Multiply the divergence by the square of the temperature.")
    num_sampled_classes: int | None = _of_spec("num_sampled_classes")
    num_shared_classes: int | None = _of_spec("num_shared_classes")
    num_tails: int | None = _of_spec("num_tails")
    num_updated_classes: int | None = _of_spec("num_updated_classes")
    rank_depth: int | None = _of_spec("rank_depth")
    proposal: Literal["dis", "teacher", "uniform", "topk"] = _of_spec("proposal")
    design: Literal["pps", "replacement"] = _of_spec("design")
    proposal_floor: float = _of_spec("proposal_floor")
    proposal_decay: float = _of_spec("proposal_decay")
    head_mode: Literal["auto", "sampled", "exact"] = setting(
        "auto", "Compute sampled classes only, all of them, or whichever is faster."
    )
    head_name: str | None = setting(None, "Name of the student's output head, where it is not found automatically.")
    head_learning_rate: float | None = setting(
        None, "Learning rate of the output head; if not given, that of all other parameters."
    )
    row_sparse_head: bool | None = setting(
        None,
        "Gradients and optimizer steps for the sampled rows of the head only (lazy AdamW); if not given, wherever "
        "optimizer and head allow it.",
        nargs="?",  # a flag alone is True
        const=True,
    )
    offload_moments: bool = setting(
        False, "Keep the optimizer's moments of a row-sparse head in host memory; only the rows of a step travel."
    )
    moment_dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "Type of the optimizer's moments of a row-sparse head; if not given, that of the head's weight."
    )
    gradient_error: float | None = setting(
        None, "Accepted relative error of the gradient, which the numbers of sampled classes follow; above 0."
    )
    exact_warmup_steps: float = setting(
        0.0, "Steps at the start that compute all classes; below 1: a share of all steps."
    )
    probe_steps: int = setting(0, "Steps between two comparisons of sampled and exact loss and gradient; 0: never.")

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
        self._check_gradient_error()
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

    def _check_gradient_error(self) -> None:
        error = self.gradient_error
        if error is None:
            return
        require_number("gradient_error", error, float)
        require(0 < error < inf, "gradient_error", error, "above 0 and finite; 0.1 to 0.5 is usual")
        for name, value in (("proposal", "topk"), ("head_mode", "exact")):
            if getattr(self, name) == value:
                raise ValueError(
                    f"gradient_error is {error} and {name} is {value!r}, whose error no sample shows: leave "
                    f"gradient_error out, or set another {name}"
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
