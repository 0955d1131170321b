"""The page of ``fastws zoo compare``: accuracy over novelty, populations side by side, and what they cost."""

import html
from collections.abc import Iterable, Iterator
from typing import Any

from fastws import pages
from fastws.downstream.judging.memorisation import SCREENED

BASELINES = {"noise": pages.GREY, "average": "#009e73", "PCA + Gaussian": pages.BLUE, "PCA + flow": "#882255"}
COLOURS = (
    pages.ORANGE,
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#8c564b",
    "#7f3fbf",
    "#d62728",
    "#17becf",
    "#bcbd22",
    "#000080",
)  # of samples
GRIDS = ("PCA + Gaussian", "PCA + flow")  # of components and temperatures: no curves
ENOUGH = 100  # held-out networks, below which p-values are coarse
LEGEND = """
Brackets are 95 % intervals over networks. spread: standard deviation of weights over that of training states. apart:
median distance among networks of the set over that among held-out networks. p &le; .05: share of networks nearer to a
training state than 95 % of held-out networks are; 5 % is expected of networks that are like these. After a stroke
stands the same of held-out networks of equal accuracy, within one point, which "partners" of the set have. agreement
and phi: equal predictions with the nearest training state, and the correlation of errors with its errors. IoU: largest
share of common errors with any training state; it falls as soon as a network gets worse, and only serves comparison.
disagreement: different predictions among pairs, over those of such held-out networks. neighbours: how many training
states are nearest to some network, over that of uniform draws. ensemble gain: accuracy of the mean logits of ten
networks less their mean accuracy, in points.
"""
TESTS = """
Intervals of mean and median are bootstrapped over networks. Differences are from the first population: of means with
Welch's interval, and the median of all differences of two networks (Hodges-Lehmann) with that of Mann-Whitney's test;
p-values by Holm for all populations of a table.
"""
COSTS = """
Floating point operations, a multiply-add being two and a backward pass two forward ones: the zoo and the training of
the model shared by so many delivered networks, and the sample, its evaluation and its own training. In brackets with
the zoo given. A dash: files that were used are gone, or the model does not say.
"""


def body(results: dict[str, Any]) -> Iterator[str]:
    yield "<h1>New networks, or old ones?</h1>"
    for sentence in results["verdicts"].values():
        yield f"<p><b>{html.escape(sentence)}</b></p>"
    if results["sets"]:
        yield from novelty(results)
    if "accuracy" in results:
        yield box_plots(results["accuracy"])
    for one in results["populations"]:
        yield f"<h2>Accuracy at epoch {one['epoch']}</h2>"
        yield pages.table(POPULATION, (population(row) for row in one["rows"]))
    if results["populations"]:
        yield f"<p><small>{TESTS}</small></p>"
    if results["costs"]:
        yield "<h2>What a network costs</h2>"
        yield from costs(results["costs"])


# --- novelty


def novelty(results: dict[str, Any]) -> Iterator[str]:
    figure, (axis,) = pages.make_figure(height=5.0)
    colours = {"held-out": "black", "untrained networks": "#bbbbbb", "reconstructed anchors": "#117733"} | BASELINES
    fixed = len(colours)
    for group in dict.fromkeys(one["group"] for one in results["sets"]):
        of_group = (one for one in results["sets"] if one["group"] == group)
        dots = sorted(of_group, key=lambda one: one["novelty"][0])
        colour = colours.setdefault(group, COLOURS[(len(colours) - fixed) % len(COLOURS)])
        across, up = [one["novelty"][0] for one in dots], [one["accuracy"][0] for one in dots]
        if group not in GRIDS:
            axis.plot(across, up, color=colour, linewidth=1, alpha=0.5)
        marker, sizes = "P" if group == "held-out" else "o", [30 + 120 * one["spread"][0] for one in dots]
        axis.scatter(across, up, s=sizes, color=colour, marker=marker, label=group, alpha=0.85)
    axis.set(
        xlabel="novelty: distance to the nearest training state, of held-out networks 1", ylabel="accuracy, epoch 0"
    )
    axis.legend(fontsize="small")
    yield pages.figure(figure, "Accuracy over novelty; the size of a point is the spread of its networks.")
    states, flipped = results["training states"], ", ".join(results["flipped groups"]) or "none"
    yield f"<p>Distances are to the nearest of {states:,} training states, modulo permutations of all hidden units and "
    yield f"signs of these groups: {html.escape(flipped)}. Activation: {html.escape(str(results['activation']))}. For "
    yield f"baselines the {SCREENED} states nearest as they lie are looked at, among which the nearest of a held-out "
    yield f"network is in {results['recall']:.0%} of the cases. Held-out networks: {results['held-out networks']}"
    few = results["held-out networks"] < ENOUGH
    yield f"; fewer than {ENOUGH}, so that p-values are coarse and intervals wide.</p>" if few else ".</p>"
    header = ("set", "networks", "accuracy", "novelty", "spread", "apart", "p <= .05", "partners", "agreement", "phi")
    header += ("IoU", "disagreement", "neighbours", "ensemble gain")
    yield pages.table(header, (judged(one) for one in results["sets"]))
    yield f"<p><small>{LEGEND}</small></p>"


def judged(one: dict[str, Any]) -> list[str]:
    measures = [bracketed(one[name], digits) for name, digits in MEASURES]
    pairs = [" / ".join(pages.number(value, 2) for value in one[name]) for name in ("agreement", "phi", "iou")]
    left_out = f" ({one['phi_left_out']} left out)" if one["phi_left_out"] else ""
    gain = " / ".join("-" if value is None else f"{100 * value:+.1f}" for value in one["ensemble_gain"])
    rest = [pages.number(one[name], 2) for name in ("disagreement", "effective_neighbours")]
    near = [f"{one['near']:.0%}", f"{one['partners']:.0%}"]
    return [one["name"], str(one["count"]), *measures, *near, pairs[0], pairs[1] + left_out, pairs[2], *rest, gain]


MEASURES = (("accuracy", 3), ("novelty", 2), ("spread", 2), ("apart", 2))


def bracketed(value: Iterable[float | None], digits: int) -> str:
    middle, low, high = (pages.number(x, digits) for x in value)
    return f"{middle} [{low}, {high}]"


# --- populations

POPULATION = ("population", "networks", "mean", "sd", "median", "5 %, 25 %, 75 %, 95 %", "difference", "Welch p")
POPULATION += ("shift", "Mann-Whitney p")


def population(row: dict[str, Any]) -> list[str]:
    summary, difference = row["summary"], row["difference"]
    cells = [row["name"], str(summary["count"]), bracketed(summary["mean"], 3), pages.number(summary["std"])]
    cells += [bracketed(summary["median"], 3), ", ".join(f"{value:.3f}" for value in summary["quantiles"])]
    if difference is None:
        return [*cells, "", "", "", ""]
    tests = (("mean", "welch_p", "welch_holm"), ("shift", "mann_whitney_p", "mann_whitney_holm"))
    for value, p, adjusted in tests:
        cells += [bracketed(difference[value], 3), f"{difference[p]:.2g} ({row[adjusted]:.2g})"]
    return cells


def lines_of(populations: list[dict[str, Any]]) -> Iterator[str]:
    """The same for a terminal, a line for each population and epoch."""
    for one in populations:
        for row in one["rows"]:
            text = f"epoch {one['epoch']}, {row['name']}: mean {bracketed(row['summary']['mean'], 3)}"
            if row["difference"] is not None:
                shift, first = bracketed(row["difference"]["shift"], 3), one["rows"][0]["name"]
                text += f", shift from {first} {shift}, Mann-Whitney p {row['mann_whitney_holm']:.2g} by Holm"
            yield text


def box_plots(accuracy: dict[str, dict[str, list[float]]]) -> str:
    figure, (axis,) = pages.make_figure(height=4.5)
    epochs = sorted({int(epoch) for one in accuracy.values() for epoch in one})
    width = 0.8 / len(accuracy)
    for place, (name, one) in enumerate(accuracy.items()):
        colour = COLOURS[place % len(COLOURS)]
        known = [epoch for epoch in epochs if str(epoch) in one]
        boxes = axis.boxplot(
            [one[str(epoch)] for epoch in known],
            positions=[epochs.index(epoch) + (place - (len(accuracy) - 1) / 2) * width for epoch in known],
            widths=0.9 * width,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.6},
            medianprops={"color": "black"},
            flierprops={"markersize": 2},
        )
        boxes["boxes"][0].set_label(name)
    axis.set(xticks=range(len(epochs)), xticklabels=epochs, xlabel="epoch", ylabel="accuracy")
    axis.legend(fontsize="small")
    return pages.figure(figure, "Accuracy of all networks of each population, by epoch.")


# --- costs


def costs(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    counts = list(next(iter(found.values()))["per network"])
    parts = ("zoo", "train", "sample", "evaluate", "finetune")
    header = ("population", *parts, *(f"one of {int(count):,}" for count in counts))
    rows = (
        [
            name,
            *(amount(one[part]) for part in parts),
            *(f"{amount(one['per network'][count])} ({amount(one['zoo given'][count])})" for count in counts),
        ]
        for name, one in found.items()
    )
    yield pages.table(header, rows)
    yield f"<p><small>{COSTS}</small></p>"


def amount(flops: float | None) -> str:
    if flops is None:
        return "-"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOP"
    return f"{flops:.3g} FLOP"
