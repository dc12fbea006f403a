"""Publishing the student: its model card, and what to do where the Hub does not take it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from torch import nn
from transformers import Trainer
from transformers.modelcard import TrainingSummary
from transformers.utils import logging

from .data.provenance import known_as
from .proposal import Proposal
from .tasks import base_model
from .version import __version__

if TYPE_CHECKING:
    from .trainer import DISDistillationTrainer

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
UNKNOWN = "unknown"
NOT_USED = "not used: every logit was computed"
# What an evaluation logs that says nothing about the student.
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class HubMixin(Trainer):
    """What a distilling trainer does of its own when it publishes: the card, and errors that say what to do."""

    def create_model_card(self, **summary: Any) -> None:
        """Writes the model card to ``README.md`` in ``output_dir``; see :func:`model_card`.

        Args:
            **summary: as for ``Trainer``, by name: ``language``, ``license``, ``tags``, ``model_name``,
                ``finetuned_from``, ``tasks``, ``dataset_tags``, ``dataset``, ``dataset_args``.
        """
        if self.is_world_process_zero():
            model_card(self, **summary).save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``Trainer``, but the student is saved before anything that needs the network.

        Raises:
            RuntimeError: if it could not be published; says why, what to do, and where the student is.
        """
        self.save_model(_internal_call=True)
        with explained(f"The trained student is saved in {self.args.output_dir}; then call push_to_hub() again."):
            check_upload(Path(self.args.output_dir))
            return super().push_to_hub(*args, **kwargs)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As in ``Trainer``, which calls it when it is made with ``push_to_hub=True``.

        Raises:
            RuntimeError: if there is no repository to publish to; says why and what to do.
        """
        if not self.args.push_to_hub:  # called by push_to_hub, which explains
            super().init_hf_repo(*args, **kwargs)
            return
        with explained("Training has not started; push_to_hub=False trains without publishing."):
            check_upload(Path(self.args.output_dir))
            super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Waits as ``Trainer`` does; a checkpoint's upload that failed in the background is told, not swallowed."""
        super()._finish_current_push()
        if self.hub_model_id is None or self.push_in_progress is None:
            return
        for job in self.push_in_progress.jobs:
            if job.exception() is not None:
                logger.warning(
                    f"a checkpoint was not published: {job.exception()}. {remedy(job.exception())} It is saved in "
                    f"{self.args.output_dir}; push_to_hub() publishes the student."
                )


def model_card(trainer: DISDistillationTrainer, **summary: Any) -> ModelCard:
    """The card of a trainer's student: teacher, data, every setting of the method, last probe and evaluation.

    What is not known is stated as unknown. Of a teacher or student in a local directory only the directory's name is
    given, as the card is public.

    Args:
        trainer: after training, or before.
        **summary: what the user says of it, see :meth:`HubMixin.create_model_card`.

    Raises:
        ValueError: if what was given makes no valid card; says what is wrong.
    """
    try:
        tags = list(dict.fromkeys([*_listed(summary.get("tags")), *trainer._tag_names]))
        said = TrainingSummary.from_trainer(trainer, **summary | {"tags": tags})
        return _rendered(trainer, said)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"no valid model card can be made with {summary} ({error}): give text, or lists of it, under the names "
            "that Trainer.create_model_card has"
        ) from error


def _rendered(trainer: DISDistillationTrainer, said: TrainingSummary) -> ModelCard:
    student = trainer.accelerator.unwrap_model(trainer.model)
    has_adapter = base_model(student) is not student
    tasks, dataset, dataset_tags = _listed(said.tasks), _listed(said.dataset), _listed(said.dataset_tags)
    metrics, metrics_step = _last_evaluation(trainer.state.log_history)
    measured = [
        EvalResult(
            task_type=task,
            dataset_type=", ".join(dataset_tags) or UNKNOWN,
            dataset_name=", ".join(dataset) or UNKNOWN,
            dataset_config=", ".join(_listed(said.dataset_args)) or None,
            metric_type=name,
            metric_value=value,
        )
        for task in tasks or [UNKNOWN]
        for name, value in metrics.items()
        # The table shows the others; the Hub's metadata takes numbers only.
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    data = ModelCardData(
        library_name="peft" if has_adapter else "transformers",
        language=said.language,
        license=said.license,
        base_model=said.finetuned_from or None,
        tags=said.tags,
        datasets=dataset_tags or None,
        pipeline_tag=tasks[0] if tasks else None,
        model_name=said.model_name,
        eval_results=measured or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        version=__version__,
        model_name=said.model_name,
        kind="an adapter for PEFT" if has_adapter else "an ordinary transformers model",
        loading=_loading(student, trainer.hub_model_id or said.model_name),
        facts=_cells(
            {
                **_teacher(trainer),
                "Data set": ", ".join(dataset) or UNKNOWN,
                **_settings(trainer),
            }
        ),
        probe=_last_probe(trainer.state.log_history),
        no_probe=_why_no_probe(trainer),
        metrics=_cells(metrics),
        metrics_step=metrics_step,
        hyperparameters=_cells(said.hyperparameters),
    )


def _loading(student: nn.Module, repo_id: str) -> str:
    """Markdown with the Python that loads a published student; an adapter goes onto the model it was trained on."""
    model = base_model(student)
    name = type(model).__name__
    module = "transformers" if hasattr(transformers, name) else type(model).__module__
    if model is student:
        lines = [f"from {module} import {name}", "", f'student = {name}.from_pretrained("{repo_id}")']
    else:
        adapted = f'{name}.from_pretrained("{known_as(model)[0] or UNKNOWN}")'
        lines = ["from peft import PeftModel", f"from {module} import {name}", ""]
        lines.append(f'student = PeftModel.from_pretrained({adapted}, "{repo_id}")')
    return "\n".join(["```python", *lines, "```"])


def _teacher(trainer: DISDistillationTrainer) -> dict[str, str]:
    if trainer.teacher_cache is None:
        name, revision = known_as(trainer.online_teacher.model)
        return {
            "Teacher": name or f"{UNKNOWN} ({type(trainer.online_teacher.model).__name__})",
            "Teacher's revision": revision or UNKNOWN,
        }
    header = trainer.teacher_cache.header
    return {
        "Teacher": f"{header.teacher['name']}, by its stored targets",
        "Teacher's revision": header.teacher["revision"] or UNKNOWN,
        "Stored targets": f"{header.depth} ranked classes and {header.tail_draws} of the tail ({header.tail})",
    }


def _settings(trainer: DISDistillationTrainer) -> dict[str, Any]:
    args, sampler = trainer.args, trainer.sampler
    kind = type(sampler.proposal)
    drawn = {
        "Classes drawn for each row (K)": sampler.num_sampled,
        "Classes of a tail that rows share (K_t)": sampler.num_shared,
        "Tails drawn a step": sampler.num_tails,
        "Classes updating the head for each row": sampler.num_updated or "all that were drawn",
        "Rank depth (m)": sampler.rank_depth,
        "Proposal": args.proposal if kind.__module__ == Proposal.__module__ else kind.__name__,
        "Sampler": sampler.sampler,
        "Steps on all classes before": args.get_exact_warmup_steps(trainer.state.max_steps),
    }
    if trainer.head_mode == "exact":
        drawn = dict.fromkeys(drawn, NOT_USED)
    head_rate = args.learning_rate if args.head_learning_rate is None else args.head_learning_rate
    return {
        "Classes (C)": trainer.num_classes,
        **drawn,
        "Temperature": args.temperature,
        "Weight of the hard labels": args.hard_label_weight,
        "Head mode": trainer.head_mode,
        "Head's learning rate": head_rate,
    }


def _last_probe(log_history: list[dict[str, float]]) -> dict[str, str] | None:
    """The last log with ``probe/*`` values, which are means since the log before it."""
    for log in reversed(log_history):
        if "probe/exact_kd_loss" in log:
            exact, sampled = log["probe/exact_kd_loss"], log["probe/sampled_kd_loss"]
            values = {"exact": exact, "sampled": sampled, "gap": sampled - exact}
            values |= {name: log[f"probe/{name}"] for name in ("cosine", "relative_error")}
            return {"step": str(log["step"]), **_cells(values)}
    return None


def _why_no_probe(trainer: DISDistillationTrainer) -> str:
    if trainer.head_mode == "exact":
        return "Nothing was sampled: every logit was computed."
    return f"{UNKNOWN.capitalize()}: they were not compared (`probe_steps={trainer.args.probe_steps}`)."


def _last_evaluation(log_history: list[dict[str, float]]) -> tuple[dict[str, float], int | None]:
    """The metrics of the last step with an evaluation, of all its evaluation sets, and that step."""
    logs = [log for log in log_history if any(name.startswith("eval_") for name in log)]
    metrics = {}
    for log in logs:
        if log["step"] == logs[-1]["step"]:
            metrics |= {name.removeprefix("eval_"): value for name, value in log.items() if name.startswith("eval_")}
    metrics = {name: value for name, value in metrics.items() if not name.endswith(NOT_METRICS)}
    return metrics, logs[-1]["step"] if logs else None


def _cells(values: dict[str, Any]) -> dict[str, str]:
    """Values as text that fits into a cell of a table."""
    texts = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return {name: " ".join(text.replace("|", "\\|").split()) for name, text in texts.items()}


def _listed(value: str | list[str | None] | None) -> list[str]:
    """Without None, which stands for the name of a data set that was made in memory."""
    return [one for one in ([value] if isinstance(value, str) else value or []) if one is not None]


def check_upload(folder: Path) -> None:
    """Makes sure that no other model, the teacher above all, is published with the student.

    Trainer uploads all of ``output_dir`` but what starts with ``_`` or ``checkpoint-``.

    Raises:
        ValueError: if a folder within holds weights.
    """
    inside = [file.relative_to(folder) for file in folder.glob("*/**/*") if file.suffix in (".safetensors", ".bin")]
    others = sorted(str(file) for file in inside if not file.parts[0].startswith(("_", "checkpoint-")))
    if others:
        raise ValueError(
            f"{folder} holds weights of other models, which would be published too: {', '.join(others)}; move them "
            "elsewhere, or into a folder whose name starts with _"
        )


@contextmanager
def explained(state: str) -> Iterator[None]:
    """Turns whatever fails inside into one error that says why nothing was published, what to do, and ``state``."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"the student was not published: {error}. {remedy(error)} {state}") from error


def remedy(error: BaseException) -> str:
    """What to do about an error of the Hub's client, which wraps some of the errors that it meets."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalTokenNotFoundError):
            return _LOG_IN
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            later = f"The Hub answered {status}: try again later." if status >= 500 or status == 429 else _CORRECT
            return {401: _LOG_IN, 403: _NO_RIGHT}.get(status, later)
        if isinstance(cause, (ConnectionError, HTTPError)):
            return "The Hub cannot be reached: check the network, and that HF_HUB_OFFLINE is not set."
        cause = cause.__cause__
    return _CORRECT


# Not hub_token: Trainer writes it into training_args.bin, which is published.
_LOG_IN = "You are not logged in: run `hf auth login`, or set HF_TOKEN to a token with write access."
_NO_RIGHT = "Your token may not write there: use one with write access, or another hub_model_id."
_CORRECT = "Correct this first."
