"""The mean and the spread of each layer of each network, of a sample of its numbers, when a window first asks for it.

A pass over all files would cost their bytes before the first step. The numbers of a window alone are too few where it
has one token of a layer, and a token would be told otherwise in each window that it is in. Means over the networks of
an architecture would change with what else lies in the folder. So each layer of each network is measured by itself, of
as many numbers whatever its size: a function of the file alone, whoever asks and when.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.layout.moments import SMALLEST_STD
from fastws.table import Row

PIECES, PIECE = 2, 2048  # of the weights of a layer that has more numbers, evenly spread; the std is right to 1 %


class Range(NamedTuple):
    """Entries of a vector."""

    first: int
    count: int


class Measured:
    """Of each network, apart from what it shares with others of its architecture.

    Args:
        names: Of the networks, m of them.
        layers: Rows of each network in the tables of the population, int64 ``[m, 2]``.
        standardize: Whether layers are measured; else their mean counts as 0 and their std as 1.
    """

    def __init__(self, names: Sequence[str], layers: Tensor, standardize: bool):
        self.names, self.standardize = tuple(names), standardize
        counts = layers[:, 1] - layers[:, 0]
        self.first = counts.cumsum(0) - layers[:, 1]  # a row of the tables plus this is the place of the layer
        self.mean, self.std = torch.zeros(int(counts.sum())), torch.ones(int(counts.sum()))
        self.known = torch.full((int(counts.sum()),), not standardize)
        self.not_finite: set[int] = set()  # networks in whose windows there were such numbers

    def measure(self, population, model: Tensor, row: Tensor) -> None:
        """Measures layers, rows ``[P]`` of a population's tables, of networks ``[P]``, but those that are known."""
        place = self.first[model] + row
        some = (~self.known[place]).nonzero().flatten()
        if not len(some):
            return
        ranges = {}
        for key, network, number in zip(*(x[some].tolist() for x in (place, model, row)), strict=True):
            which = int(population.where[number])
            layer = Row(*population.tables[which][number].tolist())
            ranges[key] = which, sampled(layer, int(population.bases[which][network]))
        widths = [weights.element_size() for weights in population.weights]
        pieces = [(r.first * widths[which], r.count * widths[which]) for which, found in ranges.values() for r in found]
        population.arena.prefetch(*zip(*pieces, strict=True))
        found = {key: mean_and_std(population.weights[which], pieces) for key, (which, pieces) in ranges.items()}
        keys = torch.tensor([*found])
        self.mean[keys], self.std[keys] = torch.tensor([*found.values()]).unbind(1)
        self.known[keys] = True

    def clean(self, values: Tensor, model: Tensor) -> Tensor:
        """Windows ``[B, W, T]`` with 0 for what is not finite; a network that has such numbers is told of once."""
        if values.sum().isfinite():
            return values
        bad = ~values.isfinite().flatten(1).all(1)
        for network in set(model[bad].tolist()) - self.not_finite:
            self.not_finite.add(network)
            print(f"note: weights of {self.names[network]} must be finite, got others, which count as 0")
        return values.nan_to_num(0, 0, 0)


def sampled(layer: Row[int], base: int) -> list[Range]:
    """The entries that a layer is measured by: all, or pieces of its weights."""
    count = layer.rows * layer.row_length
    biases = [Range(base + layer.bias_offset, layer.rows)] if layer.bias_offset >= 0 else []
    begin = base + layer.weight_offset
    if count + len(biases) * layer.rows <= PIECES * PIECE or count <= PIECE:
        return [Range(begin, count), *biases]
    return [Range(begin + (count - PIECE) * (2 * piece + 1) // (2 * PIECES), PIECE) for piece in range(PIECES)]


def mean_and_std(weights: Tensor, ranges: Sequence[Range]) -> tuple[float, float]:
    """Of the numbers in ranges of a vector, of those that are finite; a std of 1 where they do not vary."""
    numbers = torch.cat([weights[some.first : some.first + some.count] for some in ranges]).double()
    variance, mean = (x.item() for x in torch.var_mean(numbers, correction=min(1, len(numbers) - 1)))
    if not math.isfinite(variance):
        numbers = numbers[numbers.isfinite()]
        if not len(numbers):
            return 0.0, 1.0
        variance, mean = (x.item() for x in torch.var_mean(numbers, correction=min(1, len(numbers) - 1)))
    std = math.sqrt(variance)
    return mean, std if SMALLEST_STD < std < math.inf else 1.0
