"""The page of ``fastws lineage``: families as drawn trees, all pairs as a map, and the relations as a table."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy

from fastws import pages
from fastws.compare.kinship import in_words

COLOURS = {
    "average": "#009e73",
    "quantised": pages.ORANGE,
    "pruned": "#cc79a7",
    "rounded": "#e69f00",
    "low rank": "#56b4e9",
    "fine-tuned": pages.BLUE,
}
ARROWS = {"certain": "->", "strong": "->", "unknown": "-"}
LARGEST_DRAWN, MOST_DRAWN = 60, 8  # networks of a family, and families
LONGEST = 28  # characters of a name in a picture
MOST_DEVIATIONS = 12.0  # of the scale of colours
LEGEND = """
Arrows lead from parent to child: solid where that is certain (rounded, masked and averaged values cannot be undone),
broken where it is likely (one network with three relatives or more), a plain line where it is unknown. p: how often
strangers are as close.
"""


def body(title: str, groups: Sequence, left_out: Mapping[str, str]) -> Iterator[str]:
    """HTML of the groups of a ``Lineage``."""
    yield f"<h1>{html.escape(title[0].upper() + title[1:])}</h1>"
    for group in groups:
        related = sum(map(len, group.families))
        yield f"<h2>{len(group.names)} networks of one architecture</h2>"
        what = f"in {len(group.families)} families; looked at: {html.escape(group.scope)}"
        yield f"<p>{related} have relatives, {what}.</p>"
        yield from (f"<p>{html.escape(note)}</p>" for note in group.notes)
        if group.families:
            yield f"<p><small>{LEGEND}</small></p>"
        for family in group.families[:MOST_DRAWN]:
            if len(family) <= LARGEST_DRAWN:
                yield pages.figure(draw_family(group, family), f"a family of {len(family)} networks")
        if group.edges:
            yield pages.table(("from", "", "to", "what was done", "distance", "p"), rows_of(group))
        if group.duplicates:
            pairs = ((group.names[one], group.names[other]) for one, other in group.duplicates)
            yield pages.table(("network", "its duplicate"), pairs)
        if len(group.names) > 2:
            yield pages.figure(draw_pairs(group), "how much closer pairs are than their units in other orders")
    if left_out:
        yield "<h2>Left out</h2>"
        yield pages.table(("file", "why"), left_out.items())


def rows_of(group) -> Iterable[Sequence[str]]:
    signs = {"certain": "→", "strong": "⇢", "unknown": "—"}
    for edge in group.edges:
        share = "" if edge.share is None else f", {edge.share:.0%} of it"
        what = "; ".join(edge.told) or ", ".join(edge.kinds)
        ends = group.names[edge.parent], signs[edge.direction], group.names[edge.child]
        yield *ends, what + share, f"{edge.distance:.3g}", in_words(edge.log_p)


def draw_family(group, family: Sequence[int]):
    """A tree from left to right; generations are columns."""
    places = place(group, family)
    depth = max(x for x, _ in places.values()) + 1
    height = max(y for _, y in places.values()) + 1
    figure, (axis,) = pages.make_figure(height=max(1.6, 0.42 * height), width=max(6.0, min(12.0, 2.6 * depth)))
    axis.axis("off")
    axis.set(xlim=(-0.1, depth - 0.1), ylim=(height - 0.4, -0.6))
    for edge in group.edges:
        if edge.child in places:
            kind = edge.kinds[0] if edge.kinds else "fine-tuned"
            style = {"arrowstyle": ARROWS[edge.direction], "color": COLOURS.get(kind, pages.GREY)}
            style["linestyle"] = "dashed" if edge.direction == "strong" else "solid"
            axis.annotate("", places[edge.child], places[edge.parent], arrowprops=style | {"shrinkA": 4, "shrinkB": 4})
    copies = {other: one for one, other in group.duplicates}
    for number, (x, y) in places.items():
        alike = sum(one == number for one in copies.values())
        label = shorten(group.names[number]) + (f" (and {alike} equal)" if alike else "")
        axis.plot([x], [y], "o", color=pages.GREY, markersize=4)
        axis.text(x + 0.04, y - 0.12, label, fontsize=7)
    shown = {edge.kinds[0] for edge in group.edges if edge.child in places and edge.kinds}
    for kind in [kind for kind in COLOURS if kind in shown]:
        axis.plot([], [], color=COLOURS[kind], label=kind)
    if shown:
        figure.legend(fontsize=7, loc="outside right upper", frameon=False)
    return figure


def shorten(name: str) -> str:
    return name if len(name) <= LONGEST else f"...{name[-LONGEST + 3 :]}"


def place(group, family: Sequence[int]) -> dict[int, tuple[int, float]]:
    """Column and row of each network; duplicates are not drawn. The root has no parent, and most relatives."""
    equal = {other for _, other in group.duplicates}
    members = [number for number in family if number not in equal]
    near: dict[int, list[int]] = {number: [] for number in members}
    sources: dict[int, list[int]] = {}  # of averages, which have several parents
    for edge in group.edges:
        if edge.parent in near and edge.child in near and edge.share is None:
            near[edge.parent].append(edge.child)
            near[edge.child].append(edge.parent)
        elif edge.child in near:
            sources.setdefault(edge.child, []).append(edge.parent)
    children = {edge.child for edge in group.edges if edge.direction != "unknown"}
    root = max(members, key=lambda number: (number not in children, len(near[number])))
    places: dict[int, tuple[int, float]] = {}
    row = 0

    def visit(number: int, column: int) -> None:
        nonlocal row
        places[number] = column, float(row)
        for count, other in enumerate([other for other in near[number] if other not in places]):
            row += count > 0
            visit(other, column + 1)

    visit(root, 0)
    for number in sorted(members, key=lambda number: number in sources):
        if number not in places:
            row += 1
            visit(number, 1 + max((places[one][0] for one in sources.get(number, ()) if one in places), default=-1))
    return places


def draw_pairs(group):
    """All pairs, families side by side."""
    order = [number for family in group.families for number in family]
    order += [number for number in range(len(group.names)) if number not in set(order)]
    shown = group.deviations.numpy()[numpy.ix_(order, order)].clip(-2, MOST_DEVIATIONS)
    numpy.fill_diagonal(shown, numpy.nan)
    figure, (axis,) = pages.make_figure(height=4.5, width=5.5)
    axis.grid(False)
    drawn = axis.imshow(shown, cmap="magma", interpolation="nearest")
    figure.colorbar(drawn, label="standard deviations")
    axis.set(xlabel="networks, families first", ylabel="networks")
    return figure
