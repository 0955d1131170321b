"""One sentence about sampled networks: are they new, and better than what needs no learning at equal novelty?

All numbers are bootstrapped together: in each replicate samples, baselines and held-out networks are drawn anew, the
best baseline is chosen anew by one half of its networks and told by the other, and several zoos are drawn before their
networks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy
from numpy import ndarray

from fastws.downstream.judging.judged import Replicates
from fastws.downstream.judging.statistics import around, over_seeds

COPIES, ONE_NETWORK = 0.5, 0.5  # novelty and distance among samples below which the verdict is plain
SEEDS = 3  # zoos of one sign that make a claim


class Evidence(NamedTuple):
    """What a verdict rests on, of one zoo: the value and resampled ones, ``[1 + RESAMPLES]``; NaN without baseline."""

    accuracy: ndarray
    novelty: ndarray
    spread: ndarray
    apart: ndarray
    over_noise: ndarray  # accuracy less that of anchors with noise at the same novelty
    over_gaussian: ndarray  # accuracy less that of the best Gaussian of principal components at least as new and spread


def evidence(
    of: Replicates, noise: Sequence[Replicates], gaussian: Mapping[int, Mapping[float, Replicates]]
) -> tuple[Evidence, str]:
    """What a verdict on a set rests on, and which Gaussian it was compared with.

    Args:
        of: The set.
        noise: Anchors with noise, of several scales.
        gaussian: Gaussians by number of components (0: all) and by temperature.
    """
    over, name = over_curves(of, gaussian)
    return Evidence(of.accuracy, of.novelty, of.spread, of.apart, over_noise(of, noise), over), name


def over_noise(of: Replicates, noise: Sequence[Replicates]) -> ndarray:
    """Accuracy less that of a curve at the same novelty, between its points; NaN where the set lies outside of it."""
    nothing = numpy.full(len(of.accuracy), numpy.nan)
    if not noise:
        return nothing
    across, up = (numpy.stack([getattr(point, field) for point in noise], 1) for field in ("novelty", "accuracy"))
    if not across[0].min() <= of.novelty[0] <= across[0].max():
        return nothing
    order = across.argsort(1)
    across, up = numpy.take_along_axis(across, order, 1), numpy.take_along_axis(up, order, 1)
    return of.accuracy - [numpy.interp(*row) for row in zip(of.novelty, across, up, strict=True)]


def over_curves(of: Replicates, curves: Mapping[int, Mapping[float, Replicates]]) -> tuple[ndarray, str]:
    """Accuracy less that of the most accurate point of curves that is as new and as spread; NaN without such a point.

    Curves are linear between temperatures, so that the best point of a piece is an end of what of it is new enough.
    """
    best = numpy.full(len(of.accuracy), -numpy.inf)
    told, name = numpy.full(len(best), numpy.nan), ""
    for components, curve in curves.items():
        points = sorted(curve.items())
        for (cold, left), (warm, right) in zip(points, points[1:] or points, strict=False):
            low, high = numpy.zeros(len(best)), numpy.ones(len(best))
            for field in ("novelty", "spread"):
                first, slope = getattr(left, field), getattr(right, field) - getattr(left, field)
                missing = getattr(of, field) - first
                with numpy.errstate(divide="ignore", invalid="ignore"):
                    reached = missing / slope
                low = numpy.where(slope > 0, numpy.maximum(low, reached), low)
                high = numpy.where(slope < 0, numpy.minimum(high, reached), high)
                low = numpy.where((slope == 0) & (missing > 0), numpy.inf, low)
            for place in (low, high):
                place = numpy.where(low <= high, place, 0)
                chosen = numpy.where(low <= high, between(left.choosing, right.choosing, place), -numpy.inf)
                better = chosen > best
                if better[0]:
                    name = f"PCA {components or 'all'} + Gaussian, T = {cold + place[0] * (warm - cold):.2g}"
                best = numpy.where(better, chosen, best)
                told = numpy.where(better, between(left.scoring, right.scoring, place), told)
    return of.accuracy - told, name


def between(left: ndarray, right: ndarray, place: ndarray) -> ndarray:
    return left + place * (right - left)


def verdict(name: str, zoos: Sequence[Evidence], rival: str = "PCA + Gaussian") -> str:
    """One sentence, by the first rule that holds.

    Args:
        name: Of the set.
        zoos: What is known of it, for each zoo that such a set was made from.
        rival: The baseline that it was compared with.
    """
    random = numpy.random.default_rng(2)
    found = {
        field: around(
            getattr(zoos[0], field) if len(zoos) == 1 else over_seeds([getattr(x, field) for x in zoos], random)
        )
        for field in Evidence._fields
    }
    novelty, spread, noise, gain = (found[field] for field in ("novelty", "spread", "over_noise", "over_gaussian"))
    if novelty[2] < COPIES:
        return f"{name} copies its training networks: its novelty is {text(novelty)}."
    if found["apart"][2] < ONE_NETWORK:
        return (
            f"{name} makes one network: its samples are {text(found['apart'])} as far apart as held-out networks are."
        )
    if noise[1] <= 0:
        return f"{name} is no better than noise at equal novelty: {points(noise)} better."
    if not numpy.isfinite(gain[0]):
        return f"{name}: no baseline at its novelty of {text(novelty)} and its spread of {text(spread)}."
    where = f"at novelty {novelty[0]:.2f} and spread {spread[0]:.2f}"
    if gain[1] <= 0:
        return f"{name} is no better than {rival} {where}: {points(gain)} better."
    better = sum(bool(x.over_gaussian[0] > 0) for x in zoos)
    if better < len(zoos):
        return f"{name} is better than {rival} in {better} of {len(zoos)} zoos only, by {points(gain)} {where}."
    if len(zoos) < SEEDS:
        here = "this zoo" if len(zoos) == 1 else f"these {len(zoos)} zoos"
        return f"{name} is better than {rival} by {points(gain)} {where}, in {here}; three seeds of one sign prove it."
    return f"{name} is better than {rival} by {points(gain)} {where}, in all of {len(zoos)} zoos."


def text(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def points(value: tuple[float, float, float]) -> str:
    return f"{100 * value[0]:.1f} [{100 * value[1]:.1f}, {100 * value[2]:.1f}] points"
