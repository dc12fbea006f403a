"""Whole and torn checkpoints, recognised by a manifest of the files that is written after all of them.

A process that is killed while it saves leaves a folder that looks like a checkpoint. The manifest lists the files of
all processes with their sizes, and ``trainer_state.json`` is written last. A checkpoint is *torn* if
``trainer_state.json`` is missing, or a file is not as listed; otherwise the checkpoint is whole.
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
    """Lists a checkpoint's files with their sizes; call it when all files but ``trainer_state.json`` are written.

    Args:
        folder: the checkpoint.
        run: properties of the run to keep in the manifest, for JSON.
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
    """The manifest of a checkpoint; None if there is none, as in a checkpoint of a plain Trainer."""
    path = Path(folder) / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def mark_unfinished(folder: str | Path) -> None:
    """Makes a checkpoint torn, because its files are about to be written over."""
    (Path(folder) / LAST_FILE).unlink(missing_ok=True)


def what_is_torn(folder: str | Path) -> str | None:
    """A message about the first file of a checkpoint that is missing or damaged; None if the checkpoint is whole."""
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
        ValueError: if the checkpoint is torn; names the file, and the newest whole checkpoint beside it.
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
    """The newest whole checkpoint of a run.

    Args:
        output_dir: the folder with the ``checkpoint-<step>`` folders.

    Returns:
        the folder of the checkpoint, and the message of :func:`what_is_torn` by folder for each newer one.

    Raises:
        ValueError: if no checkpoint is whole; names every folder and its torn file.
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
