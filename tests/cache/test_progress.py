"""The progress bar of a cache: examples, items and bytes on the first process, or no bar."""

import pytest
from small_cache import ITEMS, SETTINGS, C
from tiny_models import labelled_images
from transformers.utils import logging

from hf_dis import cache_teacher_targets
from hf_dis.cache import writer


def test_examples_items_and_bytes(teacher, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(writer._Written, "__call__", _watched(writer._Written.__call__, shown))
    cache = cache_teacher_targets(teacher, labelled_images(ITEMS, C), tmp_path, **{**SETTINGS, "show_progress": True})
    assert [(examples, total) for examples, total, _ in shown[-1:]] == [(ITEMS, ITEMS)]
    item_bytes = cache.header.layout.item_bytes
    assert shown[-1][2] == f"{ITEMS} items, {ITEMS * item_bytes / 1e6:,.1f} MB"
    bar = capsys.readouterr().err
    assert "Teacher targets" in bar and f"{ITEMS}/{ITEMS}" in bar and f"{ITEMS} items" in bar


def _watched(update, shown):
    def updated(written, examples, items):
        update(written, examples, items)
        shown.append((written.bar.n, written.bar.total, written.bar.postfix))

    return updated


@pytest.mark.parametrize("by", ["argument", "transformers"])
def test_no_bar(teacher, tmp_path, capsys, by):
    if by == "transformers":
        logging.disable_progress_bar()
    try:
        data = labelled_images(ITEMS, C)
        cache_teacher_targets(teacher, data, tmp_path, **{**SETTINGS, "show_progress": by != "argument"})
    finally:
        logging.enable_progress_bar()
    assert "Teacher targets" not in capsys.readouterr().err
