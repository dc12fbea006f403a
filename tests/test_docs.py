"""The documentation: Python blocks run, commands are understood, links lead somewhere, the API page is complete."""

import argparse
import dataclasses
import importlib
import re
import runpy
import sys

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from pages import (
    OTHER_PAGES,
    PAGES,
    ROOT,
    SCRIPTS,
    anchors,
    commands,
    links,
    python_blocks,
    run_page,
    tables,
)
from tiny_models import labelled_images, vit
from transformers import TrainingArguments

import hf_dis

RUNNABLE = [page for page in PAGES if python_blocks(page)]


@pytest.fixture
def namespace():
    """What the pages take as given: the reader's own models and data."""
    num_classes = 40
    return {
        "student": vit(num_classes, seed=0),
        "teacher": vit(num_classes, seed=1, spread=30),
        "train_dataset": labelled_images(16, num_classes),
        "eval_dataset": labelled_images(8, num_classes),
    }


def step_of_a_loop_of_ones_own(num_classes):
    """The names of the README's second block, which speaks of 100,000 classes."""
    return {
        "head": torch.nn.Linear(4, num_classes),
        "features": torch.randn(4, 4, requires_grad=True),
        "teacher_logits": torch.randn(4, num_classes),
        "labels": torch.arange(4),
    }


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_the_blocks_run(page, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, {**namespace, **step_of_a_loop_of_ones_own(100_000)})


def test_the_readme_and_the_recipes_are_among_them():
    assert {"README.md", "subclassing.md"} <= {page.name for page in RUNNABLE}


def test_an_error_names_the_page_and_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\n# fragment: not run\nraise KeyError\n```\n\n```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as told:
        run_page(page, {})
    last = told.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 9)


# Commands


class Understood(Exception):
    """Ends a script as soon as it has understood its arguments."""


def understood_by(script, arguments, monkeypatch):
    """Starts a script with these arguments, up to where it has parsed them; they have to be spelled out."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, args=None, namespace=None):
        unknown = {name for name in arguments if name.startswith("--")} - set(parser._option_string_actions)
        assert not unknown, f"{script} has no {unknown}"
        assert parse(parser, arguments)[1] == []
        raise Understood

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(Understood):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def scripts_of(command):
    return [word for word in command if re.fullmatch(r"(examples|benchmarks)/\w+\.py", word)]


COMMANDS = [
    pytest.param(command, id=f"{page.name}: {' '.join(command)[:60]}")
    for page in [*PAGES, *OTHER_PAGES, *SCRIPTS]
    for command in commands(page)
    if scripts_of(command)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_scripts_and_flags_that_exist(command, monkeypatch):
    """``...`` and a single capital stand for a value of the reader's."""
    while "=" in command[0]:  # VARIABLE=value
        command = command[1:]
    (script,) = scripts_of(command)
    before, arguments = command[: command.index(script)], command[command.index(script) + 1 :]
    assert before[0] in ("python", "accelerate") and (ROOT / script).is_file()
    if before[0] == "accelerate":
        assert before[1] == "launch"
        launch_command_parser().parse_args([*before[2:], script])
    understood_by(script, [re.sub(r"^[A-Z]$|^\.\.\.$", "1", word) for word in arguments], monkeypatch)


def test_every_script_of_the_examples_page_is_among_them():
    assert {"examples/run_cifar.py", "examples/run_market1501.py", "examples/run_glyphs.py"} <= {
        script for command in COMMANDS for script in scripts_of(command.values[0])
    }


def test_a_flag_that_does_not_exist_is_told(monkeypatch):
    with pytest.raises(AssertionError, match=r"has no \{'--num_sampled'\}"):  # not even as an abbreviation
        understood_by("examples/run_cifar.py", ["--output_dir", "x", "--num_sampled", "4"], monkeypatch)


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_what_pages_name_exists(page):
    text = page.read_text()
    for path in re.findall(r"`((?:examples|benchmarks|docs|tests|hf_dis)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


# The API page

API = tables(ROOT / "docs" / "api.md")


def test_the_api_page_names_every_public_name():
    assert set(API["hf_dis"]) == set(hf_dis.__all__)
    for module in ("hf_dis.data", "hf_dis.metrics"):
        assert set(API[module]) == set(importlib.import_module(module).__all__)


def test_the_api_page_names_nothing_that_does_not_exist():
    assert len(API) >= 7
    for heading, names in API.items():
        owner = getattr(hf_dis, heading, None) or importlib.import_module(heading)
        for name in names if heading != "DISConfig" else ():
            assert hasattr(owner, name), f"{heading}.{name}"


def test_the_api_page_has_every_field_of_the_configuration_and_its_default():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(hf_dis.DISConfig) if field.name not in inherited]
    assert API["DISConfig"] == [field.name for field in own]
    text = (ROOT / "docs" / "api.md").read_text()
    for field in own:
        shown = f'`"{field.default}"`' if isinstance(field.default, str) else str(field.default)
        assert f"| `{field.name}` | {shown} |" in text, field.name
