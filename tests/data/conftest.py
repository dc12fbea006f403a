from functools import partial

import pytest
from archives import write_cifar100_archive

from hf_dis.data import load_cifar100


@pytest.fixture
def archive(tmp_path):
    return write_cifar100_archive(tmp_path)


@pytest.fixture
def load(tmp_path):
    """load_cifar100 for unofficial archives, with a cache of the test's own."""
    return partial(load_cifar100, verify_checksum=False, cache_dir=tmp_path / "cache")
