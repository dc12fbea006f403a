"""CIFAR-100 as folders of images: content, the same cache rules as archives, and refusals."""

import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image

from hf_dis.data import DataError, load_cifar100
from hf_dis.data.cifar100 import COARSE_NAMES, COARSE_OF_FINE, FEATURES, FINE_NAMES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two images of each class to train on, and one to test on; their pixels tell class, split and number."""
    root = tmp_path_factory.mktemp("copies") / "cifar"
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(FINE_NAMES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(label, split, number)).save(root / split / name / f"{number:04d}.png")
    (root / "train" / ".DS_Store").write_bytes(b"left by a file manager")
    (root / "train" / "apple" / ".DS_Store").write_bytes(b"left by a file manager")
    (root / "README.md").write_text("a copy")
    return root


@pytest.fixture
def folders(made, tmp_path):
    """A copy to change."""
    return shutil.copytree(made, tmp_path / "cifar")


@pytest.fixture
def load(tmp_path):
    return partial(load_cifar100, verify_checksum=False, cache_dir=tmp_path / "cache")


def pixels(label, split, number):
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = label, split == "train", number
    return image


def test_every_coarse_class_has_five_classes():
    assert Counter(COARSE_OF_FINE) == dict.fromkeys(range(20), 5)
    members = {
        coarse: {FINE_NAMES[fine] for fine, of in enumerate(COARSE_OF_FINE) if COARSE_NAMES[of] == coarse}
        for coarse in ("people", "trees", "vehicles_2", "aquatic_mammals")
    }
    assert members["people"] == {"baby", "boy", "girl", "man", "woman"}
    assert members["trees"] == {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
    assert members["vehicles_2"] == {"lawn_mower", "rocket", "streetcar", "tank", "tractor"}
    assert members["aquatic_mammals"] == {"beaver", "dolphin", "otter", "seal", "whale"}


@pytest.mark.parametrize("num_proc", [None, 2])
def test_columns_and_content(made, load, num_proc):
    loaded = load(made, num_proc=num_proc)
    assert {name: len(split) for name, split in loaded.items()} == {"train": 200, "test": 100}
    for name, split in loaded.items():
        assert split.features == FEATURES
        numbers = Counter()
        for example in split:
            fine = example["fine_label"]
            expected = pixels(fine, name, numbers[fine])
            np.testing.assert_array_equal(np.asarray(example["img"]), expected)
            assert example["coarse_label"] == COARSE_OF_FINE[fine]
            numbers[fine] += 1


def test_another_image_makes_another_dataset(folders, load):
    load(folders)
    Image.fromarray(pixels(7, "train", 99)).save(folders / "test" / "worm" / "0000.png")
    changed = np.asarray(load(folders)["test"][99]["img"])
    np.testing.assert_array_equal(changed, pixels(7, "train", 99))


def test_the_official_numbers_of_images_are_wanted(made, tmp_path):
    with pytest.raises(DataError, match=r"should have 500 images.*apple \(2\), .* and 95 more.*verify_checksum=False"):
        load_cifar100(made, cache_dir=tmp_path)


def damage(name):
    def change(folders):
        path = folders / "train" / "baby" / "0001.png"
        if name == "missing class":
            shutil.rmtree(folders / "test" / "bear")
        elif name == "unknown class":
            (folders / "train" / "cat").mkdir()
        elif name == "truncated":
            path.write_bytes(path.read_bytes()[:60])
        elif name == "no image":
            path.write_text("not a picture")
        elif name == "other size":
            Image.new("RGB", (16, 32)).save(path)
        elif name == "grey":
            Image.new("L", (32, 32)).save(path)
        elif name == "huge":
            path.write_bytes(b"0" * (1 << 17))
        elif name == "jpeg":
            path.rename(path.with_suffix(".jpg"))
        elif name == "empty":
            for file in folders.glob("test/*/*.png"):
                file.unlink()

    return change


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing class", "test has no folder of bear: CIFAR-100 has one for each class"),
        ("unknown class", "train has cat, which is not a class of CIFAR-100"),
        ("truncated", "baby/0001.png cannot be read as a PNG image"),
        ("no image", "baby/0001.png cannot be read as a PNG image"),
        ("other size", "baby/0001.png is an image of 16x32 RGB: CIFAR-100 has 32x32 RGB"),
        ("grey", "baby/0001.png is an image of 32x32 L: CIFAR-100 has 32x32 RGB"),
        ("huge", "baby/0001.png has 131,072 bytes, more than an image of 32x32 pixels"),
        ("jpeg", "baby/0001.jpg is not a PNG file"),
        ("empty", "test has no images"),
    ],
)
def test_refusals(folders, load, name, told):
    damage(name)(folders)
    with pytest.raises(DataError, match=told) as caught:
        load(folders)
    assert "official archive as data_dir=" in str(caught.value)
