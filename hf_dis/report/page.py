"""The report as one page: HTML that loads nothing, of one run or of several runs side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from hf_dis.errors import DataError
from hf_dis.report import figures
from hf_dis.report.advice import NOISY_GRADIENT, SMALL_SAMPLE, advice
from hf_dis.report.figures import Series
from hf_dis.report.records import Run


class Panel(NamedTuple):
    """A figure of logged values.

    Attributes:
        title: of the figure.
        names: of the logs.
        text: tells the reader what to look for.
        level: the accepted level of the value, if there is one.
    """

    title: str
    names: tuple[str, ...]
    text: str
    level: float | None = None


PANELS = (
    Panel("Training loss", ("kd_loss", "ce_loss"), "Per item. In sampled steps kd_loss is an estimate."),
    Panel("Evaluation loss", ("eval_kd_loss", "eval_ce_loss"), "Exact, on all classes."),
    Panel("KL to the teacher", ("eval_kl",), "Exact, at temperature 1, on the evaluation data."),
    Panel(
        "Gradient error",
        ("dis/gradient_error", "probe/relative_error"),
        "Relative error of the sampled gradient, estimated from the sample, or measured by the probe. Above the "
        "dashed line the error is larger than the gradient.",
        NOISY_GRADIENT,
    ),
    Panel("Gradient direction", ("probe/cosine",), "Cosine of the sampled and the exact gradient; 1 is best."),
    Panel("Loss of the probe", ("probe/exact_kd_loss", "probe/sampled_kd_loss"), "The same batch, computed twice."),
    Panel("Student logits per item", ("logits_per_item",), "Classes that a step computes for each item."),
    Panel(
        "Class coverage",
        ("dis/coverage", "dis/certain"),
        "Teacher's probability of the sampled classes, and the share of the ranked classes that are sampled with "
        "certainty.",
    ),
    Panel(
        "Effective sample size",
        ("dis/ess",),
        "In equally weighted classes. Below the dashed line the loss rests on few classes.",
        SMALL_SAMPLE,
    ),
)
# Logs without use in a table of last values.
NOT_SHOWN = ("step", "epoch")


def check_comparable(runs: Sequence[Run]) -> None:
    """Checks that runs can stand side by side.

    Raises:
        DataError: if tasks or numbers of classes differ; names both.
    """
    described = [
        f"{run.name} distils a {run.facts.get('task', 'task that is unknown')} with "
        f"{run.facts.get('num_classes', 0):,} classes"
        for run in runs
    ]
    for run, text in zip(runs[1:], described[1:], strict=True):
        if any(run.facts.get(name) != runs[0].facts.get(name) for name in ("task", "num_classes")):
            raise DataError(
                f"{described[0]}, {text}: runs side by side need one task and the same classes; make a report of each"
            )


def page(runs: Sequence[Run]) -> str:
    """The page as HTML.

    Args:
        runs: one, or several of the same task.

    Raises:
        DataError: as :func:`check_comparable`.
    """
    check_comparable(runs)
    names = list(dict.fromkeys(name for run in runs for log in run.logs for name in log if name not in NOT_SHOWN))
    return _template().render(
        title="Distillation report: " + ", ".join(run.name for run in runs),
        runs=[_shown(run, number) for number, run in enumerate(runs)],
        panels=_panels(runs),
        names=names,
        cell=cell,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def _shown(run: Run, number: int) -> dict[str, Any]:
    last = {name: (value, log["step"]) for log in run.logs for name, value in log.items() if name not in NOT_SHOWN}
    name, total = f"proposal{number}", sum(run.seconds.values())
    facts = run.facts
    return {
        "name": run.name,
        "number": number,
        "facts": facts,
        "status": _status(run),
        "has_ended": run.has_ended,
        "advice": advice({name: value for name, (value, _) in last.items()}),
        "last": last,
        "seconds": [(part, value, value / total) for part, value in run.seconds.items()] if total else [],
        "proposal": Markup(figures.proposals(name, run.proposals)) if run.proposals else None,
        "figure": name,
        "steps": [shot["step"] for shot in run.proposals],
    }


def _status(run: Run) -> str:
    step, total = run.last_step, run.facts.get("max_steps") or 0
    time = f"{run.last_time[:16].replace('T', ' ')} UTC"
    of = f" of {total:,}" if total > 0 else ""
    if not total and not any("loss" in log for log in run.logs):
        return f"Evaluated without training, {time}."
    if run.has_ended:
        return f"Ended after step {step:,}{of}, {time}."
    return f"No end is recorded: the run continues, or died. The last record is of step {step:,}{of}, {time}."


def _panels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The figures that have a value to show; with several runs each has one log."""
    panels = list(PANELS)
    if len(runs) > 1:
        panels = [panel._replace(names=(name,)) for panel in PANELS for name in panel.names]
    found = []
    for panel in panels:
        series = []
        for number, run in enumerate(runs):
            for name in panel.names:
                found_points = points(run, name)
                label = name if len(runs) == 1 else run.name
                if found_points:
                    series.append(Series(label, found_points, number if len(runs) > 1 else panel.names.index(name)))
        if series:
            svg = figures.curves(f"panel{len(found)}", series, panel.level)
            title = panel.title if len(runs) == 1 or len(panel.names) > 1 else f"{panel.title}: {panel.names[0]}"
            found.append({"title": title, "text": panel.text, "series": series, "svg": Markup(svg)})
    return found


def points(run: Run, name: str) -> list[tuple[float, float]]:
    """Steps and values of a log, those that are finite numbers.

    Args:
        run: with the logs.
        name: of the log.
    """
    values = ((log["step"], log.get(name)) for log in run.logs)
    return [(step, value) for step, value in values if isinstance(value, (int, float)) and abs(value) < float("inf")]


def cell(value: Any) -> str:
    """A value as text of one line: numbers with six digits."""
    if isinstance(value, float):
        return format(value, ".6g")
    return re.sub(r"\s+", " ", str(value))
