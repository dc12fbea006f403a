"""The teacher's answers, ranked: what the draw and the losses see of a teacher, wherever it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

# Elements of a chunk's [rows, C] logits: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24

# Elements that passes over all classes take at a time, so that what they leave stays in a processor's cache.
BLOCK_ELEMENTS = 2**20


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
        self.logits = widen(logits) / temperature
        top, self.ids = self.logits.topk(min(depth, logits.shape[1]), dim=1)
        self.block_rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
        self.log_normaliser = torch.cat(
            [part.logsumexp(1, keepdim=True) for part in self.logits.split(self.block_rows)]
        )
        self.log_probs = top - self.log_normaliser

    def __len__(self) -> int:
        return len(self.ids)

    def log_prob(self, ids: Tensor) -> Tensor:
        """Log-probability of any classes of each row, ``[n, K]`` for ids ``[n, K]``."""
        return self.logits.gather(1, ids) - self.log_normaliser

    def class_mass(self) -> Tensor:
        """The probability of each class outside the rows' ranked ones, summed over rows, ``[C]``."""
        blocks = zip(self.logits.split(self.block_rows), self.log_normaliser.split(self.block_rows), strict=True)
        mass = sum((logits - log_normaliser).exp_().sum(0) for logits, log_normaliser in blocks)
        ranked = self.log_probs.exp().flatten()
        return mass.index_add_(0, self.ids.flatten(), ranked, alpha=-1).clamp_min_(0)


class OnlineTeacher:
    """A teacher that runs beside the student and is ranked by chunks of rows.

    No ``[N, C]`` tensor outlives a chunk. Never trained, never saved, in evaluation mode throughout.

    Args:
        model: any model that returns ``.logits`` of shape ``[rows, C]``.
        num_classes: C, as the student has it.
        temperature: τ > 0.
        depth: m, how many ranks to resolve.
        chunk_rows: rows a chunk; by default as many as keep a chunk's logits within 64 MiB.
        context: entered around each forward; ``accelerator.autocast`` for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        temperature: float,
        depth: int,
        chunk_rows: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model = model.eval().requires_grad_(False)
        self.num_classes, self.temperature, self.depth = num_classes, temperature, depth
        self.context = context
        self.chunk_rows = chunk_rows or max(1, CHUNK_ELEMENTS // num_classes)

    def __call__(self, inputs: dict[str, Tensor], check_finite: bool = True) -> Iterator[TeacherTargets]:
        """Yields the ranked targets of each chunk of rows, in order; see :meth:`logits`."""
        # map holds no chunk back, as a loop's variable would while the next one is computed.
        return map(self._rank, self.logits(inputs, check_finite))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the teacher's weights, from at most 128 values of each: another teacher has another one."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            values = tensor.flatten()[:: max(1, tensor.numel() // 64)]
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.to("cpu", torch.float64).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _rank(self, logits: Tensor) -> TeacherTargets:
        return TeacherTargets(logits, self.temperature, self.depth)

    def logits(self, inputs: dict[str, Tensor], check_finite: bool = True) -> Iterator[Tensor]:
        """Yields the logits of each chunk of rows, ``[rows, C]``.

        Args:
            inputs: of the model, without labels.
            check_finite: look for NaN and Inf; on an accelerator this waits for the device.

        Raises:
            ValueError: if the logits do not have C columns.
            FloatingPointError: if they hold NaN or Inf; names the rows.
        """
        first_row = 0
        for chunk in split_rows(inputs, self.chunk_rows):
            with torch.no_grad(), self.context():
                logits = self.model(**chunk).logits
            check_teacher_logits(logits, self.num_classes, first_row, check_finite)
            first_row += len(logits)
            yield logits
            del logits


def check_teacher_logits(logits: Tensor, num_classes: int, first_row: int = 0, check_finite: bool = True) -> None:
    """Checks what a teacher answered.

    Args:
        logits: of some rows, ``[n, C]``.
        num_classes: C, as the student has it.
        first_row: where the rows are in the batch.
        check_finite: look for NaN and Inf; on an accelerator this waits for the device.

    Raises:
        ValueError: if the logits do not have C columns.
        FloatingPointError: if they hold NaN or Inf; names the rows.
    """
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"the teacher answers for {logits.shape[-1]} classes, the student for {num_classes}: "
            "both need the same classes in the same order; use a teacher trained on the student's labels"
        )
    # The sum finds NaN and Inf in one pass, but may itself overflow: only then look at each.
    if check_finite and not logits.sum(dtype=torch.float32).isfinite() and not logits.isfinite().all():
        rows = (~logits.isfinite()).any(1).nonzero()[:, 0] + first_row
        raise FloatingPointError(
            f"the teacher's logits hold NaN or Inf in rows {rows.tolist()[:20]} of the batch: check these "
            "inputs, and the teacher's precision (a float16 teacher overflows at 65,504; try bfloat16)"
        )


def split_rows(inputs: dict[str, Tensor], chunk_rows: int) -> Iterator[dict[str, Tensor]]:
    """Splits a batch of model inputs into chunks of rows; what does not have a row for each is passed whole."""
    num_rows = max(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim())
    for start in range(0, num_rows, chunk_rows):
        yield {
            name: value[start : start + chunk_rows]
            if isinstance(value, Tensor) and value.dim() and len(value) == num_rows
            else value
            for name, value in inputs.items()
        }
