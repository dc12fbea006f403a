"""Bytes that a card gets in a training step for an output head that FSDP2 shards, counted without a run.

    python benchmarks/fsdp_head.py

It prints the table of docs/distributed.md. The samples are the default ones, in bfloat16. A sample counts with as many
different classes as it can have. Classes are spread evenly over the cards.

gathered  FSDP2's own way: the head, once for forward and backward, and the gradients of its rows
rows      the sampled rows, their class ids and their gradients
features  the features of the items of all cards, their class ids, logits, and the gradients of features and logits
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from common import header, row

from hf_dis import SamplerSpec
from hf_dis.head.fsdp_rows import StepNumbers

ITEMSIZE = 2
CARDS = 2, 8, 64


class Setting(NamedTuple):
    """A head and a batch.

    Attributes:
        name: for the table.
        num_classes: C.
        features: d.
        items: of a card.
        has_tokens: the items are tokens of a vocabulary.
    """

    name: str
    num_classes: int
    features: int
    items: int
    has_tokens: bool


SETTINGS = (
    Setting("128,256 tokens, 4,096 features, 2,048 tokens per card", 128_256, 4096, 2048, True),
    Setting("1 million labels, 512 features, 128 images per card", 1_000_000, 512, 128, False),
)


def numbers(setting: Setting, cards: int) -> StepNumbers:
    """The numbers of a step whose samples have no class in common."""
    spec = SamplerSpec().resolved(vocab_size=setting.num_classes if setting.has_tokens else None, row_sparse=False)
    own = spec.num_sampled_classes + 1  # the label
    different = min(setting.num_classes, setting.items * own + spec.num_tails * spec.num_shared_classes)
    return StepNumbers(
        rows=[[different // cards] * cards] * cards,
        items=[setting.items] * cards,
        own=own,
        tails=spec.num_tails,
        shared=spec.num_shared_classes,
        width=setting.features,
        itemsize=ITEMSIZE,
    )


def megabytes(setting: Setting, cards: int) -> dict[str, float]:
    """Megabytes that a card gets in a step, by way."""
    step = numbers(setting, cards)
    gathered = 2 * setting.num_classes * setting.features * ITEMSIZE * (cards - 1) / cards
    ways = {"gathered": gathered, "rows": step.bytes_of_rows() / cards, "features": step.bytes_of_features() / cards}
    return {name: found / 1e6 for name, found in ways.items()}


def print_table() -> None:
    """Prints the table of docs/distributed.md."""
    print(header("head and batch", "cards", "gathered, MB", "rows, MB", "features, MB"))
    for setting in SETTINGS:
        for cards in CARDS:
            found = megabytes(setting, cards)
            print(row(setting.name, str(cards), *(f"{value:,.0f}" for value in found.values())))


def main() -> None:
    """Runs the script."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print_table()


if __name__ == "__main__":
    main()
