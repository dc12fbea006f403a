"""Advice on logged values that are bad; each threshold stands beside its reason."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

# A trainer logs numbers; metrics of the user may be of any type.
Log = dict[str, Any]

# Below this coverage, classes that were not sampled hold most of the teacher's probability for an item.
LOW_COVERAGE = 0.5

# Above this share nearly all ranked samples are certain. The top takes all K, and only a larger K reaches lower ranks.
# Where all of them are, K is m, and the error is that of the shared tail.
MOSTLY_CERTAIN = 0.9

# The estimate of the student's normaliser has a relative deviation near 1/√ESS, which is a third at ESS 10. Its
# logarithm, a part of every item's loss, is too low by about 1/(2 ESS), which is 0.05 at ESS 10.
SMALL_SAMPLE = 10

# ‖ĝ - g‖ > ‖g‖: the error of the gradient is larger than the gradient. Where unbiased, its cosine is below 1/√2.
NOISY_GRADIENT = 1.0

# The error that is estimated from the sample.
ESTIMATED_ERROR = "dis/gradient_error"

# In the README's table the divergences of exact distillation, DIS and FTIS from the teacher are 20 % to 33 % apart. A
# loss with an error of 25 % cannot rank such runs.
LOSS_GAP = 0.25


def advice(values: Log) -> list[str]:
    """Advice on logged values that are bad, a sentence or two for each; empty if all of them are good.

    Args:
        values: by log name, as ``DISDistillationTrainer`` logs them. Missing names, and values that are not numbers,
            are not judged.
    """
    values = {name: value for name, value in values.items() if isinstance(value, Real)}
    found = [
        f"{name} is {value}: training has diverged. Lower learning_rate or head_learning_rate, set max_grad_norm, and "
        "check the teacher's precision."
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    more = "num_shared_classes (num_sampled_classes if it is 0)"
    if MOSTLY_CERTAIN < values.get("dis/certain", 0) < 1:
        more = "num_sampled_classes"
    error = values.get("probe/relative_error", values.get(ESTIMATED_ERROR))
    # A signal that is spread evenly is estimated well from few classes: where the gradient is good, coverage is not
    # judged.
    if values.get("dis/coverage", 1) < LOW_COVERAGE and (error is None or error > NOISY_GRADIENT):
        unprobed = "; set probe_steps to see whether the gradient suffers" if error is None else ""
        found.append(
            f"coverage {values['dis/coverage']:.2f}: the sampled classes hold less than half of the teacher's "
            f"probability. Raise {more}{unprobed}."
        )
    if values.get("dis/ess", math.inf) < SMALL_SAMPLE:
        found.append(
            f"effective sample size {values['dis/ess']:.1f}: the loss of an item rests on few classes and is too low "
            "by about 1/(2 ESS). Raise num_sampled_classes or num_shared_classes, or proposal_floor if the proposal "
            "is narrow."
        )
    if error is not None and error > NOISY_GRADIENT:
        cosine = f" (cosine {values['probe/cosine']:.2f})" if "probe/cosine" in values else ""
        found.append(
            f"relative error {error:.2f} of the gradient{cosine}: the error is larger than the gradient. Raise "
            f"{more}, or let both follow an accepted gradient_error. Or raise the batch size, or lower learning_rate."
        )
    exact, sampled = values.get("probe/exact_kd_loss"), values.get("probe/sampled_kd_loss")
    if exact is not None and abs(sampled - exact) > LOSS_GAP * exact:
        found.append(
            f"sampled loss {sampled:.3g} where the exact loss is {exact:.3g}: kd_loss cannot be compared between "
            "runs. Compare eval_kd_loss and eval_kl, which are exact."
        )
    elif values.get("kd_loss", 0) < 0:
        found.append(
            f"kd_loss {values['kd_loss']:.3g} is below zero: kd_loss is an estimate, and teacher and student nearly "
            "agree. Compare eval_kd_loss and eval_kl, which are exact."
        )
    return found
