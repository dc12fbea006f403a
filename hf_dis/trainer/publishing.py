"""Publishing the student: checks before an upload, and the remedy where the Hub refuses it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Files that may hold the weights of a model.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5")


def report_failures(jobs: Iterable[Any], output_dir: str) -> None:
    """Warns of every upload in the background that failed.

    Args:
        jobs: futures of the uploads, done.
        output_dir: of the training.
    """
    for job in jobs:
        if job.exception() is not None:
            logger.warning(
                f"a checkpoint was not published: {job.exception()}. {remedy(job.exception())} It is saved in "
                f"{output_dir}; push_to_hub() publishes the student."
            )


def check_upload(folder: Path) -> None:
    """Checks that no other model, the teacher above all, is published with the student.

    Trainer uploads everything in ``output_dir`` except the names that start with ``_`` or ``checkpoint-``.

    Raises:
        ValueError: if a folder within holds weights; names the files.
    """
    inside = [file.relative_to(folder) for file in folder.glob("*/**/*") if file.suffix.lower() in WEIGHTS]
    others = sorted(str(file) for file in inside if not file.parts[0].startswith(("_", "checkpoint-")))
    if others:
        raise ValueError(
            f"{folder} holds weights of other models, which would be published too: {', '.join(others)}; move them "
            "elsewhere, or into a folder whose name starts with _"
        )


@contextmanager
def explained(state: str) -> Iterator[None]:
    """Turns any error of this context into one that names the cause, the remedy, and ``state``.

    Raises:
        RuntimeError: if anything within raises.
    """
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"the student was not published: {error}. {remedy(error)} {state}") from error


def remedy(error: BaseException) -> str:
    """The remedy for an error of the Hub's client, or for the error that it wraps."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalTokenNotFoundError):
            return _LOG_IN
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            later = f"The Hub answered {status}: try again later." if status >= 500 or status == 429 else _CORRECT
            return {401: _LOG_IN, 403: _NO_RIGHT}.get(status, later)
        if isinstance(cause, (ConnectionError, HTTPError)):
            return "The Hub cannot be reached: check the network, and that HF_HUB_OFFLINE is not set."
        cause = cause.__cause__
    return _CORRECT


# Not hub_token: Trainer writes it into training_args.bin, which is published.
_LOG_IN = "You are not logged in: run `hf auth login`, or set HF_TOKEN to a token with write access."
_NO_RIGHT = "Your token may not write there: use one with write access, or another hub_model_id."
_CORRECT = "Correct this first."
