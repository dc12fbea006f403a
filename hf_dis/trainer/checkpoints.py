"""Checkpoints: the sampler's state of each process, and weights under the names that the model gives them.

A resumed run repeats the uninterrupted run. A warning or an error is given where it cannot, because a checkpoint is
torn or the run was set up differently. docs/reliability.md has the rules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_dis.arguments import DISArguments
from hf_dis.distributed.processes import of_first_process, process_index
from hf_dis.head.tensor_parallel import is_tensor_parallel
from hf_dis.models.spread import is_fully_sharded
from hf_dis.sampling.class_memory import CLASS_STATE
from hf_dis.sampling.sampler import ClassSampler
from hf_dis.trainer.manifest import MANIFEST, check_whole, last_whole_checkpoint, read_manifest
from hf_dis.trainer.row_files import read_rows, write_rows

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin

logger = logging.get_logger(__name__)

STATE_FILE, CLASS_FILE = "dis_state_{rank}.safetensors", "dis_state_classes.safetensors"


def find_whole(asked: str | bool, output_dir: str) -> str:
    """The checkpoint to resume from.

    Args:
        asked: a folder, or True for the newest whole checkpoint of ``output_dir``.
        output_dir: of the training.

    Raises:
        ValueError: if the checkpoint, or every checkpoint of ``output_dir``, is torn; names the file.
    """
    if asked is not True:
        check_whole(asked)
        return asked

    def look() -> Any:
        try:
            return last_whole_checkpoint(output_dir)
        except ValueError as error:
            return error

    # One process looks, so that all processes resume from the same step.
    found = of_first_process(look)
    if isinstance(found, ValueError):
        raise found
    folder, torn = found
    for newer, wrong in torn.items():
        _warn(f"{newer} is torn and is not resumed from: {wrong}. Resuming from {folder}")
    return folder


def save_sampler(sampler: ClassSampler, output_dir: str) -> None:
    """Saves the state of this process's sampler; processes that keep classes together write one file of these."""
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, STATE_FILE.format(rank=process_index()))
    state, proposal = sampler.state_dict(), sampler.proposal
    if proposal.shard is not None:
        rows = {name: state.pop(name) for name in CLASS_STATE if name in state}
        write_rows(os.path.join(output_dir, CLASS_FILE), rows, proposal.shard, proposal.num_classes)
    save_file({name: value.contiguous() for name, value in state.items()}, f"{path}.part")
    os.replace(f"{path}.part", path)


def describe_run(trainer: DISTrainerMixin) -> dict[str, Any]:
    """The properties of a trainer's run that a resumed run should have too, for JSON."""
    args, distiller = trainer.args, trainer.distiller
    settings = {one.name: getattr(distiller.arguments, one.name) for one in fields(DISArguments)}
    return {
        "processes": args.world_size,
        "examples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "settings": settings | {"head_mode": distiller.mode},
        "teacher": distiller.teacher.fingerprint,
    }


def compare_runs(trainer: DISTrainerMixin, checkpoint: str | None) -> Callable[[ClassSampler], None]:
    """Warns of each difference between a run and the run that saved its checkpoint.

    Returns:
        a function that restores a sampler from the checkpoint, to be called once the optimizer's state is loaded.

    Raises:
        ValueError: if the optimizer's state cannot be continued with a changed setting.
    """
    saved = None if checkpoint is None else read_manifest(checkpoint)
    if saved is not None:
        for difference in differences(saved, describe_run(trainer)):
            _warn(difference)

    def restore(sampler: ClassSampler) -> None:
        if saved is not None:
            restore_sampler(sampler, checkpoint, saved["processes"], trainer.args.seed)
        elif checkpoint is not None:
            _warn(
                f"{checkpoint} has no {MANIFEST}: another trainer saved it, or save_only_model was set. The proposal "
                "and its random samples start again, so this run will not repeat the interrupted run"
            )

    return restore


def restore_sampler(sampler: ClassSampler, checkpoint: str, processes: int, seed: int) -> None:
    """Restores the state of this process's sampler.

    The proposal is the same on all processes. Each process has a random generator of its own: a process that did not
    take part in the saved run starts its generator from the seed.

    Args:
        sampler: of this process.
        checkpoint: the folder.
        processes: of the run that saved the checkpoint.
        seed: of the training.
    """
    rank = process_index()
    is_new = rank >= processes
    state = load_file(os.path.join(checkpoint, STATE_FILE.format(rank=0 if is_new else rank)))
    shard, rows = sampler.proposal.shard, os.path.join(checkpoint, CLASS_FILE)
    if shard is not None and os.path.isfile(rows):
        state |= read_rows(rows, shard, sampler.proposal.num_classes)
    if is_new:
        state["generator"] = sampler.generator.manual_seed(seed + rank).get_state()
    shapes, saved = ({name: tuple(v.shape) for name, v in s.items()} for s in (sampler.state_dict(), state))
    if shapes == saved:
        sampler.load_state_dict(state)
    else:
        _warn(f"the proposal starts again: its state was saved as {saved}, and these settings need {shapes}")
        sampler.generator.set_state(state["generator"])


def _warn(message: str) -> None:
    if process_index() == 0:
        logger.warning(message)


def saves_plain_weights(trainer: DISTrainerMixin, model: nn.Module) -> bool:
    """Returns True if a checkpoint holds the model's weights as ``save_pretrained`` writes them."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return isinstance(model, PreTrainedModel) and not sharded


def load_as_from_pretrained(model: PreTrainedModel, checkpoint: str) -> None:
    """Loads a checkpoint's weights under the names that the model gives them.

    Some models (ViT, Swin, Dinov2, ...) save their weights under other names than their modules have. Trainer would
    load the file's names as they are, warn, and continue with a random encoder.
    """
    # Each process reads its part of a model that transformers spread.
    is_spread = is_tensor_parallel(model) or is_fully_sharded(model)
    spread = {"distributed_config": model.config.distributed_config} if is_spread else {}
    saved = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype, **spread)
    model.load_state_dict(saved.state_dict())


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between a run and the run that saved its checkpoint, as messages with both values.

    Args:
        saved: of the checkpoint: ``processes``, ``examples_per_step``, ``settings`` and ``teacher``.
        now: the same of this run.

    Raises:
        ValueError: if the optimizer's state cannot be continued with a changed setting.
    """
    messages = _changed_settings(saved["settings"], now["settings"])
    if saved["teacher"] != now["teacher"]:
        messages.append(
            f"teacher_model was a different one when the checkpoint was saved: its fingerprint was {saved['teacher']} "
            f"and is {now['teacher']} now; the run continues with the latter"
        )
    if saved["processes"] != now["processes"]:
        messages.append(
            f"the checkpoint was saved by {saved['processes']} processes and is resumed by {now['processes']}: the "
            "proposal continues, and a new process samples from a seed of its own. Each process has other items "
            "than before, so the run does not repeat the samples of the interrupted run"
        )
    examples, examples_now = saved.get("examples_per_step", now["examples_per_step"]), now["examples_per_step"]
    if examples != examples_now:
        messages.append(
            f"an optimizer step had {examples} examples when the checkpoint was saved and has {examples_now} now: the "
            "run continues at the same step, with other examples than the interrupted run. Keep "
            "per_device_train_batch_size x gradient_accumulation_steps x processes to continue with the same examples"
        )
    return messages


def _changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    messages = []
    for name, value in now.items():
        before = saved.get(name, value)
        if before == value:
            continue
        told = f"{name} was {before!r} when the checkpoint was saved and is {value!r} now"
        if name == "row_sparse_head" or (name == "head_learning_rate" and None in (before, value)):
            raise ValueError(
                f"{told}, which the optimizer's state cannot be continued with: set it as it was, or load the "
                "checkpoint as the student of a new run"
            )
        goes_on = "the former, which the optimizer's state holds" if name == "head_learning_rate" else "the latter"
        messages.append(f"{told}: the run continues with {goes_on}")
    return messages
