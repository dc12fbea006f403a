"""Records of runs that never ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_dis.report.records import append, record


def facts() -> dict[str, Any]:
    """Facts of a run on 40 classes."""
    return {
        "task": "classification",
        "num_classes": 40,
        "mode": "sampled",
        "student": "ViTForImageClassification",
        "teacher": "org/teacher",
        "logits_per_item": 14,
        "max_steps": 4,
        "method": {"num_sampled_classes": 6},
        "training": {"learning_rate": "0.01"},
        "command": "python train.py",
        "versions": {"hf_dis": "0.1.0", "torch": "2.13"},
        "device": "a processor",
        "processes": 1,
    }


def logs(last: float = 0.5) -> list[dict[str, Any]]:
    """Logs of training and evaluation; ``last`` is the last kd_loss."""
    training = {
        "loss": 2.0,
        "kd_loss": 1.0,
        "ce_loss": 3.0,
        "dis/ess": 12.0,
        "dis/coverage": 0.9,
        "logits_per_item": 14,
    }
    probe = {"probe/relative_error": 0.4, "probe/cosine": 0.9}
    return [
        {**training, "step": 2},
        {"eval_kl": 0.3, "eval_kd_loss": 0.2, "step": 2},
        {**training, **probe, "kd_loss": last, "step": 4},
    ]


def proposal(step: int) -> dict[str, Any]:
    """A snapshot over 40 ranks."""
    return {
        "step": step,
        "edges": [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40],
        "measured": [0.2, 0.15, 0.1, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.0, 0.001 * (1 + step)],
        "fitted": [0.2, 0.15, 0.1, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005, 0.001],
    }


def write_run(folder: Path, **content: Any) -> Path:
    """Writes the records of a run; returns its folder.

    Args:
        folder: of the run.
        **content: ``facts``, ``logs``, ``proposals`` and ``last``, where they differ from the usual ones.
    """
    (folder / "report").mkdir(parents=True)
    found = [record("run", step=0, facts=content.get("facts", facts()))]
    for log in content.get("logs", logs(content.get("last", 0.5))):
        found.append(record("log", step=log["step"], values={name: log[name] for name in log if name != "step"}))
    for shot in content.get("proposals", [proposal(1), proposal(4)]):
        found.append(record("proposal", **shot))
    found.append(record("seconds", step=4, parts={"data": 0.001, "optimizer": 0.002}))
    found.append(record("end", step=4))
    append(folder / "report" / "records.jsonl", found)
    return folder
