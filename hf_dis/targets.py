"""The teacher's answers, ranked: what the draw and the losses see of a teacher, wherever it comes from."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that the pass over all classes takes at a time on CPU, so that what it leaves stays in the cache.
BLOCK_ELEMENTS = 2**18


def widen(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are if wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class TeacherTargets:
    """The teacher's view of some rows, ranked to a depth, at a temperature.

    Args:
        logits: the teacher's, ``[n, C]``.
        temperature: τ > 0.
        depth: m, how many ranks to resolve.

    Attributes:
        ids: the m best-ranked classes, best first, ``[n, m]``.
        log_probs: their log-probabilities at τ, ``[n, m]``, float32 or wider.
    """

    def __init__(self, logits: Tensor, temperature: float, depth: int):
        self.logits, self.temperature = logits, temperature
        top, self.ids = logits.topk(min(depth, logits.shape[1]), dim=1)
        top = widen(top) / temperature
        # The one pass of exponentials over all classes gives the normaliser and the classes' probabilities.
        on_cpu = logits.device.type == "cpu"
        block_rows = max(1, BLOCK_ELEMENTS // logits.shape[1] if on_cpu else len(logits))
        self._probability = top.new_zeros(logits.shape[1])
        totals = []
        for part, peak in zip(logits.split(block_rows), top[:, :1].split(block_rows), strict=True):
            exponentials = (widen(part) / temperature).sub_(peak).exp_()
            totals.append(exponentials.sum(1))
            self._probability.addmv_(exponentials.T, totals[-1].reciprocal())
        self.log_normaliser = top[:, :1] + torch.cat(totals)[:, None].log_()
        self.log_probs = top - self.log_normaliser

    def __len__(self) -> int:
        return len(self.ids)

    def log_prob(self, ids: Tensor) -> Tensor:
        """Log-probability of any classes of each row, ``[n, K]`` for ids ``[n, K]``."""
        return widen(self.logits.gather(1, ids)) / self.temperature - self.log_normaliser

    def class_mass(self) -> Tensor:
        """The probability of each class outside the rows' ranked ones, summed over rows, ``[C]``."""
        ranked = self.log_probs.exp().flatten()
        return self._probability.index_add(0, self.ids.flatten(), ranked, alpha=-1).clamp_min_(0)


def check_teacher_logits(logits: Tensor, num_classes: int, first_row: int = 0, check_finite: bool = True) -> None:
    """Checks what a teacher answered.

    Args:
        logits: of some rows, ``[n, C]``.
        num_classes: C, as the student has it.
        first_row: where the rows are in the batch.
        check_finite: look for NaN and Inf; on an accelerator this waits for the device.

    Raises:
        ValueError: if the logits do not have C columns.
        FloatingPointError: if they hold NaN or Inf, or a row is -inf throughout; names the rows. Some classes may be
            masked, their logits -inf.
    """
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"the teacher answers for {logits.shape[-1]} classes, the student for {num_classes}: "
            "both need the same classes in the same order; use a teacher trained on the student's labels"
        )
    # The sum is the fastest pass, but also overflows and meets masked classes (-inf), which are fine. A row's largest
    # logit is NaN or Inf where one of them is, and -inf where all classes are masked.
    if check_finite and not logits.sum(dtype=torch.float32).isfinite():
        bad = ~logits.amax(1).isfinite()
        if bad.any():
            raise FloatingPointError(
                f"the teacher's logits hold NaN or Inf in rows {(bad.nonzero()[:, 0] + first_row).tolist()[:20]} of "
                "the batch, or are -inf for all classes: check these inputs, and the teacher's precision (a float16 "
                "teacher overflows at 65,504; try bfloat16)"
            )
