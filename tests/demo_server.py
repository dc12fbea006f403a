"""Starts demo/app.py on a free port."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEADLINE = 240


def interpreter() -> str:
    """Python with gradio: that of ``make .venv-demo/.installed``, or this one."""
    own = ROOT / ".venv-demo" / "bin" / "python"
    if own.is_file():
        return str(own)
    if importlib.util.find_spec("gradio") is None:
        message = "gradio is not installed: run `make .venv-demo/.installed`"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return sys.executable


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of a running demo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [interpreter(), str(ROOT / "demo" / "app.py"), "--port", str(port), *arguments]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address, started = f"http://127.0.0.1:{port}/", time.monotonic()
    try:
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert running.poll() is None, running.stdout.read()
                assert time.monotonic() - started < DEADLINE
                time.sleep(0.3)
        yield address
    finally:
        running.terminate()
        running.communicate()
