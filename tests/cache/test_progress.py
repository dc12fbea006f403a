"""The progress bars of a cache: items and bytes that are written, and shards that are checked."""

import pytest
from small_cache import ITEMS, SETTINGS, C
from tiny_models import labelled_images
from transformers.utils import logging

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.cache import reader, writer


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


def test_checks_of_a_large_cache(teacher, tmp_path, capsys, monkeypatch):
    data, settings = labelled_images(ITEMS, C), {**SETTINGS, "show_progress": False}
    cache = cache_teacher_targets(teacher, data, tmp_path, **settings)
    TeacherCache(tmp_path)  # takes less than the delay
    assert "Checking" not in capsys.readouterr().err
    monkeypatch.setattr(reader, "DELAY", 0)
    TeacherCache(tmp_path, verify=False)
    assert "Checking" not in capsys.readouterr().err
    TeacherCache(tmp_path)
    shown = capsys.readouterr().err
    assert "Checking the cache: 100%" in shown and f"{cache.header.num_bytes / 1000:.2f}k/" in shown
    for shows in (True, False):  # compares the shards that are there
        cache_teacher_targets(teacher, data, tmp_path, **{**settings, "show_progress": shows})
        assert ("Checking the cache: 100%" in capsys.readouterr().err) == shows
    monkeypatch.setattr(reader, "process_index", lambda: 1)
    TeacherCache(tmp_path)
    assert "Checking" not in capsys.readouterr().err
