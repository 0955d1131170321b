"""Random subset: numbers drawn uniformly without replacement, and the numbers that are left."""

import torch
from torch import Tensor

from fastws import _native
from fastws.random.integers import LARGEST_BOUND, first_places, integers_reference
from fastws.random.philox import check_stream

SPARE_DRAWS = 64
ROUND = 2**40  # draws from which a round takes its own


def random_subset(
    population: int, count: int, seed: int, offset: int = 0, *, device: torch.device | None = None
) -> Tensor:
    """Draws ``count`` of the numbers below ``population``, in random order: each order of each subset equally likely.

    So it is the beginning of a random permutation, and of all numbers it is one. Draws that have come already are
    passed over; once half of the numbers are taken, those that are left, ascending, are numbered anew and drawn from.
    So 1.4 draws a number are enough, and time and memory are those of ``count``. Probabilities are exact up to
    ``population / 2**64`` per draw. The same numbers on every device. No gradients: integers.

    Args:
        population: Numbers to draw from, from 0 to 2**62.
        count: How many, in ``[0, population]``.
        seed: Names the stream of random numbers, in ``[0, 2**63)``.
        offset: Names the draw within the stream, in ``[0, 2**63)``; training steps count it up.
        device: Where to draw; by default the CPU.

    Returns:
        ``[count]``, int64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> fastws.random_subset(10, 4, seed=0)
        tensor([8, 6, 3, 0])
    """
    if not 0 <= population <= LARGEST_BOUND:
        raise ValueError(f"random_subset: population must be in [0, 2**62], got {population}")
    if not 0 <= count <= population:
        raise ValueError(f"random_subset: count must be in [0, {population}], the population, got {count}")
    check_stream("random_subset", seed, offset)
    place = torch.empty(0, dtype=torch.int64, device=device)
    return torch.ops.fastws.random_subset(place, population, count, seed, offset)


def complement(indices: Tensor, population: int) -> Tensor:
    """The numbers below ``population`` that are not among ``indices``, ascending. No gradients: integers.

    Args:
        indices: ``[n]``, int64, in ``[0, population)``, in any order, with or without duplicates. Checked on a CPU,
            trusted on a GPU.
        population: From 0.

    Returns:
        ``[population - number of distinct indices]``, int64.

    Raises:
        ValueError: If shape or dtype do not fit, or an index is out of range.

    Example:
        >>> fastws.complement(torch.tensor([3, 0, 3]), 6)
        tensor([1, 2, 4, 5])
    """
    if indices.dim() != 1 or indices.dtype != torch.int64 or population < 0:
        got = f"{list(indices.shape)} {indices.dtype} and {population}"
        raise ValueError(f"complement: indices must be [n] int64 and population at least 0, got {got}")
    if (_native.CHECK or not indices.is_cuda) and not torch.compiler.is_compiling() and len(indices):
        smallest, largest = (int(x) for x in indices.aminmax())
        if smallest < 0 or largest >= population:
            raise ValueError(f"complement: indices must be in [0, {population}), got {smallest} to {largest}")
    return torch.ops.fastws.complement(indices, population)


def random_integers_reference(place: Tensor, bound: int, first: int, count: int, seed: int, offset: int) -> Tensor:
    return integers_reference(seed, offset, first, count, bound, place.device)[0]


def random_subset_reference(place: Tensor, population: int, count: int, seed: int, offset: int) -> Tensor:
    chosen, numbers = [place.new_empty(0)], None
    first = 0
    while count > 0:
        wanted = min(count, (population + 1) // 2)
        taken = distinct_integers(place, population, first, wanted, seed, offset)
        chosen.append(taken if numbers is None else numbers[taken])
        count -= wanted
        if count > 0:
            left = torch.ops.fastws.complement(taken, population)
            numbers = left if numbers is None else numbers[left]
            population -= wanted
            first += ROUND
    return torch.cat(chosen)


def distinct_integers(place: Tensor, bound: int, first: int, count: int, seed: int, offset: int) -> Tensor:
    """The first ``count`` distinct numbers of the stream of integers below ``bound`` that begins at draw ``first``."""
    tries = count + count // 2 + SPARE_DRAWS
    while True:
        draws = torch.ops.fastws.random_integers(place, bound, first, tries, seed, offset)
        places = first_places(draws)
        if len(places) >= count:
            return draws[places[:count]]
        tries *= 2


def complement_reference(indices: Tensor, population: int) -> Tensor:
    left = torch.ones(population, dtype=torch.bool, device=indices.device)
    left[indices] = False
    return left.nonzero()[:, 0]


torch.library.define(
    "fastws::random_integers",
    "(Tensor place, SymInt bound, SymInt first, SymInt count, SymInt seed, SymInt offset) -> Tensor",
)
torch.library.define(
    "fastws::random_subset", "(Tensor place, SymInt population, SymInt count, SymInt seed, SymInt offset) -> Tensor"
)
torch.library.define("fastws::complement", "(Tensor indices, SymInt population) -> Tensor")
torch.library.register_kernel("fastws::random_integers", "default", random_integers_reference)
torch.library.register_kernel("fastws::random_subset", "default", random_subset_reference)
torch.library.register_kernel("fastws::complement", "default", complement_reference)


@torch.library.register_fake("fastws::random_integers")
def random_integers_fake(place, bound, first, count, seed, offset):
    return place.new_empty(count)


@torch.library.register_fake("fastws::random_subset")
def random_subset_fake(place, population, count, seed, offset):
    return place.new_empty(count)


@torch.library.register_fake("fastws::complement")
def complement_fake(indices, population):
    return indices.new_empty(torch.library.get_ctx().new_dynamic_size())


for op in ("random_integers", "random_subset", "complement"):
    _native.register_without_gradient(op)
_native.register_triton("random_integers", file="random_subset")
