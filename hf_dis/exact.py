"""Losses on all classes: exact distillation, the exact start of a sampled one, and what evaluation measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from .cached_teacher import CachedTargets
from .caching import check_targets, unpack_targets
from .distributed import sum_over_processes
from .drawn import drawn_columns
from .losses import (
    exact_cross_entropy,
    exact_distillation_loss,
    mix,
    sampled_distillation_loss,
    sparse_distillation_loss,
)
from .rows import Rows
from .streaming import CHUNK_ELEMENTS
from .targets import TeacherTargets
from .tasks import base_model

if TYPE_CHECKING:
    from .caching import CachedTeacher
    from .data.teacher_cache import TeacherCache
    from .sampler import ClassSampler
    from .teachers import OnlineTeacher


class ExactMixin(Trainer):
    """How a distilling trainer computes its losses where it computes every logit."""

    teacher: OnlineTeacher | CachedTeacher
    online_teacher: OnlineTeacher | None
    teacher_cache: TeacherCache | None
    eval_teacher_cache: TeacherCache | None
    sampler: ClassSampler
    num_classes: int

    def _exact_loss(self, model, inputs, rows, return_outputs, num_items_in_batch):
        """As ``compute_loss``, on all classes."""
        outputs = model(**inputs)
        if self.args.hard_label_weight == 1 and rows.labels is not None:
            losses = {"ce_loss": exact_cross_entropy(rows.of(outputs.logits)[:, : self.num_classes], rows.labels)}
            loss = losses["ce_loss"]
        else:
            losses = self._exact_losses(outputs.logits, inputs, rows)
            loss = mix(losses["kd_loss"], losses.get("ce_loss"), self.args.hard_label_weight)
        self._means.add(losses)
        loss = self._normalise(loss + self._router_loss(outputs), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _warm_up_loss(self, model, inputs, rows, return_outputs, num_items_in_batch):
        """As :meth:`_exact_loss`, and the sampler learns from the classes that it would have drawn."""
        targets = list(self.teacher(inputs, rows, self._checks_values()))
        draw = self.sampler.draw(targets, rows.labels)
        outputs = model(**inputs)
        logits = rows.of(outputs.logits)[:, : self.num_classes]
        drawn = drawn_columns(logits.detach(), draw.row_ids, draw.shared_ids)
        _, disagreement = sampled_distillation_loss(drawn, draw, self.args.temperature)
        self.sampler.learn(draw, disagreement, sum_over_processes)
        parts = zip(logits.split([len(chunk) for chunk in targets]), targets, strict=True)
        kd = torch.cat([self._distillation_loss(part, chunk) for part, chunk in parts])
        ce = None if rows.labels is None else exact_cross_entropy(logits, rows.labels)
        self._record(kd, ce, draw, disagreement, inputs, rows)
        loss = mix(kd, ce, self.args.hard_label_weight) + self._router_loss(outputs)
        loss = self._normalise(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _distillation_loss(self, logits: Tensor, targets: TeacherTargets | CachedTargets) -> Tensor:
        if isinstance(targets, TeacherTargets):
            return exact_distillation_loss(logits, targets.logits, self.args.temperature)
        return sparse_distillation_loss(logits, targets.ids, targets.log_probs, targets.target, self.args.temperature)

    def _router_loss(self, outputs: Any) -> Tensor | float:
        """The load-balancing loss of a mixture of experts, which its forward adds only where it computes its loss."""
        balance = getattr(outputs, "aux_loss", None)
        return 0.0 if balance is None else base_model(self.model).config.router_aux_loss_coef * balance

    def _exact_losses(
        self, logits: Tensor, inputs: dict[str, Tensor], rows: Rows, with_kl: bool = False
    ) -> dict[str, Tensor]:
        """Losses of each row, ``[N]``, from the student's full logits ``[B, C]`` or ``[B, S, C]``: kd_loss, ce_loss if
        there are labels, and the KL divergence from the teacher at temperature 1 if it is asked for. Copies of the
        logits exist chunk by chunk."""
        if rows.targets is None and self.online_teacher is not None:
            chunks = self._online_losses(logits, inputs, rows, with_kl)
        else:
            chunks = self._stored_losses(logits, rows, with_kl)
        parts = list(chunks)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _online_losses(
        self, logits: Tensor, inputs: dict[str, Tensor], rows: Rows, with_kl: bool
    ) -> Iterator[dict[str, Tensor]]:
        first_row = 0
        for teacher_logits in self.online_teacher.logits(inputs, rows, self._checks_values()):
            chunk = slice(first_row, first_row + len(teacher_logits))
            part = rows.of(logits, chunk)[:, : self.num_classes]
            losses = {"kd_loss": exact_distillation_loss(part, teacher_logits, self.args.temperature)}
            if with_kl:
                losses["kl"] = exact_distillation_loss(part, teacher_logits, 1.0)
            yield losses | self._label_loss(part, rows, chunk)
            first_row = chunk.stop
            del teacher_logits

    def _stored_losses(self, logits: Tensor, rows: Rows, with_kl: bool) -> Iterator[dict[str, Tensor]]:
        """kd_loss is an estimate here, and the divergence known if 1 is the temperature; without targets neither."""
        cache = self.teacher_cache if self.model.training else self.eval_teacher_cache
        if rows.targets is not None:
            check_targets(rows)
        chunk_rows = max(1, CHUNK_ELEMENTS // self.num_classes)
        for first_row in range(0, max(1, len(rows)), chunk_rows):
            chunk, losses = slice(first_row, first_row + chunk_rows), {}
            part = rows.of(logits, chunk)[:, : self.num_classes]
            if rows.targets is not None:
                stored = unpack_targets(cache.header, rows.targets[chunk], self._checks_values())
                losses["kd_loss"] = self._distillation_loss(part, CachedTargets(stored, self.num_classes))
                if with_kl and self.args.temperature == 1:
                    losses["kl"] = losses["kd_loss"]
            yield losses | self._label_loss(part, rows, chunk)

    def _label_loss(self, logits: Tensor, rows: Rows, chunk: slice) -> dict[str, Tensor]:
        return {} if rows.labels is None else {"ce_loss": exact_cross_entropy(logits, rows.labels[chunk])}
