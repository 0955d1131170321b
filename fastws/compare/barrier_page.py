"""The page of ``fastws barrier``: loss and accuracy along the line between two networks."""

import html
from collections.abc import Iterator
from typing import Any

from fastws import pages

COLUMNS = (
    ("alignment", 11),
    ("statistics", 10),
    ("data", 5),
    ("loss of a", 9),
    ("of b", 7),
    ("barrier", 8),
    ("midpoint", 8),
    ("accuracy of a", 13),
    ("of b", 7),
    ("barrier", 8),
    ("midpoint", 8),
)
STYLES = {"stored": "-", "reset": "--", "repaired": ":"}
COLOURS = {"as they are": pages.GREY, "permuted": pages.BLUE, "whole group": pages.ORANGE}
LEGEND = """
Networks on the straight line between the weights of both, ends included. A barrier is the largest distance between the
curve and the straight line between its ends: of the loss upwards, in nats, of the accuracy downwards; midpoint: the
same in the middle. stored: statistics of batch norms are averaged like weights; reset: they are computed anew on
training inputs; repaired: outputs of layers without batch norm are given the mean of the moments of both ends
(REPAIR).
"""


def cells(curve: dict[str, Any]) -> list[str]:
    """A row of the table."""
    barrier = curve["barrier"]
    losses = [curve["loss"][0], curve["loss"][-1], barrier["loss"], barrier["midpoint_loss"]]
    accuracies = [curve["accuracy"][0], curve["accuracy"][-1], barrier["accuracy"], barrier["midpoint_accuracy"]]
    names = [curve[name] for name in ("alignment", "statistics", "part")]
    return [*names, *(f"{value:.4f}" for value in (*losses, *accuracies))]


def body(results: dict[str, Any]) -> Iterator[str]:
    cosine, images = results["cosine"], results["images"]
    yield f"<h1>From {html.escape(results['a'])} to {html.escape(results['b'])}</h1>"
    yield f"<p>{html.escape(results['module'])} on {html.escape(results['data'])}: {images['test']:,} test and "
    yield f"{images['train']:,} training inputs, {images['statistics']:,} of them for statistics. Cosine of the "
    yield f"weights: {', '.join(f'{name} {value:.3f}' for name, value in cosine.items())}.</p>"
    for part in dict.fromkeys(curve["part"] for curve in results["curves"]):
        yield figure([curve for curve in results["curves"] if curve["part"] == part], part)
    yield pages.table([name for name, _ in COLUMNS], map(cells, results["curves"]))
    yield f"<p><small>{LEGEND}</small></p>"


def figure(curves: list[dict[str, Any]], part: str) -> str:
    drawn, axes = pages.make_figure(2)
    for axis, what in zip(axes, ("loss", "accuracy"), strict=True):
        for curve in curves:
            places = [k / (len(curve[what]) - 1) for k in range(len(curve[what]))]
            name = f"{curve['alignment']}, {curve['statistics']}"
            style = {"color": COLOURS[curve["alignment"]], "linestyle": STYLES[curve["statistics"]]}
            axis.plot(places, curve[what], label=name, **style)
        axis.set(xlabel="share of the second network", ylabel=f"{part} {what}")
    axes[0].legend(fontsize="small")
    return pages.figure(drawn, f"Loss (nats) and accuracy along the line, {part} data.")
