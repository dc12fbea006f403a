"""Figures of the pages against the records in benchmarks/results; parity.py and items.py have tests of their own."""

import json
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
LAYOUTS = {(32, 512, 16): "16 tails", (32, 512, 1): "one tail", (128, 0, 1): "item by item"}


def records(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def students(name, **key):
    """The records of students with a key, in a file of lines."""
    lines = (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if key.items() <= one.items()]


def page(name):
    return (ROOT / name).read_text()


def test_the_sizes_from_which_sampling_is_faster():
    text, found = page("docs/when-it-pays.md"), 0
    for one in records("crossover"):
        layout = LAYOUTS.get((one["sampled"], one["shared"], one["tails"]))
        if layout is None or (one["features"], one["items"]) != (256, 128):
            continue
        sizes = f"| {one['sampled']} | {one['shared']} | {one['tails'] if one['shared'] else ''} |"
        times = f" {one['exact_ms']:.0f} | {one['dis_ms']:.0f} | {one['ratio']:.1f} | {one['auto']} |"
        assert f"| {one['classes']:,} | {layout} {sizes}{times}\n" in text
        found += 1
    assert found == text.count("| exact |\n") + text.count("| sampled |\n") == 13


def test_the_language_model():
    names = {"exact": "exact KD", "dis": "DIS", "exact_in_time": "exact KD in DIS's time"}
    text, readme = page("docs/language-models.md"), page("README.md")
    for one in records("clm"):
        error = f"{one['gradient_error']:.1%}" if one["gradient_error"] else "0"
        sizes = f"{one['sampled']:,} | {one['steps']} | {one['exact_steps']}"
        quality = f"{one['seconds']:.0f} | {one['perplexity']:.1f} | {one['kl']:.3f} | {error}"
        assert f"| {names[one['method']]} | {sizes} | {quality} |\n" in text
        if one["method"] != "exact_in_time":
            assert f"{one['kl']:.3f}, perplexity {one['perplexity']:.1f}, {one['seconds']:.0f} s" in readme


@pytest.mark.parametrize(
    ("name", "key", "quality"),
    [
        ("items", {"data": "beauty.txt", "rate": 4.0}, "NDCG@10 {ndcg10:.4f}"),
        ("large_vocabulary", {"tokenizer": "gemma3"}, "KL {kl:.3f}"),
    ],
)
def test_the_students_of_the_readme(name, key, quality):
    """Means over seeds of the student of exact distillation and of DIS, side by side."""
    cells, cell = [], f"{quality}, {{cpu_seconds:.0f}} s, {{peak_mb:.0f}} MB per step"
    for method in ("exact", "dis"):
        found = students(name, method=method, **key)
        numbers = [what for what, value in found[0].items() if isinstance(value, float)]
        cells.append(cell.format(**{what: mean(one[what] for one in found) for what in numbers}))
    setting = f"{found[0]['steps']} steps, {['one seed', 'two seeds', 'three seeds'][len(found) - 1]}"
    assert f"| {' | '.join(cells)} | [{setting}](" in page("README.md")


def test_a_step_by_other_divergences():
    names = {
        "exact": "exact, in tiles",
        "exact (materialised)": "exact, by autograd",
        "trl_gkd": "TRL GKD",
        "trl_chunked": "TRL chunked",
        "liger": "Liger",
        "head_product": "the product of the student's head",
        "dis": "DIS",
    }
    text, given = page("docs/divergences.md"), records("language_model_divergences")
    dis = {one["divergence"]: one["ms"] for one in given if one["method"] == "dis"}
    assert len(given) == 2 * len(names)
    for one in given:
        error = {0.0: "0", None: ""}.get(one["error"]) if not one["error"] else f"{one['error']:.4f}"
        times = f"{one['ms']:,.0f} | {one['ms'] / dis[one['divergence']]:.1f} | {one['peak_mb']:,.0f}"
        assert f"| {one['divergence']} | {names[one['method']]} | {times} | {error} |\n" in text
