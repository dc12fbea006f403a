"""The kernels compiled ahead, for devices that are not there: they compile, and no index is of 32 bits."""

import re

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_dis.fused import triton_sampled_head, triton_tails_gradient  # noqa: E402
from hf_dis.head import triton_adamw, triton_contributions, triton_products, triton_rows  # noqa: E402
from hf_dis.loss import triton_exact, triton_exact_sums, triton_sampled  # noqa: E402
from hf_dis.models import triton_gathered  # noqa: E402
from hf_dis.sampling import (  # noqa: E402
    triton_assembly,
    triton_cached,
    triton_item_columns,
    triton_learning,
    triton_steps,
    triton_tails,
)
from hf_dis.teacher import triton_normaliser, triton_ranking, triton_stored  # noqa: E402

NAMES = {
    "f": "*fp32", "b": "*bf16", "h": "*fp16", "d": "*fp64", "l": "*i64", "w": "*i32", "u": "*u8", "i": "i32",
    "n": "fp64",
}  # fmt: skip
PLACED = {"BLOCK": 4, "BLOCK_WIDTH": 512}
PRODUCTS = {"BLOCK_IDS": 32, "BLOCK_WIDTH": 128}
ROWS = {"PIECE": 64, "BLOCK": 4, "BLOCK_WIDTH": 512}
OTHERS, ALONE = {"HAS_OTHERS": True}, {"HAS_KEPT": False, "HAS_OTHERS": False}
NORMALISER = {"GROUP": 8, "BLOCK": 8192}
MASS = {"BLOCK_ITEMS": 16, "BLOCK_CLASSES": 256}
STEP = {"BLOCK_ROWS": 2, "BLOCK_WIDTH": 512}
WIDE = {"WIDE": triton.language.float32}
COLUMNS = {"HAS_LABEL": True, "ALL_RANKS": False, "STEPS": 6, "BLOCK_RANKS": 32, "BLOCK_DEPTH": 64}
ASSEMBLY = COLUMNS | {"BLOCK": 512}
TAILS = {"BLOCK_ITEMS": 128, "BLOCK_SHARED": 64, "BLOCK_WIDTH": 128}
INCLUSION = {"STEPS": 4, "BLOCK": 4096}
PARTS = {"HAS_CAP": True, "PART": 2**15, "BLOCK": 4096}
TERMS = {"HARD": 2} | PARTS | {"BLOCK_PARTS": 32, "BLOCK_STORED": 32}
# A letter an argument: pointers to float32, bfloat16, float16, float64, int64, int32, bytes; an integer; a number in
# float64; - is None and 1 the integer 1, which are compiled in.
CONSTANTS = {"-": None, "1": 1}
CASES = {
    "products": (
        triton_products.products_kernel,
        ["bflbb", "fflff", "bblbb", "hhlhh"],
        "iiiiiiiii",
        WIDE | PRODUCTS | {"BLOCK_SHARED": 1024},
    ),
    "features": (
        triton_products.features_gradient_kernel,
        ["bflbb", "fflff", "hhlhh"],
        "iiiiiiii",
        WIDE | {"HAS_TAILS": True} | PRODUCTS,
    ),
    "gathered rows": (triton_gathered.gathered_rows_kernel, ["flb", "bll"], "iiii", PLACED),
    "placed rows": (triton_gathered.placed_rows_kernel, ["blf", "flb"], "iiiii", PLACED),
    "normaliser": (triton_normaliser.log_normaliser_kernel, ["bfb", "fff", "hfh", "ddd"], "iiin", NORMALISER),
    "ranked mass": (triton_normaliser.take_ranked_kernel, ["flf", "dld"], "iiiiin", {"BLOCK": 64}),
    "mass": (triton_normaliser.class_mass_kernel, ["bfff", "ffff", "hfff"], "iiiinn", {"HAS_ADDED": True} | MASS),
    "pieces": (triton_rows.pieces_kernel, ["fflflf", "bblblf", "bblflf"], "iiiii", OTHERS | ROWS),
    "segments": (
        triton_rows.segments_kernel,
        ["fflflflff", "bblflflfb", "bblflfldf"],
        "iiii",
        {"HAS_KEPT": True} | OTHERS | ROWS,
    ),
    "segments of one tensor": (triton_rows.segments_kernel, ["b-lfl" + "f--b"], "iiii", ALONE | ROWS),
    "factors": (triton_adamw.row_factors_kernel, ["fddlffff"], "innnnnnn", {"BLOCK": 256}),
    "step": (triton_adamw.step_kernel, ["ffflfffff", "bbblbffff"], "iinn", STEP),
    "divergence": (triton_sampled.forward_kl_kernel, ["ffffffff", "bfffffff"], "iiiiin", {"BLOCK": 1024}),
    "mixture": (triton_sampled.mixed_kernel, ["ffffffffffu", "bfffffffffu"], "iiiiiinnn", {"BLOCK": 1024}),
    "head": (
        triton_sampled_head.head_kernel,
        ["bflfff" + "bldffl" + "bffbbbu", "fflfff" + "fldffl" + "ffffffu", "bblfff" + "bldffl" + "bffbbbu"],
        "iiiiiiiiiiiinnn",
        WIDE | PRODUCTS | {"BLOCK_OWN": 32, "BLOCK": 1024},
    ),
    "tails gradient": (
        triton_tails_gradient.tails_gradient_kernel,
        ["bbbff", "bbbfb", "fffff"],
        "iiiii",
        WIDE | {"WIDENS": False, "PRECISION": "ieee"} | TAILS,
    ),
    "starts": (triton_contributions.starts_kernel, ["lll"], "i", {"BLOCK": 4096}),
    "lengths": (triton_contributions.lengths_kernel, ["fff", "bbf", "ddd"], "iiiii", {"BLOCK": 4, "BLOCK_WIDTH": 512}),
    "contributions": (
        triton_contributions.contributions_kernel,
        ["lbflff", "lfflff"],
        "iiii",
        {"HAS_LENGTHS": True, "BLOCK": 256},
    ),
    "class sizes": (triton_contributions.class_sizes_kernel, ["flf"], "i", {"BLOCK": 256}),
    "kept": (triton_contributions.kept_kernel, ["flll" + "ddlldl"], "iinn", INCLUSION),
    "best places": (triton_ranking.best_kernel, ["bl", "fl", "hl"], "iii", {"LOWEST_BIT": 0, "BLOCK": 4096}),
    "ranking": (triton_ranking.rank_kernel, ["blbl", "flfl", "hlhl"], "iiii", {"GROUP": 8, "BLOCK": 512}),
    "answers": (
        triton_ranking.answers_kernel,
        ["bbfllf", "fffllf", "dddlld"],
        "iiiiiin",
        {"HAS_LABEL": True, "BLOCK": 1024},
    ),
    "answers of items": (
        triton_ranking.item_kernel,
        ["bfblbl" + "llf", "ffflfl" + "llf", "hfhlhl" + "llf"],
        "iiiiiiiiin",
        {"GROUP": 8, "HAS_LABEL": True, "LOWEST_BIT": 0, "BLOCK": 8192, "BLOCK_GROUPS": 4096, "BLOCK_RANKS": 512}
        | {"BLOCK_COLUMNS": 1024},
    ),
    "unpacking": (triton_stored.unpack_kernel, ["ulflfff"], "iiii", {"BITS": 18, "BLOCK": 32, "BLOCK_DEPTH": 2}),
    "stored columns": (triton_stored.columns_kernel, ["lflffluff"], "iin", {"BLOCK_DEPTH": 2, "BLOCK": 32}),
    "stored sample": (
        triton_cached.assemble_stored_kernel,
        ["luffldl" + "lfufffu"],
        "iiin",
        {"HAS_LABEL": True, "BLOCK_STORED": 32, "BLOCK": 1024},
    ),
    "inclusion": (triton_assembly.inclusion_kernel, ["ddd"], "iii", {"BLOCK": 64}),
    "sample": (triton_assembly.assemble_kernel, ["lfldddd" + "llfufflfu"], "iiiiiii", ASSEMBLY),
    "sample of all ranks": (
        triton_assembly.assemble_kernel,
        ["lfld---" + "llfufflfu"],
        "iiiiiii",
        ASSEMBLY | {"ALL_RANKS": True},
    ),
    "item columns": (triton_item_columns.item_columns_kernel, ["lffdddl" + "lffffl" + "f"], "iiiiii", COLUMNS),
    "item columns of all ranks": (
        triton_item_columns.item_columns_kernel,
        ["lff---l" + "lffffl" + "f"],
        "iiiiii",
        COLUMNS | {"ALL_RANKS": True},
    ),
    "class sums": (triton_tails.class_sums_kernel, ["ffd"], "i", {"BLOCK": 4096}),
    "class density": (triton_tails.class_density_kernel, ["ffddd"], "iinnn", {"BLOCK": 4096, "BLOCK_SUMS": 64}),
    "tail scale": (triton_tails.tail_scale_kernel, ["ddd"], "iin", {"BLOCK": 1024}),
    "tail ids": (triton_tails.tail_ids_kernel, ["dddld"], "iiinn", {"STEPS": 19, "BLOCK": 256}),
    "finite items": (triton_learning.finite_items_kernel, ["ffu", "bfu"], "iii", {"BLOCK": 1024}),
    "item counts": (triton_learning.item_counts_kernel, ["ul"], "i", {"BLOCK": 4096}),
    "rank sums": (
        triton_learning.rank_sums_kernel,
        ["fflu" + "ld"],
        "iiiiii",
        {"ITEMS": 64, "BLOCK": 32, "BLOCK_BINS": 16},
    ),
    "tail sums": (triton_learning.tail_sums_kernel, ["fu--uf", "bu--uf"], "iiiiii", {"BLOCK_ITEMS": 32, "BLOCK": 32}),
    "tail sums outside": (triton_learning.tail_sums_kernel, ["f-lluf"], "iiiiii", {"BLOCK_ITEMS": 32, "BLOCK": 32}),
    "rank steps": (triton_steps.step_ranks_kernel, ["dldddddd"], "iin", {"BLOCK_SCALES": 8, "BLOCK_BINS": 16}),
    "class steps": (triton_steps.step_classes_kernel, ["lff"], "in", {"BLOCK": 256}),
    "marginal": (triton_steps.step_marginal_kernel, ["fllf"], "in", {"BLOCK": 1024}),
    "part sums": (
        triton_exact_sums.part_sums_kernel,
        ["bbf", "fbf", "hhf", "ddd"],
        "iiiinnn",
        {"TEACHER": 1, "HAS_LABEL": True} | PARTS,
    ),
    "mean slopes": (
        triton_exact_sums.mean_slopes_kernel,
        ["bbff", "fbff", "dddd"],
        "iiiinnnn",
        {"KIND": 2} | PARTS | {"BLOCK_PARTS": 32},
    ),
    "terms of logits": (
        triton_exact.terms_kernel,
        ["bblffl" + "ffffb", "ffldfl" + "fffff", "hhlffl" + "fffff", "ddlddl" + "ddddd"],
        "iiiiiinnnnnnn",
        {"KIND": 3, "TEACHER": 1} | TERMS,
    ),
    "terms of stored targets": (
        triton_exact.terms_kernel,
        ["bblffl" + "ffffb", "ffldfl" + "fffff"],
        "iiiiiinnnnnnn",
        {"KIND": 0, "TEACHER": 2} | TERMS,
    ),
    "terms without labels": (
        triton_exact.terms_kernel,
        ["bb----ff-fb"],
        "ii1iiinnnnnnn",
        {"KIND": 0, "TEACHER": 1} | TERMS,
    ),
    "terms alone": (
        triton_exact.terms_kernel,
        ["b----l-f-f-"],
        "i11i11nnnnnnn",
        {"KIND": 0, "TEACHER": 0} | TERMS,
    ),
    "sums of a part": (
        triton_exact_sums.part_sums_kernel,
        ["b-f"],
        "i1iinnn",
        {"TEACHER": 2, "HAS_LABEL": False} | PARTS,
    ),
    "cross-entropy": (triton_sampled.cross_entropy_kernel, ["ffff", "bfff"], "iiii", {"BLOCK": 1024}),
}
WARPS = {"head": triton_sampled_head.WARPS, "tails gradient": 8}
# A product of two 32-bit integers in Triton's intermediate language.
NARROW = r"arith\.muli .*: (tensor<[\dx]*)?i32"


@pytest.fixture(autouse=True)
def compiles_anew(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, letters, constants, capability, warps=4):
    types = [NAMES.get(letter, "constexpr") for letter in letters]
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    places |= {(place,): CONSTANTS[letter] for place, letter in enumerate(letters) if letter in CONSTANTS}
    source, options = ASTSource(kernel, signature, places), {"num_warps": warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compile(name, capability):
    check(name, CASES[name][1][:1], capability)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compile_for_all_types(name):
    check(name, CASES[name][1][1:], 90)


def check(name, pointers, capability):
    """No two 32-bit integers are multiplied at run time: rows · columns of a head can pass 2^31."""
    kernel, _, others, constants = CASES[name]
    for letters in pointers:
        result = compiled(kernel, letters + others, constants, capability, WARPS.get(name, 4))
        assert len(result.asm["cubin"]) > 1000
        if name not in ("ranking", "answers of items"):  # tl.sort multiplies numbers below the size of its block
            assert not re.search(NARROW, result.asm["ttir"]), result.asm["ttir"]


def test_a_product_of_32_bits_is_found():
    """The search of the tests above, on a kernel that it has to catch."""
    import triton.language as tl

    @triton.jit
    def narrow(values, stride):
        tl.store(values + tl.program_id(0) * stride, 0.0)

    assert re.search(NARROW, compiled(narrow, "fi", {}, 80).asm["ttir"])
