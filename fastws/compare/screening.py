"""Pairs of networks that may be relatives, among many: all pairs at once, by matrix products."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from scipy.special import log_ndtr
from torch import Tensor
from tqdm import tqdm

from fastws.compare.kinship import Family

AT_ONCE = 2**24  # numbers of all networks that are in memory at a time
LEAST_PAIRS = 128  # that say how much similarities vary by chance
MOST_DEVIATIONS = 8.0  # that one tensor counts for at most: a tensor whose units have an order does not decide alone
EXACT_BELOW = 2**26  # numbers of all networks, with which float64 takes no time


def screen(states: Sequence[Mapping[str, Tensor]], families: Sequence[Family], progress: bool = False) -> Tensor:
    """How much closer each pair is in stored coordinates than its units in other orders are, float64 ``[M, M]``.

    Of each tensor the cosine of a pair, of units less their mean, in units of its standard deviation where the units of
    one are shifted against those of the other: that shift is what independent training does. Tensors are added up as
    independent ones, so that strangers have mean 0 and variance 1, whatever else lies in the folder.

    Args:
        states: M networks, tensors by name.
        families: What ``find_families`` finds.
    """
    count = len(states)
    total = torch.zeros(count, count, dtype=torch.float64)
    for family in tqdm(families, desc="screen", unit=" tensors", disable=not progress, leave=False):
        similarity, chance = tensor_similarity([state[family.tensor] for state in states], family.axis)
        spread = math.sqrt(float(chance.square().mean()))
        if spread > 0:
            total += (similarity / spread).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
    return total / math.sqrt(max(1, len(families)))


def tensor_similarity(tensors: Sequence[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """Cosines of one tensor of all pairs ``[M, M]``, and those of units that were shifted, of pairs of two networks."""
    count, units = len(tensors), tensors[0].shape[axis]
    length = tensors[0].numel() // units
    shifts = range(1, 1 + min(units - 1, -(-LEAST_PAIRS // (count * (count - 1)))))
    here = torch.zeros(count, count, dtype=torch.float64)
    there = torch.zeros(len(shifts), count, count, dtype=torch.float64)
    sums = torch.zeros(count, length, dtype=torch.float64)
    for rows in stacked(tensors, axis):
        flat = rows.flatten(1)
        here += flat @ flat.T
        for number, shift in enumerate(shifts):
            there[number] += flat @ rows.roll(shift, 1).flatten(1).T
        sums += rows.sum(1)
    common = sums @ sums.T / units  # what all units of a network share says nothing about their order
    here, there = here - common, there - common
    lengths = here.diagonal().clamp(min=0).sqrt()
    scale = (lengths[:, None] * lengths).clamp(min=1e-300)
    return here / scale, (there / scale)[:, ~torch.eye(count, dtype=torch.bool)]


def stacked(tensors: Sequence[Tensor], axis: int = 0) -> Iterator[Tensor]:
    """Pieces ``[M, rows, entries]`` of one tensor of all networks, float32 or, where they are few, float64."""
    views = [tensor.transpose(0, axis).reshape(tensor.shape[axis], -1) for tensor in tensors]
    small = len(views) * views[0].numel() <= EXACT_BELOW
    dtype = torch.float64 if small or views[0].dtype == torch.float64 else torch.float32
    # two rows at least, or there would be nothing to shift
    step = max(2, AT_ONCE // max(1, len(views) * views[0].shape[1]))
    begins = list(range(0, max(1, len(views[0]) - 1), step))
    for begin, end in zip(begins, [*begins[1:], len(views[0])], strict=True):
        piece = torch.empty(len(views), end - begin, views[0].shape[1], dtype=dtype)
        for row, view in zip(piece, views, strict=True):
            row.copy_(view[begin:end])
        yield piece


def log_chance(deviations: Tensor) -> Tensor:
    """Natural logarithm of the probability that strangers are as close."""
    return torch.from_numpy(log_ndtr(-deviations.numpy()))


def gram_of_changes(states: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Inner products of what networks have changed of one of them, and sums of squares of each: ``[k, k]``, ``[k]``.

    Differences are multiplied rather than networks: of relatives, which are nearly equal, the rest would be rounding.
    """
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    squares = torch.zeros(len(states), dtype=torch.float64)
    for name, tensor in base.items():
        if tensor.numel() == 0:
            continue
        for piece in stacked([state[name].reshape(1, -1).T for state in [*states, base]]):
            flat = piece.flatten(1)
            squares += flat[:-1].square().sum(1)
            flat = flat[:-1] - flat[-1]
            gram += flat @ flat.T
    return gram, squares


def distances_of(gram: Tensor, squares: Tensor) -> Tensor:
    """``||a - b|| / (||a|| ||b||)**0.5`` of all pairs ``[k, k]``."""
    own = gram.diagonal()
    gaps = (own[:, None] + own - 2 * gram).clamp(min=0)
    lengths = squares.clamp(min=1e-300).sqrt()
    return (gaps / (lengths[:, None] * lengths)).sqrt()
