"""Datasets for the examples, built from local files."""

from hf_dis.data.cifar100 import Cifar100, load_cifar100
from hf_dis.data.glyph_market import write_glyph_market
from hf_dis.data.glyphs import Glyphs, load_glyphs
from hf_dis.data.market1501 import Market1501, load_market1501
from hf_dis.errors import DataError

__all__ = [
    "Cifar100",
    "DataError",
    "Glyphs",
    "Market1501",
    "load_cifar100",
    "load_glyphs",
    "load_market1501",
    "write_glyph_market",
]
