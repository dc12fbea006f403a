"""DISReportCallback: plots and a page about a running distillation, with advice where the numbers are bad."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dis.sampling.proposal import DISProposal

if TYPE_CHECKING:
    from hf_dis.trainer.trainer import DISDistillationTrainer

Log = dict[str, float]


# Plot by plot, the logged names of each of its panels.
PLOTS = {
    "losses.png": (("kd_loss", "ce_loss"), ("eval_kd_loss", "eval_ce_loss"), ("eval_kl",)),
    "sample.png": (("dis/ess",), ("dis/coverage", "dis/certain")),
    "probe.png": (
        ("probe/exact_kd_loss", "probe/sampled_kd_loss"),
        ("probe/cosine",),
        ("probe/relative_error",),
    ),
}


# Below half, most of what the teacher says of a row is carried by classes that were not sampled.
LOW_COVERAGE = 0.5


# Above it nearly all ranked samples are certain: K is spent on the top, and only a larger K reaches further down.
MOSTLY_CERTAIN = 0.9


# The estimate of the student's normaliser has a relative deviation near 1/√ESS: a third of it below ten. Its
# logarithm is too low by about 1/(2 ESS), which is then more than 0.05, in every row's loss.
SMALL_SAMPLE = 10


# ‖ĝ - g‖ > ‖g‖: a batch's gradient has more noise than content (and, unbiased, a cosine below 1/√2).
NOISY_GRADIENT = 1.0


# In the README's table exact distillation, DIS and FTIS are a fifth to a third apart in their divergence from the
# teacher: a loss that is off by a quarter cannot rank such runs.
LOSS_GAP = 0.25


class DISReportCallback(TrainerCallback):
    """Writes ``report.md`` and its plots to ``<output_dir>/report`` at every evaluation and at the end of training.

    Only the main process writes. The scalars need no callback: they go wherever ``report_to`` says.

    Args:
        trainer: the one that this callback is added to: ``trainer.add_callback(DISReportCallback(trainer))``.

    Raises:
        ImportError: if matplotlib is not installed.
    """

    def __init__(self, trainer: DISDistillationTrainer):
        try:
            from . import plots
        except ImportError as error:
            raise ImportError(
                f"DISReportCallback samples with matplotlib, which cannot be imported ({error}): "
                "pip install 'matplotlib>=3.8'"
            ) from error
        self.plots, self.trainer = plots, trainer
        self.first_snapshot = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.write(Path(args.output_dir) / "report", state)

    on_train_end = on_evaluate

    def write(self, folder: Path, state: TrainerState) -> None:
        """Writes the report of what has been logged so far; does nothing on other processes than the main one."""
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
        """The fitted proposal, when first reported and now; baselines and exact distillation have none."""
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
    """What to change, where the last logged values are bad; empty if they are not.

    Args:
        values: by log name, as ``DISDistillationTrainer`` logs them. What is missing is not judged.
    """
    found = [
        f"{name} is {value}: training has diverged. Lower learning_rate or head_learning_rate, set max_grad_norm, and "
        "look at the teacher's precision."
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    more = "num_shared_classes (num_sampled_classes if it is 0)"
    if values.get("dis/certain", 0) > MOSTLY_CERTAIN:
        more = "num_sampled_classes"
    error = values.get("probe/relative_error")
    # A good gradient needs no coverage: a disagreement that is spread evenly is estimated well from few classes.
    if values.get("dis/coverage", 1) < LOW_COVERAGE and (error is None or error > NOISY_GRADIENT):
        unprobed = "; set probe_steps to see whether the gradient suffers" if error is None else ""
        found.append(
            f"coverage {values['dis/coverage']:.2f}: the sampled classes hold less than half of the teacher's "
            f"probability. Raise {more}{unprobed}."
        )
    if values.get("dis/ess", math.inf) < SMALL_SAMPLE:
        found.append(
            f"effective sample size {values['dis/ess']:.1f}: each row's loss rests on few classes and is too low by "
            "about half its inverse. Raise num_sampled_classes or num_shared_classes, or proposal_floor if the "
            "proposal is narrow."
        )
    if error is not None and error > NOISY_GRADIENT:
        found.append(
            f"relative error {error:.2f} of the gradient (cosine {values['probe/cosine']:.2f}): more noise than "
            f"content. Raise {more}, or the batch size, or lower learning_rate."
        )
    exact, sampled = values.get("probe/exact_kd_loss"), values.get("probe/sampled_kd_loss")
    if exact is not None and abs(sampled - exact) > LOSS_GAP * exact:
        found.append(
            f"sampled loss {sampled:.3g} where the exact one is {exact:.3g}: kd_loss cannot be compared between "
            "runs. Judge by eval_kd_loss and eval_kl, which are exact."
        )
    elif values.get("kd_loss", 0) < 0:
        found.append(
            f"kd_loss {values['kd_loss']:.3g} is below zero: it is an estimate, and teacher and student nearly agree. "
            "Judge by eval_kd_loss and eval_kl, which are exact."
        )
    return found


def report(log_history: list[Log], images: list[str]) -> str:
    """The page: advice, the last value of everything that was logged, plots.

    Args:
        log_history: a trainer's ``state.log_history``.
        images: file names of the plots.
    """
    last = {name: (value, log["step"]) for log in log_history for name, value in log.items() if name != "step"}
    told = advice({name: value for name, (value, _) in last.items()})
    lines = ["# Distillation report", "", "## Advice", ""]
    lines += [f"- {line}" for line in told] or ["Nothing stands out."]
    lines += ["", "## Last values", "", "| log | value | step |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {value if isinstance(value, str) else format(value, '.6g')} | {step} |"
        for name, (value, step) in last.items()
    ]
    lines += ["", "## Plots", *(f"\n![{Path(name).stem}]({name})" for name in images)]
    return "\n".join(lines) + "\n"
