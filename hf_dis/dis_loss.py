"""DISLoss: the loss from features, weight and teacher logits, for training loops without a model object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf

import torch
from torch import Tensor

from hf_dis.checks import require
from hf_dis.fused.sampled_head import is_fused, mean_loss
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.head.vocab_shard import VocabShard, check_shards
from hf_dis.items import check_labels
from hf_dis.loss.f_divergence import make_divergence
from hf_dis.loss.sampled import sampled_loss
from hf_dis.sampling.sample import Statistics
from hf_dis.sampling.sampler import ClassSampler
from hf_dis.teacher.logit_checks import check_support, check_teacher_logits
from hf_dis.teacher.targets import TeacherTargets


class DISLoss:
    """The sampled loss: samples classes, computes the sampled logits, and lets the sampler learn from each batch.

    Args:
        sampler: samples the classes, see :func:`hf_dis.make_sampler`. Its ``state_dict`` belongs in your checkpoints.
            With several processes give each its own seed, and sum the statistics of the proposal by ``reduce``.
        temperature: τ > 0.
        hard_label_weight: λ in [0, 1], the share of cross-entropy; has no effect without labels.
        reduce: sums a dict of tensors, some of them sparse, over processes, as
            :func:`hf_dis.distributed.sums.sum_over_processes` does.
        row_sparse_head: give weight and bias sparse gradients, which hold the sampled rows only; for
            :class:`hf_dis.RowSparseAdamW`. ``DistributedDataParallel`` cannot reduce sparse gradients.
        divergence: as for :class:`hf_dis.DISArguments`.
        jsd_beta: as for :class:`hf_dis.DISArguments`.
        skew_alpha: as for :class:`hf_dis.DISArguments`.
        scale_by_temperature: as for :class:`hf_dis.DISArguments`.
        shard: the classes of this process, where tensor parallelism spreads the head over processes. Weight and bias
            are then the rows of these classes. All processes of the group give the same features, teacher logits and
            labels, and seed their samplers alike. ``reduce`` sums over one process of each group.

    Raises:
        TypeError: if ``jsd_beta`` or ``skew_alpha`` is neither a number nor None.
        ValueError: if a value is out of range, or does not belong to the divergence.

    Example::

        dis_loss = DISLoss(make_sampler(num_classes=100_000))
        loss = dis_loss(features, head.weight, head.bias, teacher_logits, labels)
        loss.backward()
    """

    def __init__(
        self,
        sampler: ClassSampler,
        temperature: float = 2.0,
        hard_label_weight: float = 0.1,
        reduce: Callable[[Statistics], Statistics] | None = None,
        row_sparse_head: bool = False,
        divergence: str = "forward_kl",
        jsd_beta: float | None = None,
        skew_alpha: float | None = None,
        scale_by_temperature: bool = True,
        shard: VocabShard | None = None,
    ):
        require(0 < temperature < inf, "temperature", temperature, "above 0 and finite; 1 to 4 is usual")
        require(0 <= hard_label_weight <= 1, "hard_label_weight", hard_label_weight, "within [0, 1]")
        self.sampler, self.temperature, self.hard_label_weight = sampler, temperature, hard_label_weight
        self.reduce, self.row_sparse_head = reduce, row_sparse_head
        self.divergence = make_divergence(divergence, jsd_beta, skew_alpha, scale_by_temperature)
        self.shard = shard
        self._has_checked_values = False

    def __call__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_logits: Tensor | Iterable[Tensor],
        labels: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            features: input of the head, ``[N, d]``.
            weight: of the head, ``[C, d]``; with a shard the rows of its classes.
            bias: of the head, ``[C]``, or None; with a shard the entries of its classes.
            teacher_logits: ``[N, C]``, or an iterable of chunks of items that need not exist at the same time.
            labels: class ids ``[N]``.

        Raises:
            ValueError: if sampler, head and teacher have different numbers of classes or are on different devices,
                labels are outside 0..C-1, a shape is wrong, or the teacher masks classes under the reverse KL.
            FloatingPointError: if the teacher's logits hold NaN or Inf. On an accelerator, where a check of values
                waits for the device, teacher and labels are checked in the first batch only.
        """
        num_classes = self.sampler.proposal.num_classes
        if self.shard is not None:
            if not self._has_checked_values:
                check_shards(self.shard, weight, num_classes)
        elif len(weight) != num_classes:
            raise ValueError(
                f"the sampler is made for {num_classes} classes, the head has {len(weight)}: call "
                f"make_sampler({len(weight)})"
            )
        _check_shapes(features, weight, bias, teacher_logits, labels, num_classes)
        self._check_devices(features.device, weight=weight, bias=bias, labels=labels)
        check_values = features.device.type == "cpu" or not self._has_checked_values
        self._has_checked_values = True
        if labels is not None and check_values:
            check_labels(labels, num_classes)

        chunks = [teacher_logits] if isinstance(teacher_logits, Tensor) else teacher_logits
        return self.of_targets(features, weight, bias, self._ranked(chunks, features.device, check_values), labels)

    def of_targets(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Iterable[TeacherTargets],
        labels: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of a batch for a teacher whose answers are ranked already, a scalar; checks no argument.

        Args:
            features: as for the loss itself.
            weight: as for the loss itself.
            bias: as for the loss itself.
            targets: of consecutive chunks of items, at the temperature, to the depth ``sampler.rank_depth``.
            labels: as for the loss itself.
        """
        options = self.temperature, self.hard_label_weight, self.divergence
        if self.shard is None and is_fused(features, weight, bias, labels, self.sampler, self.divergence):
            with torch.no_grad():
                sample = self.sampler.sample_without_tails(targets, labels)
            loss, signal, finite = mean_loss(features, weight, sample, *options, self.row_sparse_head)
            self.sampler.learn(sample, signal, self.reduce, finite)
            return loss
        with torch.no_grad():
            sample = self.sampler.sample(targets, labels)
        ids = sample.item_ids, sample.tail_ids
        logits = sampled_logits(features, weight, bias, *ids, self.row_sparse_head, sample.updates, self.shard)
        loss, _, result = sampled_loss(logits, sample, *options)
        self.sampler.learn(sample, result.signal, self.reduce, result.finite)
        return loss.mean() if len(features) else loss.sum()

    def _check_devices(self, device: torch.device, **given: Tensor | None) -> None:
        """Checks that tensors and the sampler are on a device."""
        for name, tensor in {"the sampler": self.sampler.not_finite, **given}.items():
            if tensor is not None and tensor.device != device:
                remedy = "pass device to make_sampler" if name == "the sampler" else f"bring {name} there with .to()"
                raise ValueError(f"{name} is on {tensor.device} and the features are on {device}: {remedy}")

    def _ranked(self, chunks: Iterable[Tensor], device: torch.device, check_finite: bool) -> Iterator[TeacherTargets]:
        first_item = 0
        for logits in chunks:
            self._check_devices(device, teacher_logits=logits)
            check_teacher_logits(logits, self.sampler.proposal.num_classes, first_item, check_finite=False)
            if check_finite and self.divergence.needs_full_support:
                check_support(logits, first_item)
            targets = TeacherTargets(logits, self.temperature, self.sampler.rank_depth)
            if check_finite:
                targets.check_finite(first_item)
            first_item += len(logits)
            yield targets
            del logits, targets  # the next chunk may be computed without this one in memory


def _check_shapes(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | Iterable[Tensor],
    labels: Tensor | None,
    num_classes: int,
) -> None:
    num_rows, width = weight.shape
    if features.dim() != 2 or features.shape[1] != width:
        raise ValueError(
            f"features have shape {tuple(features.shape)}: the head takes [N, {width}], one vector per item"
        )
    num_items = len(features)
    if bias is not None and bias.shape != (num_rows,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}: the head has {num_rows} classes, so its bias is [{num_rows}]"
        )
    if isinstance(teacher_logits, Tensor) and (teacher_logits.dim() != 2 or len(teacher_logits) != num_items):
        raise ValueError(
            f"teacher_logits have shape {tuple(teacher_logits.shape)} for features of {num_items} items: they have to "
            f"be [{num_items}, {num_classes}]"
        )
    if labels is not None and labels.shape != (num_items,):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for features of {num_items} items: they have to be one class id "
            f"per item, [{num_items}]"
        )
