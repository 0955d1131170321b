"""Are new networks new? Distances to the training networks modulo permutation and sign, beside what is fair.

Accuracy at epoch 0 alone says nothing: a copy of a training network, or one with a little noise, has all of it. So
every set of networks is judged by its *novelty*, the distance to the nearest training state divided by the median of
the same distance of held-out networks, by its *spread*, and by the accuracy of cheap baselines at equal novelty.
"""

from typing import NamedTuple

import numpy
import torch
from torch import Tensor

import fastws
from fastws.downstream.judging.statistics import draw_counts, pair_counts, weighted_median
from fastws.matching.packing import Packing, packing_of
from fastws.symmetry.symmetry import Symmetry

EXHAUSTIVE = 2_000_000  # pairs, up to which all training states are looked at
SCREENED = 64  # states nearest as they lie, which alone are looked at where there are more, and for baselines
SOME = 60  # networks, at most, whose distances among themselves are looked at


class Novelty(NamedTuple):
    """How far networks are from the training states."""

    distance: Tensor  # to the nearest, [S] float64
    neighbour: Tensor  # which one that is, [S] int64
    novelty: Tensor  # distance over the median of the held-out networks'
    p: Tensor  # share of held-out networks that are as near: small for copies, uniform where samples are like these


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
        counts = draw_counts(len(held_out), numpy.random.default_rng(0))
        self.units = weighted_median(distance.numpy(), counts)  # of resampled held-out networks; the first is theirs
        self.unit = float(self.units[0])
        self.apart_units = self.apart(held_out, counts)

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

    def apart(self, flat: Tensor, counts: numpy.ndarray) -> numpy.ndarray:
        """Median distance among the first 60 networks, that occur ``counts`` times ``[B, S]``: ``[B]``."""
        packed = self.packing.pack(flat[:SOME])
        others = torch.arange(len(packed)).repeat(len(packed), 1)
        squares = self.compare(packed, packed, others)
        pairs = squares[torch.triu_indices(len(packed), len(packed), 1).unbind()].sqrt()
        return weighted_median(pairs.numpy(), pair_counts(counts[:, :SOME])) if len(pairs) else numpy.zeros(len(counts))

    def others(self, places: Tensor, networks: Tensor) -> Tensor:
        """Distance of training states to the nearest state of another network, ``[k]``.

        Args:
            places: Of the states among the training states, int64 ``[k]``.
            networks: Number of the network that each training state is of, ``[n]``.
        """
        packed, found = self.packed[places], []
        for place, query in zip(places.tolist(), packed.split(1), strict=True):
            chosen = (networks != networks[place]).nonzero().T
            found.append(self.compare(query, self.packed, chosen).min().sqrt())
        return torch.stack(found)
