import pickle
import shutil
import tarfile

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from archives import cifar100_files, cifar100_split, pack, write_cifar100_archive

from hf_dis.data import Cifar100, DataError, load_cifar100
from hf_dis.data import cifar100 as module
from hf_dis.data.cifar100 import ARCHIVE, COARSE_NAMES, FEATURES, FINE_NAMES, FOLDER, HOMEPAGE


def test_the_names_are_the_official_ones():
    assert sorted(set(FINE_NAMES)) == FINE_NAMES and len(FINE_NAMES) == 100
    assert sorted(set(COARSE_NAMES)) == COARSE_NAMES and len(COARSE_NAMES) == 20
    for index, name in {
        0: "apple",
        23: "cloud",
        26: "crab",
        41: "lawn_mower",
        58: "pickup_truck",
        99: "worm",
    }.items():
        assert FINE_NAMES[index] == name
    for index, name in {0: "aquatic_mammals", 9: "large_man-made_outdoor_things", 19: "vehicles_2"}.items():
        assert COARSE_NAMES[index] == name


def test_the_checksums_are_those_torchvision_knows():
    official = pytest.importorskip("torchvision.datasets").CIFAR100
    assert official.tgz_md5 == module.ARCHIVE_MD5
    assert dict(official.train_list + official.test_list) | {"meta": official.meta["md5"]} == module.FILE_MD5
    assert (official.filename, official.base_folder) == (ARCHIVE, FOLDER)


def test_columns_and_content(archive, load):
    loaded = load(archive)
    assert {name: len(split) for name, split in loaded.items()} == {"train": 200, "test": 100}
    for name, seed in {"train": 0, "test": 1_000_000}.items():
        split, expected = loaded[name], cifar100_split(len(loaded[name]), seed)
        assert split.features == FEATURES
        assert split["fine_label"][:] == expected[b"fine_labels"]
        assert split["coarse_label"][:] == expected[b"coarse_labels"]
        images = np.stack([np.asarray(image) for image in split["img"]])
        planes = expected[b"data"].reshape(-1, 3, 32, 32)
        for channel in range(3):
            np.testing.assert_array_equal(images[..., channel], planes[:, channel])
    assert loaded["test"][0]["img"].mode == "RGB"


@pytest.mark.parametrize("kind", ["archive", "folder of the archive", "folder of the extracted", "extracted"])
def test_every_kind_of_data_dir(kind, archive, load, tmp_path):
    place = tmp_path / "elsewhere"
    place.mkdir()
    if kind == "folder of the archive":
        shutil.copy(archive, place)
    elif kind != "archive":
        with tarfile.open(archive) as opened:
            opened.extractall(place, filter="data")
    data_dir = {"archive": archive, "extracted": place / FOLDER}.get(kind, place)
    assert load(str(data_dir))["test"]["fine_label"][:] == list(range(100))


def test_reads_python_3_pickles(tmp_path, load):
    repickled = {}
    for name, content in cifar100_files(train=4, test=3).items():
        plain = pickle.loads(content, encoding="bytes")
        decoded = {
            key.decode(): [item.decode() if isinstance(item, bytes) else item for item in value]
            if isinstance(value, list)
            else value
            for key, value in plain.items()
        }
        repickled[name] = pickle.dumps(decoded, protocol=2)
    assert load(pack(tmp_path, **repickled))["train"]["fine_label"][:] == [0, 1, 2, 3]


# Checksums


def test_another_archive_is_refused(archive, tmp_path):
    with pytest.raises(DataError) as caught:
        load_cifar100(archive, cache_dir=tmp_path)
    message = str(caught.value)
    assert module.ARCHIVE_MD5 in message and module.hashlib.md5(archive.read_bytes()).hexdigest() in message
    assert "verify_checksum=False" in message and "--no_verify_checksum" in message and str(archive) in message


def test_the_right_checksum_is_accepted(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ARCHIVE_MD5", module.hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load_cifar100(archive, cache_dir=tmp_path / "cache")["train"]) == 200


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_every_extracted_file_is_checked(name, tmp_path, monkeypatch):
    folder = tmp_path / FOLDER
    folder.mkdir()
    for file, content in cifar100_files(train=4, test=3).items():
        (folder / file).write_bytes(content)
        monkeypatch.setitem(module.FILE_MD5, file, module.hashlib.md5(content).hexdigest())
    load_cifar100(folder, cache_dir=tmp_path / "cache")
    with open(folder / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(DataError, match=rf"{FOLDER}/{name} has the md5 checksum .* verify_checksum=False"):
        load_cifar100(folder, cache_dir=tmp_path / "cache")


# The cache


@pytest.mark.parametrize("extracted", [False, True], ids=["archive", "extracted"])
def test_replaced_files_do_not_meet_a_stale_cache(extracted, tmp_path, load):
    for seed in (1, 2):
        data_dir = write_cifar100_archive(tmp_path, train=3, test=2, seed=seed)
        if extracted:
            with tarfile.open(data_dir) as opened:
                opened.extractall(tmp_path, filter="data")
            data_dir = tmp_path / FOLDER
        image = load(data_dir)["train"][0]["img"]
        expected = cifar100_split(3, seed)[b"data"][0].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_the_same_archive_elsewhere_shares_its_cache(archive, tmp_path):
    copy = shutil.copy(archive, tmp_path / "copy.tar.gz")
    builders = [Cifar100(cache_dir=tmp_path, data_dir=str(path), verify_checksum=False) for path in (archive, copy)]
    assert builders[0].cache_dir == builders[1].cache_dir


def test_processes_share_one_reading(archive, tmp_path, monkeypatch):
    log = tmp_path / "readings"
    read_files = module._read_files

    def logged(source):
        with open(log, "a") as file:
            file.write("read\n")
        return read_files(source)

    monkeypatch.setattr(module, "_read_files", logged)
    loaded = {
        num_proc: load_cifar100(archive, verify_checksum=False, cache_dir=tmp_path / str(num_proc), num_proc=num_proc)
        for num_proc in (None, 2)
    }
    assert log.read_text() == "read\n" * 2
    assert len(loaded[2].cache_files["train"]) == 2, "two processes write two files"
    for split in ("train", "test"):
        for column in FEATURES:
            assert loaded[None][split][column][:] == loaded[2][split][column][:]


# Missing data


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_offline_without_data_dir_names_both_ways_out(tmp_path, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(DataError) as caught:
        load_cifar100(cache_dir=tmp_path)
    for part in ("data_dir=", "--data_dir", HOMEPAGE, ARCHIVE, "HF_HUB_OFFLINE", "uoft-cs/cifar100"):
        assert part in str(caught.value)


def test_the_hub_copy_gets_the_same_features(tmp_path, monkeypatch):
    spelling = datasets.ClassLabel(names=["cra" if name == "crab" else name for name in FINE_NAMES])
    columns = {"img": [np.zeros((32, 32, 3), np.uint8)], "fine_label": [26], "coarse_label": [13]}
    split = datasets.Dataset.from_dict(columns, features=datasets.Features({**FEATURES, "fine_label": spelling}))
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.DatasetDict(train=split, test=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_cifar100(cache_dir=tmp_path, num_proc=3)
    assert asked == [("uoft-cs/cifar100", {"cache_dir": str(tmp_path), "num_proc": 3})]
    assert loaded["train"].features == loaded["test"].features == FEATURES
    assert loaded["train"]["fine_label"][:] == [26]


def test_no_checksum_of_the_hub_copy_to_skip():
    with pytest.raises(DataError, match="verify_checksum=False is about files in data_dir"):
        load_cifar100(verify_checksum=False)


def test_missing_data_dir(tmp_path, load):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"empty holds neither {ARCHIVE} nor"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match="needs data_dir="):
        Cifar100(cache_dir=tmp_path)


def test_partly_extracted_folder(tmp_path, load):
    (tmp_path / "train").write_bytes(b"")
    with pytest.raises(DataError, match="part of CIFAR-100 but no test, meta"):
        load(tmp_path)
