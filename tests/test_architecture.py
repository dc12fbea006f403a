"""The shape of the package: who imports a Trainer, and the files that a batch passes on its way through the step.

The import contract itself is in pyproject.toml, and ``make lint`` checks it.
"""

import ast
import sys
from pathlib import Path

import pytest
from tiny_models import labelled_tokens, llama
from transformers.utils import ModelOutput

import hf_dis
from hf_dis.items import Items
from hf_dis.steps import Request

PACKAGE = Path(hf_dis.__file__).parent
ADAPTERS = ("trainer", "integrations")


def imported(path):
    """Names imported from transformers, and modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            yield from (alias.name for alias in node.names)


def test_only_the_adapters_import_a_trainer():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
        if name.endswith(("Trainer", "TrainingArguments"))
    }
    assert {"trainer/trainer.py", "trainer/config.py"} <= found
    others = {name for name in found if not name.startswith(ADAPTERS)}
    assert others <= {"report/callback.py", "report/facts.py"}  # a TrainerCallback, for whoever has a Trainer


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_a_batch_enters_few_files(make_trainer, mode):
    """Counts the files of the functions that are given the batch, its items or the student's answer."""
    trainer = make_trainer(
        llama(40), llama(40, seed=1, spread=30), train_dataset=labelled_tokens(16, 40), head_mode=mode, max_steps=1
    )
    trainer.train()  # comparisons of the first step are done
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {id(value) for value in batch.values()}
    entered = set()

    def is_of_batch(value):
        if isinstance(value, dict) and not isinstance(value, ModelOutput):
            return any(id(one) in inputs for one in value.values())
        return isinstance(value, (Items, Request, ModelOutput)) or id(value) in inputs

    def watch(frame, event, _):
        file = frame.f_code.co_filename
        given = (value for name, value in frame.f_locals.items() if name != "self")
        if event == "call" and file.startswith(str(PACKAGE)) and any(map(is_of_batch, given)):
            entered.add(Path(file).relative_to(PACKAGE).as_posix())

    trainer.model.train()
    sys.setprofile(watch)
    try:
        trainer.compute_loss(trainer.model, batch)
    finally:
        sys.setprofile(None)
    assert {"trainer/mixin.py", "distiller.py", "items.py", "teacher/online.py"} <= entered
    assert len(entered) <= 12, sorted(entered)


def test_no_file_is_long():
    root = PACKAGE.parent
    files = [
        path
        for folder in ("hf_dis", "tests", "examples", "benchmarks", "tools")
        for path in (root / folder).rglob("*.py")
    ]
    long = {
        path.relative_to(root).as_posix(): count
        for path in files
        if (count := len(path.read_text().splitlines())) > 350
    }
    assert not long


def test_no_function_is_long():
    long = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long[f"{path.relative_to(PACKAGE)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert not long
