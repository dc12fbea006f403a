"""Cases at the limits, for property tests: sizes, temperatures, huge logits, ties, masked and certain classes."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

ITEMS, WIDTH = 3, 4
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)

SHAPES = {
    "normal": lambda x: x,
    "huge": lambda x: 1e4 * x.clamp(-1, 1),
    "tied": lambda x: torch.zeros_like(x),
    "one-hot": lambda x: torch.full_like(x, -1e4).scatter(1, x.argmax(1, keepdim=True), 1e4),
    "duplicated": lambda x: x[:, torch.arange(x.shape[1]) // 2],
    "masked": lambda x: x.masked_fill(x < x.median(1, keepdim=True).values, -torch.inf),
    "all but one masked": lambda x: x.masked_fill(x < x.amax(1, keepdim=True), -torch.inf),
}


@st.composite
def cases(pick, layouts=("per item", "strata"), designs=("pps", "replacement")):
    """The layout of a sample, a temperature, a teacher's logits, and a student."""
    num_classes = pick(st.one_of(st.integers(1, 6), st.integers(1, 80)))
    layout, design = pick(st.sampled_from(layouts)), pick(st.sampled_from(designs))
    num_sampled = pick(st.integers(1, 90))
    generator = torch.Generator().manual_seed(pick(st.integers(0, 2**20)))
    logits = torch.randn(ITEMS, num_classes, generator=generator)
    student_scale = pick(st.sampled_from([0.0, 1.0, 1e4 / WIDTH]))
    is_shared = layout == "strata" and design == "pps"
    return {
        "spec": {
            "num_sampled_classes": num_sampled,
            "num_shared_classes": pick(st.integers(1, 40)) if is_shared else 0,
            "num_tails": pick(st.integers(1, 5)) if is_shared else 1,
            "rank_depth": num_sampled + pick(st.integers(0, 20)),
            "proposal": pick(st.sampled_from(["dis", "teacher", "uniform", "topk"])),
            "design": design,
            "proposal_floor": pick(st.sampled_from([1e-3, 0.05, 1.0])),
        },
        "temperature": pick(st.floats(0.05, 100)),
        "teacher_logits": SHAPES[pick(st.sampled_from(sorted(SHAPES)))](logits),
        "features": torch.randn(ITEMS, WIDTH, generator=generator).clamp(-1, 1),
        "weight": student_scale * torch.randn(num_classes, WIDTH, generator=generator).clamp(-1, 1),
        "labels": torch.randint(num_classes, (ITEMS,), generator=generator) if pick(st.booleans()) else None,
    }
