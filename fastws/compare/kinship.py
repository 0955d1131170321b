"""Whether two networks are relatives: an exact test in stored coordinates, and nulls of strangers.

Units of networks that were trained independently are exchangeable: nothing ties unit 7 of one to unit 7 of the other.
So if units are assigned to those that they resemble most, each gets its own number by chance alone, and how many do is
a Poisson variable of mean 1. A copy that was trained on, rounded or pruned keeps its numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln, log_ndtr, logsumexp
from torch import Tensor

UNITS = 128  # of a family that are compared, at most: 128 of 128 by chance has a probability of 1e-216
ENTRIES = 2048  # of each of them
FEWEST = 4  # units that make a family
LEAST_NULL = 20  # pairs of strangers below which no error rate is told
FARTHEST = 10.0  # standard deviations, beyond which no tail is believed to be that of a normal distribution
ENOUGH_NULL = 1000  # from which on it is counted, for fewer cannot show 0.001; below, log distances are normal
TERMS = 64  # of a tail, whose terms fall at least as fast as 1 / k!


class Family(NamedTuple):
    """Units that may stand in any order: an axis of a tensor whose other axes describe them."""

    tensor: str
    axis: int
    count: int


@dataclass
class Agreement:
    """How many units of two networks are most alike to those of their own number.

    Attributes:
        families: Of units, with how many were compared and how many of them have their own number.
        log_p: Natural logarithm of the probability that strangers agree as much; None where nothing could be compared.
    """

    families: list[tuple[Family, int, int]]
    log_p: float | None

    @property
    def compared(self) -> int:
        return sum(count for _, count, _ in self.families)

    @property
    def fixed(self) -> int:
        return sum(fixed for *_, fixed in self.families)


def find_families(shapes: Mapping[str, tuple[int, ...]]) -> list[Family]:
    """Axes of weights that are of units, judged by their sizes alone; one of each tensor at most.

    A size that is that of the first axis of a weight and of the second of one is that of hidden units. Sizes of inputs,
    classes and vocabularies are on one side only, and so are left out: their order is not arbitrary.
    """
    weights = {name: shape for name, shape in shapes.items() if len(shape) >= 2 and min(shape) > 0}
    hidden = {shape[0] for shape in weights.values()} & {shape[1] for shape in weights.values()}
    families = []
    for name, shape in weights.items():
        axis = next((axis for axis in (0, 1) if shape[axis] in hidden), None)
        if axis is None or shape[axis] < FEWEST or math.prod(shape) < 2 * shape[axis]:
            continue
        families.append(Family(name, axis, shape[axis]))
    return families


def agreement(a: Mapping[str, Tensor], b: Mapping[str, Tensor], families: Sequence[Family]) -> Agreement:
    """The exact test in stored coordinates (compare arXiv 2502.12292, who correlate ranks instead).

    Probabilities of families are combined by Fisher, without the most unlikely one where there are several: so no
    single tensor whose units have an order decides (Benjamini and Heller, 2008: a partial conjunction of two).

    Args:
        a: Tensors by name.
        b: Those of the other network, of the same shapes.
        families: What ``find_families`` finds.
    """
    found = [(family, *fixed_points(family, a[family.tensor], b[family.tensor])) for family in families]
    logs = sorted(log_poisson_tail(fixed) for _, _, fixed in found)
    kept = logs[1:] or logs
    return Agreement(found, log_fisher(kept) if kept else None)


def fixed_points(family: Family, a: Tensor, b: Tensor) -> tuple[int, int]:
    """How many units were compared, and how many were assigned to their own number."""
    ours, theirs = (describe_units(tensor, family.axis) for tensor in (a, b))
    # equal ones, like pruned units, are assigned in the order in which they stand, which must not be that of numbers
    order = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(0))
    similarity = (ours @ theirs[order].T).numpy()
    best = order.numpy()[linear_sum_assignment(similarity, maximize=True)[1]]
    return len(best), int((best == numpy.arange(len(best))).sum())


def describe_units(tensor: Tensor, axis: int) -> Tensor:
    """Some units by some of their weights: float32 ``[units, entries]``, of mean 0 over units and of length 1 each."""
    rows = tensor if axis == 0 else tensor.transpose(0, 1)
    units = spaced(len(rows), UNITS)
    rows = rows[units].reshape(len(units), -1)
    rows = rows[:, spaced(rows.shape[1], ENTRIES)].float()
    rows = rows - rows.mean(0)
    return torch.nn.functional.normalize(rows, dim=1)


def spaced(count: int, most: int) -> Tensor:
    """At most so many of so many places, evenly spaced."""
    # float32 rounds the places of large tensors beyond their ends
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


# --- probabilities, in natural logarithms because they are smaller than any float


def log_poisson_tail(count: int) -> float:
    """Of at least ``count`` events where one is expected."""
    if count <= 0:
        return 0.0
    terms = numpy.arange(count, count + TERMS)
    return float(min(0.0, logsumexp(-1 - gammaln(terms + 1))))


def log_fisher(logs: Sequence[float]) -> float:
    """Of logarithms of independent probabilities whose sum is as low: the tail of a chi-squared with 2 n degrees."""
    x, steps = -math.fsum(logs), numpy.arange(len(logs))
    if x <= 0:
        return 0.0
    return float(min(0.0, -x + logsumexp(steps * math.log(x) - gammaln(steps + 1))))


def log_empirical(distance: float, null: Sequence[float]) -> float | None:
    """Of strangers that are at least as close, from distances of pairs of strangers.

    Counted, ``(1 + closer) / (1 + pairs)``, where there are at least 1,000 pairs; else the tail of a normal
    distribution of log distances. None where there are fewer than 20.
    """
    if len(null) < LEAST_NULL:
        return None
    if len(null) >= ENOUGH_NULL:
        closer = sum(other <= distance for other in null)
        return math.log((1 + closer) / (1 + len(null)))
    logs = numpy.log(numpy.maximum(null, 1e-30))
    spread = max(float(logs.std(ddof=1)), 1e-12)
    return float(log_ndtr(max(-FARTHEST, (math.log(max(distance, 1e-30)) - logs.mean()) / spread)))


def discoveries(logs: Sequence[float], rate: float) -> list[bool]:
    """Which hypotheses are rejected at a rate of false discoveries (Benjamini and Hochberg, 1995)."""
    order = numpy.argsort(logs, kind="stable")
    limits = math.log(rate) + numpy.log(numpy.arange(1, len(logs) + 1) / max(1, len(logs)))
    below = numpy.asarray(logs, dtype=float)[order] <= limits
    last = int(numpy.flatnonzero(below).max(initial=-1))
    rejected = numpy.zeros(len(logs), bool)
    rejected[order[: last + 1]] = True
    return rejected.tolist()


def in_words(log_p: float | None) -> str:
    """A probability as text: ``2.1e-05`` or, below what a float holds, ``10^-812``."""
    if log_p is None:
        return "unknown"
    if log_p > -690:
        return f"{math.exp(log_p):.2g}"
    return f"10^{log_p / math.log(10):.0f}"
