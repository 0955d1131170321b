"""Figures of the report of a zoo."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import NamedTuple

import numpy
from torch import Tensor

from fastws.pages import BLUE, GREY, ORANGE, make_figure
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.survey.diversity import Distances, Functions, Sample, Weights, pairs, tensor_names, tensor_offsets

if find_spec("matplotlib"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

MEASURES = (("test_accuracy", "generalisation_gap", "sparsity"), ("train_loss", "test_loss"))  # of one figure each
LABELS = {"generalisation_gap": "generalisation gap"}
MOST_BOXES, MOST_LAYERS = 26, 9


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
    found = [[measure for name in names if (measure := measure_of(zoo, sample, name))] for names in MEASURES]
    lines = "Each line is a network of the sample; the thick line is the median, the band holds 80 % of them."
    for measure in sum(found, [])[:1]:
        yield draw_boxes(measure), "Half of the networks are in the box, 90 % between the whiskers."
    for measures in found:
        if measures:
            yield draw_trajectories(measures), lines


def draw_boxes(measure: Measure) -> "Figure":
    figure, (axis,) = make_figure(height=3.6)
    chosen = numpy.unique(numpy.linspace(0, len(measure.epochs) - 1, MOST_BOXES).round().astype(int))
    values = [column[numpy.isfinite(column)] for column in measure.values.T[chosen]]
    style = {"whis": (5, 95), "widths": 0.6, "flierprops": {"markersize": 2}, "medianprops": {"color": ORANGE}}
    axis.boxplot(values, positions=range(len(chosen)), **style)
    axis.set_xticks(range(len(chosen)), [measure.epochs[place] for place in chosen])
    middle = numpy.nanmedian(measure.gather_last())
    axis.set(title=f"{label(measure.name)}: half of the networks end above {middle:.3f}", xlabel="epoch")
    axis.set_ylabel(label(measure.name))
    return figure


def draw_trajectories(measures: list[Measure]) -> "Figure":
    figure, axes = make_figure(len(measures), 3.2)
    for axis, measure in zip(axes, measures, strict=True):
        faint = min(0.3, 30 / len(measure.values))
        axis.plot(*over_epochs(measure.epochs, measure.values.T), color=GREY, alpha=faint, linewidth=0.7)
        draw_band(axis, measure.epochs, measure.values.T)
        axis.set(title=label(measure.name), xlabel="epoch")
        if measure.name.endswith("loss") and numpy.nanmin(measure.values) > 0:
            axis.set_yscale("log")
    return figure


def draw_band(axis, epochs: list[int], values: numpy.ndarray) -> None:
    """Median and the middle 80 % of ``[epochs, n]``, over the epochs that have values."""
    epochs, values = over_epochs(epochs, values)
    low, middle, high = numpy.nanquantile(values, [0.1, 0.5, 0.9], axis=1)
    axis.fill_between(epochs, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axis.plot(epochs, middle, color=BLUE, linewidth=2)
    mark_epochs(axis)


def over_epochs(epochs: list[int], values: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The epochs that have values ``[epochs, n]``, and these; a single one as an interval, for a line has two ends."""
    known = numpy.isfinite(values).any(1)
    epochs, values = numpy.asarray(epochs)[known], values[known]
    return (epochs, values) if len(epochs) != 1 else (epochs + [-0.3, 0.3], values.repeat(2, 0))


def mark_epochs(axis) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


# --- weights


def weight_figures(zoo: Zoo, sample: Sample, weights: Weights) -> Iterable[tuple["Figure", str]]:
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
    if len(sample.models) > 1:
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
        when, quantiles = over_epochs(epochs, statistics[:, :, tensor, 2:].nanmedian(1).values.numpy())
        low, lower, middle, upper, high = quantiles.T
        axis.fill_between(when, low, high, color=BLUE, alpha=0.15, linewidth=0)
        axis.fill_between(when, lower, upper, color=BLUE, alpha=0.35, linewidth=0)
        axis.plot(when, middle, color=BLUE, linewidth=1.5)
        axis.set_title(names[tensor], fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        mark_epochs(axis)
    for axis in axes[len(chosen) - columns : len(chosen)]:
        axis.tick_params(labelbottom=True)  # the lowest ones that are drawn
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    figure.supxlabel("epoch", fontsize=9)
    return figure


def draw_steps(epochs: list[int], steps: Tensor) -> "Figure":
    figure, (axis,) = make_figure(height=3.0)
    draw_band(axis, epochs[1:], steps.T.numpy())
    axis.set(title="Length of the step to each epoch", xlabel="epoch", ylabel="distance from the epoch before")
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


# --- functions


def function_figures(functions: Functions) -> Iterable[tuple["Figure", str]]:
    yield (
        draw_functions(functions),
        f"All pairs of the {len(functions.accuracy)} networks of the sample, after their last epoch, on "
        f"{functions.images} test images: the share of images that both put into the same class, and linear CKA of "
        "their logits.",
    )


def draw_functions(functions: Functions) -> "Figure":
    figure, axes = make_figure(2, 3.0)
    draw_histogram(axes[0], {"": pairs(functions.agreement)}, "Agreement")
    draw_histogram(axes[1], {"": pairs(functions.cka)}, "Linear CKA of logits")
    return figure
