"""The processes that the tests of several processes start: where one fails, all are ended and its error is shown."""

import pytest
from launch import processes

FAILS = """
import os, sys, time
sys.stderr.write(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}, {sys.argv[2]}")
sys.exit(3) if os.environ["RANK"] == "1" else time.sleep(300)
"""


def test_a_process_that_fails_ends_the_others(tmp_path):
    """Process 0 has no exit code when process 1 fails: it is not waited for."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    with pytest.raises(AssertionError, match=r"exit codes \[None, 3\](.|\n)*process 1 of 2, word"):
        processes(2, str(script), tmp_path, "word")


def test_results_of_another_number_of_processes_are_refused(tmp_path):
    script = tmp_path / "saves.py"
    script.write_text(
        "import os, sys, torch; torch.save({'world_size': 1}, f'{sys.argv[1]}/rank_{os.environ[\"RANK\"]}.pt')"
    )
    with pytest.raises(AssertionError):
        processes(2, str(script), tmp_path)
