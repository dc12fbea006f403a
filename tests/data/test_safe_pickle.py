import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from archives import python2_pickle

from hf_dis.data import safe_pickle
from hf_dis.data.safe_pickle import load_plain_pickle

CONTENT = {
    "data": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "labels": [1, 2, 3],
    "name": b"a \xff byte string",
}


class Payload:
    """Unpickling this the ordinary way calls a function of the author's choice."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def check(loaded):
    assert list(loaded) == list(CONTENT)
    assert loaded["data"].dtype == np.uint8
    np.testing.assert_array_equal(loaded["data"], CONTENT["data"])
    assert loaded["labels"] == CONTENT["labels"]
    assert loaded["name"] == CONTENT["name"]


def test_reads_python_2_pickles():
    check(load_plain_pickle(python2_pickle({key.encode(): value for key, value in CONTENT.items()})))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_reads_python_3_pickles(protocol):
    check(load_plain_pickle(pickle.dumps(CONTENT, protocol=protocol)))


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "f4", "f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_arrays_of_numbers(dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=dtype, order=order)
    loaded = load_plain_pickle(pickle.dumps({"data": array}, protocol=2))["data"]
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_executes_nothing(tmp_path, protocol):
    marker = tmp_path / "executed"
    hostile = pickle.dumps({"data": Payload(os.system, f"touch {marker}")}, protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match=r"refers to (posix|nt)\.system"):
        load_plain_pickle(hostile)
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists(), "the payload works, so its refusal means something"


@pytest.mark.parametrize(
    "value",
    [
        Payload(eval, "1"),
        Payload(getattr, "", "join"),
        Payload(np.load, "file"),
        Payload(np.zeros, (10,)),
        OrderedDict(),
        np.float64(1.0),
        np.dtype("u1").newbyteorder,
        {1, 2}.union,
    ],
    ids=["eval", "getattr", "np.load", "np.zeros", "OrderedDict", "np.float64", "byte order", "set.union"],
)
def test_refuses_other_globals(value):
    with pytest.raises(pickle.UnpicklingError, match="refers to"):
        load_plain_pickle(pickle.dumps({"data": value}, protocol=2))


def test_refuses_out_of_band_arrays():
    with pytest.raises(pickle.UnpicklingError):
        load_plain_pickle(pickle.dumps(CONTENT, protocol=5))
    with pytest.raises(pickle.UnpicklingError):
        load_plain_pickle(pickle.dumps(CONTENT, protocol=5, buffer_callback=lambda buffer: None))


@pytest.mark.parametrize("dtype", ["O", "U3", "S4", "M8[s]", "c8", "u1,u1", "V4"])
def test_refuses_other_dtypes(dtype):
    array = np.zeros(3, dtype=dtype)
    with pytest.raises(pickle.UnpicklingError, match="plain number"):
        load_plain_pickle(pickle.dumps({"data": array}, protocol=2))


def test_refuses_a_subarray_dtype():
    forged = python2_pickle({b"data": np.zeros(3, "u1")}).replace(b"NNN", b"N)N")
    with pytest.raises(pickle.UnpicklingError, match="structured dtype"):
        load_plain_pickle(forged)


@pytest.mark.parametrize(
    "name",
    [
        "numpy.core.multiarray _reconstruct",
        "numpy._core.multiarray _reconstruct",
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
    ],
)
@pytest.mark.parametrize(
    "state", [b"}U\x0c__setstate__U\x01xs", b"(N}U\x0c__setstate__U\x01xst"], ids=["dict", "slots"]
)
def test_globals_cannot_be_altered(name, state):
    with pytest.raises(pickle.UnpicklingError, match=r"damaged|alters a function"):
        load_plain_pickle(b"c" + name.replace(" ", "\n").encode() + b"\n" + state + b"b.")


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x0f", b"p268435455\n"], ids=["LONG_BINPUT", "PUT"])
def test_refuses_a_memo_that_fills_the_memory(put):
    with pytest.raises(pickle.UnpicklingError, match="more than 5,000,000 instructions"):
        load_plain_pickle(b"}" + put + b".")


def test_refuses_endless_instructions(monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_INSTRUCTIONS", 100)
    assert load_plain_pickle(b"}" + b"}0" * 40 + b".") == {}
    with pytest.raises(pickle.UnpicklingError, match="more than 100 instructions"):
        load_plain_pickle(b"}" + b"}0" * 60 + b".")


def test_refuses_bytes_that_multiply():
    text, once = b"X" + (1000).to_bytes(4, "little") + b"x" * 1000, b"h\x00h\x01R0"
    start = b"\x80\x02c_codecs\nencode\nq\x00" + text + b"X\x06\x00\x00\x00latin1\x86q\x010" + b"0"
    assert load_plain_pickle(start + once + b"}.") == {}
    with pytest.raises(pickle.UnpicklingError, match="more bytes than it has"):
        load_plain_pickle(start + once * 2 + b"}.")


@pytest.mark.parametrize("value", [[1], b"text", 3, None, np.zeros(3, "u1")], ids=lambda v: type(v).__name__)
def test_refuses_anything_but_a_dictionary(value):
    with pytest.raises(pickle.UnpicklingError, match="not a dictionary"):
        load_plain_pickle(pickle.dumps(value, protocol=2))


def test_refuses_every_truncation():
    whole = python2_pickle({key.encode(): value for key, value in CONTENT.items()})
    for length in range(len(whole)):
        with pytest.raises(pickle.UnpicklingError):
            load_plain_pickle(whole[:length])


def test_refuses_wrong_array_sizes():
    pixels = b"T\x06\x00\x00\x00" + b"\0" * 6
    whole = python2_pickle({b"data": np.zeros((2, 3), "u1")})
    assert pixels in whole
    forged = whole.replace(pixels, b"T\x05\x00\x00\x00" + b"\0" * 5)
    with pytest.raises(pickle.UnpicklingError, match="damaged"):
        load_plain_pickle(forged)


def test_refuses_persistent_ids():
    with pytest.raises(pickle.UnpicklingError, match="outside itself"):
        load_plain_pickle(b"\x80\x02}U\x01aU\x01bQs.")
