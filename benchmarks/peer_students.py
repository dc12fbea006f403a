"""Students of language models by the losses of peers: a trainer, and the peers' approximations of distillation.

A loss takes the features and the weight of the student's head, those of the teacher's, and labels: ``[N, d]``,
``[V, d]``, ``[N, d_t]``, ``[V, d_t]`` and ``[N]``. It returns the mean over items at temperature 1. The losses of
:mod:`peers` are exact. Those of this module leave classes out, and are biased:

topk_bucket    the K likeliest classes of the teacher, and a bucket with the probability of all remaining classes
negatives      the labels of the batch and uniform negatives that a batch shares, as PartialFC (arXiv 2203.15565) takes
               them; both models' probabilities are those of a softmax over these classes alone

A share λ of hard labels mixes both with the cross-entropy of the labels, over the student's probabilities of the loss:
over all classes, or over labels and negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from sampling_methods import with_bucket
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from hf_dis import DISDistillationTrainer

IGNORED = -100
# Items whose logits exist at a time in topk_bucket, which computes them again in backward.
CHUNK = 64
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def topk_bucket(*given: Tensor, k: int, hard_label_weight: float = 0.0) -> Tensor:
    """KL(p ‖ s) over the teacher's ``k`` likeliest classes and a bucket of all remaining classes."""
    features, weight, teacher_features, teacher_weight, labels = given
    parts = zip(*(values.split(CHUNK) for values in (features, teacher_features, labels)), strict=True)
    rest = weight, teacher_weight, k, hard_label_weight
    sums = [checkpoint(_bucket_loss, *part, *rest, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum() / len(features)


def _bucket_loss(
    features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    weight: Tensor,
    teacher_weight: Tensor,
    k: int,
    hard_label_weight: float,
) -> Tensor:
    """The sum of the losses of a few items."""
    with torch.no_grad():
        log_p, ids = (teacher_features @ teacher_weight.T).log_softmax(1).topk(min(k, len(weight)), dim=1)
        log_p = with_bucket(log_p)
    log_s = (features @ weight.T).log_softmax(1)
    kl = F.kl_div(with_bucket(log_s.gather(1, ids)), log_p, reduction="sum", log_target=True)
    return mixed(kl, F.nll_loss(log_s, labels, reduction="sum"), hard_label_weight)


def negatives(*given: Tensor, k: int, hard_label_weight: float = 0.0) -> Tensor:
    """KL(p ‖ s) over the batch's labels and uniform negatives, ``k`` distinct classes in all."""
    features, weight, teacher_features, teacher_weight, labels = given
    score = torch.rand(len(weight), device=weight.device)
    score[labels] = 2.0  # labels come first
    ids = score.topk(min(max(k, len(labels.unique())), len(weight))).indices
    log_s = (features @ weight[ids].T).log_softmax(1)
    log_p = (teacher_features @ teacher_weight[ids].T).log_softmax(1)
    columns = torch.empty_like(score, dtype=torch.long)
    columns[ids] = torch.arange(len(ids), device=ids.device)
    kl = F.kl_div(log_s, log_p, reduction="batchmean", log_target=True)
    return mixed(kl, F.nll_loss(log_s, columns[labels]), hard_label_weight)


def mixed(kl: Tensor, cross_entropy: Tensor, hard_label_weight: float) -> Tensor:
    """``(1 - λ) KL + λ CE``."""
    return torch.lerp(kl, cross_entropy, hard_label_weight)


def losses(k: int) -> dict[str, Loss]:
    """The losses by method.

    Args:
        k: classes of the methods that leave classes out.
    """
    return {
        "trl_chunked": lambda *given: peers.trl_chunked(*given[:4]),
        "liger": peers.liger_jsd,
        "topk_bucket": partial(topk_bucket, k=k),
        "negatives": partial(negatives, k=k),
    }


class PeerTrainer(DISDistillationTrainer):
    """Trains by the loss of a peer, in one process and without accumulation; evaluates as its base class.

    Args:
        loss: of a batch.
        *args, **kwargs: as for :class:`hf_dis.DISDistillationTrainer`; ``head_mode`` has to be ``"exact"``.
    """

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss, self.teacher = loss, kwargs["teacher_model"]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        is_item = labels != IGNORED
        with torch.no_grad():
            teacher_features = _features(self.teacher, inputs)[is_item]
        student = self.accelerator.unwrap_model(model)
        features = _features(student, inputs)[is_item]
        heads = (one.get_output_embeddings().weight for one in (student, self.teacher))
        return self.loss(features, next(heads), teacher_features, next(heads).detach(), labels[is_item])


def _features(model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    """The input of the head at all positions but the last, ``[B, L - 1, d]``."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
