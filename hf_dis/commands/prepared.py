"""Datasets as ``hf-dis cache`` gives them to a teacher; a training from the cache prepares them the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from hf_dis.errors import DataError, first_line


def prepared_texts(
    dataset: str, model: str, *, split: str = "train", column: str = "text", block_size: int = 1024
) -> Dataset:
    """Texts joined one after another, as blocks of tokens with as many labels.

    Args:
        dataset: name on the Hub, or a folder of files or of ``save_to_disk``.
        model: whose tokenizer is used.
        split: of the dataset.
        column: with the texts.
        block_size: tokens of a block, 2 or more; the rest of a thousand texts is dropped.

    Raises:
        DataError: if the dataset, its split or its column is missing, the column holds no text, the model has no
            tokenizer, or there are fewer tokens than one block.
    """
    texts = _loaded(dataset, split, column, str)
    tokenizer = tokenizer_of(model)

    def blocks(batch: dict[str, list]) -> dict[str, list]:
        ids = [token for text in tokenizer(batch[column])["input_ids"] for token in text]
        whole = len(ids) - len(ids) % block_size
        parts = [ids[start : start + block_size] for start in range(0, whole, block_size)]
        return {"input_ids": parts, "labels": parts}

    found = texts.map(blocks, batched=True, remove_columns=texts.column_names, desc="Tokens")
    if not len(found):
        raise DataError(
            f"the split {split} of {dataset} has fewer than {block_size} tokens: give more text, or a smaller "
            "block_size"
        )
    return found


def prepared_images(
    dataset: str, model: str, *, split: str = "train", column: str = "image", label_column: str = "label"
) -> Dataset:
    """Images as their model's processor makes them, when they are read; set ``remove_unused_columns=False``.

    Args:
        dataset: name on the Hub, or a folder of images or of ``save_to_disk``.
        model: whose image processor is used.
        split: of the dataset.
        column: with the images.
        label_column: with the class ids; left out where there is no such column.

    Raises:
        DataError: if the dataset, its split or its column is missing, the column holds no images, or the model has no
            image processor.
    """
    images = _loaded(dataset, split, column, Image.Image)
    processor = _beside(model, AutoImageProcessor.from_pretrained, "image processor")
    has_labels = label_column in images.column_names

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        made = processor(images=[image.convert("RGB") for image in batch[column]], return_tensors="pt")
        return {"pixel_values": made["pixel_values"]} | ({"labels": batch[label_column]} if has_labels else {})

    return images.with_transform(transform)


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by which a cache recognises another one.

    Raises:
        DataError: if there is none beside the model.
    """
    return _beside(model, AutoTokenizer.from_pretrained, "tokenizer")


def _beside(model: str, load: Callable[[str], Any], kind: str) -> Any:
    """Loads the tokenizer or the image processor of a model."""
    try:
        return load(model)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the model {model!r} has no {kind} that can be loaded: {first_line(error)}. Save its {kind} into its "
            "folder by save_pretrained"
        ) from error


def _loaded(dataset: str, split: str, column: str, kind: type) -> Dataset:
    """The split of a dataset whose column holds values of a kind."""
    is_saved = any((Path(dataset) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(dataset) if is_saved else datasets.load_dataset(dataset)
    except (OSError, ValueError, DatasetGenerationError) as error:
        cause = str(error).strip().rstrip(".")
        raise DataError(
            f"the dataset {dataset!r} cannot be loaded: {cause}. Give the name of a dataset on the Hub, or a folder"
        ) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise DataError(f"the dataset {dataset!r} has no split {split!r}: it has {', '.join(found)}; set --split")
        found = found[split]
    if column not in found.column_names:
        raise DataError(
            f"the dataset {dataset!r} has no column {column!r}: it has {', '.join(found.column_names)}; set --column"
        )
    if len(found) and not isinstance(found[0][column], kind):
        raise DataError(
            f"the column {column!r} of the dataset {dataset!r} holds values of the type "
            f"{type(found[0][column]).__name__}: they have to be {'text' if kind is str else 'images'}; set --column"
        )
    return found
