"""The kernels compiled ahead, for devices that are not there: they compile, and no index is of 32 bits."""

import re

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_dis.head import triton_adamw, triton_products, triton_rows  # noqa: E402
from hf_dis.loss import triton_sampled  # noqa: E402
from hf_dis.teacher import triton_normaliser  # noqa: E402

NAMES = {"f": "*fp32", "b": "*bf16", "h": "*fp16", "d": "*fp64", "l": "*i64", "i": "i32", "n": "fp64"}
PRODUCTS = {"BLOCK_IDS": 32, "BLOCK_WIDTH": 128}
ROWS = {"PIECE": 64, "BLOCK": 4, "BLOCK_WIDTH": 512}
NORMALISER = {"GROUP": 8, "BLOCK": 8192}
MASS = {"BLOCK_ITEMS": 16, "BLOCK_CLASSES": 256}
STEP = {"BLOCK_ROWS": 2, "BLOCK_WIDTH": 512}
# A letter an argument: pointers to float32, bfloat16, float16, float64, int64; an integer; a number in float64.
CASES = {
    "products": (triton_products.products_kernel, ["bflf", "fflf", "bblf", "hhlf"], "iiiiii", PRODUCTS),
    "features": (triton_products.features_gradient_kernel, ["bflf", "fflf", "hhlf"], "iiiiii", PRODUCTS),
    "normaliser": (triton_normaliser.log_normaliser_kernel, ["bfb", "fff", "hfh", "ddd"], "iiin", NORMALISER),
    "mass": (triton_normaliser.class_mass_kernel, ["bff", "fff", "hff"], "iiiinn", MASS),
    "pieces": (triton_rows.pieces_kernel, ["flflf", "blblf", "blflf"], "iii", ROWS),
    "segments": (triton_rows.segments_kernel, ["flflff", "blblfb", "blflff"], "ii", ROWS),
    "factors": (triton_adamw.row_factors_kernel, ["fdlfff"], "innnn", {"BLOCK": 256}),
    "step": (triton_adamw.step_kernel, ["ffflffff", "bbblbfff"], "iinnn", STEP),
    "divergence": (triton_sampled.forward_kl_kernel, ["ffffffff", "bfffffff"], "iiiiin", {"BLOCK": 1024}),
    "cross-entropy": (triton_sampled.cross_entropy_kernel, ["ffff", "bfff"], "iiii", {"BLOCK": 1024}),
}
# A product of two 32-bit integers in Triton's intermediate language.
NARROW = r"arith\.muli .*: (tensor<[\dx]*)?i32"


@pytest.fixture(autouse=True)
def compiles_anew(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, letters, constants, capability):
    types = [NAMES[letter] for letter in letters]
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compile(name, capability):
    check(name, CASES[name][1][:1], capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compile_for_all_types(name, capability):
    check(name, CASES[name][1][1:], capability)


def check(name, pointers, capability):
    """No two 32-bit integers are multiplied at run time: rows · columns of a head can pass 2^31."""
    kernel, _, others, constants = CASES[name]
    for letters in pointers:
        result = compiled(kernel, letters + others, constants, capability)
        assert len(result.asm["cubin"]) > 1000
        assert not re.search(NARROW, result.asm["ttir"]), result.asm["ttir"]


def test_a_product_of_32_bits_is_found():
    """The search of the tests above, on a kernel that it has to catch."""
    import triton.language as tl

    @triton.jit
    def narrow(values, stride):
        tl.store(values + tl.program_id(0) * stride, 0.0)

    assert re.search(NARROW, compiled(narrow, "fi", {}, 80).asm["ttir"])
