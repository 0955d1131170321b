"""The report of a quickstart: one HTML file with its figures and tables inside."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy

from fastws import pages
from fastws.files.atomic import write_file
from fastws.pages import BLUE, GREY, ORANGE, make_figure, number, table

if find_spec("matplotlib"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

TARGETS = {"test_accuracy": "accuracy", "epoch": "epoch", "generalisation_gap": "generalisation gap"}
NEW = ("epoch 0", "trained", "novelty", "spread")  # what is said of new networks
COLOURS = (ORANGE, "#cc79a7", BLUE, "#009e73", GREY, "black")  # of sets of new networks
IS_NEW = 0.5  # novelty above which a set of networks is no copy: the mean of two training networks has .6
TRAINED = "accuracy as sampled and after {} epochs of training; novelty and spread beside those of held-out networks"
SMOKE = "<p><strong>A smoke run: it shows that everything works; its numbers mean nothing.</strong></p>"


class Curves(NamedTuple):
    """What is drawn beside the numbers of results.json."""

    accuracy: numpy.ndarray  # test accuracy of each network after each epoch, [networks, epochs + 1], nan if unknown
    embeddings: numpy.ndarray  # [states, E]
    embedded_accuracy: numpy.ndarray  # [states]
    unseen: numpy.ndarray  # bool [states]: of the test split
    log: Sequence[Mapping]  # lines of SANE's log


def write(path: Path, results: Mapping, curves: Curves) -> None:
    """Writes the report; all numbers in it are those of ``results``, the content of results.json."""
    write_file(path, page(results, curves).encode())


def page(results: Mapping, curves: Curves) -> str:
    figures = [
        (draw_zoo(curves), "Each line is a network; the thick line is the median, the band holds 80 % of them."),
        (draw_predictions(results), "Each point is one state of a network that nothing was trained on."),
        (draw_map(curves), "Each point is one state of a network; the axes are the two main directions."),
        (
            draw_losses(curves),
            "Averages over batches; validation has neither noise nor erasing, and networks that were not trained on.",
        ),
    ]
    body = [
        "<h1>What the weights of networks tell about them</h1>",
        f"<p>{html.escape(headline(results))}</p>",
        SMOKE if results["config"]["smoke"] else "",
        "<h2>R² on networks that no part of the training saw</h2>",
        r2_table(results["probe"]["r2"]),
        f"<p><small>{features_note(results)}</small></p>",
        *(pages.figure(drawn, caption) for drawn, caption in figures),
        "<h2>Permutations of neurons</h2>",
        permutation_section(results["permutations"]),
        "<h2>A network in a network</h2>",
        f"<p>{html.escape(nern_note(results['nern']))}</p>",
        pages.figure(
            draw_kernels(results["nern"]), "The kernels of its first layer: above as trained, below as stored."
        ),
        "<h2>New networks</h2>",
        new_section(results["new"]),
        pages.figure(
            draw_new(results["new"]),
            "Each point is a set of networks. Left is what copies, right what no training network is like.",
        ),
        "<h2>What was run</h2>",
        stage_table(results["stages"]),
        table(("machine", ""), [(name, f"{value}") for name, value in results["machine"].items()]),
        "<h2>How to repeat it</h2>",
        f"<pre>{html.escape(results['command'])}</pre>",
        "<p>Other options, all at their defaults unless named above:</p>",
        f"<pre>{html.escape(json.dumps(results['config'], indent=1))}</pre>",
    ]
    return pages.document("fastws quickstart", body)


def features_note(results: Mapping) -> str:
    aligned = "of the aligned networks" if results["config"]["align"] else "of the networks"
    means = "over the tokens of each layer" if results["config"]["pool"] == "layers" else "over all tokens"
    return (
        "Ridge regression; penalty and scaling are chosen on the validation split. In brackets the 2.5 % and 97.5 % "
        f"quantiles over resampled test networks. SANE: means {means} of the embeddings {aligned}, "
        f"{results['embed']['shape'][1]} numbers. s(W): mean, variance and five quantiles of each layer. W: all "
        "weights; aligned: with the neurons in the order of those of one network."
    )


def headline(results: Mapping) -> str:
    zoo, rows = results["zoo"], results["probe"]["rows"]
    test = {
        score["features"]: score["test_r2"] for score in results["probe"]["r2"] if score["target"] == "test_accuracy"
    }
    scores = ", ".join(f"{number(value, 2)} from {name}" for name, value in test.items())
    networks = sum(zoo["networks"].values())
    return (
        f"{networks} networks of {zoo['weights']:,} weights learned to read digits; {zoo['states']:,} states of them "
        f"were kept. SANE learned from those of {zoo['networks']['train']}. On {rows['test']} states of "
        f"{zoo['networks']['test']} others, a linear probe predicts the test accuracy with R² {scores}."
    )


# --- tables


def r2_rows(scores: Sequence[Mapping]) -> list[list[str]]:
    """One row per feature set: its name and, for each target, R^2 with its interval."""
    rows: dict[str, list[str]] = {}
    for score in scores:
        interval = score["interval"]
        spread = f" [{number(interval[0], 2)}, {number(interval[1], 2)}]" if interval else ""
        rows.setdefault(score["features"], [score["features"]]).append(number(score["test_r2"]) + spread)
    return list(rows.values())


def r2_table(scores: Sequence[Mapping]) -> str:
    return table(("features", *TARGETS.values()), r2_rows(scores))


def permutation_section(check: Mapping) -> str:
    rows = []
    for kind in ("SANE", "W"):
        found = check[kind]
        shares = (f"{100 * found[name]:.1f} %" for name in ("nearer", "nearer_than_nearest"))
        rows.append((kind, number(found["permuted"]), number(found["other"]), number(found["ratio"]), *shares))
    text = (
        f"The neurons of {check['networks']} test networks were permuted at random, {check['permutations']} times "
        "each. The function stays the same; the embedding should move less than to another network."
    )
    header = ("", "to its permuted copy", "to another network", "ratio", "copy nearer than another", "than all others")
    return f"<p>{text}</p>{table(header, rows)}"


def nern_note(found: Mapping) -> str:
    before, after = (number(value) for value in found["accuracy"])
    return (
        f"A NeRN predicts the convolution kernels of the best network from their places in it. With predicted kernels "
        f"its test accuracy is {after}, before it was {before}. The NeRN has {found['nern_weights']:,} weights for "
        f"{found['stored_weights']:,}: of so small a network nothing is saved; of a ResNet-20 it is about half."
    )


def new_rows(found: Mapping) -> list[list[str]]:
    """One row per set of new networks: its name and the columns of ``NEW``."""
    rows = []
    for name, one in found["sets"].items():
        trained = "" if one["trained"] is None else number(one["trained"])
        cells = (
            f"{number(value, 2)} [{number(low, 2)}, {number(high, 2)}]"
            for value, low, high in (one["novelty"], one["spread"])
        )
        rows.append([name, number(one["accuracy"][0]), trained, *cells])
    return [*rows, ["from scratch", *map(number, found["scratch"]), "", ""]]


def new_section(found: Mapping) -> str:
    text = (
        f"{found['count']} networks of {found['weights']:,} weights of each kind, made from "
        f"{found['training_states']:,} states of {found['networks']} trained ones: "
        f"{TRAINED.format(found['more_epochs'])}. Novelty is the distance to the nearest training state, whatever the "
        "order and the signs of neurons, over the same of networks that nobody trained on: a copy has 0, and copies "
        "are accurate. What counts is accuracy at the novelty and the spread of held-out networks."
    )
    return f"<p>{html.escape(text)}</p>{table(('', *NEW), new_rows(found))}"


def stage_table(stages: Mapping) -> str:
    rows = [
        (name, f"{stage['seconds']:.1f}", f"{stage['cpu_seconds']:.1f}", str(stage["attempts"]))
        for name, stage in stages.items()
    ]
    totals = (f"{sum(stage[key] for stage in stages.values()):.1f}" for key in ("seconds", "cpu_seconds"))
    note = "<p><small>A stage of several attempts was interrupted; its times are those of the last.</small></p>"
    return table(("stage", "seconds", "CPU seconds", "attempts"), [*rows, ("all", *totals, "")]) + note


# --- figures


def draw_zoo(curves: Curves) -> "Figure":
    figure, (axis,) = make_figure()
    epochs = numpy.arange(curves.accuracy.shape[1])
    low, middle, high = numpy.nanquantile(curves.accuracy, [0.1, 0.5, 0.9], axis=0)
    faint = min(0.3, 30 / len(curves.accuracy))
    axis.plot(epochs, curves.accuracy.T, color=GREY, alpha=faint, linewidth=0.7)
    axis.fill_between(epochs, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axis.plot(epochs, middle, color=BLUE, linewidth=2.5)
    title = f"The zoo: after {epochs[-1]} epochs 80 % of the networks reach {low[-1]:.2f} to {high[-1]:.2f}"
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(title=title, xlabel="epoch", ylabel="test accuracy", ylim=(0, 1), xlim=(0, epochs[-1]))
    return figure


def draw_predictions(results: Mapping) -> "Figure":
    known = results["probe"]["accuracy"]
    kinds = [kind for kind in known if kind != "true"]
    scores = {s["features"]: s["test_r2"] for s in results["probe"]["r2"] if s["target"] == "test_accuracy"}
    figure, axes = make_figure(len(kinds), 3.2, 2.8 * len(kinds))
    everything = numpy.concatenate([known[kind] for kind in known])
    limits = min(0, everything.min()) - 0.05, max(1, everything.max()) + 0.05
    for axis, kind in zip(axes, kinds, strict=True):
        axis.scatter(known["true"], known[kind], s=9, color=BLUE, alpha=0.5, linewidths=0)
        axis.plot([0, 1], [0, 1], color=ORANGE, linewidth=1)
        axis.set(title=f"{kind}: R² {number(scores[kind], 2)}", xlabel="true test accuracy")
        axis.set(xlim=(-0.05, 1.05), ylim=limits)
    axes[0].set_ylabel("predicted")
    return figure


def draw_map(curves: Curves) -> "Figure":
    figure, (axis,) = make_figure(height=5.0)
    centred = curves.embeddings - curves.embeddings[~curves.unseen].mean(0)
    _, singular, directions = numpy.linalg.svd(centred[~curves.unseen], full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    places = centred @ directions[:2].T
    for marker, size, chosen, label in ((".", 14, ~curves.unseen, "train, val"), ("^", 16, curves.unseen, "test")):
        color = {"c": curves.embedded_accuracy[chosen], "cmap": "viridis", "vmin": 0, "vmax": 1}
        points = axis.scatter(*places[chosen].T, s=size, marker=marker, linewidths=0, alpha=0.7, label=label, **color)
    figure.colorbar(points, ax=axis, label="test accuracy")
    axis.legend(frameon=False, loc="best", markerscale=2)
    related = [abs(numpy.corrcoef(place, curves.embedded_accuracy)[0, 1]) for place in places.T]
    axis.set(
        title=f"Embeddings: accuracy correlates with the two main directions by {related[0]:.2f} and {related[1]:.2f}"
    )
    axis.set(xlabel=f"direction 1 ({shares[0]:.0%} of variance)", ylabel=f"direction 2 ({shares[1]:.0%})")
    return figure


def draw_kernels(found: Mapping) -> "Figure":
    kernels = numpy.array(found["kernels"])  # [2, kernels, height, width]
    figure, _ = make_figure(height=2.4)
    figure.clear()
    limit = abs(kernels).max()
    for row, axes in zip(kernels, figure.subplots(*kernels.shape[:2], squeeze=False), strict=True):
        for kernel, axis in zip(row, axes, strict=True):
            axis.imshow(kernel, cmap="RdBu", vmin=-limit, vmax=limit)
            axis.set_axis_off()
    return figure


def draw_new(found: Mapping) -> "Figure":
    figure, (axis,) = make_figure(height=4.0)
    sets, epochs = found["sets"], found["more_epochs"]
    for color, (name, one) in zip(COLOURS, sets.items(), strict=True):
        (across, *_), (up, *_), (size, *_) = one["novelty"], one["accuracy"], one["spread"]
        axis.scatter(across, up, s=30 + 120 * size, color=color, label=name)
        if one["trained"] is not None:
            axis.annotate("", (across, one["trained"]), (across, up), arrowprops={"arrowstyle": "->", "color": color})
    scratch = {"color": GREY, "linewidth": 0.7, "linestyle": "--"}
    axis.axhline(found["scratch"][1], label=f"from scratch after {epochs} epochs", **scratch)
    new = [(one["accuracy"][0], name) for name, one in sets.items() if one["novelty"][0] >= IS_NEW and one["trained"]]
    title = "{1}, {0:.2f}".format(*max(new)) if new else "none is new"
    axis.set(title=f"Most accurate beyond novelty {IS_NEW}: {title}", xlim=(0, None))
    axis.set(xlabel="novelty; the size of a point is spread", ylabel=f"accuracy; arrows: after {epochs} epochs")
    axis.legend(frameon=False, loc="lower left")
    return figure


def draw_losses(curves: Curves) -> "Figure":
    figure, axes = make_figure(2, 3.4)
    for axis, name, title in zip(axes, ("reconstruction", "contrast"), ("Reconstruction", "Contrast"), strict=True):
        for split, color in (("train", BLUE), ("val", ORANGE)):  # val last: its end is in the title
            points = [(line["step"], line[f"{split}/{name}"]) for line in curves.log if f"{split}/{name}" in line]
            style = {"marker": "o", "markersize": 3} if split == "val" else {"linewidth": 1}
            axis.plot(*zip(*points, strict=True), color=color, label=split, **style)
        axis.set(title=f"{title} loss: {points[0][1]:.2f} to {points[-1][1]:.2f}", xlabel="step", ylim=(0, None))
        axis.legend(frameon=False)
    return figure
