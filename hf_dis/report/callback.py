"""DISReportCallback writes plots and a page about a running distillation, with advice where the numbers are bad."""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dis.sampling.proposal import DISProposal

if TYPE_CHECKING:
    from hf_dis.trainer.trainer import DISDistillationTrainer

# A trainer logs numbers; metrics of the user may be of any type.
Log = dict[str, Any]

# The plots by file name, each with the logged names of its panels.
PLOTS = {
    "losses.png": (("kd_loss", "ce_loss"), ("eval_kd_loss", "eval_ce_loss"), ("eval_kl",)),
    "sample.png": (("dis/ess",), ("dis/coverage", "dis/certain")),
    "probe.png": (
        ("probe/exact_kd_loss", "probe/sampled_kd_loss"),
        ("probe/cosine",),
        ("probe/relative_error",),
    ),
}

# Below this coverage, classes that were not sampled hold most of the teacher's probability for an item.
LOW_COVERAGE = 0.5

# Above this share nearly all ranked samples are certain. The top takes all K, and only a larger K reaches lower ranks.
MOSTLY_CERTAIN = 0.9

# The estimate of the student's normaliser has a relative deviation near 1/√ESS, which is a third at ESS 10. Its
# logarithm, a part of every item's loss, is too low by about 1/(2 ESS), which is 0.05 at ESS 10.
SMALL_SAMPLE = 10

# ‖ĝ - g‖ > ‖g‖: the gradient of a batch has more noise than content. Where unbiased, its cosine is below 1/√2.
NOISY_GRADIENT = 1.0

# In the README's table the divergences of exact distillation, DIS and FTIS from the teacher are 20 % to 33 % apart. A
# loss with an error of 25 % cannot rank such runs.
LOSS_GAP = 0.25

# Metrics that are not numbers are cut to this length in the page's table.
TEXT_LENGTH = 200


class DISReportCallback(TrainerCallback):
    """Writes ``report.md`` and its plots to ``<output_dir>/report`` at every evaluation and at the end of training.

    Only the main process writes. The loggers of ``report_to`` get the numbers without this callback.

    Args:
        trainer: the trainer that this callback is added to: ``trainer.add_callback(DISReportCallback(trainer))``.

    Raises:
        ImportError: if matplotlib is not installed.
    """

    def __init__(self, trainer: DISDistillationTrainer):
        try:
            from hf_dis.report import plots
        except ImportError as error:
            raise ImportError(
                f"DISReportCallback plots with matplotlib, which cannot be imported ({error}): "
                "pip install 'matplotlib>=3.9'"
            ) from error
        self.plots, self.trainer = plots, trainer
        self.first_snapshot = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the report to ``<output_dir>/report``."""
        self.write(Path(args.output_dir) / "report", state)

    on_train_end = on_evaluate

    def write(self, folder: Path, state: TrainerState) -> None:
        """Writes the report of all logs so far, on the main process only.

        Args:
            folder: of the report; made if there is none.
            state: of the trainer.
        """
        if not state.is_world_process_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        images = [
            name for name, panels in PLOTS.items() if self.plots.plot_curves(folder / name, state.log_history, panels)
        ]
        if self._write_proposal(folder / "proposal.png", state.global_step):
            images.append("proposal.png")
        (folder / "report.md").write_text(report(state.log_history, images))

    def _write_proposal(self, path: Path, step: int) -> bool:
        """Plots the fitted proposal at the first report and now; returns False where there is no fitted proposal."""
        proposal = self.trainer.distiller.sampler.proposal
        if not isinstance(proposal, DISProposal) or not proposal.ranks.observed:
            return False
        now = self.plots.ProposalSnapshot.of(proposal.ranks, step)
        if self.first_snapshot is None:
            self.first_snapshot = now
        snapshots = [now] if self.first_snapshot.step == step else [self.first_snapshot, now]
        self.plots.plot_proposal(path, snapshots)
        return True


def advice(values: Log) -> list[str]:
    """Advice on logged values that are bad, a sentence or two for each; empty if all of them are good.

    Args:
        values: by log name, as ``DISDistillationTrainer`` logs them. Missing names are not judged.
    """
    found = [
        f"{name} is {value}: training has diverged. Lower learning_rate or head_learning_rate, set max_grad_norm, and "
        "check the teacher's precision."
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    more = "num_shared_classes (num_sampled_classes if it is 0)"
    if values.get("dis/certain", 0) > MOSTLY_CERTAIN:
        more = "num_sampled_classes"
    error = values.get("probe/relative_error")
    # A signal that is spread evenly is estimated well from few classes: where the gradient is good, coverage is not
    # judged.
    if values.get("dis/coverage", 1) < LOW_COVERAGE and (error is None or error > NOISY_GRADIENT):
        unprobed = "; set probe_steps to see whether the gradient suffers" if error is None else ""
        found.append(
            f"coverage {values['dis/coverage']:.2f}: the sampled classes hold less than half of the teacher's "
            f"probability. Raise {more}{unprobed}."
        )
    if values.get("dis/ess", math.inf) < SMALL_SAMPLE:
        found.append(
            f"effective sample size {values['dis/ess']:.1f}: the loss of an item rests on few classes and is too low "
            "by about 1/(2 ESS). Raise num_sampled_classes or num_shared_classes, or proposal_floor if the proposal "
            "is narrow."
        )
    if error is not None and error > NOISY_GRADIENT:
        found.append(
            f"relative error {error:.2f} of the gradient (cosine {values['probe/cosine']:.2f}): more noise than "
            f"content. Raise {more}, or the batch size, or lower learning_rate."
        )
    exact, sampled = values.get("probe/exact_kd_loss"), values.get("probe/sampled_kd_loss")
    if exact is not None and abs(sampled - exact) > LOSS_GAP * exact:
        found.append(
            f"sampled loss {sampled:.3g} where the exact loss is {exact:.3g}: kd_loss cannot be compared between "
            "runs. Compare eval_kd_loss and eval_kl, which are exact."
        )
    elif values.get("kd_loss", 0) < 0:
        found.append(
            f"kd_loss {values['kd_loss']:.3g} is below zero: kd_loss is an estimate, and teacher and student nearly "
            "agree. Compare eval_kd_loss and eval_kl, which are exact."
        )
    return found


def report(log_history: list[Log], images: list[str]) -> str:
    """The page in Markdown: advice, the last value of every logged name, and the plots.

    Args:
        log_history: a trainer's ``state.log_history``. Values that are not numbers are shown as text.
        images: file names of the plots, in the folder of the page.
    """
    last = {name: (value, log["step"]) for log in log_history for name, value in log.items() if name != "step"}
    told = advice({name: value for name, (value, _) in last.items()})
    lines = ["# Distillation report", "", "## Advice", ""]
    lines += [f"- {line}" for line in told] or ["Nothing stands out."]
    lines += ["", "## Last values", "", "| log | value | step |", "|---|---|---|"]
    lines += [f"| `{name}` | {_cell(value)} | {step} |" for name, (value, step) in last.items()]
    lines += ["", "## Plots", *(f"\n![{Path(name).stem}]({name})" for name in images)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """A value in a cell of a Markdown table: on one line, and without ends of the cell."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return format(float(value), ".6g")
    text = " ".join(str(value).split())
    text = text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} ..."
    return text.replace("|", "\\|")
