"""The command that makes the report of one run, or of several runs side by side, from their records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_dis.errors import DataError
from hf_dis.report.records import FOLDER, PAGE, RECORDS, read_run


def make_report(folders: Sequence[str | Path], output_file: str | Path | None = None) -> Path:
    """Makes the page of one run, or of several runs of the same task side by side.

    Args:
        folders: an ``output_dir`` of a training with ``DISReportCallback`` each, or the folder ``report`` in it.
        output_file: of the page. None: beside the records of a single run, or ``report.html`` in the working
            directory for several runs.

    Returns:
        the file of the page.

    Raises:
        DataError: if a folder has no records, the records cannot be read, the tasks differ, or the page cannot be
            written.
        ImportError: if matplotlib is not installed.
    """
    from hf_dis.report.page import page  # matplotlib is needed here only

    if not folders:
        raise DataError("no run is given: name the output_dir of one training, or of several")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = str(folder)
    text = page(runs)
    path = _place(Path(folders[0]), len(runs)) if output_file is None else Path(output_file)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}; name another file with --output_file") from error
    return path


def _place(folder: Path, number: int) -> Path:
    if number > 1:
        return Path(PAGE)
    return folder / FOLDER / PAGE if (folder / FOLDER / RECORDS).is_file() else folder / PAGE
