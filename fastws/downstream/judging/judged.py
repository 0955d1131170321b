"""What is said of a set of networks: how accurate, how new, how spread, and how like its neighbours it behaves."""

from functools import cache
from typing import NamedTuple

import numpy
import torch
from numpy import ndarray
from torch import Tensor

from fastws.downstream.judging.memorisation import Judge, Novelty
from fastws.downstream.judging.statistics import around, draw_counts, mean_std, weighted_mean, weighted_median
from fastws.downstream.populations import Measured
from fastws.zoo.making.measuring import disagreement

CALIPER = 0.01  # of accuracy, within which a held-out network counts as equally good
ENSEMBLE = 10  # networks whose mean logits are looked at
DRAWS = 2000  # of uniform neighbours, to know how many different ones they would be
NEAR = 0.05  # p-value from which on a network is nearer to training states than held-out networks are


class Replicates(NamedTuple):
    """Statistics of a set of networks, then of resampled ones: ``[1 + RESAMPLES]`` each."""

    accuracy: ndarray
    choosing: ndarray  # accuracy of every other network, by which the best of several sets is chosen
    scoring: ndarray  # accuracy of the rest, by which what was chosen is told
    novelty: ndarray  # the median
    spread: ndarray  # standard deviation of weights over that of the training states
    apart: ndarray  # median distance among themselves over that of held-out networks


class Behaviour(NamedTuple):
    """How like the training states networks behave, ``[S]`` each; NaN where it cannot be said."""

    accuracy: ndarray
    agreement: ndarray  # share of predictions that are those of the nearest training state
    phi: ndarray  # correlation of errors with those of the nearest training state
    iou: ndarray  # the largest share of common errors with any training state


class Known(NamedTuple):
    """What sets are compared with, beside distances."""

    y: Tensor  # labels of the images, [n]
    predictions: Tensor  # of all training states, [N, n]
    held_out: Measured  # networks that nobody trained on
    behaviour: Behaviour  # theirs


class Judged(NamedTuple):
    """What is said of a set of networks; numbers with 95 % intervals are ``(value, low, high)``.

    Pairs are a value of the set and that of held-out networks of equal accuracy, within one point: both over the
    networks that have such a partner, or the first over all where none has and the second is not known.
    """

    name: str
    group: str  # the curve that it is a point of
    count: int
    accuracy: tuple[float, float, float]
    novelty: tuple[float, float, float]  # the median
    spread: tuple[float, float, float]  # standard deviation of weights over that of the training states
    apart: tuple[float, float, float]  # median distance among themselves over that of held-out networks
    near: float  # share of the set with p at most .05; 5 % where it is like held-out networks
    partners: float  # share of the set that has a held-out partner of equal accuracy
    agreement: tuple[float, float]
    phi: tuple[float, float]
    phi_left_out: int  # networks without phi, because one of both makes no error, or nothing else
    iou: tuple[float, float]
    disagreement: float  # among pairs of the set, over that of pairs of partners
    effective_neighbours: float  # how many training states are neighbours, over that of uniform draws
    ensemble_gain: tuple[float, float]  # accuracy of the mean logits of ten less theirs; also of held-out networks


def judge(judged_by: Judge, known: Known, name: str, group: str, flat: Tensor, novelty: Novelty, found: Measured,
          gain: float, held_out_gain: float) -> tuple[Judged, Replicates]:  # fmt: skip
    """Says it.

    Args:
        judged_by: Of the zoo.
        known: What is compared with.
        name: Of the set.
        group: Of the curve.
        flat: The networks, ``[S, P]``.
        novelty: Theirs.
        found: What they do on the images.
        gain: Of an ensemble of ten of them.
        held_out_gain: Of ten held-out networks.
    """
    numbers = replicates(judged_by, flat, novelty, found)
    own = behave(known, found, novelty.neighbour)
    partner = partners_of(own.accuracy, known.behaviour.accuracy)
    matched = partner >= 0
    pairs = {
        field: paired(getattr(own, field), getattr(known.behaviour, field), partner) for field in Behaviour._fields
    }
    theirs = disagreement(known.held_out.predictions[numpy.unique(partner[matched])]).item()
    counts = novelty.neighbour.bincount(minlength=len(judged_by.training)).double()
    judged = Judged(
        name=name,
        group=group,
        count=len(flat),
        **{field: around(getattr(numbers, field)) for field in ("accuracy", "novelty", "spread", "apart")},
        near=(novelty.p <= NEAR).double().mean().item(),
        partners=float(matched.mean()),
        agreement=pairs["agreement"],
        phi=pairs["phi"],
        phi_left_out=int(numpy.isnan(own.phi).sum()),
        iou=pairs["iou"],
        disagreement=disagreement(found.predictions).item() / theirs if theirs > 0 else numpy.nan,
        effective_neighbours=effective(counts) / effective_of_uniform(len(flat), len(counts)),
        ensemble_gain=(gain, held_out_gain),
    )
    return judged, numbers


def replicates(judged_by: Judge, flat: Tensor, novelty: Novelty, found: Measured) -> Replicates:
    """Statistics of the set and of resampled ones, in units of held-out networks that are resampled too."""
    accuracy = found.accuracy.numpy()
    counts = draw_counts(len(flat), numpy.random.default_rng(1))
    half = numpy.arange(len(flat)) % 2 == 0
    halves = [
        weighted_mean(accuracy[part], numpy.maximum(counts[:, part], counts[:, part].sum(1, keepdims=True) == 0))
        for part in (half, ~half if len(flat) > 1 else half)
    ]
    return Replicates(
        weighted_mean(accuracy, counts),
        *halves,
        weighted_median(novelty.distance.numpy(), counts) / judged_by.units,
        mean_std(flat, counts) / judged_by.sd,
        judged_by.apart(flat, counts) / judged_by.apart_units,
    )


# --- behaviour


def behave(known: Known, found: Measured, neighbour: Tensor) -> Behaviour:
    """How networks behave beside the training states, of which ``neighbour`` are the nearest."""
    wrong, theirs = found.predictions != known.y, known.predictions != known.y
    nearest = known.predictions[neighbour]
    agreement = (found.predictions == nearest).double().mean(1)
    return Behaviour(
        found.accuracy.numpy(), agreement.numpy(), phi(wrong, theirs[neighbour]).numpy(), max_iou(wrong, theirs).numpy()
    )


def phi(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the errors of pairs of networks, bool ``[S, n]``: ``(q - a b) / sqrt(a (1 - a) b (1 - b))``.

    q is the share of images that both get wrong, a and b their error rates; NaN where one makes no error, or nothing
    else. Unlike the share of common errors it does not fall because a network gets worse.
    """
    a, b = a.double(), b.double()
    both, first, second = (a * b).mean(1), a.mean(1), b.mean(1)
    scale = (first * (1 - first) * second * (1 - second)).sqrt()
    return torch.where(scale > 0, (both - first * second) / scale, torch.nan)


def max_iou(wrong: Tensor, theirs: Tensor) -> Tensor:
    """For each network the largest share of common errors, ``|Ea & Eb| / |Ea | Eb|``, with any of others: ``[S]``.

    NaN where neither makes an error. It falls as soon as a network gets worse; arXiv 2506.07998 takes that for novelty.
    """
    both = wrong.float() @ theirs.float().T
    either = wrong.float().sum(1, keepdim=True) + theirs.float().sum(1) - both
    share = torch.where(either > 0, both / either, -1.0).double()
    return share.max(1).values.where(share.max(1).values >= 0, torch.nan)


def partners_of(accuracy: ndarray, held_out: ndarray) -> ndarray:
    """The held-out network that is nearest in accuracy to each network, ``[S]``; -1 where none is within a point."""
    gaps = numpy.abs(accuracy[:, None] - held_out)
    nearest = gaps.argmin(1)
    return numpy.where(gaps.min(1) <= CALIPER + 1e-9, nearest, -1)


def paired(own: ndarray, held_out: ndarray, partner: ndarray) -> tuple[float, float]:
    """Means of networks that have a partner, and of their partners."""
    kept = partner >= 0
    kept[kept] = numpy.isfinite(own[kept]) & numpy.isfinite(held_out[partner[kept]])
    if kept.any():
        return float(own[kept].mean()), float(held_out[partner[kept]].mean())
    known = own[numpy.isfinite(own)]
    return (float(known.mean()) if len(known) else numpy.nan), numpy.nan


def effective(counts: Tensor) -> float:
    """``exp`` of the entropy of counts: how many states these are, weighted by how often they occur."""
    share = counts[counts > 0] / counts.sum()
    return (-(share * share.log()).sum()).exp().item()


@cache
def effective_of_uniform(draws: int, states: int) -> float:
    """The mean of ``effective`` for so many uniform draws of states."""
    random = numpy.random.default_rng(0)
    found = [effective(torch.from_numpy(random.integers(states, size=draws)).bincount().double()) for _ in range(DRAWS)]
    return float(numpy.mean(found))


def ensemble_gain(found: Measured, y: Tensor) -> float:
    """Accuracy of the mean logits of networks less their mean accuracy."""
    return (found.mean_logits.argmax(1) == y).double().mean().item() - found.accuracy.mean().item()
