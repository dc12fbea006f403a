"""Every Python block of README.md and docs/ runs, on tiny models and in a temporary directory."""

import pytest
import torch
from models import labelled_images, vit
from pages import PAGES, python_blocks, run_page

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
