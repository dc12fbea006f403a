"""Checks of a student's output head: that it computes the model's logits, and that its gradients can be row-sparse."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_dis.head.fsdp_rows import is_plain_embedding
from hf_dis.head.sampled_linear import sampled_columns
from hf_dis.head.sharded import ShardedHead, sharded_heads
from hf_dis.head.switch import SampledHead
from hf_dis.items import Items
from hf_dis.models.after_head import AfterHead
from hf_dis.models.head_features import evaluating
from hf_dis.models.spread import is_fully_sharded, is_spread_by_rows
from hf_dis.models.ties import modules_with
from hf_dis.precision import check_sparse


@torch.no_grad()
def check_head(
    model: nn.Module, head: SampledHead, inputs: dict[str, Tensor], precision: torch.dtype | None = None
) -> None:
    """Compares the switched head with the full head on a few items; run once, at the first step.

    Model and random state are left as they were.

    Args:
        model: the student.
        head: the student's head.
        inputs: a few examples, without labels. Where logits are ``[B, S, C]`` the items are some of the tokens.
        precision: the narrowest type that the model computes in, if narrower than its logits; sets the tolerance.

    Raises:
        ValueError: if the student's logits are not those of the head at the same classes: another layer comes after
            the head, or the wrong layer was taken for it.
        FloatingPointError: if the logits are NaN or Inf.
    """
    layers = " and ".join(map(repr, head.layers))
    remedy = "another layer comes after it. Name the right head with head_name, or use head_mode='exact'"
    with evaluating(model), _random_state_kept(next(model.parameters()).device):
        full = model(**inputs).logits
        positions = None
        if full.dim() == 3:
            full = full.flatten(0, 1)
            positions = torch.arange(0, len(full), 1 + len(full) // 8, device=full.device)
            full = full[positions]
        item_ids, tail_ids = _classes_to_compare(*full.shape, full.device)
        try:
            with head.only(item_ids, tail_ids, positions):
                sampled = model(**inputs).logits
        except torch.OutOfMemoryError:
            raise  # a RuntimeError too, and no fault of the head
        except RuntimeError as error:
            raise ValueError(
                f"{type(model).__name__} cannot continue from the output of {layers} at sampled classes ({error}): "
                f"{remedy}"
            ) from error
    if not full.isfinite().all():
        raise FloatingPointError(
            f"{type(model).__name__} returns NaN or Inf for the first examples. Check these inputs and its weights: "
            "classes that the model masks after its head need head_mode='exact'"
        )
    expected = sampled_columns(full, item_ids, tail_ids)
    tolerance = 8 * torch.finfo(precision or full.dtype).eps * float(full.abs().max().clamp_min(1))
    if sampled.shape != expected.shape or not torch.allclose(sampled, expected, rtol=0, atol=tolerance):
        gap = (
            "shapes differ"
            if sampled.shape != expected.shape
            else f"off by up to {(sampled - expected).abs().max():.3g}"
        )
        raise ValueError(
            f"{type(model).__name__} does not return the output of {layers} as its logits ({gap}): {remedy}"
        )


@torch.no_grad()
def splits_at_head(model: nn.Module, head: SampledHead, inputs: dict[str, Tensor], after_head: AfterHead) -> bool:
    """Returns True if a model's logits follow from the input of its head, so that a loss can compute them from there.

    The head has to be one ``nn.Linear``, whole, sharded or tensor-parallel, called once and without hooks. The logits
    of a few examples are compared. Model and random state are left as they were.

    Args:
        model: the student.
        head: the student's head.
        inputs: a few examples, without labels.
        after_head: the operations after the head; the model's own bias among them is read from the head.
    """
    if len(head.layers) != 1 or not _is_plain_linear(head.module):
        return False
    with evaluating(model), _random_state_kept(next(model.parameters()).device):
        full = model(**inputs).logits
        items = Items(len(full))
        if full.dim() == 3:
            full = full.flatten(0, 1)
            positions = torch.arange(len(full), device=full.device)
            items = Items(items.num_examples, positions=positions, length=len(full) // items.num_examples)
        try:
            holding = head.hold_in_training(items)
            model(**inputs)
        except torch.OutOfMemoryError:
            raise  # a RuntimeError too, and no fault of the model
        except (RuntimeError, ValueError, IndexError):
            return False  # of a model that needs all classes, or an item for every token
        finally:
            head.clear()
    if holding.dtype == torch.float16:
        return True  # all classes were computed, as they are in training
    if holding.features is None or holding.features.shape != (len(full), head.module.in_features):
        return False
    if head.shard is None and not is_spread_by_rows(head.module.weight):
        weight, bias = head.weight_and_bias()
        values = (None if one is None else one.to(holding.dtype) for one in (holding.features, weight, bias))
        logits = F.linear(*values)
    else:
        logits = head.module(holding.features)
    logits = after_head._replace(bias=None)(logits)
    tolerance = 16 * max(torch.finfo(full.dtype).eps, torch.finfo(holding.dtype).eps)
    largest = float(full.abs().nan_to_num(0, 0, 0).max().clamp_min(1))
    return torch.allclose(logits.to(full.dtype), full, rtol=0, atol=tolerance * largest, equal_nan=True)


def check_row_sparse_head(student: nn.Module, names: Sequence[str], is_sharded: bool | Literal["fsdp2"]) -> None:
    """Checks that the gradients of a head can be row-sparse.

    Args:
        student: the model that is trained.
        names: the linear layers of its output head.
        is_sharded: the student's parameters are sharded by FSDP or DeepSpeed; ``"fsdp2"``: by ``fully_shard``.

    Raises:
        ValueError: if torch is too old or has no sparse tensors for the device. Or if DeepSpeed or FSDP of version 1
            shards the head, or its weight is tied to a layer with dense gradients.
    """
    if torch.__version__ < (2, 14):
        raise ValueError(
            f"row_sparse_head is set, but torch is {torch.__version__}, which has no norm of sparse gradients: it "
            "needs torch 2.14 or newer; or set row_sparse_head=False"
        )
    if is_sharded and is_sharded != "fsdp2" and not sharded_heads(student):
        raise ValueError(
            "row_sparse_head is set, but DeepSpeed and FSDP of version 1 shard dense gradients only: set it to False, "
            "or use FSDP2 or plain data parallelism. In a loop of your own call fully_shard before build_distiller"
        )
    head = SampledHead(student, names)
    for parameter in head.parameters():
        check_sparse(parameter.device, "row_sparse_head is set", "set row_sparse_head=False")
    for name, layer in head.layers.items():
        if layer.weight.requires_grad:
            for other, module in modules_with(student, layer.weight).items():
                _check_tied(name, other, module, is_spread=is_sharded == "fsdp2" or is_spread_by_rows(layer.weight))


def check_sharded_head(
    student: nn.Module, teacher: nn.Module | None, names: Sequence[str], is_sharded: bool = False
) -> None:
    """Checks that a student whose output head is sharded over the processes can be trained.

    A student whose head is whole passes.

    Args:
        student: the model that is trained.
        teacher: its teacher, or None.
        names: the linear layers of the student's output head.
        is_sharded: the student's parameters are sharded by FSDP or DeepSpeed too.

    Raises:
        ValueError: if something else is sharded too, or the sharded head is not all of the output head. Or if the
            processes are not those that hold the head, or the head of the teacher alone is sharded. Or if FSDP
            shards the teacher beside its sharded head.
    """
    heads = sharded_heads(student)
    theirs = {} if teacher is None else sharded_heads(teacher)
    if theirs and is_fully_sharded(teacher):
        raise ValueError(
            f"the head {', '.join(theirs)} of the teacher is sharded, and FSDP has sharded the teacher too: leave "
            "shard_head or fully_shard of the teacher out"
        )
    if theirs and not heads:
        raise ValueError(
            f"the head {', '.join(theirs)} of the teacher is sharded, and the student's is whole: shard both, keep "
            "the teacher whole, or train from a cache of its targets"
        )
    if not heads:
        return
    spread_twice = any(isinstance(one, DTensor) for head in heads.values() for one in head.parameters())
    if spread_twice or (is_sharded and not is_fully_sharded(student)):
        raise ValueError(
            f"the head {', '.join(heads)} is sharded, and FSDP or DeepSpeed shards this head once more: give "
            "fully_shard its parameters as ignored_params, or use plain data parallelism"
        )
    if tuple(heads) != tuple(names):
        raise ValueError(
            f"the sharded layers are {', '.join(heads)} and the output head is {', '.join(names) or 'not known'}: "
            "both have to be the same, without adapters; name the head with head_name, or leave PEFT out"
        )
    (head,) = heads.values()
    processes = dist.get_world_size() if dist.is_initialized() else 1
    held = head.shard.number if len(head.shard) < head.out_features else 1
    if held != processes:
        raise ValueError(
            f"the sharded head is held by {held} processes and the run has {processes}: call shard_head after the "
            "processes are joined, on all of them"
        )


def _check_tied(head: str, other: str, module: nn.Module, is_spread: bool) -> None:
    """Checks that a module with the head's weight can give it a row-sparse gradient, spread over processes or not."""
    if other == head:
        return
    if not isinstance(module, nn.Embedding):
        raise ValueError(
            f"row_sparse_head is set, but the weight of the head {head} is tied to {other}, and the "
            f"{type(module).__name__} gives it a dense gradient: set row_sparse_head=False, or untie it"
        )
    if module.scale_grad_by_freq:
        raise ValueError(
            f"row_sparse_head is set, but the embedding {other}, to which the head {head} is tied, has "
            "scale_grad_by_freq, of which torch has no sparse gradient: set row_sparse_head=False, or "
            f"{other}.scale_grad_by_freq = False"
        )
    if is_spread and not is_plain_embedding(module):
        raise ValueError(
            f"row_sparse_head is set, but the head {head} is spread over processes and tied to {other}, a "
            f"{type(module).__name__} that does more than look rows up: set row_sparse_head=False, or untie it"
        )


def _is_plain_linear(layer: nn.Module) -> bool:
    """Returns True if a layer computes ``h Wᵀ + b`` and nothing else, from a weight on this process."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if type(layer).forward not in (nn.Linear.forward, ShardedHead.forward) or any(hooks):
        return False
    # transformers gives a tensor-parallel layer a forward of its own, which sends the features and joins the logits.
    is_own = "forward" not in vars(layer) and type(layer.weight) in (nn.Parameter, Tensor)
    return layer.weight.is_floating_point() and (is_own or is_spread_by_rows(layer.weight))


def _classes_to_compare(num_items: int, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Chooses classes of each item and a tail, together not C columns.

    With C columns a bias of all classes, added after the head, would fit the shape and pass unseen while it is zero.
    """
    columns = torch.arange(min(4, num_classes), device=device)
    item_ids = (columns * 7 + torch.arange(num_items, device=device)[:, None]) % num_classes
    tail_ids = (columns * 3 + 1) % num_classes
    return item_ids, (tail_ids if 2 * len(columns) != num_classes else tail_ids[1:])[None]


def _random_state_kept(device: torch.device) -> AbstractContextManager:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
