"""Settings of the method where the student writes the text; joins TRL's ``beta`` and our ``divergence``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import inf
from typing import Literal

from hf_dis.arguments import DISArguments, check_divergence
from hf_dis.checks import require, require_number

# β of TRL's generalised Jensen-Shannon divergence. The skew KL is a forward KL from a mixture, so it shares β = 0.
OWN_BETA = {"forward_kl": 0.0, "skew_kl": 0.0, "reverse_kl": 1.0}


@dataclass
class OnPolicyArguments(DISArguments):
    """:class:`hf_dis.DISArguments` for a host of TRL whose student writes the text.

    ``beta`` and ``divergence`` choose the same thing, so one of them is enough. Both are filled in after that.

    Args:
        temperature: of the host, for the student's sampling; above 0.
        kd_temperature: τ > 0 of the loss. None: ``temperature``.
        beta: TRL's choice of the divergence: 0 is the forward KL, 1 the reverse KL, and a value between them the
            Jensen-Shannon divergence. None: that of ``divergence``.
        divergence: as for :class:`hf_dis.DISArguments`. None: that of ``beta``.
        scale_by_temperature: multiply the divergence by τ²; False as in TRL.
        hard_label_weight: 0. The labels of a text that the student wrote are its own samples.

    Raises:
        TypeError, ValueError: as :class:`hf_dis.DISArguments`; ValueError if ``beta`` and ``divergence`` disagree, or
            if ``hard_label_weight`` is not 0.
    """

    temperature: float = field(
        default=1.0, metadata={"help": "Divides the student's logits where it writes text; above 0."}
    )
    kd_temperature: float | None = field(
        default=None,
        metadata={"help": "Divides the logits of teacher and student in the loss; if not given temperature."},
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "0: forward KL, 1: reverse KL, between: Jensen-Shannon; if not given that of divergence."},
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] | None = field(
        default=None, metadata={"help": "The divergence of the student from the teacher; if not given that of beta."}
    )
    scale_by_temperature: bool = field(
        default=False, metadata={"help": "Multiply the divergence by the square of kd_temperature."}
    )
    hard_label_weight: float = field(
        default=0.0, metadata={"help": "0: the labels of a text that the student wrote are its own samples."}
    )

    def __post_init__(self) -> None:
        self._choose_divergence()
        for name in ("temperature", "kd_temperature"):
            value = getattr(self, name)
            if value is not None:
                require_number(name, value, float)
                require(0 < value < inf, name, value, "above 0 and finite; 1 is usual")
        self.settings()

    def _choose_divergence(self) -> None:
        """Fills in ``beta``, ``divergence`` and ``jsd_beta``."""
        self.divergence, self.jsd_beta, self.beta = agreed_divergence(
            self.divergence, self.jsd_beta, self.skew_alpha, self.beta, self._default_beta()
        )

    @staticmethod
    def _default_beta() -> float:
        """TRL's default: the reverse KL."""
        return 1.0

    def settings(self) -> DISArguments:
        """The settings of the method alone; ``temperature`` is that of the loss.

        Raises:
            TypeError, ValueError: as the class, for values that were changed later too.
        """
        given = {one.name: getattr(self, one.name) for one in fields(DISArguments)}
        agreed = agreed_divergence(self.divergence, self.jsd_beta, self.skew_alpha, self.beta, self._default_beta())
        temperature = self.temperature if self.kd_temperature is None else self.kd_temperature
        self._check_hard_labels()
        given |= {"divergence": agreed[0], "jsd_beta": agreed[1], "temperature": temperature}
        return DISArguments(**given)

    def _check_hard_labels(self) -> None:
        require(
            self.hard_label_weight == 0,
            "hard_label_weight",
            self.hard_label_weight,
            "0 where the student writes the text: its labels are the student's own samples, and cross-entropy with "
            "them has a gradient of mean zero, which is noise",
        )


def agreed_divergence(
    divergence: str | None, jsd_beta: float | None, skew_alpha: float | None, beta: float | None, default_beta: float
) -> tuple[str, float | None, float]:
    """Finds the divergence that ``beta`` and ``divergence`` choose together.

    Args:
        divergence, jsd_beta, skew_alpha, beta: as for :class:`OnPolicyArguments`.
        default_beta: where neither ``beta`` nor ``divergence`` is given.

    Returns:
        ``divergence``, ``jsd_beta`` (None unless it is ``"jsd"``), and ``beta``.

    Raises:
        TypeError: if a number is expected and another value is given.
        ValueError: if a value is outside its range, or ``beta`` and ``divergence`` disagree.
    """
    if beta is not None:
        require_number("beta", beta, float)
        require(0 <= beta <= 1, "beta", beta, "within [0, 1]: 0 is the forward KL, 1 the reverse KL")
    if divergence is None:
        beta = default_beta if beta is None else beta
        divergence = {0: "forward_kl", 1: "reverse_kl"}.get(beta, "jsd")
    if divergence == "jsd" and jsd_beta is None:
        jsd_beta = 0.5 if beta is None else float(beta)
    check_divergence(divergence, jsd_beta, skew_alpha)
    own = OWN_BETA.get(divergence, jsd_beta)
    if beta is not None and beta != own:
        raise ValueError(
            f"beta is {beta}, and divergence is {divergence!r}"
            f"{f' with jsd_beta={own}' if divergence == 'jsd' else ''}, for which beta is {own}: both choose the "
            "divergence, so give one of them and leave the other at None"
        )
    return divergence, jsd_beta, own
