"""The records of a run: JSON lines that are appended while it trains, and from which its report is made again.

A line is an object with ``kind`` and ``time``. The kinds are ``run`` (facts, at the start), ``log``, ``proposal``,
``seconds`` (times of the parts of a step) and ``end``. A run that died has no ``end``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from hf_dis.errors import DataError
from hf_dis.report.advice import Log

FOLDER, RECORDS, PAGE = "report", "records.jsonl", "report.html"
KINDS = ("run", "log", "proposal", "seconds", "end")
# What a run has to state about itself.
FACTS: dict[str, type] = {
    "task": str,
    "num_classes": int,
    "mode": str,
    "student": str,
    "teacher": str,
    "logits_per_item": int,
    "max_steps": int,
    "method": dict,
    "training": dict,
    "command": str,
    "versions": dict,
    "device": str,
    "processes": int,
}
# Metrics that are not numbers are cut to this length.
TEXT_LENGTH = 200


@dataclass
class Run:
    """A run as its records tell.

    Attributes:
        name: of the run, for the reader.
        facts: task, sizes, settings, command and versions.
        logs: as in a trainer's ``state.log_history``.
        proposals: snapshots of the proposal, see :func:`hf_dis.report.snapshots.snapshot`.
        seconds: mean time of each part of a step; empty if no step was timed.
        has_ended: the training came to its end.
        last_time: of the last record, in UTC.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    logs: list[Log] = field(default_factory=list)
    proposals: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    has_ended: bool = False
    last_time: str = ""

    @property
    def last_step(self) -> int:
        """The step of the last log; 0 without logs."""
        return max((log["step"] for log in self.logs), default=0)


def record(kind: str, **content: Any) -> dict[str, Any]:
    """A record made now, with values that JSON can hold."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"kind": kind, "time": now, **{name: plain(value) for name, value in content.items()}}


def plain(value: Any) -> Any:
    """A value for JSON: numbers, text, lists and dicts as they are; other values as one line of text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)) and len(value) <= TEXT_LENGTH:
        return [plain(one) for one in value]
    text = " ".join(str(value).split())
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} ..."


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends records to a file, which is made if there is none."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(one)}\n" for one in records)


def replace(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replaces a file of records as a whole."""
    written = path.with_suffix(".part")
    written.unlink(missing_ok=True)
    append(written, records)
    os.replace(written, path)


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a file of records. A last line that is cut short, as a process that died leaves it, does not count.

    Raises:
        DataError: if the file cannot be read, or a line is not a record; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; restore or delete the file") from error
    found = []
    for number, line in enumerate(lines[:-1], 1):  # the text after the last newline is cut short, or empty
        try:
            one = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is not a record: {error}; restore or delete the file") from error
        if not isinstance(one, dict) or one.get("kind") not in KINDS:
            raise DataError(
                f"line {number} of {path} is not a record of a report: its kind has to be one of {', '.join(KINDS)}; "
                "restore the file or delete it"
            )
        found.append(one)
    return found


def before(records: Iterable[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The records that a training keeps when it resumes from a step: those up to this step, without ends."""
    return [one for one in records if one["kind"] != "end" and one.get("step", 0) <= step]


def read_run(folder: str | Path) -> Run:
    """Reads the run of a folder.

    Args:
        folder: the ``output_dir`` of the training, or the folder ``report`` in it.

    Raises:
        DataError: if there is no such folder, it has no records, or the records cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the output_dir of a training with DISReportCallback")
    places = [folder / FOLDER / RECORDS, folder / RECORDS]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"{folder} has no {FOLDER}/{RECORDS}: give the output_dir of a training with DISReportCallback, which "
            "writes that file"
        )
    name = folder.resolve()
    return to_run(read(path), name.parent.name if name.name == FOLDER else name.name)


def to_run(records: Iterable[dict[str, Any]], name: str) -> Run:
    """Collects records in a run.

    Args:
        records: in the order in which they were written.
        name: of the run.

    Raises:
        DataError: if a record lacks a part.
    """
    run = Run(name)
    for number, one in enumerate(records, 1):
        try:
            run.last_time = str(one["time"])
            if one["kind"] == "run":
                run.facts = _facts(one["facts"])
            elif one["kind"] == "log":
                run.logs.append({**one["values"], "step": int(one["step"])})
            elif one["kind"] == "proposal":
                run.proposals.append(_proposal(one))
            elif one["kind"] == "seconds":
                run.seconds = {part: float(seconds) for part, seconds in one["parts"].items()}
            run.has_ended = one["kind"] == "end" or (run.has_ended and one["kind"] == "log")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"record {number} of the run {name} is damaged: {error!r}; restore or delete it"
            ) from error
    if not run.logs:
        raise DataError(f"the run {name} has logged no value yet: make its report after the first logging_steps")
    return run


def _facts(found: Any) -> dict[str, Any]:
    """The facts of a record; raises a KeyError or TypeError if one is missing or of a different kind."""
    for name, kind in FACTS.items():
        if not isinstance(found[name], kind):
            raise TypeError(f"the fact {name} is {found[name]!r}")
    return found


def _proposal(one: dict[str, Any]) -> dict[str, Any]:
    """The snapshot of a record; raises a KeyError, TypeError or ValueError if it is not one."""
    edges, measured, fitted = ([float(value) for value in one[name]] for name in ("edges", "measured", "fitted"))
    if not len(edges) == len(measured) + 1 == len(fitted) + 1:
        raise ValueError(f"{len(edges)} edges do not fit {len(measured)} and {len(fitted)} values")
    return {"step": int(one["step"]), "edges": edges, "measured": measured, "fitted": fitted}
