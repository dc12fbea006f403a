"""Checks of a teacher's logits: their shape, NaN and Inf, and masked classes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_support(logits: Tensor, first_item: int = 0) -> None:
    """Checks that a teacher gives every class a probability above 0; on an accelerator this waits for the device.

    Args:
        logits: of consecutive items, ``[n, C]``, without NaN and +Inf.
        first_item: number of the first of these items in the batch.

    Raises:
        ValueError: if classes are masked, by -inf or by the lowest numbers of the type; names the items.
    """
    masked = logits.amin(1) < torch.finfo(logits.dtype).min / 2
    if masked.any():
        raise ValueError(
            f"the teacher masks classes in items {(masked.nonzero()[:, 0] + first_item).tolist()[:20]} of the batch: "
            "their logits are -inf, or as low as their type allows. divergence='reverse_kl' is infinite where the "
            "teacher's probability is 0: set divergence to 'jsd' or 'skew_kl', or give masked classes a floor, for "
            "example the item's highest logit minus 30"
        )


def check_teacher_logits(logits: Tensor, num_classes: int, first_item: int = 0, check_finite: bool = True) -> None:
    """Checks the logits of a teacher. Classes may be masked: their logits are -inf.

    Args:
        logits: of consecutive items, ``[n, C]``.
        num_classes: C, as the student has it.
        first_item: number of the first of these items in the batch.
        check_finite: look for NaN and Inf; on an accelerator this waits for the device.

    Raises:
        ValueError: if the logits do not have C columns.
        FloatingPointError: if logits are NaN or Inf, or all logits of an item are -inf; names the items.
    """
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"the teacher has logits of {logits.shape[-1]} classes, the student of {num_classes}: "
            "both need the same classes in the same order; use a teacher trained on the student's labels"
        )
    # The sum is the fastest pass. It may overflow, or be -inf for masked classes, and neither is an error: then the
    # largest logit of each item decides. It is NaN or Inf where a logit is, and -inf where all classes are masked.
    if check_finite and not logits.sum(dtype=torch.float32).isfinite():
        bad = ~logits.amax(1).isfinite()
        if bad.any():
            raise FloatingPointError(
                f"the teacher's logits hold NaN or Inf in items {(bad.nonzero()[:, 0] + first_item).tolist()[:20]} of "
                "the batch, or are -inf for all classes. Check these inputs, and the teacher's precision: a float16 "
                "teacher overflows at 65,504, so try bfloat16"
            )
