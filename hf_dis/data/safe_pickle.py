"""Reads pickled dictionaries of plain data without running anything that a pickle asks for.

A pickle is a program: ``pickle.load`` runs any function that a hostile pickle names. Here the globals in pickled
NumPy arrays stand for the small classes below, which only record numbers, and every other global is refused.
NumPy's own constructors are refused too, because with a forged dtype they build arrays of raw pointers. A
pickle of a few bytes cannot claim gigabytes of memory.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

MAX_INSTRUCTIONS = 5_000_000  # CIFAR-100 takes some 300,000; each may make an object of a hundred bytes


class _Dtype:
    """Stands for ``numpy.dtype``: a plain number type; any other type is an error."""

    def __init__(self, code: bytes | str, *_flags: Any) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not re.fullmatch("[biuf][1248]", code):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}, which is not a plain number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        byte_order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array with a structured dtype, which is not a plain number")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stands for ``numpy.ndarray``: holds the array of the pickled state."""

    def __init__(self, *_placeholder: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran_order, raw = state
        self.value = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


class _Encode:
    """Stands for ``_codecs.encode``, by which Python 3 writes bytes up to protocol 2."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def __call__(self, text: str, codec: str) -> bytes:
        encoded = text.encode(codec)
        self.left -= len(encoded)
        if self.left < 0:
            raise pickle.UnpicklingError("it unfolds to more bytes than it has")
        return encoded

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it alters a function")


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        # A pickle's BUILD instruction can alter none of these: the classes' __setstate__ then lacks its instance,
        # and a string has no attributes to set. So one pickle cannot prepare the way for another.
        self._allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy._core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): "only ever an argument of _reconstruct",
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): _Encode(limit=len(data)),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which plain data has no need of")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def _check_instructions(data: bytes) -> None:
    for count, (opcode, argument, _position) in enumerate(pickletools.genops(data)):
        # The unpickler's memo is an array: a single high index would have it fill the memory.
        memo_index = argument if opcode.name in ("PUT", "LONG_BINPUT") else 0
        if max(count, memo_index) > MAX_INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has more than {MAX_INSTRUCTIONS:,} instructions or objects")


def load_plain_pickle(data: bytes) -> dict[str, Any]:
    """Unpickles a dictionary of numbers, strings, lists and number arrays, and nothing else.

    Reads pickles of Python 2, whose strings come back as ``bytes``, and those of Python 3 up to protocol 4.

    Args:
        data: the whole pickle.

    Returns:
        the dictionary, its keys decoded to ``str`` and the arrays among its values read-only.

    Raises:
        pickle.UnpicklingError: if it is damaged, not a dictionary, or asks for anything but plain data.
    """
    try:
        _check_instructions(data)
        loaded = _PlainUnpickler(data).load()
        if type(loaded) is not dict:
            raise pickle.UnpicklingError(f"it holds a {type(loaded).__name__}, not a dictionary")
        return {
            key.decode() if isinstance(key, bytes) else str(key): value.value if isinstance(value, _Array) else value
            for key, value in loaded.items()
        }
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle may raise anything: IndexError, EOFError, MemoryError, ...
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__}: {error})") from error
