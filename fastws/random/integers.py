"""Unbiased random integers of 64 bits, the same as csrc/cpu/random/integers.h and kernels/integers.py draw."""

from functools import lru_cache

import torch
from torch import Tensor

from fastws.random.philox import LOW, philox_reference

FRACTION_BITS = 62
LARGEST_BOUND = 2**62


def integers_reference(
    seed: int, offset: int, first: int, count: int, bound: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draws ``first`` to ``first + count - 1`` of a stream: integers in ``[0, bound)``, and what they leave.

    Draw i is made of words 2i and 2i + 1, ``x = words[2 * i] + 2**32 * words[2 * i + 1]``: the integer is
    ``x * bound >> 64``, of which each has its share of the x, give or take one, and the fraction the next 62 bits of
    the product: uniform in ``[0, 2**62)``, in steps of ``bound / 4``. Both are int64, ``[count]``.
    """
    counter = first // 2  # words come in fours, draws in twos
    words = philox_reference(seed, offset, 2 * (first + count - 2 * counter), device, counter)
    low, high = words.view(-1, 2)[first - 2 * counter :].unbind(1)
    bound_low, bound_high = bound & LOW, bound >> 32
    # the four products of a long multiplication, which wrap, which leaves the 64 bits right
    products = low * bound_low, high * bound_low, low * bound_high, high * bound_high
    middle = (products[0] >> 32 & LOW) + (products[1] & LOW) + (products[2] & LOW)
    integers = products[3] + (products[1] >> 32 & LOW) + (products[2] >> 32 & LOW) + (middle >> 32)
    rest = (middle << 32) + (products[0] & LOW)
    return integers, rest >> 2 & (2**FRACTION_BITS - 1)


def first_places(draws: Tensor) -> Tensor:
    """Where each value of ``draws``, ``[n]``, stands for the first time, ascending."""
    values, places = draws.sort(stable=True)
    new = torch.ones_like(values, dtype=torch.bool)
    new[1:] = values[1:] != values[:-1]
    return places[new].sort().values


def epoch_rows(count: int, size: int, seed: int, offset: int, step: int) -> Tensor:
    """The rows of batch ``step``, ``[size]``: each epoch visits every row below ``count`` once.

    Epochs have orders of their own; that of epoch e is from draw ``offset + e``.
    """
    begin = step * size
    epochs = range(begin // count, (begin + size - 1) // count + 1)
    rows = torch.cat([epoch_order(count, seed, offset + epoch) for epoch in epochs])
    return rows[begin - epochs[0] * count :][:size]


@lru_cache(maxsize=8)
def epoch_order(count: int, seed: int, offset: int) -> Tensor:
    return philox_reference(seed, offset, count, torch.device("cpu")).argsort(stable=True)
