"""The parts of the demo's page as HTML: answers side by side, the sampled classes, cost and error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from answers import Budget, Item

# Classes of each model that are listed.
LISTED = 6
CERTAIN, RANDOM = "var(--color-accent)", "#2a9d8f"
STYLE = """
.dis table {width: 100%; border-collapse: collapse}
.dis td, .dis th {padding: 2px 6px; text-align: left; overflow-wrap: anywhere}
.dis .bar {height: 8px; border-radius: 4px; background: var(--body-text-color-subdued)}
.dis .sides {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 12px}
.dis svg {width: 100%; height: auto; color: var(--body-text-color)}
.dis .number {font-size: 1.4em; font-weight: 600}
"""


def answers(item: Item, budget: Budget, label: Callable[[int], str]) -> str:
    """The likeliest classes of teacher and student side by side; those of the sample are marked.

    Args:
        item: one item.
        budget: its sample.
        label: the name of a class.
    """
    certain = dict(zip(budget.classes.tolist(), budget.certain.tolist(), strict=True))
    sides = []
    for name, logits in (("Teacher", item.teacher), ("Student", item.student)):
        probs, classes = logits[0].softmax(0).topk(min(LISTED, logits.shape[1]))
        rows = []
        for prob, number in zip(probs.tolist(), classes.tolist(), strict=True):
            colour = {True: CERTAIN, False: RANDOM}.get(certain.get(number))
            lit = "" if colour is None else f"background: {colour}"
            rows.append(
                f"<tr><td>{escape(label(number))}</td><td>{prob:.1%}</td>"
                f'<td style="width: 40%"><div class="bar" style="width: {100 * prob:.1f}%; {lit}"></div></td></tr>'
            )
        sides.append(f"<div><h3>{name}</h3><table>{''.join(rows)}</table></div>")
    return f'<div class="dis"><div class="sides">{"".join(sides)}</div></div>'


def lights(budget: Budget, num_classes: int, label: Callable[[int], str]) -> str:
    """All classes in the teacher's order, from the upper left on; the sampled ones light up.

    Args:
        budget: the sample.
        num_classes: C.
        label: the name of a class.
    """
    across = math.ceil(math.sqrt(2.5 * num_classes))
    down = math.ceil(num_classes / across)
    cells = []
    found = zip(budget.ranks.tolist(), budget.classes.tolist(), budget.certain.tolist(), strict=True)
    for rank, number, certain in found:
        row, column = divmod(rank, across)
        cells.append(
            f'<rect x="{column}" y="{row}" width="0.9" height="0.9" fill="{CERTAIN if certain else RANDOM}">'
            f"<title>{escape(label(number))}, rank {rank + 1:,}</title></rect>"
        )
    return (
        f'<div class="dis"><svg viewBox="0 0 {across} {down}" role="img" aria-label="Sampled classes">'
        f'<rect width="{across}" height="{down}" fill="currentColor" opacity="0.08"/>{"".join(cells)}</svg>'
        f"<p>{num_classes:,} classes in the teacher's order, the likeliest at the upper left. "
        f'<b style="color: {CERTAIN}">In every sample</b>: {int(budget.certain.sum())}. '
        f'<b style="color: {RANDOM}">Sampled at random</b>: {int((~budget.certain).sum())}.</p></div>'
    )


def costs(budget: Budget, num_classes: int) -> str:
    """Error and cost of a budget beside those of all classes.

    Args:
        budget: the sample.
        num_classes: C.
    """
    number, share = len(budget.classes), len(budget.classes) / num_classes
    products = budget.products / 1e3
    return (
        '<div class="dis"><table>'
        f'<tr><td>Gradient error</td><td class="number" id="error">{budget.error:.1%}</td></tr>'
        f'<tr><td>Student logits</td><td class="number">{number:,} of {num_classes:,} ({share:.1%})</td></tr>'
        f"<tr><td>Multiplications of the head</td><td>{products:,.0f} of {products / share:,.0f} thousand</td></tr>"
        "</table></div>"
    )


def curve(budgets: Sequence[Budget], chosen: Budget) -> str:
    """The error of the gradient by budget, both on logarithmic axes.

    Args:
        budgets: two or more, by rising size.
        chosen: that is marked.
    """
    points = [(len(one.classes), one.error) for one in [*budgets, chosen] if one.error > 0]
    if len(points) < 2:
        return ""
    (left, right), (low, high) = ((math.log(min(part)), math.log(max(part))) for part in zip(*points, strict=True))

    def place(budget: Budget) -> tuple[float, float]:
        across = (math.log(len(budget.classes)) - left) / max(right - left, 1e-9)
        up = (math.log(max(budget.error, math.exp(low))) - low) / max(high - low, 1e-9)
        return 40 + 240 * across, 100 - 85 * up

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, budgets))
    ticks = "".join(
        f'<text x="{place(one)[0]:.1f}" y="116" text-anchor="middle">{len(one.classes)}</text>' for one in budgets
    )
    x, y = place(chosen)
    return (
        '<div class="dis"><svg viewBox="0 0 300 130" role="img" aria-label="Gradient error by budget" '
        'font-size="9" fill="currentColor">'
        f'<text x="36" y="18" text-anchor="end">{math.exp(high):.0%}</text>'
        f'<text x="36" y="103" text-anchor="end">{math.exp(low):.1%}</text>{ticks}'
        '<text x="160" y="128" text-anchor="middle">error by number of sampled classes, both logarithmic</text>'
        f'<polyline points="{line}" fill="none" stroke="{CERTAIN}" stroke-width="2"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{RANDOM}"/></svg></div>'
    )
