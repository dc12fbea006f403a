"""Records of students, a line each: settings, seeds and times, for scripts that train several of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

# The clocks of a record: wall time, and processor time of all threads.
CLOCKS = ("seconds", "cpu_seconds")


def clock_of(device: str) -> str:
    """The seconds of a record that methods are compared by, for the type of its device."""
    return "cpu_seconds" if device == "cpu" else "seconds"


def by_setting(records: list[dict], names: Sequence[str]) -> dict[tuple, dict[int, dict]]:
    """The records of each setting by seed.

    Args:
        records: of a file.
        names: of what a setting is made of, without the seed.
    """
    cells: dict[tuple, dict[int, dict]] = {}
    for one in records:
        cells.setdefault(tuple(one[name] for name in names), {})[one["seed"]] = one
    return cells


def of_first(records: list[dict], key: Sequence[str]) -> list[dict]:
    """The records that agree with the first one in all names of a key but the method."""
    return [one for one in records if all(one[name] == records[0][name] for name in key if name != "method")]


def steps_in_time(records: list[dict], key: dict[str, Any], methods: tuple[str, str], clock: str, where: str) -> int:
    """The number of steps of a method in the time that another one took.

    Args:
        records: of the file.
        key: of the run.
        methods: the method whose steps are counted, and the method whose time is given.
        clock: one of ``CLOCKS``.
        where: names the run in an error.

    Raises:
        ValueError: if a student that the number comes from is missing.
    """
    others = {name: value for name, value in key.items() if name != "method"}
    alike = [one for one in records if all(one[name] == value for name, value in others.items())]
    found = {one["method"]: one for one in alike if one["method"] in methods}
    if missing := set(methods) - found.keys():
        raise ValueError(
            f"{key['method']} at {where} needs the times of {' and '.join(sorted(missing))}, which the file does not "
            "have: add to --methods"
        )
    base, timed = (found[name] for name in methods)
    return max(1, round(base["steps"] * timed[clock] / base[clock]))


def seconds_per_step(records: list[dict], clock: str) -> float:
    """Mean seconds of a step, without the writing of a cache."""
    training = sum(one[clock] - one[f"writing_{clock}"] for one in records)
    return training / sum(one["steps"] for one in records)


def peak_cell(records: list[dict]) -> str | None:
    """The mean peak memory in MB, as a cell of a table; None where it was not measured."""
    peaks = [one["peak_mb"] for one in records if one["peak_mb"] is not None]
    return f"{mean(peaks):,.0f}" if peaks else None
