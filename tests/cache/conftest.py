import shutil

import pytest
from small_cache import ITEMS, SETTINGS, C
from tiny_models import labelled_images, vit

from hf_dis import cache_teacher_targets


@pytest.fixture(scope="session")
def teacher():
    return vit(C, seed=1, spread=30)


@pytest.fixture(scope="session")
def whole(teacher, tmp_path_factory):
    """The folder of a cache, to be read only."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    cache_teacher_targets(teacher, labelled_images(ITEMS, C), path, **SETTINGS)
    return path


@pytest.fixture
def cache(whole, tmp_path):
    """A copy of the folder for the test alone."""
    return shutil.copytree(whole, tmp_path / "cache")
