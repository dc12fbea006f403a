"""DISReportCallback records a running distillation, and writes a page about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dis.report import clock, facts, records
from hf_dis.report.advice import Log
from hf_dis.report.snapshots import SNAPSHOTS, snapshot
from hf_dis.sampling.proposal import DISProposal

if TYPE_CHECKING:
    from hf_dis.report.card_figures import CardFigure
    from hf_dis.trainer.trainer import DISDistillationTrainer


class DISReportCallback(TrainerCallback):
    """Writes ``report.html`` to ``<output_dir>/report`` at every evaluation and at the end of training.

    The page loads nothing from elsewhere. ``records.jsonl`` beside it grows with every log, so that
    ``hf-dis report <output_dir>`` makes the page of a run that died. A resumed training continues the records of its
    folder, and another training replaces them. Only the main process writes. At every tenth step the parts of a step
    are timed, which waits for an accelerator. The loggers of ``report_to`` get the logs without this callback.

    Args:
        trainer: the trainer that this callback is added to: ``trainer.add_callback(DISReportCallback(trainer))``.

    Raises:
        ImportError: if matplotlib is not installed.
    """

    def __init__(self, trainer: DISDistillationTrainer):
        try:
            from hf_dis.report import card_figures, page
        except ImportError as error:
            raise ImportError(
                f"DISReportCallback plots with matplotlib, which cannot be imported ({error}): "
                "pip install 'matplotlib>=3.9'"
            ) from error
        self._page, self._card_figures, self.trainer = page, card_figures, trainer
        self._clock: clock.StepClock | None = None
        self._next_snapshot = 0.0

    # Records

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins new records, or continues those up to the step that the training resumes from."""
        if not state.is_world_process_zero:
            return
        path = self._records(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = records.before(records.read(path), state.global_step) if state.global_step and path.is_file() else []
        if not kept:
            kept = [_log(log, log["step"]) for log in state.log_history]
        records.replace(path, [*kept, self._facts(args, state)])
        self._next_snapshot = 0.0
        if self._clock is not None:
            self._clock.close()  # of a training that died
        self._clock = None
        if not args.torch_compile:  # a hook would break up the compiled forward
            self._clock = clock.StepClock(self.trainer.distiller.student, args.device)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Log | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends a log, and from time to time the proposal and the times of a step."""
        if not state.is_world_process_zero:
            return
        path, step, values = self._records(args), state.global_step, dict(logs or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        is_training = "loss" in values
        if is_training:
            values["logits_per_item"] = facts.logits_per_item(self.trainer.distiller, state)
        found = [] if path.is_file() else [self._facts(args, state)]  # an evaluation without a training
        found.append(_log(values, step))
        proposal = self.trainer.distiller.sampler.proposal
        is_due = is_training and step >= self._next_snapshot
        if is_due and isinstance(proposal, DISProposal) and proposal.ranks.observed:
            found.append(records.record("proposal", step=step) | snapshot(proposal.ranks))
            self._next_snapshot = step + state.max_steps / SNAPSHOTS
        if is_training and self._clock is not None and (parts := self._clock.means()):
            found.append(records.record("seconds", step=step, parts=parts))
        records.append(path, found)
        self._rest(state)

    # Pages

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the page of all records so far."""
        if state.is_world_process_zero:
            self.write(self._records(args).parent, Path(args.output_dir).resolve().name)
        self._rest(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records the end of training, and writes the page."""
        if self._clock is not None:
            self._clock.close()
            self._clock = None
        if state.is_world_process_zero:
            records.append(self._records(args), [records.record("end", step=state.global_step)])
            self.write(self._records(args).parent, Path(args.output_dir).resolve().name)

    def write(self, folder: Path, name: str) -> None:
        """Writes the page from the records of a folder.

        Args:
            folder: of the report.
            name: of the run.
        """
        run = records.to_run(records.read(folder / records.RECORDS), name)
        (folder / records.PAGE).write_text(self._page.page([run]), encoding="utf-8")

    def card_figures(self, folder: Path, logs: Sequence[Log]) -> list[CardFigure]:
        """Plots the figures of the model card; see :func:`hf_dis.report.card_figures.save_card_figures`."""
        return self._card_figures.save_card_figures(folder, logs)

    # Times

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begins a step of the clock."""
        if self._clock is not None:
            self._clock.begin(state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a backward of the accumulation."""
        if self._clock is not None:
            self._clock.mark(clock.BACKWARD)

    on_pre_optimizer_step = on_substep_end

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the optimizer's step."""
        if self._clock is not None:
            self._clock.mark(clock.OPTIMIZER)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Ends a step of the clock."""
        if self._clock is not None:
            self._clock.end()
        self._rest(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leaves the time of saving out of that of the data."""
        self._rest(state)

    def _rest(self, state: TrainerState) -> None:
        if self._clock is not None:
            self._clock.rest(state.global_step)

    def _records(self, args: TrainingArguments) -> Path:
        return Path(args.output_dir) / records.FOLDER / records.RECORDS

    def _facts(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        found = facts.run_facts(self.trainer.distiller, args, state)
        return records.record("run", step=state.global_step, facts=found)


def _log(values: Log, step: int) -> dict[str, Any]:
    return records.record("log", step=step, values={name: value for name, value in values.items() if name != "step"})
