"""The fuzzers' watch sees what it is there to see."""

import os
import pickle
import subprocess
import sys

import pytest
from fuzzing import Payload, nothing_run_or_written_but_in


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: (folder / "file").write_text(""),
        lambda folder: (folder / "in" / ".." / "file").write_text(""),
        lambda folder: os.symlink("file", folder / "link"),
        lambda folder: os.rename(folder / "in" / "file", folder / "file"),
        lambda folder: os.remove(folder / "there"),
        lambda folder: subprocess.run([sys.executable, "--version"], capture_output=True),
        lambda folder: pickle.loads(pickle.dumps(Payload(len, "a"))),
    ],
)
def test_it_sees_what_is_written_elsewhere_and_what_is_run(tmp_path, act):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("")
    (tmp_path / "there").write_text("")
    with pytest.raises(AssertionError), nothing_run_or_written_but_in(tmp_path / "in"):
        act(tmp_path)


def test_what_is_read_and_written_in_the_folder_is_no_concern(tmp_path):
    with nothing_run_or_written_but_in(tmp_path):
        (tmp_path / "file").write_text("text")
        (tmp_path / "file").rename(tmp_path / "other")
        assert (tmp_path / "other").read_text() == "text"
        open(os.devnull).close()
