"""Scores of probes on networks they have not seen, with intervals, as lines of a table."""

from math import isfinite
from typing import Any

from scipy.stats import kendalltau
from torch import Tensor

from fastws.downstream.probes.intervals import mean_interval, r2_interval, tau_interval
from fastws.downstream.probes.ridge import r_squared
from fastws.table import table_rows
from fastws.zoo.format.zoo import Zoo

AT_CHANCE = 0.01  # accuracy from guessing, within which a network has learned nothing
WIDTHS = {"features": 14, "probe": 11, "target": 20}


def chance_of(zoo: Zoo) -> float | None:
    """Accuracy of guessing: one over the outputs of the last layer; None where a layout has no layers."""
    rows = table_rows(zoo.layout.table)
    return 1 / rows[-1].rows if rows else None


def finite(value: float) -> float | None:
    return value if isfinite(value) else None


def score_numbers(
    prediction: Tensor, target: Tensor, models: list[str], chance: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """R^2 and Kendall's tau on a test split with 95 % intervals; None where a target is constant.

    Args:
        prediction: float64 ``[n]``.
        target: float64 ``[n]``, known of all.
        models: The network of each row.
        chance: Where the target is an accuracy, that of guessing: then the share of rows within a point of it is told,
            and tau without them.
        seed: Of the intervals.
    """
    scores: dict[str, Any] = {
        "test_r2": finite(float(r_squared(prediction[:, None], target[:, None]))),
        "r2_interval": r2_interval(prediction, target, models, seed),
        "test_tau": finite(float(kendalltau(target.numpy(), prediction.numpy()).statistic)),
        "tau_interval": tau_interval(prediction, target, models, seed),
    }
    if chance is not None and len(target):
        learned = (target - chance).abs() > AT_CHANCE
        tau = float(kendalltau(target[learned].numpy(), prediction[learned].numpy()).statistic)
        scores |= {"at_chance": 1 - learned.double().mean().item(), "tau_without": finite(tau)}
    return scores


def score_names(right: Tensor, frequent: Tensor, models: list[str], seed: int = 0) -> dict[str, Any]:
    """Accuracy on a test split with a 95 % interval, beside that of always saying the most frequent name.

    Args:
        right: Whether each prediction is, bool ``[n]``.
        frequent: Whether each network has the name that is the most frequent of the training split, bool ``[n]``.
        models: The network of each row.
        seed: Of the interval.
    """
    if not len(right):
        return {"test_accuracy": None, "accuracy_interval": None, "most_frequent": None}
    return {
        "test_accuracy": right.double().mean().item(),
        "accuracy_interval": mean_interval(right.double(), models, seed),
        "most_frequent": frequent.double().mean().item(),
    }


def describe(line: dict[str, Any], heading: bool = False) -> str:
    """One line of the table, below its heading where that is wanted."""
    kind = "accuracy" if "test_accuracy" in line else "r2"
    cells = [f"{line[name]:<{width}}" for name, width in WIDTHS.items()]
    cells += [f"{'acc' if kind == 'accuracy' else 'R2':<4}"]
    cells += [number(line.get(f"{split}_{kind}")) for split in ("train", "val", "test")]
    cells += [interval(line.get(f"{kind}_interval")), number(line.get("test_tau")), interval(line.get("tau_interval"))]
    cells += [number(line.get("published")), f"{line['penalty']:8.0e}" if line.get("penalty") else " " * 8]
    notes = [f"on {line['zoo']}"] if line["zoo"] else []
    notes += ["scaled"] if line.get("standardized") else []
    if "most_frequent" in line and line["most_frequent"] is not None:
        notes.append(f"most frequent name {line['most_frequent']:.4f}")
    if line.get("at_chance"):
        without = "-" if line["tau_without"] is None else f"{line['tau_without']:.4f}"
        notes.append(f"{line['at_chance']:.0%} at chance, tau {without} without them")
    text = " ".join(cells) + "  " + "; ".join(notes)
    if not heading:
        return text.rstrip()
    names = [f"{name:<{width}}" for name, width in WIDTHS.items()]
    heads = [*names, " " * 4, *(f"{name:>8}" for name in ("train", "val", "test")), f"{'[95 %]':^17}"]
    heads += [f"{'tau':>8}", f"{'[95 %]':^17}", f"{'published':>8}", f"{'penalty':>8}"]
    return f"{' '.join(heads)}\n{text}".rstrip()


def number(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4f'):>8}"


def interval(bounds: list[float] | None) -> str:
    return " " * 17 if bounds is None else f"[{bounds[0]:7.3f}, {bounds[1]:6.3f}]"
