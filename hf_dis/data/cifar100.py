"""CIFAR-100 as a Hugging Face dataset, from the official archive or from the Hub."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np

from hf_dis.data.cifar100_folders import content_digest, is_class_folders, list_images, read_image
from hf_dis.data.content import ContentConfig
from hf_dis.data.safe_pickle import load_plain_pickle
from hf_dis.errors import DataError

HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
HUB_NAME = "uoft-cs/cifar100"
ARCHIVE = "cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FILE_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
REMEDY = f"Download {ARCHIVE} from {HOMEPAGE} again and pass its path as data_dir= (--data_dir)."
MAX_BYTES = 512 << 20  # the official archive unpacks to 186 MB
SHARDS = 32  # units of work that are shared out to num_proc processes

# fmt: off
FINE_NAMES = [
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
    "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair",
    "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin",
    "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp",
    "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck",
    "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
    "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman",
    "worm",
]
COARSE_NAMES = [
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables",
    "household_electrical_devices", "household_furniture", "insects", "large_carnivores",
    "large_man-made_outdoor_things", "large_natural_outdoor_scenes", "large_omnivores_and_herbivores",
    "medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees",
    "vehicles_1", "vehicles_2",
]
# The coarse class of each fine class, as in the official files.
COARSE_OF_FINE = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
]
# fmt: on
FEATURES = datasets.Features(
    {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=FINE_NAMES),
        "coarse_label": datasets.ClassLabel(names=COARSE_NAMES),
    }
)


def load_cifar100(
    data_dir: str | Path | None = None,
    *,
    verify_checksum: bool = True,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.DatasetDict:
    """Loads CIFAR-100, splits ``train`` and ``test``: 32x32 RGB ``img``, ``fine_label``, ``coarse_label``.

    Args:
        data_dir: the official ``cifar-100-python.tar.gz``, a folder that holds it, a folder that holds the
            extracted ``cifar-100-python/``, or that extracted folder itself (the archive is preferred where
            there are both). Or a folder of ``train/<class>/*.png`` and ``test/<class>/*.png``, with the official
            names of the classes. None: the Hub's copy, ``uoft-cs/cifar100``.
        verify_checksum: refuse files other than the official ones, and folders of images without the official
            number of images per class; False accepts any in the official format. In both cases nothing in the
            files is executed, and nothing is extracted to disk.
        cache_dir: folder of the built dataset; None: the cache of Hugging Face Datasets.
        num_proc: processes that build the dataset; None: this process alone.

    Raises:
        DataError: if the files are missing, not the official ones, damaged or hostile, or if there is no
            ``data_dir`` and the Hub is unreachable.
    """
    cache_dir = None if cache_dir is None else str(cache_dir)
    if data_dir is None:
        if not verify_checksum:
            raise DataError(
                "verify_checksum=False is about files in data_dir, and data_dir is None: pass data_dir, or drop "
                "verify_checksum."
            )
        return _load_from_hub(cache_dir, num_proc)
    builder = Cifar100(cache_dir=cache_dir, data_dir=str(data_dir), verify_checksum=verify_checksum)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


def _load_from_hub(cache_dir: str | None, num_proc: int | None) -> datasets.DatasetDict:
    try:
        loaded = datasets.load_dataset(HUB_NAME, cache_dir=cache_dir, num_proc=num_proc)
    except ConnectionError as error:
        raise DataError(
            f"No data_dir was given and the Hugging Face Hub is unreachable: {error}. Either download "
            f"{ARCHIVE} from {HOMEPAGE} and pass its path as data_dir= (--data_dir on the command line), or "
            f"connect to the network, with HF_HUB_OFFLINE unset, for the Hub's copy, {HUB_NAME}."
        ) from error
    return loaded.cast(FEATURES)  # the Hub's copy spells one class differently ("cra")


@dataclass
class Cifar100Config(ContentConfig):
    """The files to build from: ``data_dir`` and ``verify_checksum`` as in :func:`load_cifar100`.

    ``digest`` is that of the files' content.
    """

    verify_checksum: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dir is None:
            raise DataError(f"data_dir is None: Cifar100 needs data_dir=, the path of {ARCHIVE} from {HOMEPAGE}.")
        self.digest = _content_digest(_locate(self.data_dir), self.verify_checksum)


class Cifar100(datasets.GeneratorBasedBuilder):
    """Builds CIFAR-100 from local files; :func:`load_cifar100` is the short way to the dataset."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = Cifar100Config

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="60,000 colour images of 32x32 pixels in 100 classes, grouped into 20.",
            features=FEATURES,
            homepage=HOMEPAGE,
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        # Read once, here, where errors reach the caller as they are; workers are sent their images.
        source = _locate(self.config.data_dir)
        if is_class_folders(source):
            images = list_images(source, FINE_NAMES, self.config.verify_checksum)
            return [
                datasets.SplitGenerator(split, gen_kwargs={"shards": _shards_of_images(images[split])})
                for split in ("train", "test")
            ]
        files = {name: _unpickle(data, source, name) for name, data in _read_files(source)}
        if missing := [name for name in FILE_MD5 if name not in files]:
            raise DataError(f"{source} has no {FOLDER}/{missing[0]}: it is not {ARCHIVE}. {REMEDY}")
        _check_meta(files["meta"], source)
        return [
            datasets.SplitGenerator(split, gen_kwargs={"shards": _shards(files[split], source, split)})
            for split in ("train", "test")
        ]

    def _generate_examples(self, shards: list[tuple[np.ndarray, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for shard in shards:
            for number, image, fine, coarse in zip(*shard, strict=True):
                yield int(number), {"img": image, "fine_label": int(fine), "coarse_label": int(coarse)}


def _locate(data_dir: str | Path) -> Path:
    """Finds the archive or the extracted folder in ``data_dir``."""
    given = Path(data_dir).expanduser()
    if given.is_file():
        return given
    if (given / ARCHIVE).is_file():
        return given / ARCHIVE
    if is_class_folders(given):
        return given
    for folder in (given / FOLDER, given):
        present = [name for name in FILE_MD5 if (folder / name).is_file()]
        if len(present) == len(FILE_MD5):
            return folder
        if present:
            missing = ", ".join(name for name in FILE_MD5 if name not in present)
            raise DataError(f"{folder} holds part of CIFAR-100 but no {missing}. {REMEDY}")
    state = "holds neither" if given.is_dir() else "does not exist, so is neither"
    raise DataError(
        f"data_dir {given} {state} {ARCHIVE} nor the extracted {FOLDER}/ folder nor train/ and test/ with a folder of "
        f"images per class. {REMEDY}"
    )


def _content_digest(source: Path, verify_checksum: bool) -> str:
    if is_class_folders(source):
        return content_digest(source)
    expected = {source / name: md5 for name, md5 in FILE_MD5.items()} if source.is_dir() else {source: ARCHIVE_MD5}
    digest = hashlib.sha256()
    for path, official in expected.items():
        md5 = hashlib.md5(usedforsecurity=False)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                md5.update(block)
                digest.update(block)
        if verify_checksum and md5.hexdigest() != official:
            raise DataError(
                f"{path} has the md5 checksum {md5.hexdigest()}, the official file has {official}: it is "
                f"a different file, or was damaged or altered on the way. {REMEDY} To use it as it is, pass "
                "verify_checksum=False (--no_verify_checksum)."
            )
    return digest.hexdigest()[:16]


class _BoundedReader:
    """Raises DataError where a small archive unpacks to an endless stream."""

    def __init__(self, stream: BinaryIO, source: Path) -> None:
        self.stream, self.source, self.left = stream, source, MAX_BYTES

    def read(self, size: int) -> bytes:
        block = self.stream.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise _too_large(self.source)
        return block


def _too_large(source: Path) -> DataError:
    return DataError(f"{source} unpacks to more than {MAX_BYTES >> 20} MiB: it is not {ARCHIVE}. {REMEDY}")


def _read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of those of the files train, test and meta that ``source`` has."""
    if source.is_dir():
        for name in FILE_MD5:
            if (source / name).stat().st_size > MAX_BYTES:
                limit = f"{MAX_BYTES >> 20} MiB"
                raise DataError(f"{source / name} is larger than {limit}: it is not from {ARCHIVE}. {REMEDY}")
            yield name, (source / name).read_bytes()
        return
    wanted = {f"{FOLDER}/{name}": name for name in FILE_MD5}
    try:
        # Read front to back and in memory: a member's name or link never decides where anything is written.
        with gzip.open(source) as stream:
            bounded = _BoundedReader(stream, source)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:
                for member in archive:
                    if member.size > MAX_BYTES:
                        raise _too_large(source)
                    if member.name not in wanted:
                        continue
                    if not member.isfile():
                        raise DataError(f"{source}: {member.name} is not a regular file. {REMEDY}")
                    yield wanted.pop(member.name), archive.extractfile(member).read()
            while bounded.read(1 << 20):  # gzip compares its checksum once it reaches the end
                pass
    except (EOFError, OSError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{source} cannot be read as a .tar.gz archive: {error}. {REMEDY}") from error


def _unpickle(data: bytes, source: Path, name: str) -> dict[str, Any]:
    try:
        return load_plain_pickle(data)
    except pickle.UnpicklingError as error:
        raise DataError(f"{source}: the pickle {name} was refused: {error}. {REMEDY}") from error


def _check_meta(meta: dict[str, Any], source: Path) -> None:
    for key, official in (("fine_label_names", FINE_NAMES), ("coarse_label_names", COARSE_NAMES)):
        if meta.get(key) not in (official, [name.encode() for name in official]):
            raise DataError(f"{source}: {key} in meta are not those of CIFAR-100. {REMEDY}")


def _shards(content: dict[str, Any], source: Path, split: str) -> list[tuple[np.ndarray, ...]]:
    """Checks a split and splits it: numbers, images ``[n, 32, 32, 3]``, fine labels and coarse labels."""
    if missing := [key for key in ("data", "fine_labels", "coarse_labels") if key not in content]:
        raise DataError(f"{source}: {split} has no {missing[0]}. {REMEDY}")
    data = content["data"]
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{source}: data in {split} should be uint8 [images, 3072], found {found}. {REMEDY}")
    if len(data) == 0:
        raise DataError(f"{source}: {split} holds no images. {REMEDY}")
    fine = _labels(content, "fine_labels", FINE_NAMES, len(data), source, split)
    coarse = _labels(content, "coarse_labels", COARSE_NAMES, len(data), source, split)
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _split((np.arange(len(data)), images, fine, coarse))


def _shards_of_images(images: list[tuple[Path, int]]) -> list[tuple[np.ndarray, ...]]:
    """Reads the image files of a split, and splits it as :func:`_shards` does."""
    paths, fine = zip(*images, strict=True)
    coarse = np.array(COARSE_OF_FINE)[np.array(fine)]
    return _split((np.arange(len(paths)), np.stack(list(map(read_image, paths))), np.array(fine), coarse))


def _split(columns: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, ...]]:
    """Splits columns of the same length into at most ``SHARDS`` parts."""
    parts = min(SHARDS, len(columns[0]))
    return list(zip(*(np.array_split(column, parts) for column in columns), strict=True))


def _labels(content: dict[str, Any], key: str, names: list[str], count: int, source: Path, split: str) -> np.ndarray:
    where = f"{source}: {key} in {split} should be {count} whole numbers below {len(names)}"
    try:
        labels = np.asarray(content[key])
    except ValueError as error:
        raise DataError(f"{where}, found a ragged list. {REMEDY}") from error
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(f"{where}, found {labels.dtype} {list(labels.shape)}. {REMEDY}")
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(f"{where}, found {labels.min()} to {labels.max()}. {REMEDY}")
    return labels
