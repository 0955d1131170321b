"""The report of a zoo: one HTML file with its figures and tables inside."""

import html
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy
from torch import Tensor

from fastws import pages
from fastws.atomic import write_file
from fastws.pages import BLUE, GREY, ORANGE, make_figure, number, table
from fastws.zoo.diversity import Distances, Duplicates, Functions, Sample, Weights, pairs, tensor_names, tensor_offsets
from fastws.zoo.format import Zoo

if find_spec("matplotlib"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

MEASURES = ("test_accuracy", "generalisation_gap", "train_loss", "test_loss")
LABELS = {"generalisation_gap": "generalisation gap"}
MOST_BOXES, MOST_LAYERS = 26, 9


class Findings(NamedTuple):
    """All that a report tells."""

    zoo: Zoo
    sample: Sample
    seed: int  # of the sample
    weights: Weights
    duplicates: Duplicates
    functions: Functions | None
    no_functions: str  # why there are none


def write(path: Path, findings: Findings) -> None:
    content = pages.document(f"zoo {findings.zoo.path.name}", body(findings)).encode()
    write_file(path, content)


def body(findings: Findings) -> Iterable[str]:
    zoo, sample = findings.zoo, findings.sample
    yield f"<h1>Model zoo {html.escape(zoo.path.name)}</h1>"
    yield f"<p>{html.escape(headline(findings))}</p>"
    yield overview(zoo)
    for drawn, caption in measured_figures(zoo, sample):
        yield pages.figure(drawn, caption)
    yield "<h2>Weights</h2>"
    for drawn, caption in weight_figures(findings):
        yield pages.figure(drawn, caption)
    yield diversity_table(findings)
    yield "<h2>Functions</h2>"
    if findings.functions is None:
        yield f"<p>Not compared: {html.escape(findings.no_functions)}</p>"
    else:
        caption = (
            f"All pairs of the {len(sample.models)} networks of the sample, after their last epoch, on "
            f"{findings.functions.images} test images: the share of images that both put into the same class, and "
            "linear CKA of their logits."
        )
        yield pages.figure(draw_functions(findings.functions), caption)
    yield "<h2>What the zoo holds</h2>"
    yield f"<pre>{html.escape(zoo.layout.describe())}</pre>"
    yield table(("provenance", ""), [(name, f"{value}") for name, value in flatten(zoo.provenance)])


def headline(findings: Findings) -> str:
    zoo, sample = findings.zoo, findings.sample
    models = zoo.properties["model"].combine_chunks().unique()
    text = (
        f"{len(zoo):,} states of {len(models):,} networks of {zoo.layout.num_weights:,} weights. Weights and functions "
        f"are those of {len(sample.models):,} networks, drawn with seed {findings.seed}."
    )
    best = measure_of(zoo, sample, "test_accuracy")
    if best is None:
        return text
    last = best.gather_last()
    mean, std = numpy.nanmean(last), numpy.nanstd(last)
    return f"{text} They reach a test accuracy of {mean:.3f} on average, with a standard deviation of {std:.3f}."


def overview(zoo: Zoo) -> str:
    rows = [
        ("weights", f"{zoo.dtype}"),
        ("symmetry", f"{zoo.symmetry or 'unknown'}"),
        ("left out as not finite", f"{zoo.dropped:,}"),
    ]
    rows += [(f"networks in {name}", f"{len(members):,}") for name, members in zoo.splits.items()]
    return table(("zoo", ""), rows)


def flatten(nested: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name} ")
        elif value is not None:
            yield f"{prefix}{name}", value


# --- what was measured in training


class Measure(NamedTuple):
    """A property of the networks of a sample after each epoch."""

    name: str
    epochs: list[int]
    values: numpy.ndarray  # [models, epochs], nan where unknown

    def gather_last(self) -> numpy.ndarray:
        """The last known value of each network, nan if there is none."""
        known = numpy.isfinite(self.values)
        place = numpy.where(known.any(1), known.shape[1] - 1 - known[:, ::-1].argmax(1), 0)
        return self.values[numpy.arange(len(place)), place]


def measure_of(zoo: Zoo, sample: Sample, name: str) -> Measure | None:
    if name not in zoo.properties.column_names:
        return None
    values = numpy.where(sample.rows >= 0, zoo.numbers(name)[sample.rows.numpy()], numpy.nan)
    return Measure(name, sample.epochs, values) if numpy.isfinite(values).any() else None


def measured_figures(zoo: Zoo, sample: Sample) -> Iterable[tuple["Figure", str]]:
    found = [measure for name in MEASURES if (measure := measure_of(zoo, sample, name))]
    lines = "Each line is a network of the sample; the thick line is the median, the band holds 80 % of them."
    for measure in found[:1]:
        yield draw_boxes(measure), "Half of the networks are in the box, 90 % between the whiskers."
    for two in (found[:2], found[2:]):
        if two:
            yield draw_trajectories(two), lines


def draw_boxes(measure: Measure) -> "Figure":
    figure, (axis,) = make_figure(height=3.6)
    chosen = numpy.unique(numpy.linspace(0, len(measure.epochs) - 1, MOST_BOXES).round().astype(int))
    values = [column[numpy.isfinite(column)] for column in measure.values.T[chosen]]
    style = {"whis": (5, 95), "widths": 0.6, "flierprops": {"markersize": 2}, "medianprops": {"color": ORANGE}}
    axis.boxplot(values, positions=range(len(chosen)), **style)
    axis.set_xticks(range(len(chosen)), [measure.epochs[place] for place in chosen])
    middle = numpy.median(measure.gather_last())
    axis.set(title=f"{label(measure.name)}: half of the networks end above {middle:.3f}", xlabel="epoch")
    axis.set_ylabel(label(measure.name))
    return figure


def draw_trajectories(measures: list[Measure]) -> "Figure":
    figure, axes = make_figure(len(measures), 3.2)
    for axis, measure in zip(axes, measures, strict=True):
        faint = min(0.3, 30 / len(measure.values))
        axis.plot(measure.epochs, measure.values.T, color=GREY, alpha=faint, linewidth=0.7)
        draw_band(axis, measure.epochs, measure.values.T, BLUE)
        axis.set(title=label(measure.name), xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if measure.name.endswith("loss") and numpy.nanmin(measure.values) > 0:
            axis.set_yscale("log")
    return figure


def draw_band(axis, epochs: list[int], values: numpy.ndarray, color: str) -> None:
    """Median and the middle 80 % of ``[epochs, n]``, over the epochs that have values."""
    known = numpy.isfinite(values).any(1)
    low, middle, high = numpy.nanquantile(values[known], [0.1, 0.5, 0.9], axis=1)
    epochs = numpy.asarray(epochs)[known]
    axis.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(epochs, middle, color=color, linewidth=2, marker="." if len(epochs) == 1 else None)


def label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


# --- weights


def weight_figures(findings: Findings) -> Iterable[tuple["Figure", str]]:
    zoo, sample, weights = findings.zoo, findings.sample, findings.weights
    names = tensor_names(zoo.layout)
    begin, end = tensor_offsets(zoo.layout).T
    largest = sorted((end - begin).argsort(descending=True, stable=True)[:MOST_LAYERS].tolist())
    yield (
        draw_layers(sample.epochs, weights.statistics, names, largest),
        "Quantiles of the weights of a tensor, each the median over the networks: the line is the median weight, the "
        "dark band holds half of the weights, the light one 98 %.",
    )
    if weights.steps.isfinite().any():
        yield (
            draw_steps(sample.epochs, weights.steps),
            "Distance in weight space between a state and the next; line: median, band: 80 % of the networks.",
        )
    yield (
        draw_distances(weights.distances),
        "All pairs of networks of the sample, after their last epoch. A cosine distance of 1 is a right angle.",
    )


def draw_layers(epochs: list[int], statistics: Tensor, names: list[str], chosen: list[int]) -> "Figure":
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axis, tensor in zip(axes, chosen, strict=False):
        known = statistics[:, :, tensor, 0].isfinite().any(1)
        when = numpy.asarray(epochs)[known.numpy()]
        low, lower, middle, upper, high = statistics[known][:, :, tensor, 2:].nanmedian(1).values.T.numpy()
        axis.fill_between(when, low, high, color=BLUE, alpha=0.15, linewidth=0)
        axis.fill_between(when, lower, upper, color=BLUE, alpha=0.35, linewidth=0)
        axis.plot(when, middle, color=BLUE, linewidth=1.5)
        axis.set_title(names[tensor], fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    figure.supxlabel("epoch", fontsize=9)
    return figure


def draw_steps(epochs: list[int], steps: Tensor) -> "Figure":
    figure, (axis,) = make_figure(height=3.0)
    draw_band(axis, epochs[1:], steps.T.numpy(), BLUE)
    axis.set(title="Length of the step to each epoch", xlabel="epoch", ylabel="distance from the epoch before")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(0, None)
    return figure


def draw_distances(distances: Mapping[str, Distances]) -> "Figure":
    figure, axes = make_figure(2, 3.0)
    for axis, name, title in zip(axes, Distances._fields, ("Euclidean distance", "Cosine distance"), strict=True):
        draw_histogram(axis, {f"{kind}, ": getattr(found, name) for kind, found in distances.items()}, title)
    return figure


def draw_histogram(axis, values: Mapping[str, Tensor], title: str) -> None:
    known = {kind: found[found.isfinite()].numpy() for kind, found in values.items()}
    everything = numpy.concatenate(list(known.values()))
    if len(everything) == 0:
        axis.set(title=f"{title}: unknown")
        return
    bins = numpy.histogram_bin_edges(everything, 40)
    for (kind, found), color in zip(known.items(), (BLUE, ORANGE), strict=False):
        axis.hist(found, bins, color=color, alpha=0.6, label=f"{kind}mean {found.mean():.3g}")
    axis.set(title=title, ylabel="pairs")
    axis.legend(frameon=False, fontsize=8)


def diversity_table(findings: Findings) -> str:
    weights, models = findings.weights, len(findings.sample.models)
    rows = []
    for kind, found in weights.distances.items():
        rows += [
            (f"{title} between two networks, {kind}", spread(values))
            for title, values in zip(("Euclidean distance", "cosine distance"), found, strict=True)
        ]
    rows.append(("standard deviation of a weight over the networks", spread(weights.std)))
    rows.append(("length of a step between states", spread(weights.steps)))
    if findings.functions is not None:
        functions = findings.functions
        rows += [
            ("agreement of two networks", spread(pairs(functions.agreement))),
            ("linear CKA of their logits", spread(pairs(functions.cka))),
            (f"accuracy on {functions.images} test images", spread(functions.accuracy)),
        ]
    rows.append((f"of {findings.duplicates.states:,} states, equal to an earlier one", repeated(findings.duplicates)))
    rows.append((f"of {models:,} last states, equal but for the order of neurons", repeated(weights.permuted)))
    return table(("", "mean (standard deviation)"), rows)


def spread(values: Tensor) -> str:
    known = values[values.isfinite()].double()
    if len(known) == 0:
        return "-"
    return f"{number(known.mean().item(), 4)} ({number(known.std(correction=0).item(), 4)})"


def repeated(duplicates: Duplicates) -> str:
    where = f", such as rows {duplicates.example[0]} and {duplicates.example[1]}" if duplicates.example else ""
    return f"{duplicates.repeated:,}{where}"


def draw_functions(functions: Functions) -> "Figure":
    figure, axes = make_figure(2, 3.0)
    draw_histogram(axes[0], {"": pairs(functions.agreement)}, "Agreement")
    draw_histogram(axes[1], {"": pairs(functions.cka)}, "Linear CKA of logits")
    return figure
