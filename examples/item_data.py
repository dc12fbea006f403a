"""Interactions of users with the items of a catalogue: read from a file, or simulated by a hidden Markov model.

A user's items are in time order. Leave-one-out: the last item of each user is for testing, the one before for
validation, and all before these are for training. Id 0 is padding; items have the ids 1, 2, ....
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

FEWEST_ITEMS, SHOWN = 3, 10
# Of the simulation: states, their successors, how often a state is kept, how often an item comes from its state.
STATES, SUCCESSORS, STAYS, OF_STATE = 100, 2, 0.4, 0.9
SHORTEST, MEAN_LENGTH, LONGEST = 5, 12, 60


@dataclass(frozen=True)
class Interactions:
    """Sequences of a catalogue's items, one per user.

    Attributes:
        sequences: ids of each user's items in time order, 3 or more.
        names: of the items; item ``i`` is ``names[i - 1]``.
        too_short: the number of users with fewer than 3 items, who are left out.
    """

    sequences: list[np.ndarray]
    names: Sequence[str]
    too_short: int = 0

    @property
    def num_classes(self) -> int:
        """The number of items, and one for padding."""
        return len(self.names) + 1

    def counts(self) -> np.ndarray:
        """Counts each class in the training part: integers, ``[num_classes]``."""
        return np.bincount(np.concatenate([one[:-2] for one in self.sequences]), minlength=self.num_classes)

    def training(self, length: int) -> Dataset:
        """The training parts, in windows of at most ``length`` items with the columns ``input_ids`` and ``labels``.

        Windows of a user overlap by one item, so that every pair of neighbours is in one window.

        Args:
            length: of a window, 2 or more.

        Raises:
            ValueError: if no user has two items to train on.
        """
        if length < 2:
            raise ValueError(f"length is {length}: a window has an item and the next one, so 2 items or more")
        parts = (one[:-2] for one in self.sequences)
        windows = [part[at : at + length] for part in parts for at in range(0, len(part) - 1, length - 1)]
        if not windows:
            raise ValueError(
                f"none of the {len(self.sequences)} users has 4 items or more: two are held out, and training needs "
                "an item and the next one; give longer histories"
            )
        return Dataset.from_dict({"input_ids": windows, "labels": windows})

    def held_out(self, split: str, length: int) -> Dataset:
        """The histories before the held-out items: the columns ``input_ids`` and ``next_item``.

        Args:
            split: ``"validation"`` or ``"test"``.
            length: items of a history, at most; older ones are cut off.
        """
        end = {"validation": -2, "test": -1}[split]
        histories = [one[max(0, len(one) + end - length) : end] for one in self.sequences]
        return Dataset.from_dict({"input_ids": histories, "next_item": [int(one[end]) for one in self.sequences]})

    def facts(self) -> list[str]:
        """Describes the catalogue, and what of it cannot be learned or was left out: a sentence each."""
        unseen, users = self.counts() == 0, len(self.sequences)
        held = {
            name: sum(bool(unseen[one[end]]) for one in self.sequences)
            for name, end in (("validation", -2), ("test", -1))
        }
        single = sum(len(one) == FEWEST_ITEMS for one in self.sequences)
        return [
            f"{users:,} users, {len(self.names):,} items, {sum(map(len, self.sequences)):,} interactions.",
            f"{self.too_short:,} users with fewer than {FEWEST_ITEMS} items were left out.",
            f"{single:,} users have {FEWEST_ITEMS} items: they are evaluated, and give no pair to train on.",
            f"{int(unseen[1:].sum()):,} items are unseen in training; they are the true item of "
            f"{held['validation']:,} users in validation and of {held['test']:,} in the test, and are ranked like "
            "all items.",
        ]


def read_interactions(path: str | Path) -> Interactions:
    """Reads lines of a user and an item, separated by white space, each user's lines in time order.

    Users and items are any words. Items get ids in the order of their first line.

    Args:
        path: of a UTF-8 text file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not a pair of words, with the numbers of such lines; or no user has 3 items.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give a text file with a user and an item per line")
    ids: dict[str, int] = {}
    users: dict[str, list[int]] = {}
    bad = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            user, item = line.decode().split()
        except ValueError:  # no UTF-8, or another number of words
            bad.append((number, line))
            continue
        users.setdefault(user, []).append(ids.setdefault(item, len(ids) + 1))
    if bad:
        shown = "\n".join(
            f"  line {number}: {line[:80].decode(errors='backslashreplace')!r}" for number, line in bad[:SHOWN]
        )
        more = f"\n  and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad):,} lines of {path} are not a user and an item, two words in UTF-8; correct or remove:\n"
            f"{shown}{more}"
        )
    return _interactions(users.values(), list(ids), str(path))


def _interactions(sequences, names: Sequence[str], source: str) -> Interactions:
    sequences = list(sequences)
    kept = [np.asarray(one) for one in sequences if len(one) >= FEWEST_ITEMS]
    if not kept:
        raise ValueError(
            f"{source} has no user with {FEWEST_ITEMS} items among its {len(sequences):,} users: one item is for "
            "training, one for validation and one for testing; give longer histories"
        )
    return Interactions(kept, names, len(sequences) - len(kept))


def simulate(num_items: int, num_users: int, seed: int = 0) -> Interactions:
    """Simulates users by a hidden Markov model; the same arguments give the same users.

    A hidden state is a taste: it is kept with probability 0.4, or followed by one of its two successors. An item comes
    from the state's own part of the catalogue with probability 0.9, else from the whole. Within a part, as in the
    whole, popularity follows Zipf's law. A user takes an item once: later times are left out of the sequence.

    Args:
        num_items: of the catalogue, 200 or more. Items that no user took are part of it too.
        num_users: 1 or more; they take 5 to 60 items, 12 in the mean, before repetitions are left out.
        seed: of the simulation.

    Raises:
        ValueError: if there are fewer than 200 items.
    """
    if num_items < 2 * STATES:
        raise ValueError(f"num_items is {num_items}: {STATES} tastes need {2 * STATES} items or more")
    random = np.random.default_rng(seed)
    state_of = np.sort(np.arange(num_items) % STATES)
    popularity = random.permutation(1 / np.arange(10, num_items + 10))
    upto = np.concatenate([[0.0], popularity.cumsum()])
    first, last = (
        upto[np.searchsorted(state_of, np.arange(STATES))],
        upto[np.searchsorted(state_of, np.arange(STATES), "right")],
    )
    successors = random.integers(STATES, size=(STATES, SUCCESSORS))
    lengths = np.minimum(SHORTEST + random.geometric(1 / (MEAN_LENGTH - SHORTEST), num_users) - 1, LONGEST)
    state = random.integers(STATES, size=num_users)
    items = np.empty((num_users, lengths.max()), dtype=np.int64)
    for step in range(items.shape[1]):
        own = random.random(num_users) < OF_STATE
        start, stop = np.where(own, first[state], 0.0), np.where(own, last[state], upto[-1])
        at = start + random.random(num_users) * (stop - start)
        items[:, step] = np.searchsorted(upto, at, "right").clip(1, num_items)
        moved = successors[state, random.integers(SUCCESSORS, size=num_users)]
        state = np.where(random.random(num_users) < STAYS, state, moved)
    sequences = (_first_times(row[:length]) for row, length in zip(items, lengths, strict=True))
    return _interactions(sequences, range(1, num_items + 1), "the simulation")


def _first_times(items: np.ndarray) -> np.ndarray:
    """The items in order, each at its first time only."""
    return items[np.sort(np.unique(items, return_index=True)[1])]
