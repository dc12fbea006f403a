"""The hooks of a distilling trainer that save: checkpoints, the model card, the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_dis.distiller import Distiller
from hf_dis.head.sharded import sharded_heads
from hf_dis.report.callback import DISReportCallback
from hf_dis.trainer import checkpoints, manifest, publishing, sharded_files
from hf_dis.trainer.card import model_card

if TYPE_CHECKING:
    from hf_dis.report.card_figures import CardFigure


class SavingHooks:
    """Saves, restores and publishes what :class:`hf_dis.DISTrainerMixin` adds to its host.

    The method's name, paper and tags, which the model card states, have the names that they have in TRL's trainers.
    """

    distiller: Distiller
    _name = "DIS"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Accelerating Large Scale Knowledge Distillation via Dynamic Importance Sampling",
        "id": "1812.00914",
        "citation": """\
@article{li2018accelerating,
  title = {Accelerating Large Scale Knowledge Distillation via Dynamic Importance Sampling},
  author = {Li, M. and Zuo, T. and Li, R. and White, M. and Zheng, W.-S.},
  journal = {arXiv preprint arXiv:1812.00914},
  year = {2018}
}""",
    }
    _tag_names: Sequence[str] = ("hf_dis", "knowledge-distillation", "dynamic-importance-sampling")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the host's; ``resume_from_checkpoint=True`` takes the newest *whole* checkpoint of ``output_dir``.

        Raises:
            ValueError: if the named checkpoint, or every checkpoint of ``output_dir``, is torn; names the file.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoints.find_whole(resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            manifest.mark_unfinished(os.path.join(self._get_output_dir(trial), folder))
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As the host's, and each process adds its rows of a sharded head."""
        output_dir = output_dir or self.args.output_dir
        if not sharded_heads(self.model):
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, sharded_files.without_heads(self.model))
        sharded_files.save_head(self.model, output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        checkpoints.save_sampler(self.distiller.sampler, output_dir)
        for head in sharded_heads(self.model).values():
            sharded_files.save_moments(head, self.optimizer, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """As the host's, and writes the manifest once every process has saved its files.

        The random state is the last file that each process saves. The host writes ``trainer_state.json`` and removes
        older checkpoints afterwards.
        """
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        run = checkpoints.describe_run(self)  # on every process: a teacher that FSDP2 shards is read by all of them
        if self.args.should_save:
            manifest.write_manifest(output_dir, run)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the host's, which would add a step to a run that had ended and is resumed."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        restore = checkpoints.compare_runs(self, checkpoint)
        if checkpoint is not None and self.is_fsdp_enabled and self.distiller.row_sparse:
            self._start_state_of_rows()
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for head in sharded_heads(self.model).values():
                sharded_files.load_moments(head, self.optimizer, checkpoint)
        restore(self.distiller.sampler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if sharded_heads(model):
            sharded_files.load_model(model, resume_from_checkpoint)
        elif checkpoints.saves_plain_weights(self, model):
            checkpoints.load_as_from_pretrained(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if sharded_heads(self.model):
            sharded_files.load_model(self.model, self.state.best_model_checkpoint)
        elif checkpoints.saves_plain_weights(self, self.model):
            checkpoints.load_as_from_pretrained(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # Publishing

    def create_model_card(self, **summary: Any) -> None:
        """Writes the model card to ``README.md`` in ``output_dir``; see :func:`hf_dis.trainer.card.model_card`.

        With :class:`hf_dis.DISReportCallback` two figures of the report are plotted into the folder ``report``. The
        card shows these figures.

        Args:
            **summary: as for ``Trainer``, by name: ``language``, ``license``, ``tags``, ``model_name``,
                ``finetuned_from``, ``tasks``, ``dataset_tags``, ``dataset``, ``dataset_args``.
        """
        if self.is_world_process_zero():
            model_card(self, figures=self._card_figures(), **summary).save(Path(self.args.output_dir) / "README.md")

    def _card_figures(self) -> list[CardFigure]:
        """Plots the figures of the card; none without a report."""
        callbacks = self.callback_handler.callbacks
        report = next((one for one in callbacks if isinstance(one, DISReportCallback)), None)
        return [] if report is None else report.card_figures(Path(self.args.output_dir), self.state.log_history)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's, but saves the student before anything that needs the network.

        Raises:
            RuntimeError: if the student could not be published; names the cause, the remedy and the student's folder.
        """
        self.save_model(_internal_call=True)
        with publishing.explained(
            f"The trained student is saved in {self.args.output_dir}; then call push_to_hub() again."
        ):
            publishing.check_upload(Path(self.args.output_dir))
            return super().push_to_hub(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As the host's, which calls this method in its own set-up if ``push_to_hub`` is True.

        Raises:
            RuntimeError: if there is no repository to publish to; names the cause and the remedy.
        """
        if not self.args.push_to_hub:  # called by push_to_hub, which explains errors itself
            super().init_hf_repo(*args, **kwargs)
            return
        with publishing.explained("Training has not started; push_to_hub=False trains without publishing."):
            publishing.check_upload(Path(self.args.output_dir))
            super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """As the host's, and warns of each checkpoint whose upload in the background failed."""
        super()._finish_current_push()
        if self.hub_model_id is not None and self.push_in_progress is not None:
            publishing.report_failures(self.push_in_progress.jobs, self.args.output_dir)
