"""Triton kernel of fastws::random_integers, which random_subset is made of on a GPU."""

import triton
import triton.language as tl
from torch import Tensor

from fastws.kernels.philox import philox

BLOCK = 256


@triton.jit
def draw_below(seed, offset, draw, bound):
    """Integers below ``bound`` and fractions of 62 bits of int64 draws, as in fastws/random/integers.py; all int64."""
    word0, word1, word2, word3 = philox(seed, offset, draw // 2)
    second = draw % 2 == 1
    low = tl.where(second, word2, word0).to(tl.uint64)
    number = low | tl.where(second, word3, word1).to(tl.uint64) << 32
    bound = tl.zeros_like(number) + bound.to(tl.uint64)
    return tl.umulhi(number, bound).to(tl.int64), ((number * bound) >> 2).to(tl.int64)


@triton.jit(do_not_specialize=["bound", "first", "count", "seed", "offset"])
def _random_integers_kernel(integers, bound, first, count, seed, offset, BLOCK: tl.constexpr):
    """integers[i] = the integer of draw first + i. One program per BLOCK draws."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    integer, _ = draw_below(seed.to(tl.int64), offset.to(tl.int64), first.to(tl.int64) + i, bound.to(tl.int64))
    tl.store(integers + i, integer, mask=i < count)


def random_integers(place: Tensor, bound: int, first: int, count: int, seed: int, offset: int) -> Tensor:
    integers = place.new_empty(count)
    if count > 0:
        _random_integers_kernel[(triton.cdiv(count, BLOCK),)](integers, bound, first, count, seed, offset, BLOCK)
    return integers
