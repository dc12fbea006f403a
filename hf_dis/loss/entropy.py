"""The entropy of the student, estimated from sampled classes. A pure function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dis.teacher.targets import widen


def sampled_entropy(logits: Tensor, log_weights: Tensor) -> Tensor:
    """-Σ s log s over all classes, s = softmax(z), estimated from the sampled classes as ``-Σ ω ŝ log ŝ``.

    ``log ŝ = z - logsumexp(z + log ω)``. The normaliser makes the estimate consistent, not unbiased: its bias falls as
    1/K. With all classes sampled with certainty the estimate is the entropy.

    Args:
        logits: the student's, of the sampled classes, ``[N, K]``; a constant added to all logits of an item has no
            effect.
        log_weights: log ω of every column, ``[N, K]``; ``-inf`` where a column is not used.

    Returns:
        the entropy in nats, ``[N]``, float32 or wider.
    """
    # A masked class has a logit of -inf: a number in its place, so that 0 · log 0 is 0 and not NaN.
    logits = widen(logits).clamp_min(torch.finfo(torch.float32).min)
    log_normaliser = (logits + log_weights).logsumexp(1, keepdim=True)
    share = (logits + log_weights - log_normaliser).exp()
    return (share * (log_normaliser - logits)).sum(1)
