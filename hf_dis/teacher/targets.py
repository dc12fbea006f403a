"""The teacher's answers, ranked: what the sample and the losses see of a teacher, wherever it comes from."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the [n, C] logits of a chunk: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24

# Elements that a pass over items takes at a time on CPU, so that what it leaves stays in the cache.
BLOCK_ELEMENTS = 2**18


# Classes of a group whose highest logit says whether one of them can be among the best-ranked.
GROUP = 8


def widen(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are if wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def block_items(values: Tensor) -> int:
    """How many items of ``[n, C]`` a pass takes at a time: what stays in the cache of a CPU, elsewhere all."""
    in_cache = BLOCK_ELEMENTS // max(1, values.shape[1])
    return max(1, in_cache if values.device.type == "cpu" else len(values))


def top_ranked(logits: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The highest logits of each item and their classes, best first: as ``topk``, several times faster.

    The m highest of all lie in the m groups with the highest maxima.

    Args:
        logits: ``[n, C]``.
        depth: m, at most C.

    Returns:
        logits and ids, ``[n, m]``.
    """
    num_items, num_classes = logits.shape
    num_groups = num_classes // GROUP
    if num_groups < 2 * depth:
        return logits.topk(depth, dim=1)
    # Class c is in group c mod G, so that maxima are taken between whole stretches of memory.
    grouped = logits[:, : num_groups * GROUP].unflatten(1, (GROUP, num_groups))
    groups = grouped.amax(1).topk(depth, dim=1, sorted=False).indices
    members = groups[:, :, None] + num_groups * torch.arange(GROUP, device=logits.device)
    left_over = torch.arange(num_groups * GROUP, num_classes, device=logits.device)
    candidates = torch.cat([members.flatten(1), left_over.expand(num_items, -1)], 1)
    top, places = logits.gather(1, candidates).topk(depth, dim=1)
    return top, candidates.gather(1, places)


class TeacherTargets:
    """The teacher's view of some items, ranked to a depth, at a temperature.

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
        top, self.ids = top_ranked(logits, min(depth, logits.shape[1]))
        top = widen(top) / temperature
        # The one pass of exponentials over all classes gives the normaliser and the classes' probabilities.
        items = block_items(logits)
        self._probability = top.new_zeros(logits.shape[1])
        totals = []
        for part, peak in zip(logits.split(items), top[:, :1].split(items), strict=True):
            exponentials = (widen(part) / temperature).sub_(peak).exp_()
            totals.append(exponentials.sum(1))
            self._probability.addmv_(exponentials.T, totals[-1].reciprocal())
        self.log_normaliser = top[:, :1] + torch.cat(totals)[:, None].log_()
        self.log_probs = top - self.log_normaliser

    def __len__(self) -> int:
        return len(self.ids)

    def all_classes(self) -> Tensor:
        """What a loss on all classes needs of the teacher: its logits, ``[n, C]``."""
        return self.logits

    def log_prob(self, ids: Tensor) -> Tensor:
        """Log-probability of any classes of each item, ``[n, K]`` for ids ``[n, K]``."""
        return widen(self.logits.gather(1, ids)) / self.temperature - self.log_normaliser

    def class_mass(self) -> Tensor:
        """The probability of each class outside the items' ranked ones, summed over items, ``[C]``."""
        ranked = self.log_probs.exp().flatten()
        return self._probability.index_add(0, self.ids.flatten(), ranked, alpha=-1).clamp_min_(0)


def check_teacher_logits(logits: Tensor, num_classes: int, first_item: int = 0, check_finite: bool = True) -> None:
    """Checks what a teacher answered.

    Args:
        logits: of some items, ``[n, C]``.
        num_classes: C, as the student has it.
        first_item: where the items are in the batch.
        check_finite: look for NaN and Inf; on an accelerator this waits for the device.

    Raises:
        ValueError: if the logits do not have C columns.
        FloatingPointError: if they hold NaN or Inf, or an item is -inf throughout; names the items. Some classes may be
            masked, their logits -inf.
    """
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"the teacher answers for {logits.shape[-1]} classes, the student for {num_classes}: "
            "both need the same classes in the same order; use a teacher trained on the student's labels"
        )
    # The sum is the fastest pass, but also overflows and meets masked classes (-inf), which are fine. An item's largest
    # logit is NaN or Inf where one of them is, and -inf where all classes are masked.
    if check_finite and not logits.sum(dtype=torch.float32).isfinite():
        bad = ~logits.amax(1).isfinite()
        if bad.any():
            raise FloatingPointError(
                f"the teacher's logits hold NaN or Inf in items {(bad.nonzero()[:, 0] + first_item).tolist()[:20]} of "
                "the batch, or are -inf for all classes: check these inputs, and the teacher's precision (a float16 "
                "teacher overflows at 65,504; try bfloat16)"
            )
