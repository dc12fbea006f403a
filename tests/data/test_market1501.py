"""Market-1501 from an archive or a folder: the content of the splits, and the refusals."""

import io
import logging
import random
import shutil
import stat
import zipfile
from functools import partial
from pathlib import Path

import pytest
from markets import jpeg, market_files, write_market_archive, write_market_folder
from PIL import Image

from hf_dis.data import DataError, Market1501, load_market1501
from hf_dis.data import market1501 as module
from hf_dis.data.market1501 import ARCHIVE, FOLDER, HOMEPAGE

JUNK_IMAGE = b"\xff\xd8 no image"


@pytest.fixture
def load(tmp_path):
    """load_market1501 with a cache of the test's own."""
    return partial(load_market1501, cache_dir=tmp_path / "cache")


def without(prefix):
    return {name: content for name, content in market_files().items() if not name.startswith(prefix)}


def examples(split):
    kinds = split.features["kind"].names
    return [(example["pid"], example["camid"], example["label"], kinds[example["kind"]]) for example in split]


def shades(split):
    return [image.getpixel((0, 0))[0] for image in split["image"]]


def test_columns_and_content(tmp_path, load):
    loaded = load(write_market_archive(tmp_path))
    assert examples(loaded["train"]) == [
        (2, 1, 0, "person"),
        (2, 2, 0, "person"),
        (7, 6, 1, "person"),
        (1488, 1, 2, "person"),
    ]
    assert examples(loaded["query"]) == [(1, 1, -1, "person"), (3, 3, -1, "person")]
    assert examples(loaded["gallery"]) == [
        (-1, 1, -1, "junk"),
        (0, 1, -1, "distractor"),
        (1, 2, -1, "person"),
        (3, 3, -1, "person"),
    ]
    assert loaded["train"].features["label"].names == ["0002", "0007", "1488"]
    assert loaded["train"].features == loaded["query"].features == loaded["gallery"].features
    assert [*shades(loaded["train"]), *shades(loaded["query"]), *shades(loaded["gallery"])] == list(range(0, 200, 20))
    image = loaded["query"][0]["image"]
    assert image.size == (8, 16) and image.mode == "RGB"


@pytest.mark.parametrize("kind", ["archive", "folder of the archive", "folder of the extracted", "extracted"])
def test_every_kind_of_data_dir(kind, tmp_path, load):
    archive = write_market_archive(tmp_path)
    place = tmp_path / "elsewhere"
    place.mkdir()
    if kind == "folder of the archive":
        shutil.copy(archive, place)
    elif kind != "archive":
        write_market_folder(place)
    data_dir = {"archive": archive, "extracted": place / FOLDER}.get(kind, place)
    assert shades(load(str(data_dir))["query"]) == [80, 100]


def test_what_file_browsers_leave_behind_is_not_an_image(tmp_path, load):
    files = {**market_files(), "query/Thumbs.db": b"", "bounding_box_train/.DS_Store": b"", "readme.txt": b""}
    assert len(load(write_market_archive(tmp_path, files))["query"]) == 2
    assert len(load(write_market_folder(tmp_path, files))["train"]) == 4


def test_a_test_identity_that_is_trained_on_has_its_label_and_is_told(tmp_path, load, warnings):
    files = {**market_files(), "query/0007_c1s1_000001_00.jpg": jpeg()}
    loaded = load(write_market_archive(tmp_path, files))
    assert examples(loaded["query"])[-1] == (7, 1, 1, "person")
    assert "1 identities of query or gallery are in bounding_box_train too" in warnings.text


# Counts


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(module.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def test_other_counts_than_the_official_ones_are_told_each_time(tmp_path, load, warnings):
    archive = write_market_archive(tmp_path)
    for _ in range(2):
        warnings.clear()
        load(archive)
        for part in ("train 4 (-12,932)", "query 2 (-3,366)", "gallery 4 (-19,728)", "training identities 3 (-748)"):
            assert part in warnings.text
        assert str(archive) in warnings.text


def test_the_official_counts_are_silent(tmp_path, load, warnings, monkeypatch):
    assert module.COUNTS == {"train": 12_936, "query": 3_368, "gallery": 19_732} and module.TRAIN_IDENTITIES == 751
    monkeypatch.setattr(module, "COUNTS", {"train": 4, "query": 2, "gallery": 4})
    monkeypatch.setattr(module, "TRAIN_IDENTITIES", 3)
    load(write_market_archive(tmp_path))
    assert warnings.text == ""


# The cache


@pytest.mark.parametrize("write", [write_market_archive, write_market_folder])
def test_replaced_files_do_not_meet_a_stale_cache(write, tmp_path, load):
    for shade in (40, 200):
        path = write(tmp_path, {**market_files(), "query/0001_c1s1_001051_00.jpg": jpeg(shade)})
        assert shades(load(path)["query"]) == [shade, 100]


def test_a_renamed_file_does_not_meet_a_stale_cache(tmp_path, load):
    folder = write_market_folder(tmp_path)
    load(folder)
    (folder / "query/0001_c1s1_001051_00.jpg").rename(folder / "query/0001_c2s1_001051_00.jpg")
    assert examples(load(folder)["query"])[0] == (1, 2, -1, "person")


def test_the_same_files_elsewhere_share_their_cache(tmp_path):
    archive = write_market_archive(tmp_path)
    copy = shutil.copy(archive, tmp_path / "copy.zip")
    builders = [Market1501(cache_dir=tmp_path, data_dir=str(path)) for path in (archive, copy)]
    assert builders[0].cache_dir == builders[1].cache_dir


# Missing, misnamed, unreadable


@pytest.mark.parametrize("write", [write_market_archive, write_market_folder])
@pytest.mark.parametrize("folder", ["bounding_box_train", "query", "bounding_box_test"])
def test_a_missing_folder_is_named(write, folder, tmp_path, load):
    with pytest.raises(DataError, match=f"has no folder {folder}/") as told:
        load(write(tmp_path, without(folder)))
    assert HOMEPAGE in str(told.value) and ARCHIVE in str(told.value)


def test_an_empty_query_is_refused(tmp_path, load):
    folder = write_market_folder(tmp_path / "extracted", without("query"))
    (folder / "query").mkdir()
    archive = write_market_archive(tmp_path, without("query"), {f"{FOLDER}/query/": b""})
    for path in (folder, archive):
        with pytest.raises(DataError, match="the folder query/ holds no images"):
            load(path)


@pytest.mark.parametrize("write", [write_market_archive, write_market_folder])
def test_misnamed_files_are_listed(write, tmp_path, load):
    wrong = ["0002.jpg", "0002_c1s1_000451_03.png", "2_c1s1_000451_03.jpg", "x0002_c1s1_000451_03.jpg", "notes.txt"]
    wrong.append("٠٠٠٢_c1s1_000451_03.jpg")  # digits, but not of ASCII
    path = write(tmp_path, {**market_files(), **{f"query/{name}": b"" for name in wrong}})
    with pytest.raises(DataError, match=r"0002_c1s1_000451_03.jpg: identity, camera.* 6 are not") as told:
        load(path)
    assert all(name in str(told.value) for name in wrong)


def test_of_many_misnamed_files_the_first_are_listed(tmp_path, load):
    wrong = {f"bounding_box_train/{index:02}.jpg": b"" for index in range(14)}
    with pytest.raises(DataError, match=r"14 are not: 00.jpg, .*09.jpg, and 4 more"):
        load(write_market_folder(tmp_path, {**market_files(), **wrong}))


@pytest.mark.parametrize("name", ["bounding_box_train/0000_c1s1_000151_01.jpg", "query/-1_c1s1_000401_03.jpg"])
def test_junk_and_distractors_have_no_place_but_the_gallery(name, tmp_path, load):
    with pytest.raises(DataError, match=rf"belong into bounding_box_test/.*holds 1: {name.split('/')[1]}"):
        load(write_market_folder(tmp_path, {**market_files(), name: jpeg()}))


@pytest.mark.parametrize("write", [write_market_archive, write_market_folder])
def test_unreadable_images_are_named_all_of_them(write, tmp_path, load):
    broken = {
        "query/0001_c1s1_001051_00.jpg": JUNK_IMAGE,
        "query/0003_c3s3_000001_00.jpg": b"",
        "bounding_box_train/0002_c1s1_000451_03.jpg": jpeg(size=(64, 64))[:-300],
        "bounding_box_test/-1_c1s1_000401_03.jpg": jpeg().replace(
            b"\xff\xc0\x00\x11\x08\x00\x10", b"\xff\xc0\x00\x11\x08\xff\xff"
        ),
    }
    with pytest.raises(DataError, match="4 images cannot be read") as told:
        load(write(tmp_path, {**market_files(), **broken}))
    assert all(name in str(told.value) for name in broken)


def test_an_image_of_another_format_is_not_decoded(tmp_path, load):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 16)).save(buffer, "PNG")
    name = "query/0001_c1s1_001051_00.jpg"
    with pytest.raises(DataError, match=f"1 images cannot be read: {name}"):
        load(write_market_folder(tmp_path, {**market_files(), name: buffer.getvalue()}))


def test_an_image_that_claims_to_be_huge_is_not_decoded(tmp_path, load, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 8 * 16 - 1)
    with pytest.raises(DataError, match=r"10 images cannot be read: .*claims 8 x 16 pixels"):
        load(write_market_folder(tmp_path))


def test_missing_data_dir(tmp_path, load):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"empty holds neither {ARCHIVE} nor"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match="needs data_dir="):
        Market1501(cache_dir=tmp_path)


# Hostile archives and folders


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg",
        f"{FOLDER}/query/../../../evil.jpg",
        "/tmp/evil.jpg",
        "C:\\evil.jpg",
        "C:/evil.jpg",
        f"{FOLDER}\\query\\0002_c1s1_000451_03.jpg",
    ],
)
def test_members_that_would_be_unpacked_elsewhere_are_refused(name, tmp_path, load):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="would be unpacked elsewhere"):
        load(write_market_archive(tmp_path / "in", others={name: jpeg()}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == [ARCHIVE] and not Path("/tmp/evil.jpg").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_an_archive_are_refused(kind, tmp_path, load):
    link = zipfile.ZipInfo(f"{FOLDER}/query/0002_c1s1_000451_03.jpg")
    link.external_attr = (kind | 0o644) << 16
    with pytest.raises(DataError, match="is a link or device"):
        load(write_market_archive(tmp_path, others={link: "/etc/passwd"}))


def test_links_in_a_folder_are_refused(tmp_path, load):
    folder = write_market_folder(tmp_path)
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (folder / "query" / "0001_c2s1_000001_00.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=r"0001_c2s1_000001_00.jpg is not a regular file"):
        load(folder)


def test_a_file_that_is_in_an_archive_twice_is_refused(tmp_path, load):
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = write_market_archive(tmp_path, others={f"{FOLDER}/query/0001_c1s1_001051_00.jpg": jpeg(9)})
    with pytest.raises(DataError, match="is in it twice"):
        load(archive)


def test_encrypted_members_are_refused(tmp_path, load):
    archive = write_market_archive(tmp_path)
    content = bytearray(archive.read_bytes())
    start = content.index(b"PK\x01\x02")  # the first entry of the directory
    content[start + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        load(archive)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, load, monkeypatch):
    large = write_market_archive(tmp_path, others={f"{FOLDER}/x.jpg": bytes(module.MAX_IMAGE_BYTES + 1)})
    (tmp_path / "many").mkdir()
    many = write_market_archive(tmp_path / "many", others={str(index): bytes(1 << 19) for index in range(3)})
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *args, **kwargs: pytest.fail("something was unpacked"))
    with pytest.raises(DataError, match="unpacks to more than 4 MiB: it is not an image"):
        load(large)
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        load(many)


def test_a_member_larger_than_it_says_is_not_unpacked_further(tmp_path, load):
    name = "query/0001_c1s1_001051_00.jpg"
    archive = write_market_archive(tmp_path, {**without(name), name: bytes(3 << 20)})
    content = bytearray(archive.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start + 24 : start + 28] = (100).to_bytes(4, "little")  # its unpacked size, in the directory
    archive.write_bytes(content)
    with pytest.raises(DataError, match=rf"1 images cannot be read: {name} .*CRC"):
        load(archive)


def test_a_large_file_in_a_folder_is_refused(tmp_path, load, monkeypatch):
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(DataError, match="is larger than 0 MiB"):
        load(write_market_folder(tmp_path))


@pytest.mark.parametrize("content", [b"<html>404</html>", b""], ids=["page", "empty"])
def test_not_an_archive_at_all(content, tmp_path, load):
    (tmp_path / ARCHIVE).write_bytes(content)
    with pytest.raises(DataError, match=f"{ARCHIVE} cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.9, -9, -1])
def test_truncated_archives(keep, tmp_path, load):
    archive = write_market_archive(tmp_path)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=f"{ARCHIVE} cannot be read"):
        load(archive)


def test_random_damage_raises_nothing_else(tmp_path):
    rng = random.Random(0)
    whole = write_market_archive(tmp_path).read_bytes()
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path = tmp_path / "damaged.zip"
        path.write_bytes(damaged)
        try:
            Market1501(cache_dir=tmp_path, data_dir=str(path))._split_generators(None)
        except DataError:
            refused += 1
    assert refused > 100
