"""Which checkpoints are whole: a manifest of the files, written after all of them.

A process that is killed while it saves leaves a folder that looks like a checkpoint. Here every process's files are
listed with their sizes once all are written, and ``trainer_state.json`` comes last: a folder without it, or with a
file that is not as listed, is torn.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

MANIFEST = "dis_checkpoint.json"


LAST_FILE = "trainer_state.json"


def write_manifest(folder: str | Path, run: dict[str, Any]) -> None:
    """Lists a checkpoint's files with their sizes; to be called when all but ``trainer_state.json`` are written.

    Args:
        folder: the checkpoint.
        run: what to keep of the run that made it, for JSON.
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, LAST_FILE)
    }
    written = folder / f"{MANIFEST}.part"
    written.write_text(json.dumps({**run, "files": files}, indent=2, default=str) + "\n")
    os.replace(written, folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What :func:`write_manifest` wrote; None where there is none, as in a checkpoint of another trainer."""
    path = Path(folder) / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def mark_unfinished(folder: str | Path) -> None:
    """What is in the folder is no checkpoint any more: it is about to be written over."""
    (Path(folder) / LAST_FILE).unlink(missing_ok=True)


def what_is_torn(folder: str | Path) -> str | None:
    """Says what is missing or damaged in a checkpoint, naming the file; None if it is whole."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    for name in (LAST_FILE, MANIFEST):
        try:
            json.loads((folder / name).read_text())
        except FileNotFoundError:
            if name == LAST_FILE:
                return f"{name}, which is written last, is missing"
        except ValueError:
            return f"{name} is cut short or damaged"
    for name, size in (read_manifest(folder) or {"files": {}})["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def check_whole(folder: str | Path) -> None:
    """Checks a checkpoint that was asked for by name.

    Raises:
        ValueError: if it is torn; names the file, and the newest whole checkpoint beside it.
    """
    wrong = what_is_torn(folder)
    if wrong is None:
        return
    try:
        instead = f"resume from {last_whole_checkpoint(Path(folder).parent)[0]}, the newest whole one beside it"
    except ValueError:
        instead = "there is no whole one beside it: start without resume_from_checkpoint"
    raise ValueError(f"the checkpoint {folder} cannot be resumed from: {wrong}; {instead}")


def last_whole_checkpoint(output_dir: str | Path) -> tuple[str, dict[str, str]]:
    """The newest whole checkpoint of a run, and what is torn in each newer one.

    Args:
        output_dir: that holds the ``checkpoint-<step>`` folders.

    Returns:
        the folder, and for each torn folder that is newer what is wrong with it.

    Raises:
        ValueError: if there is none; says what is wrong with each.
    """
    torn: dict[str, str] = {}
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    for folder in sorted((path for path, step in steps.items() if step), key=lambda path: -int(steps[path][1])):
        wrong = what_is_torn(folder)
        if wrong is None:
            return str(folder), torn
        torn[str(folder)] = wrong
    found = "; ".join(f"in {folder} {wrong}" for folder, wrong in torn.items()) or "no folder checkpoint-<step>"
    raise ValueError(
        f"there is no whole checkpoint in {output_dir} to resume from ({found}): start without "
        "resume_from_checkpoint, or name a checkpoint elsewhere"
    )
