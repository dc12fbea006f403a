"""Data sets for the examples, built from local files by Hugging Face Datasets builders."""

from hf_dis.data.cifar100 import Cifar100, load_cifar100
from hf_dis.data.errors import DataError
from hf_dis.data.glyphs import Glyphs, load_glyphs

__all__ = ["Cifar100", "DataError", "Glyphs", "load_cifar100", "load_glyphs"]
