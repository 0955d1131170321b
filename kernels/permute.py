"""Triton kernels of fastws::permute and fastws::random_permutations."""

import triton
import triton.language as tl
from torch import Tensor, empty_like, int32

from fastws.kernels.philox import philox
from fastws.kernels.table import (
    COLUMN_BLOCK,
    COLUMN_FIRST_IN,
    COLUMN_FIRST_OUT,
    COLUMN_ROW_LENGTH,
    COLUMN_UNITS,
    COLUMN_WEIGHT_OFFSET,
    COLUMNS,
    permuted,
    with_sign,
)

BLOCK = 1024


# a search whose size is a constant 1 breaks the compiler of Triton 3.6
@triton.jit(do_not_specialize=["num_layers"])
def _permute_kernel(
    flat,
    table,
    permutations,
    target,
    num_weights,
    num_layers,
    indices,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """target[b, i] = flat[b, source of i], negated or not; INVERSE: target[b, source of i] = flat[b, i], likewise.

    One program per BLOCK weights. Places within a tensor are divided in 32 bits unless WIDE: a GPU has no instruction
    that divides 64 bits and calls a long subroutine instead.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    blocks = tl.cdiv(num_weights, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_weights
    i = tl.minimum(i, num_weights - 1)
    # the tensor that each weight is in; a block may hold several
    first, last = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64) + num_layers
    size = num_layers
    while size > 1:
        middle = (first + last) // 2
        before = tl.load(table + middle * COLUMNS + COLUMN_WEIGHT_OFFSET, mask=middle > first, other=0) <= i
        first, last = tl.where(before, middle, first), tl.where(before, last, middle)
        size = (size + 1) // 2
    layer = table + first * COLUMNS
    offset, length = tl.load(layer + COLUMN_WEIGHT_OFFSET), tl.load(layer + COLUMN_ROW_LENGTH).to(index)
    block = tl.load(layer + COLUMN_BLOCK).to(index)
    period = block * tl.load(layer + COLUMN_UNITS).to(index)
    place = (i - offset).to(index)
    row, f = place // length, place % length
    vectors = permutations + b * indices
    row, negative_row = permuted(vectors, tl.load(layer + COLUMN_FIRST_OUT), row)
    unit, negative_unit = permuted(vectors, tl.load(layer + COLUMN_FIRST_IN), f % period // block)
    negative = negative_row != negative_unit
    source = offset + row.to(tl.int64) * length + f // period * period + unit.to(tl.int64) * block + f % block
    if INVERSE:
        # no atomics: a permutation meets each weight once
        x = tl.load(flat + b * num_weights + i, mask=inside)
        tl.store(target + b * num_weights + source, with_sign(x, negative), mask=inside)
    else:
        x = tl.load(flat + b * num_weights + source, mask=inside)
        tl.store(target + b * num_weights + i, with_sign(x, negative), mask=inside)


@triton.jit(do_not_specialize=["seed", "offset"])
def _random_permutations_kernel(starts, permutations, total, groups, seed, offset):
    """Fisher-Yates, inside out, as in fastws/ops/permute.py. One program, of one warp, per group and draw.

    Entries follow each other through memory, which a barrier keeps in order; csrc/cuda/permute.cu is faster.
    """
    b = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    entries = permutations + b * total + start
    for i in range(0, end - start):
        index = b * total + start + i
        word0, word1, word2, word3 = philox(seed.to(tl.int64), offset.to(tl.int64), index // 4)
        lane = index % 4
        word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
        j = word.to(tl.int64) * (i + 1) >> 32
        other = tl.load(entries + j, mask=j < i, other=0)
        tl.debug_barrier()
        tl.store(entries + i, other)
        tl.debug_barrier()
        tl.store(entries + j, i)
        tl.debug_barrier()


def permute(flat: Tensor, table: Tensor, permutations: Tensor, inverse: bool = False) -> Tensor:
    flat, table, permutations = flat.contiguous(), table.contiguous(), permutations.contiguous()
    target = empty_like(flat)
    if flat.numel() > 0:
        grid = (triton.cdiv(flat.shape[1], BLOCK) * len(flat),)
        sizes = flat.shape[1], len(table), permutations.shape[1]
        _permute_kernel[grid](flat, table, permutations, target, *sizes, BLOCK, inverse, flat.shape[1] >= 2**31)
    return target


def random_permutations(starts: Tensor, total: int, batch: int, seed: int, offset: int) -> Tensor:
    permutations = starts.new_empty(batch, total, dtype=int32)
    groups = len(starts) - 1
    if permutations.numel() > 0:
        args = starts.contiguous(), permutations, total, groups, seed, offset
        _random_permutations_kernel[(batch * groups,)](*args, num_warps=1)
    return permutations
