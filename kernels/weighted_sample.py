"""Triton kernel of fastws::weighted_sample."""

import triton
import triton.language as tl
from torch import Tensor

from fastws.kernels.random_subset import draw_below

BLOCK = 256


@triton.jit(do_not_specialize=["num_columns", "first", "count", "seed", "offset"])
def _weighted_sample_kernel(columns, sample, num_columns, first, count, seed, offset, BLOCK: tl.constexpr):
    """sample[i] = the column of draw first + i, or its alias where the first 32 bits of the fraction are at most the
    upper half of the column. One program per BLOCK draws."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    draw = first.to(tl.int64) + i
    number, fraction = draw_below(seed.to(tl.int64), offset.to(tl.int64), draw, num_columns.to(tl.int64))
    column = tl.load(columns + number, mask=i < count, other=0).to(tl.uint64)
    last, alias = column >> 32, (column & 0xFFFFFFFF).to(tl.int64)
    tl.store(sample + i, tl.where((fraction >> 30).to(tl.uint64) <= last, alias, number), mask=i < count)


def weighted_sample(columns: Tensor, first: int, count: int, seed: int, offset: int) -> Tensor:
    columns, sample = columns.contiguous(), columns.new_empty(count)
    if count > 0:
        args = columns, sample, len(columns), first, count, seed, offset
        _weighted_sample_kernel[(triton.cdiv(count, BLOCK),)](*args, BLOCK)
    return sample
