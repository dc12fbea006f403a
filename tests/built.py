"""The package as it is released: its source distribution and wheel, and commands run beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of pip, for packages whose dependencies come from this environment.
ALONE = ("--quiet", "--no-deps", "--no-build-isolation")


def run(*command: str, cwd: Path, timeout: float = 500, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside of the repository, and fails if it does.

    Args:
        command: and its arguments.
        cwd: directory to run it in.
        timeout: in seconds.
        **environment: variables beside those of this process, of which PYTHONPATH is left out.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    finished = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def build(folder: Path) -> dict[str, Path]:
    """Source distribution, and the wheel made from it, of a copy of the files that git does not ignore."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    for name in [name for name in listed[:-1] if (ROOT / name).is_file()]:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    backend = "from setuptools import build_meta as b; import sys; "
    run(sys.executable, "-c", backend + "b.build_sdist(sys.argv[1])", str(folder), cwd=folder / "source")
    (sdist,) = folder.glob("hf_dis-*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", *ALONE, "--wheel-dir", str(folder), str(sdist), cwd=folder)
    (wheel,) = folder.glob("hf_dis-*.whl")
    return {"wheel": wheel, "sdist": sdist}


def install(package: Path, site: Path) -> None:
    """Installs a wheel or a source distribution into a folder of its own."""
    run(sys.executable, "-m", "pip", "install", *ALONE, "--target", str(site), str(package), cwd=site.parent)
