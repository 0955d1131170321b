"""Statistics of populations of networks; the unit of observation is the network, with all its states together.

Intervals are those of the percentile bootstrap: networks are drawn again, with replacement, and the statistic is
computed anew. A resampled population is a row of counts, how often each network was drawn, so that all of them are
computed at once. The first row draws every network once: the population itself.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy
import scipy.stats
import torch
from numpy import ndarray
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95  # of intervals
QUANTILES = (0.05, 0.25, 0.75, 0.95)
COLUMNS = 4096  # weights whose spread is computed at a time


def draw_counts(size: int, random: numpy.random.Generator) -> ndarray:
    """How often each of ``size`` networks is drawn, ``[1 + RESAMPLES, size]`` int64; once each in the first row."""
    drawn = random.multinomial(size, numpy.full(size, 1 / size), size=RESAMPLES)
    return numpy.concatenate([numpy.ones((1, size), dtype=drawn.dtype), drawn])


def weighted_mean(values: ndarray, counts: ndarray) -> ndarray:
    """Means of values ``[n]`` that occur ``counts`` times ``[B, n]``: ``[B]``."""
    return counts @ values / counts.sum(1)


def weighted_median(values: ndarray, counts: ndarray) -> ndarray:
    """Medians of values ``[n]`` that occur ``counts`` times ``[B, n]``: ``[B]``; the mean of both in the middle."""
    order = values.argsort()
    reached = 2 * counts[:, order].cumsum(1, dtype=numpy.int64)
    total = reached[:, -1:] // 2
    lower, upper = (reached >= total).argmax(1), (reached > total).argmax(1)
    return (values[order[lower]] + values[order[upper]]) / 2


def pair_counts(counts: ndarray) -> ndarray:
    """How often each pair i < j of different networks occurs among networks that occur ``counts`` times."""
    first, second = numpy.triu_indices(counts.shape[1], 1)
    return counts[:, first] * counts[:, second]


def mean_std(flat: Tensor, counts: ndarray) -> ndarray:
    """Standard deviations over networks ``[n, P]`` that occur ``counts`` times, their mean over weights: ``[B]``."""
    shares = torch.from_numpy(counts).to(flat.device, torch.float32) / len(flat)
    # pairs of a network with itself, which drawing again makes more of, are left out, as in ``pair_counts``
    different = torch.from_numpy(len(flat) ** 2 - (counts**2).sum(1)).to(flat.device).clamp(min=1)
    total = torch.zeros(len(counts), dtype=torch.float64, device=flat.device)
    for part in flat.float().split(COLUMNS, 1):
        centred = part - part.mean(0)
        variance = shares @ centred.square() - (shares @ centred).square()
        total += variance.clamp(min=0).sqrt().double().sum(1)
    return (total * len(flat) / different.sqrt() / flat.shape[1]).cpu().numpy()


def around(replicates: ndarray) -> tuple[float, float, float]:
    """The value and its 95 % interval of replicates ``[1 + RESAMPLES]``; those that are not a number are left out."""
    known = replicates[1:][numpy.isfinite(replicates[1:])]
    edges = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = numpy.quantile(known, edges) if len(known) else (numpy.nan, numpy.nan)
    return float(replicates[0]), float(low), float(high)


def over_seeds(replicates: Sequence[ndarray], random: numpy.random.Generator) -> ndarray:
    """The mean over seeds of a statistic, where seeds are drawn again, and networks within each: ``[1 + RESAMPLES]``.

    Args:
        replicates: Of each seed, ``[1 + RESAMPLES]``.
        random: Draws seeds, and a resampled population of each.
    """
    table = numpy.stack(replicates)
    seeds = random.integers(len(table), size=(RESAMPLES, len(table)))
    rows = random.integers(1, table.shape[1], size=seeds.shape)
    return numpy.concatenate([[table[:, 0].mean()], table[seeds, rows].mean(1)])


def cluster_interval(values: ndarray, clusters: ndarray, random: numpy.random.Generator) -> tuple[float, float, float]:
    """The mean of states, and its interval where all states of a network are drawn together.

    Args:
        values: Of each state, ``[n]``.
        clusters: Which network it is a state of, ``[n]``.
        random: Draws networks.
    """
    _, places = numpy.unique(clusters, return_inverse=True)
    sums, sizes = numpy.bincount(places, values), numpy.bincount(places)
    counts = draw_counts(len(sums), random)
    return around(counts @ sums / (counts @ sizes))


def selection_optimism(best: float, accuracy: float, num_images: int, std: float) -> float:
    """How much the accuracy by which the best share of networks was chosen overstates theirs.

    ``i * s2 / sqrt(std**2 + s2)``, with ``s2 = accuracy * (1 - accuracy) / num_images`` and i the mean of the best
    share of a standard normal distribution.

    Args:
        best: Share that is kept, in (0, 1).
        accuracy: Mean of all networks, in [0, 1].
        num_images: Images that they are chosen on.
        std: Of the true accuracies of networks.
    """
    noise = accuracy * (1 - accuracy) / num_images
    intensity = scipy.stats.norm.pdf(scipy.stats.norm.isf(best)) / best
    return float(intensity * noise / max((std**2 + noise) ** 0.5, 1e-12))


# --- one population, and two of them


class Summary(NamedTuple):
    """One population; intervals are ``(value, low, high)``."""

    count: int
    mean: tuple[float, float, float]
    std: float  # of a sample
    median: tuple[float, float, float]
    quantiles: tuple[float, ...]  # 5 %, 25 %, 75 %, 95 %


class Difference(NamedTuple):
    """How a population differs from another."""

    mean: tuple[float, float, float]  # difference of means, with Welch's interval
    welch_t: float
    welch_p: float
    mann_whitney_u: float
    mann_whitney_p: float
    shift: tuple[float, float, float]  # Hodges-Lehmann: the median of all differences of two, with its interval


def summarise(values: ndarray, random: numpy.random.Generator) -> Summary:
    counts = draw_counts(len(values), random)
    return Summary(
        len(values),
        around(weighted_mean(values, counts)),
        float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        around(weighted_median(values, counts)),
        tuple(numpy.quantile(values, QUANTILES).tolist()),
    )


def compare(values: ndarray, others: ndarray) -> Difference | None:
    """Welch's t, Mann-Whitney's U and Hodges-Lehmann's shift of ``values`` from ``others``, two-sided.

    None where a population has fewer than two networks, or neither varies, of which no test can say anything.
    """
    if min(len(values), len(others)) < 2 or values.std() == others.std() == 0:
        return None
    welch = scipy.stats.ttest_ind(values, others, equal_var=False)
    interval = welch.confidence_interval(LEVEL)
    ranks = scipy.stats.mannwhitneyu(values, others, alternative="two-sided")
    mean = float(values.mean() - others.mean()), float(interval.low), float(interval.high)
    tests = (welch.statistic, welch.pvalue, ranks.statistic, ranks.pvalue)
    return Difference(mean, *map(float, tests), shift_of(values, others))


def shift_of(values: ndarray, others: ndarray) -> tuple[float, float, float]:
    """The median of all differences of two networks, and the interval that belongs to Mann-Whitney's test."""
    n, m = len(values), len(others)
    differences = numpy.sort((values[:, None] - others).ravel())
    wide = scipy.stats.norm.isf((1 - LEVEL) / 2) * (n * m * (n + m + 1) / 12) ** 0.5
    low = min(max(int(numpy.floor(n * m / 2 - wide)), 0), n * m - 1)
    return float(numpy.median(differences)), float(differences[low]), float(differences[n * m - 1 - low])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values, for as many tests as there are."""
    order = numpy.argsort(p)
    scaled = numpy.asarray(p)[order] * numpy.arange(len(p), 0, -1)
    adjusted = numpy.empty(len(p))
    adjusted[order] = numpy.minimum(numpy.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


# --- several populations


class Row(NamedTuple):
    """A population in a table, and how it differs from the table's first; p-values with Holm's adjustment beside."""

    name: str
    summary: Summary
    difference: Difference | None
    welch_holm: float | None
    mann_whitney_holm: float | None

    def to_dict(self) -> dict[str, object]:
        nested = None if self.difference is None else self.difference._asdict()
        return self._asdict() | {"summary": self.summary._asdict(), "difference": nested}


def tabulate(populations: Mapping[str, ndarray]) -> list[dict[str, object]]:
    """A row for each population; all but the first are tested against the first."""
    names, values = list(populations), list(populations.values())
    differences = [None, *(compare(x, values[0]) for x in values[1:])]
    tested = [place for place, found in enumerate(differences) if found is not None]
    adjusted = [
        dict(zip(tested, holm([getattr(differences[place], field) for place in tested]), strict=True))
        for field in ("welch_p", "mann_whitney_p")
    ]
    return [
        Row(
            name,
            summarise(values[place], numpy.random.default_rng(place)),
            differences[place],
            *(found.get(place) for found in adjusted),
        ).to_dict()
        for place, name in enumerate(names)
    ]
