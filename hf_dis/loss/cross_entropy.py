"""Cross-entropy with the labels, on sampled classes and on all of them. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.loss.classes import ALL_CLASSES, Classes
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.targets import widen


def sampled_cross_entropy(logits: Tensor, sample: ClassSample) -> Tensor:
    """-log softmax(z)_y, with the normaliser estimated from the sampled classes; the label is always among them.

    Args:
        logits: the student's, of the sampled classes, ``[N, R + K_t]``.
        sample: made with labels.

    Returns:
        the loss, ``[N]``, in float32 or wider.
    """
    if uses_triton(logits.device):
        from hf_dis.loss import triton_sampled

        return triton_sampled.sampled_cross_entropy(logits, sample.log_weights, sample.label_column)
    logits = widen(logits)
    return (logits + sample.log_weights).logsumexp(1) - logits[:, sample.label_column]


def exact_cross_entropy(logits: Tensor, labels: Tensor, classes: Classes = ALL_CLASSES) -> tuple[Tensor, Tensor]:
    """-log softmax(z)_y over all classes, and its gradient softmax(z) - onehot(y).

    Args:
        logits: the student's, ``[n, C]``, float32 or wider.
        labels: class ids, ``[n]``.
        classes: sums over all classes, where the logits are of a part of them.

    Returns:
        the loss ``[n]`` and the gradient ``[n, C]``.
    """
    log_student = classes.log_softmax(logits)
    ids = labels[:, None]
    columns = classes.columns(ids)
    chosen = log_student.gather(1, columns)
    minus_one = torch.full_like(chosen, -1)
    loss = -classes.sum(classes.only_here(chosen, ids))
    return loss, log_student.exp_().scatter_add_(1, columns, classes.only_here(minus_one, ids))
