"""The model card of a distilled student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.modelcard import TrainingSummary
from transformers.utils import logging

from hf_dis.models.provenance import class_name, hub_name, is_hub_name, known_as, known_license
from hf_dis.models.tasks import base_model
from hf_dis.version import __version__

if TYPE_CHECKING:
    from hf_dis.report.card_figures import CardFigure
    from hf_dis.trainer.mixin import DISTrainerMixin

logger = logging.get_logger(__name__)


TEMPLATE = Path(__file__).with_name("model_card_template.md")
# A proposal from elsewhere is the user's own and is named by its class.
PACKAGE = "hf_dis."
UNKNOWN = "unknown"
NOT_USED = "not used: every logit was computed"
# Logs of an evaluation that do not describe the student.
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def model_card(trainer: DISTrainerMixin, figures: Sequence[CardFigure] = (), **summary: Any) -> ModelCard:
    """The card of a trainer's student: teacher, data, every setting of the method, last probe and evaluation.

    A fact that is not known is stated as unknown. The card is public, so the path of a local teacher or student is
    shortened to the name of its directory. The licence is that of the student's checkpoint unless one is given. A
    teacher of the Hub is a tag, ``teacher:`` and its name, since the Hub has no relation of a student to its teacher.

    Args:
        trainer: after training, or before.
        figures: files beside the card that it shows.
        **summary: facts that the user adds; see :meth:`DISTrainerMixin.create_model_card`.

    Raises:
        ValueError: if no valid card can be made with ``summary``; names the cause.
    """
    try:
        student = base_model(trainer.accelerator.unwrap_model(trainer.model))
        known = {} if summary.get("license") else known_license(student)
        given = {"license": known.get("license"), "tags": _tags(trainer, student, summary.get("tags"))}
        said = TrainingSummary.from_trainer(trainer, **summary | {name: one for name, one in given.items() if one})
        said.finetuned_from = summary.get("finetuned_from") or hub_name(student)
        return _rendered(trainer, said, known, figures)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"no valid model card can be made with {summary} ({error}): give text, or lists of it, under the names "
            "that Trainer.create_model_card has"
        ) from error


def _tags(trainer: DISTrainerMixin, student: nn.Module, given: Any) -> list[str]:
    """Tags that are given, of the method, of the loggers (Trackio's is among the model's), and of the teacher."""
    model_tags = student.model_tags if isinstance(student, PreTrainedModel) else None
    if trainer.teacher_cache is None:
        teacher = known_as(trainer.distiller.online_teacher.model)
    else:
        teacher = (trainer.teacher_cache.header.teacher[name] for name in ("name", "revision"))
    name, revision = teacher
    teacher_tags = [f"teacher:{name}"] if is_hub_name(name, revision) else []
    return list(dict.fromkeys([*_listed(given), *trainer._tag_names, *(model_tags or ()), *teacher_tags]))


def _measured(said: TrainingSummary, metrics: dict[str, float]) -> list[EvalResult]:
    """The metrics as the Hub's ``model-index`` has them."""
    tasks, dataset, dataset_tags = _listed(said.tasks), _listed(said.dataset), _listed(said.dataset_tags)
    return [
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
        # The Hub's metadata takes finite numbers only; the table of the card shows all metrics.
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _rendered(
    trainer: DISTrainerMixin, said: TrainingSummary, known: dict[str, str], figures: Sequence[CardFigure]
) -> ModelCard:
    student = trainer.accelerator.unwrap_model(trainer.model)
    has_adapter = base_model(student) is not student
    tasks, dataset, dataset_tags = _listed(said.tasks), _listed(said.dataset), _listed(said.dataset_tags)
    metrics, metrics_step = _last_evaluation(trainer.state.log_history)
    relation = "adapter" if has_adapter else "finetune"
    data = ModelCardData(
        library_name="peft" if has_adapter else "transformers",
        language=said.language,
        license=said.license,
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        base_model=said.finetuned_from,
        base_model_relation=relation if said.finetuned_from else None,
        tags=said.tags,
        datasets=dataset_tags or None,
        pipeline_tag=tasks[0] if tasks else None,
        model_name=said.model_name,
        eval_results=_measured(said, metrics) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        version=__version__,
        method=trainer._name,
        papers=[vars(kind)["_paper"] for kind in type(trainer).__mro__ if vars(kind).get("_paper")],
        figures=figures,
        model_name=said.model_name,
        kind="an adapter for PEFT" if has_adapter else "an ordinary transformers model",
        loading=_loading(student, trainer.hub_model_id or said.model_name),
        facts=_cells(
            {
                **_teacher(trainer),
                "Dataset": ", ".join(dataset) or UNKNOWN,
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
    """Markdown with the Python that loads a published student; an adapter is loaded onto its base model."""
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


def _teacher(trainer: DISTrainerMixin) -> dict[str, str]:
    if trainer.teacher_cache is None:
        name, revision = known_as(trainer.distiller.online_teacher.model)
        return {
            "Teacher": name or f"{UNKNOWN} ({class_name(trainer.distiller.online_teacher.model)})",
            "Teacher's revision": revision or UNKNOWN,
        }
    header = trainer.teacher_cache.header
    return {
        "Teacher": f"{header.teacher['name']}, by its stored targets",
        "Teacher's revision": header.teacher["revision"] or UNKNOWN,
        "Stored targets": f"{header.depth} ranked classes and {header.sample_size} of the tail ({header.design})",
    }


def _settings(trainer: DISTrainerMixin) -> dict[str, Any]:
    distiller = trainer.distiller
    settings, sampler = distiller.arguments, distiller.sampler
    kind = type(sampler.proposal)
    sampled = {
        "Classes sampled per item (K)": sampler.num_sampled,
        "Classes of a shared tail (K_t)": sampler.num_shared,
        "Shared tails per step": sampler.num_tails,
        "Classes per item that update the head": sampler.num_updated or "all sampled classes",
        "Rank depth (m)": sampler.rank_depth,
        "Proposal": settings.proposal if kind.__module__.startswith(PACKAGE) else kind.__name__,
        "Design": sampler.design,
        **({} if sampler.budget is None else {"Accepted error of the gradient": sampler.budget.accepted}),
        "Exact warm-up steps": settings.get_exact_warmup_steps(trainer.state.max_steps),
    }
    if distiller.mode == "exact":
        sampled = dict.fromkeys(sampled, NOT_USED)
    head_rate = trainer.args.learning_rate if settings.head_learning_rate is None else settings.head_learning_rate
    return {
        "Classes (C)": distiller.num_classes,
        **sampled,
        "Divergence": distiller.divergence.described,
        "Temperature": settings.temperature,
        "Weight of the hard labels": settings.hard_label_weight,
        "Head mode": distiller.mode,
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


def _why_no_probe(trainer: DISTrainerMixin) -> str:
    if trainer.distiller.mode == "exact":
        return "Nothing was sampled: every logit was computed."
    return f"{UNKNOWN.capitalize()}: the two were not compared (`probe_steps={trainer.args.probe_steps}`)."


def _last_evaluation(log_history: list[dict[str, float]]) -> tuple[dict[str, float], int | None]:
    """The metrics of the last step with an evaluation, on all evaluation sets, and the number of that step."""
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
    """The entries but None, which stands for the name of a dataset that was made in memory."""
    return [one for one in ([value] if isinstance(value, str) else value or []) if one is not None]
