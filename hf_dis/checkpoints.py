"""Checkpoints: the sampler's state, process by process, and weights under the names that the model gives them.

A resumed run is the uninterrupted one; where it cannot be, because a checkpoint is torn or the run was set up
differently, it says so. docs/reliability.md has the rules.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from .manifest import MANIFEST, check_whole, last_whole_checkpoint, mark_unfinished, read_manifest, write_manifest

if TYPE_CHECKING:
    from .config import DISConfig
    from .sampler import ClassSampler
    from .teachers import OnlineTeacher

logger = logging.get_logger(__name__)

STATE_FILE = "dis_state_{rank}.safetensors"


class CheckpointMixin(Trainer):
    """What a distilling trainer saves and restores besides what ``Trainer`` does."""

    args: DISConfig
    head_mode: str
    sampler: ClassSampler
    teacher: OnlineTeacher

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in ``Trainer``; ``resume_from_checkpoint=True`` takes the newest *whole* checkpoint of ``output_dir``.

        Raises:
            ValueError: if the checkpoint that is named, or every one there is, is torn; says which file is.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, asked: str | bool) -> str:
        if asked is not True:
            check_whole(asked)
            return asked
        # One process looks, so that all of them resume from the same step.
        found: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                found = [last_whole_checkpoint(self.args.output_dir)]
            except ValueError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        folder, torn = found[0]
        for newer, wrong in torn.items():
            self._warn(f"{newer} is torn and is not resumed from: {wrong}. Resuming from {folder}")
        return folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            mark_unfinished(os.path.join(self._get_output_dir(trial), folder))
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        path = os.path.join(output_dir, STATE_FILE.format(rank=self.args.process_index))
        state = {name: value.contiguous() for name, value in self.sampler.state_dict().items()}
        save_file(state, f"{path}.part")
        os.replace(f"{path}.part", path)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that a process saves of its own; ``trainer_state.json`` and the removal of older checkpoints
        come after it, so here the processes wait for each other."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(output_dir, self._run())

    def _run(self) -> dict[str, Any]:
        """What a resumed run should have in common with this one."""
        inherited = {field.name for field in fields(TrainingArguments)}
        own = [field.name for field in fields(self.args) if field.name not in inherited]
        settings = {name: getattr(self.args, name) for name in own} | {"head_mode": self.head_mode}
        return {
            "processes": self.args.world_size,
            "examples_per_step": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "settings": settings,
            "teacher": self.teacher.fingerprint,
        }

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in ``Trainer``, which would add a step to a run that had ended and is resumed."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        saved = None if checkpoint is None else read_manifest(checkpoint)
        if saved is not None:
            for difference in differences(saved, self._run()):
                self._warn(difference)
        super()._load_optimizer_and_scheduler(checkpoint)
        if saved is not None:
            self._restore_sampler(checkpoint, saved["processes"])
        elif checkpoint is not None:
            self._warn(
                f"{checkpoint} has no {MANIFEST}: another trainer saved it, or save_only_model was set. The proposal "
                "and its random draws start anew, so this run will not repeat the interrupted one"
            )

    def _restore_sampler(self, checkpoint: str, processes: int) -> None:
        """The proposal is the same on all processes; each has a generator of its own, or starts it if it is new."""
        rank = self.args.process_index
        is_new = rank >= processes
        state = load_file(os.path.join(checkpoint, STATE_FILE.format(rank=0 if is_new else rank)))
        if is_new:
            state["generator"] = self.sampler.generator.manual_seed(self.args.seed + rank).get_state()
        shapes, saved = ({name: tuple(v.shape) for name, v in s.items()} for s in (self.sampler.state_dict(), state))
        if shapes == saved:
            self.sampler.load_state_dict(state)
        else:
            self._warn(f"the proposal starts anew: its state was saved as {saved}, and these settings need {shapes}")
            self.sampler.generator.set_state(state["generator"])

    def _warn(self, message: str) -> None:
        if self.args.process_index == 0:
            logger.warning(message)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if self._saves_plain_weights(model):
            _load_as_from_pretrained(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._saves_plain_weights(self.model):
            _load_as_from_pretrained(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _saves_plain_weights(self, model: nn.Module) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(model, PreTrainedModel) and not sharded


def _load_as_from_pretrained(model: PreTrainedModel, checkpoint: str) -> None:
    """Loads a checkpoint's weights under the names that the model gives them.

    Trainer loads the file's names as they are, and where a model saves under other names than it has (ViT, Swin,
    Dinov2, ...) goes on with a random encoder and only a warning.
    """
    saved = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what a run differs from the one that saved its checkpoint: messages, each with both values.

    Args:
        saved: of the checkpoint: ``processes``, ``examples_per_step``, ``settings`` and ``teacher``.
        now: of this run.

    Raises:
        ValueError: if the optimizer's state cannot be continued with what changed.
    """
    messages = []
    for name, value in now["settings"].items():
        before = saved["settings"].get(name, value)
        if before == value:
            continue
        told = f"{name} was {before!r} when the checkpoint was saved and is {value!r} now"
        if name == "row_sparse_head" or (name == "head_learning_rate" and None in (before, value)):
            raise ValueError(
                f"{told}, which the optimizer's state cannot be continued with: set it as it was, or load the "
                "checkpoint as the student of a new run"
            )
        goes_on = "the former, which the optimizer's state holds" if name == "head_learning_rate" else "the latter"
        messages.append(f"{told}: the run goes on with {goes_on}")
    if saved["teacher"] != now["teacher"]:
        messages.append(
            f"teacher_model was another one when the checkpoint was saved: its fingerprint was {saved['teacher']} and "
            f"is {now['teacher']} now; the run goes on with the latter"
        )
    if saved["processes"] != now["processes"]:
        messages.append(
            f"the checkpoint was saved by {saved['processes']} processes and is resumed by {now['processes']}: the "
            "proposal goes on, a process that was not there before draws from its own seed, and each draws for other "
            "rows than before, so the run does not repeat the interrupted one's draws"
        )
    examples, examples_now = saved.get("examples_per_step", now["examples_per_step"]), now["examples_per_step"]
    if examples != examples_now:
        messages.append(
            f"an optimizer step had {examples} examples when the checkpoint was saved and has {examples_now} now: the "
            "run goes on at the same step, with other examples than the interrupted one. Keep "
            "per_device_train_batch_size x gradient_accumulation_steps x processes to go on with the same"
        )
    return messages
