"""Whole and torn checkpoint folders, without a trainer."""

import pytest

from hf_dis.trainer.manifest import (
    LAST_FILE,
    MANIFEST,
    check_whole,
    last_whole_checkpoint,
    mark_unfinished,
    read_manifest,
    what_is_torn,
    write_manifest,
)


def checkpoint(output_dir, step, last="{}"):
    folder = output_dir / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"12345")
    (folder / "shards" / "0.bin").write_bytes(b"123")
    write_manifest(folder, {"processes": 2})
    if last is not None:
        (folder / LAST_FILE).write_text(last)
    return folder


def test_a_manifest_lists_every_file_and_keeps_what_it_is_given(tmp_path):
    folder = checkpoint(tmp_path, 1)
    assert read_manifest(folder) == {"processes": 2, "files": {"weights.bin": 5, "shards/0.bin": 3}}
    assert what_is_torn(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == sorted(["weights.bin", "shards", MANIFEST, LAST_FILE])
    check_whole(folder)


def test_a_checkpoint_of_another_trainer_is_whole_with_its_last_file(tmp_path):
    (tmp_path / LAST_FILE).write_text("{}")
    assert read_manifest(tmp_path) is None and what_is_torn(tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights.bin").write_bytes(b"1234"), "weights.bin has 4 bytes, 5 were written"),
        (lambda folder: (folder / "weights.bin").write_bytes(b""), "weights.bin has 0 bytes, 5 were written"),
        (lambda folder: (folder / "shards" / "0.bin").unlink(), "shards/0.bin is missing"),
        (lambda folder: (folder / LAST_FILE).unlink(), f"{LAST_FILE}, which is written last, is missing"),
        (lambda folder: (folder / LAST_FILE).write_text('{"step": 1'), f"{LAST_FILE} is cut short or damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"fil'), f"{MANIFEST} is cut short or damaged"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00"), f"{MANIFEST} is cut short or damaged"),
        (mark_unfinished, f"{LAST_FILE}, which is written last, is missing"),
    ],
)
def test_what_is_torn_is_named_with_the_checkpoint_to_take_instead(tmp_path, damage, message):
    older, folder = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    damage(folder)
    assert what_is_torn(folder) == message
    assert last_whole_checkpoint(tmp_path) == (str(older), {str(folder): message})
    with pytest.raises(ValueError) as refused:
        check_whole(folder)
    assert str(folder) in str(refused.value) and message in str(refused.value)
    assert f"resume from {older}, the newest whole one" in str(refused.value)


def test_the_newest_is_that_of_the_most_steps(tmp_path):
    folders = [checkpoint(tmp_path, step) for step in (9, 100, 20)]
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert last_whole_checkpoint(tmp_path) == (
        str(folders[1]),
        {str(tmp_path / "checkpoint-200"): "there is no such folder"},
    )


def test_where_nothing_is_whole_each_folder_is_named(tmp_path):
    folders = [checkpoint(tmp_path, step, last=None) for step in (1, 2)]
    with pytest.raises(ValueError, match="no whole checkpoint") as refused:
        last_whole_checkpoint(tmp_path)
    assert all(str(folder) in str(refused.value) for folder in folders)
    with pytest.raises(ValueError, match="no whole one beside it: start without"):
        check_whole(folders[0])


@pytest.mark.parametrize("name", ["", "nothing here"])
def test_where_there_are_no_checkpoints(tmp_path, name):
    with pytest.raises(ValueError, match=r"no folder checkpoint-<step>.*start without resume_from_checkpoint"):
        last_whole_checkpoint(tmp_path / name)
