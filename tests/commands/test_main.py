"""``hf-dis``: its commands, its help, and reports by the command."""

import subprocess
import sys

import pytest
from pages import OTHER_PAGES, PAGES, commands
from runs import facts, write_run

from hf_dis.commands import cache
from hf_dis.commands.main import main
from hf_dis.commands.parsing import CommandParser
from hf_dis.version import __version__


def refused(capsys, *words):
    try:
        code = main(words)
    except SystemExit as error:  # of argparse
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "error: " in err
    return err


def test_help_and_version(capsys):
    for words in (["--help"], ["-h"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in ("estimate", "cache", "report"))
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"
    for name in ("estimate", "cache", "report"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and "--config" in shown and "default: None" not in shown
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert "Tokens per block of text. (default: 1024)" in " ".join(capsys.readouterr().out.split())


def test_unknown_commands(capsys):
    assert "no command is given: it has to be one of estimate, cache, report" in refused(capsys)
    assert "'train' is not a command" in refused(capsys, "train")


def test_a_command_that_is_stopped(capsys, monkeypatch):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "run", stop)
    assert main(["cache"]) == 130
    assert capsys.readouterr().err.startswith("hf-dis cache: stopped; give the command again")


class Understood(Exception):
    """Ends a command as soon as it has understood its arguments."""


WRITTEN = [words for page in [*PAGES, *OTHER_PAGES] for words in commands(page) if words[0] == "hf-dis"]


@pytest.mark.parametrize("words", WRITTEN, ids=" ".join)
def test_commands_in_the_docs_are_understood(words, monkeypatch):
    def parse(parser, argv):
        parser.parse_args(argv)
        raise Understood

    monkeypatch.setattr(CommandParser, "parse", parse)
    if words[1] != "--version":
        with pytest.raises(Understood):
            main(words[1:])


def test_the_docs_have_each_command():
    assert {"estimate", "cache", "report"} <= {words[1] for words in WRITTEN}


def test_a_report_of_one_run_and_of_several(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name)
    assert main(["report", "a"]) == 0 and capsys.readouterr().out == "a/report/report.html\n"
    assert main(["report", "a", "b"]) == 0 and capsys.readouterr().out == "report.html\n"
    assert main(["report", "a", "b", "--output_file", "both.html"]) == 0
    assert (tmp_path / "both.html").read_text() == (tmp_path / "report.html").read_text()
    (tmp_path / "report.yaml").write_text("output_file: third.html\n")
    assert main(["report", "--config", "report.yaml", "a"]) == 0 and (tmp_path / "third.html").is_file()


def test_runs_that_cannot_be_reported(tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", facts=facts() | {"task": "causal language model"})
    (tmp_path / "empty").mkdir()
    assert "is not a folder" in refused(capsys, "report", str(tmp_path / "absent"))
    assert "has no report/records.jsonl" in refused(capsys, "report", str(tmp_path / "empty"))
    assert "need one task" in refused(capsys, "report", str(tmp_path / "a"), str(tmp_path / "b"))
    assert "required: runs" in refused(capsys, "report")
    nowhere = str(tmp_path / "absent" / "page.html")
    assert "cannot be written" in refused(capsys, "report", str(tmp_path / "a"), "--output_file", nowhere)


@pytest.mark.slow
def test_the_module_is_the_same_command(tmp_path):
    run = write_run(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-m", "hf_dis.report", str(run)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{run}/report/report.html\n"
    done = subprocess.run([sys.executable, "-m", "hf_dis.report", "absent"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "absent is not a folder" in done.stderr
