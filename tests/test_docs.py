"""The documentation: Python blocks run, commands are understood, links lead somewhere, the reference is complete."""

import argparse
import ast
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
    reference,
    run_page,
    skips,
)
from tiny_models import labelled_images, vit
from transformers import default_data_collator

import hf_dis

RUNNABLE = [page for page in PAGES if python_blocks(page)]


@pytest.fixture
def namespace():
    """The names that the pages take as given: the reader's own models and data."""
    num_classes = 40
    train_dataset = labelled_images(16, num_classes)
    return {
        "student": vit(num_classes, seed=0),
        "teacher": vit(num_classes, seed=1, spread=30),
        "train_dataset": train_dataset,
        "eval_dataset": labelled_images(8, num_classes),
        "batch": default_data_collator(train_dataset),
    }


def chats(monkeypatch):
    """The names that the page about TRL takes as given."""
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "integrations"))
    made = importlib.import_module("chats")
    return {
        "student": made.student(),
        "teacher": made.teacher(),
        "tokenizer": made.tokenizer(),
        "train_dataset": made.chats(16),
        "eval_dataset": made.chats(4, seed=1),
    }


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_the_blocks_run(page, namespace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, namespace | (chats(monkeypatch) if page.name == "trl.md" else {}))


def test_the_readme_and_the_recipes_are_among_them():
    assert {"README.md", "subclassing.md"} <= {page.name for page in RUNNABLE}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_found_and_skipped_ones_have_a_reason(page):
    assert len(python_blocks(page)) == page.read_text().count("```python\n")
    assert all(action == "next" and reason for action, reason in skips(page))


def test_an_error_names_the_page_and_its_line(tmp_path):
    page = tmp_path / "page.md"
    skipped = '<!-- skip: next "not run" -->\n\n```python\nraise KeyError\n```\n'
    page.write_text(f"# A page\n\n{skipped}\n```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as told:
        run_page(page, {})
    last = told.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 10)


@pytest.fixture(scope="module")
def subclassing(tmp_path_factory):
    """The names that docs/subclassing.md defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        return run_page(ROOT / "docs" / "subclassing.md", {})


def test_an_added_term_is_counted_once_per_optimizer_step_and_in_evaluation(subclassing, tmp_path):
    gained = []
    for steps in (1, 4):
        losses = []
        for penalty in (0.0, 1.0):
            args = hf_dis.DISConfig(
                output_dir=str(tmp_path / "out"),
                use_cpu=True,
                head_mode="exact",
                max_steps=1,
                per_device_train_batch_size=8 // steps,
                gradient_accumulation_steps=steps,
                logging_steps=1,
                save_strategy="no",
                learning_rate=0.0,
            )
            data = {name: labelled_images(8, 40) for name in ("train_dataset", "eval_dataset")}
            trainer = subclassing["PenalisedTrainer"](vit(40), vit(40, seed=1, spread=30), args, **data)
            trainer.penalty = penalty
            trainer.train()
            losses += [(trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"])]
        gained += [after - before for before, after in zip(*losses, strict=True)]
    norm = vit(40).classifier.weight.square().sum().item()
    assert norm > 0.1 and gained == pytest.approx([norm] * 4, rel=1e-3)


def test_a_window_of_the_loop_is_one_large_batch(subclassing, tmp_path):
    """All classes are sampled with certainty, so nothing depends on how the items are split."""
    examples, weights = labelled_images(9, 40), []
    for sizes in ([9], [5, 4], [2, 6, 1]):
        student = vit(40)
        arguments = hf_dis.DISArguments(
            head_mode="sampled", num_sampled_classes=10, rank_depth=10, num_shared_classes=40
        )
        subclassing |= {
            "model": student.train(),
            "distiller": hf_dis.build_distiller(student, vit(40, seed=1, spread=30), arguments),
            "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        }
        taken = iter(examples)
        batches = [default_data_collator([next(taken) for _ in range(size)]) for size in sizes]
        subclassing["train_window"](batches)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in vit(40).parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    for others in weights[1:]:
        torch.testing.assert_close(others, weights[0], rtol=0, atol=1e-6)


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


IN_THE_REPOSITORY = [page for page in [*PAGES, *OTHER_PAGES] if "docs" not in page.parts]


@pytest.mark.parametrize("page", IN_THE_REPOSITORY, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """``make docs`` checks the links of the pages in docs/."""
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


# The site


def test_links_out_of_the_docs_become_links_between_pages(hooks):
    text = "[a](../README.md#top), [b](trl.md), [c](../examples/run_clm.py), [d](../no.md), ![e](images/e.svg)"
    expected = "[a](index.md#top), [b](trl.md), c, [d](../no.md), ![e](images/e.svg)"
    assert hooks.relinked(text, "docs/cache.md", "cache.md") == expected
    deeper = "[a](../../README.md) [b](../trl.md)"
    assert hooks.relinked(deeper, "docs/reference/cache.md", "reference/cache.md") == "[a](../index.md) [b](../trl.md)"
    text = "[a](docs/trl.md) ![b](docs/images/b.svg) [c](examples/quickstart.ipynb)"
    expected = "[a](trl.md) ![b](images/b.svg) [c](quickstart.ipynb)"
    assert hooks.relinked(text, "README.md", "index.md") == expected


@pytest.fixture
def hooks(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("hooks")


# The reference


def public_names():
    for module in ("hf_dis", "hf_dis.cache", "hf_dis.data", "hf_dis.distributed", "hf_dis.metrics"):
        yield from (f"{module}.{name}" for name in importlib.import_module(module).__all__)
    for module in ("trl", "on_policy", "gkd"):
        tree = ast.parse((ROOT / "hf_dis" / "integrations" / f"{module}.py").read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        yield from (f"hf_dis.integrations.{module}.{name}" for name in names if not name.startswith("_"))


def test_the_reference_has_every_public_name_once():
    documented = reference()
    assert len(documented) == len(set(documented)) > 50
    in_the_package = {f"hf_dis.{name}" for name in hf_dis.__all__}
    for name in public_names():
        short = f"hf_dis.{name.rpartition('.')[2]}"
        assert name in documented or short in in_the_package & {*documented, "hf_dis.__version__"}, name
    assert "`hf_dis.__version__`" in (ROOT / "docs" / "reference" / "index.md").read_text()


def test_the_reference_names_nothing_that_does_not_exist():
    for path in reference():
        if path.startswith("hf_dis.integrations."):
            pytest.importorskip("trl")
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_the_settings_page_has_every_field_of_the_configuration_and_its_default():
    text = (ROOT / "docs" / "settings.md").read_text()
    own = dataclasses.fields(hf_dis.DISArguments)
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == sorted(field.name for field in own)
    for field in own:
        shown = f'`"{field.default}"`' if isinstance(field.default, str) else str(field.default)
        assert f"| `{field.name}` | {shown} |" in text, field.name
