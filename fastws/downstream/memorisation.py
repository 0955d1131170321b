"""Are new networks new? Distances to the training networks modulo permutation and sign, beside what is fair.

Accuracy at epoch 0 alone says nothing: a copy of a training network, or one with a little noise, has all of it. So
every set of networks is judged by its *novelty*, the distance to the nearest training state divided by the median of
the same distance of held-out networks, by its *spread*, and by the accuracy of cheap baselines at equal novelty.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

import fastws
from fastws.downstream.populations import Measured
from fastws.matching.packing import Packing, packing_of
from fastws.symmetry.symmetry import Symmetry

EXHAUSTIVE = 2_000_000  # pairs, up to which all training states are looked at
SCREENED = 64  # states nearest as they lie, which alone are looked at where there are more, and for baselines
RESAMPLES = 2000  # of the intervals
COPIES, ONE_NETWORK = 0.5, 0.5  # novelty and spread below which the verdict is plain


class Novelty(NamedTuple):
    """How far networks are from the training states."""

    distance: Tensor  # to the nearest, [S] float64
    neighbour: Tensor  # which one that is, [S] int64
    novelty: Tensor  # distance over the median of the held-out networks'
    p: Tensor  # share of held-out networks that are as near: small for copies, uniform where samples are like these


class Judged(NamedTuple):
    """What is said of a set of networks; numbers with 95 % intervals ``(value, low, high)``."""

    name: str
    group: str  # the curve that it is a point of
    count: int
    accuracy: tuple[float, float, float]
    halves: tuple[float, float]  # accuracy of every other network, and of the rest: one to choose by, one to tell
    novelty: tuple[float, float, float]  # the median
    spread: tuple[float, float, float]  # standard deviation of weights over that of the training networks
    apart: tuple[float, float, float]  # median distance among themselves over that of held-out networks
    near: float  # share of the set with p at most .05; 5 % where it is like held-out networks
    agreement: float  # of predictions with those of the nearest training state
    phi: float  # correlation of errors with its errors, corrected for chance
    effective_neighbours: float  # how many training states are neighbours, over that of uniform draws
    ensemble_gain: float  # accuracy of the mean logits less the mean accuracy


class Judge:
    """The training networks, and what distances to them mean.

    Args:
        training: Aligned training states, ``[n, P]``.
        held_out: Networks that nobody trained on, ``[h, P]``, in the same order of neurons.
        symmetry: Of the architecture.
        layout: Of the vectors.
        flips: For each group whether its units may be multiplied by -1.
    """

    def __init__(
        self, training: Tensor, held_out: Tensor, symmetry: Symmetry, layout: fastws.Layout, flips: tuple[bool, ...]
    ):
        self.packing: Packing = packing_of(symmetry, layout, flips)
        self.training, self.packed = training, self.packing.pack(training)
        self.mean, self.sd = training.mean(0), training.std(0).mean().item()
        self.held_out = held_out
        distance, _ = self.nearest(held_out)
        self.reference = distance.sort().values
        self.unit = self.reference.median().item()
        self.apart_held_out = self.apart(held_out)

    def nearest(self, flat: Tensor, candidates: int | None = None) -> tuple[Tensor, Tensor]:
        """Distance ``[S]`` to the nearest training state, and which one it is.

        Args:
            flat: Networks, ``[S, P]``.
            candidates: Training states to look at for each, the nearest as they lie; by default all where that takes
                minutes, else 64.
        """
        if candidates is None:
            candidates = len(self.training) if len(flat) * len(self.training) <= EXHAUSTIVE else SCREENED
        chosen = self.screen(flat, min(candidates, len(self.training)))
        squares = self.compare(self.packing.pack(flat), self.packed, chosen)
        least, place = squares.min(1)
        return least.sqrt(), chosen.gather(1, place[:, None])[:, 0]

    def screen(self, flat: Tensor, candidates: int) -> Tensor:
        """The training states nearest as they lie, ``[S, candidates]``."""
        if candidates == len(self.training):
            return torch.arange(candidates).repeat(len(flat), 1)
        return torch.cdist(flat, self.training).topk(candidates, largest=False).indices

    def compare(self, queries: Tensor, references: Tensor, candidates: Tensor) -> Tensor:
        marks = [torch.ones(len(x), dtype=torch.bool) for x in (queries, references)]
        tables = self.packing.groups, self.packing.parts, self.packing.once
        return fastws.matched_distance(
            queries, references, candidates, *tables, query_flips=marks[0], reference_flips=marks[1]
        )

    def novelty(self, flat: Tensor, candidates: int | None = None) -> Novelty:
        distance, neighbour = self.nearest(flat, candidates)
        as_near = torch.searchsorted(self.reference, distance, right=True)
        p = (1 + as_near) / (1 + len(self.reference))
        return Novelty(distance, neighbour, distance / self.unit, p)

    def recall(self, most: int = 100) -> float:
        """How often the nearest state is among those that are looked at for baselines, of held-out networks."""
        flat = self.held_out[:most]
        return (self.nearest(flat, SCREENED)[0] <= self.nearest(flat)[0] * (1 + 1e-6)).double().mean().item()

    def apart(self, flat: Tensor, most: int = 60) -> Tensor:
        """Distances among networks, of at most so many of them: ``[pairs]``."""
        packed = self.packing.pack(flat[:most])
        others = torch.arange(len(packed)).repeat(len(packed), 1)
        squares = self.compare(packed, packed, others)
        return squares[torch.triu_indices(len(packed), len(packed), 1).unbind()].sqrt()


def judge(
    judged_by: Judge,
    name: str,
    group: str,
    flat: Tensor,
    novelty: Novelty,
    found: Measured,
    neighbours: Tensor,
    y: Tensor,
) -> Judged:
    """What is said of a set of networks.

    Args:
        judged_by: Of the zoo.
        name: Of the set.
        group: Of the curve.
        flat: The networks, ``[S, P]``.
        novelty: Theirs.
        found: What they do on some images.
        neighbours: Predictions of the training state nearest to each, ``[S, n]``.
        y: Labels of the images.
    """
    random = numpy.random.default_rng(0)
    rows = random.integers(len(flat), size=(RESAMPLES, len(flat)))
    accuracy, distances = found.accuracy.numpy(), novelty.novelty.numpy()
    wrong, theirs = found.predictions != y, neighbours != y
    counts = novelty.neighbour.bincount(minlength=len(judged_by.training)).double()
    drawn = numpy.bincount(random.integers(len(judged_by.training), size=len(flat)), minlength=len(judged_by.training))
    share = judged_by.apart(flat) / judged_by.apart_held_out.median()
    some = torch.from_numpy(random.integers(len(share), size=(RESAMPLES, len(share)))) if len(share) else None
    spreads = [flat[row].std(0).mean().item() / judged_by.sd for row in torch.from_numpy(rows[:200])]
    return Judged(
        name,
        group,
        len(flat),
        (float(accuracy.mean()), *interval(accuracy[rows].mean(1))),
        (float(accuracy[::2].mean()), float(accuracy[1::2].mean())),
        (float(numpy.median(distances)), *interval(numpy.median(distances[rows], 1))),
        (flat.std(0).mean().item() / judged_by.sd, *interval(numpy.array(spreads))),
        (share.median().item(), *interval(share[some].median(1).values.numpy())) if len(share) else (0.0, 0.0, 0.0),
        (novelty.p <= 0.05).double().mean().item(),
        (found.predictions == neighbours).double().mean().item(),
        phi(wrong, theirs),
        effective(counts) / effective(torch.from_numpy(drawn).double()),
        (found.mean_logits.argmax(1) == y).double().mean().item() - accuracy.mean(),
    )


def interval(values: numpy.ndarray) -> tuple[float, float]:
    low, high = numpy.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def phi(a: Tensor, b: Tensor) -> float:
    """Mean correlation of the errors of pairs of networks, ``[S, n]`` bool: ``(q - a b) / sqrt(a (1 - a) b (1 - b))``.

    q is the share of images that both get wrong, a and b their error rates; pairs of which one makes no error, or
    nothing else, are left out. Unlike the share of common errors it does not fall because a network gets worse.
    """
    a, b = a.double(), b.double()
    both, first, second = (a * b).mean(1), a.mean(1), b.mean(1)
    scale = (first * (1 - first) * second * (1 - second)).sqrt()
    kept = scale > 0
    return ((both - first * second)[kept] / scale[kept]).mean().item() if kept.any() else float("nan")


def effective(counts: Tensor) -> float:
    """``exp`` of the entropy of counts: how many states these are, weighted by how often they occur."""
    share = counts[counts > 0] / counts.sum()
    return (-(share * share.log()).sum()).exp().item()


def verdict(of: Judged, noise: Sequence[Judged], gaussian: Sequence[Judged]) -> str:
    """One sentence, by the first rule that holds.

    Args:
        of: The set that is judged.
        noise: Anchors with noise, of several scales.
        gaussian: Gaussians in the space of principal components, of several numbers of them.
    """
    if of.novelty[2] < COPIES:
        return f"{of.name} copies its training networks: its novelty is {text(of.novelty)}."
    if of.apart[2] < ONE_NETWORK:
        return f"{of.name} makes one network: its samples are {text(of.apart)} as far apart as held-out networks are."
    bar = at_novelty(noise, of.novelty[0])
    if bar is not None and of.accuracy[1] <= bar:
        return f"{of.name} is no better than noise at equal novelty: {text(of.accuracy)} against {bar:.3f}."
    rivals = [other for other in gaussian if other.novelty[0] >= of.novelty[0] and other.spread[0] >= of.spread[0]]
    if not rivals:
        return f"{of.name}: no baseline at its novelty of {text(of.novelty)} and its spread of {text(of.spread)}."
    # chosen by one half of its networks and told by the other, for the best of many is best by luck too
    best = max(rivals, key=lambda other: other.halves[0])
    gain = of.accuracy[0] - best.halves[1]
    width = [(one.accuracy[2] - one.accuracy[1]) / 2 for one in (of, best)]
    error = (width[0] ** 2 + 2 * width[1] ** 2) ** 0.5
    if gain - error <= 0:
        return f"{of.name} is no better than {best.name}, which has {best.halves[1]:.3f} to its {of.accuracy[0]:.3f}."
    where = f"at novelty {of.novelty[0]:.2f} and spread {of.spread[0]:.2f}"
    points = f"{100 * gain:.1f} [{100 * (gain - error):.1f}, {100 * (gain + error):.1f}] points"
    return f"{of.name} is better than {best.name} by {points} {where}, in this zoo; three seeds of one sign prove it."


def text(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def at_novelty(curve: Sequence[Judged], novelty: float) -> float | None:
    """The accuracy of a curve at a novelty, between its points; None outside of them."""
    points = sorted((point.novelty[0], point.accuracy[0]) for point in curve)
    if not points or not points[0][0] <= novelty <= points[-1][0]:
        return None
    return float(numpy.interp(novelty, *zip(*points, strict=True)))
