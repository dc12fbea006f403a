"""Interactions of the item examples: good and bad files, leave-one-out, windows, and the simulation."""

from itertools import pairwise

import numpy as np
import pytest
from item_data import Interactions, read_interactions, simulate


def written(tmp_path, text):
    path = tmp_path / "interactions.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_users_items_and_their_order(tmp_path):
    data = read_interactions(written(tmp_path, "u a\nv b\nu b\nv a\nu c\nv d\nw a\nw b\nu d\n"))
    assert [one.tolist() for one in data.sequences] == [[1, 2, 3, 4], [2, 1, 4]]
    assert (data.names, data.num_classes, data.too_short) == (["a", "b", "c", "d"], 5, 1)
    assert data.counts().tolist() == [0, 1, 2, 0, 0]
    facts = "\n".join(data.facts())
    assert "2 users, 4 items, 7 interactions." in facts
    assert "1 users with fewer than 3 items were left out" in facts
    assert "1 users have 3 items: they are evaluated" in facts
    # c and d are unseen; v's validation is a, and its test is d; u's are c and d.
    assert "2 items are unseen in training" in facts and "of 1 users in validation and of 2 in the test" in facts


def test_bad_lines_are_listed_by_number(tmp_path):
    lines = [b"u a"] * 3 + [b"u", b"u a 5", b"", b"u \xff"] + [b"x"] * 9
    with pytest.raises(ValueError) as raised:
        read_interactions(written(tmp_path, b"\n".join(lines)))
    told = str(raised.value)
    assert "13 lines of" in told and "are not a user and an item" in told and "and 3 more" in told
    for number, text in ((4, "u"), (5, "u a 5"), (6, ""), (7, "u \\\\xff")):
        assert f"line {number}: '{text}'" in told
    assert "line 3:" not in told


@pytest.mark.parametrize("text", ["", "u a\nu b\nv a\n"], ids=["empty", "all too short"])
def test_no_user_is_long_enough(text, tmp_path):
    with pytest.raises(ValueError, match=r"has no user with 3 items among its [02] users"):
        read_interactions(written(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.txt: give a text file"):
        read_interactions(tmp_path / "nothing.txt")


def test_windows_have_every_pair_of_neighbours_once():
    sequences = [np.arange(1, 13), np.arange(1, 5), np.arange(1, 4)]
    data = Interactions(sequences, range(1, 13))
    windows = data.training(4)
    pairs = [pair for one in windows["input_ids"] for pair in pairwise(one)]
    assert sorted(pairs) == sorted([(n, n + 1) for n in range(1, 10)] + [(1, 2)])
    assert max(map(len, windows["input_ids"])) == 4 and windows["labels"][:] == windows["input_ids"][:]


def test_nothing_to_train_on():
    data = Interactions([np.arange(1, 4)], range(1, 4))
    with pytest.raises(ValueError, match="none of the 1 users has 4 items or more"):
        data.training(10)
    with pytest.raises(ValueError, match="length is 1: a window has"):
        data.training(1)


def test_held_out_items_are_no_part_of_their_history():
    data = Interactions([np.array([1, 2, 3, 4, 5]), np.array([6, 7, 8])], range(1, 9))
    validation, test = data.held_out("validation", 2), data.held_out("test", 50)
    assert validation["input_ids"][:] == [[2, 3], [6]] and validation["next_item"][:] == [4, 7]
    assert test["input_ids"][:] == [[1, 2, 3, 4], [6, 7]] and test["next_item"][:] == [5, 8]


def test_the_simulation_is_the_same_each_time_and_can_be_learned():
    data, again = simulate(400, 500), simulate(400, 500)
    assert all((one == other).all() for one, other in zip(data.sequences, again.sequences, strict=True))
    lengths = [len(one) for one in data.sequences]
    assert len(lengths) + data.too_short == 500 and max(lengths) <= 60 and 8 < np.mean(lengths) < 12
    assert all(len(set(one.tolist())) == len(one) for one in data.sequences)
    joined = np.concatenate(data.sequences)
    assert joined.min() >= 1 and joined.max() <= 400
    # 4 items have a state; neighbours are of one state far more often than in 1 of 100 pairs.
    same = [(one[1:] - 1) // 4 == (one[:-1] - 1) // 4 for one in data.sequences]
    assert 0.15 < np.concatenate(same).mean() < 0.5
    with pytest.raises(ValueError, match="num_items is 199: 100 tastes need 200"):
        simulate(199, 5)
