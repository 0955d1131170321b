"""Triton kernel of fastws::token_views."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastws.kernels.philox import philox
from fastws.kernels.table import (
    COLUMN_BIAS_OFFSET,
    COLUMN_BLOCK,
    COLUMN_CHUNKS,
    COLUMN_FIRST_BIAS,
    COLUMN_FIRST_IN,
    COLUMN_FIRST_OUT,
    COLUMN_FIRST_TOKEN,
    COLUMN_ROW_LENGTH,
    COLUMN_ROWS,
    COLUMN_UNITS,
    COLUMN_WEIGHT_OFFSET,
    COLUMNS,
    find_layer,
    find_layers,
    permuted,
    place_of,
)


@triton.jit
def word_of(seed, offset, index):
    """Word ``index`` of a draw."""
    word0, word1, word2, word3 = philox(seed, offset, index // 4)
    lane = index % 4
    return tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))


@triton.jit
def normals(seed, offset, index):
    """One standard normal per entry, by Box and Muller's method: fastws/random/philox.py has the formula."""
    word = word_of(seed, offset, index // 2).to(tl.int64)
    radius = tl.sqrt(-tl.log(((word & 0xFFFF).to(tl.float32) + 0.5) * 1.52587890625e-05))
    t = ((word >> 16 & 0x3FFF).to(tl.float32) - 8191.5) * 9.587379924285257e-05
    second = index % 2 == 1
    sign = tl.where(second, word >> 30 & 1, word >> 31 & 1)
    x = radius * tl.where(second, tl.cos(t) + tl.sin(t), tl.cos(t) - tl.sin(t))
    return tl.where(sign == 1, -x, x)


NEW_DRAWS: tl.constexpr = tl.constexpr(-(2**63))  # 2**63 as words of 64 bits; where additive noise and blocks begin
WORDS: tl.constexpr = tl.constexpr(24)  # of random numbers for the block of a view


@triton.jit(do_not_specialize=["threshold", "shortest", "longest", "seed", "offset"])
def _draw_blocks_kernel(table, layers, blocks, threshold, shortest, longest, seed, offset):
    """blocks[b] = first weight and end of what view b erases, the formula of fastws/ops/token_views.py.

    One program per view.
    """
    b = tl.program_id(0).to(tl.int64)
    size = tl.zeros([], tl.int64)
    l, last = tl.load(layers + 2 * b), tl.load(layers + 2 * b + 1)  # noqa: E741
    while l < last:
        layer = table + l * COLUMNS
        rows, bias = tl.load(layer + COLUMN_ROWS), tl.load(layer + COLUMN_BIAS_OFFSET)
        end = tl.load(layer + COLUMN_WEIGHT_OFFSET) + rows * tl.load(layer + COLUMN_ROW_LENGTH)
        size = tl.maximum(size, tl.maximum(end, tl.where(bias >= 0, bias + rows, 0)))
        l += 1  # noqa: E741
    seed, draw = seed.to(tl.int64), 2 * offset.to(tl.int64) + 1 + NEW_DRAWS
    erased = word_of(seed, draw, b * WORDS).to(tl.int64) < threshold
    begin, end, attempt = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    while attempt < tl.where(erased, 10, 0):  # tries of a block that would pass the end
        word = b * WORDS + 2 + 2 * attempt
        part = (word_of(seed, draw, word) >> 8).to(tl.int64)
        length = size * (shortest + ((longest - shortest) * part >> 24)) >> 24
        start = size * (word_of(seed, draw, word + 1) >> 8).to(tl.int64) >> 24
        fits = start + length < size
        begin, end = tl.where(fits, start, 0), tl.where(fits, start + length, 0)
        attempt = tl.where(fits, 10, attempt + 1)
    tl.store(blocks + 2 * b, begin)
    tl.store(blocks + 2 * b + 1, end)


@triton.jit
def source_of(table, l, row, f, vectors, PERMUTE: tl.constexpr):  # noqa: E741
    """Of entries f of rows of layer l, scalars or a vector: what they read, whether it is negated, and their target.

    The target is the place in the flat vector of the permuted network.
    """
    layer = table + l * COLUMNS
    weight, bias = tl.load(layer + COLUMN_WEIGHT_OFFSET), tl.load(layer + COLUMN_BIAS_OFFSET)
    length, block = tl.load(layer + COLUMN_ROW_LENGTH), tl.load(layer + COLUMN_BLOCK)
    # rows are short: 32 bits, in which division is several times faster
    short, period = block.to(tl.int32), (block * tl.load(layer + COLUMN_UNITS)).to(tl.int32)
    is_weight = f < length
    unit, weight_row, bias_row = f % period // short, row, row
    negative = f < 0
    if PERMUTE:
        unit, negative_unit = permuted(vectors, tl.load(layer + COLUMN_FIRST_IN), unit)
        weight_row, negative_row = permuted(vectors, tl.load(layer + COLUMN_FIRST_OUT), row)
        bias_row, negative_bias = permuted(vectors, tl.load(layer + COLUMN_FIRST_BIAS), row)
        unit = unit.to(tl.int32)
        negative = tl.where(is_weight, negative_row != negative_unit, negative_bias)
    source = weight + weight_row * length + f // period * period + unit * short + f % short
    target = tl.where(is_weight, weight + row * length + f, bias + row)
    return tl.where(is_weight, source, bias + bias_row), negative, target


@triton.jit(do_not_specialize=["noise", "erase_threshold", "erase_value", "behind", "seed", "offset"])
def _token_views_kernel(
    weights,
    table,
    base,
    layers,
    start,
    permutations,
    scale,
    shift,
    additive,
    blocks,
    values,
    lengths,
    positions,
    indices,
    token_size,
    window,
    noise,
    erase_threshold,
    erase_value,
    behind,
    seed,
    offset,
    BLOCK: tl.constexpr,
    PERMUTE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    NOISE: tl.constexpr,
    ERASE: tl.constexpr,
    ADDITIVE: tl.constexpr,
    ERASE_BLOCK: tl.constexpr,
    ERASE_NORMAL: tl.constexpr,
):
    """values[b, w, e], the formula of fastws/ops/token_views.py.

    One program per token of a view; BLOCK >= token_size.
    """
    program = tl.program_id(0).to(tl.int64)
    b, w = program // window, program % window
    token = tl.load(start + b) + w
    first_layer, last_layer = tl.load(layers + 2 * b), tl.load(layers + 2 * b + 1)
    zero = tl.zeros([], tl.int64)
    l = find_layer(table, first_layer, last_layer, token, zero)  # noqa: E741
    layer = table + l * COLUMNS
    rows, chunks, first_token = (
        tl.load(layer + COLUMN_ROWS),
        tl.load(layer + COLUMN_CHUNKS),
        tl.load(layer + COLUMN_FIRST_TOKEN),
    )
    row, begin = place_of(table, l, token, zero, token_size)
    inside = row < rows  # else the sequence is over
    row = tl.where(inside, row, 0)
    e = tl.arange(0, BLOCK)
    vectors = permutations + b * indices
    if chunks > 0:
        f = begin.to(tl.int32) + e
        count = tl.load(layer + COLUMN_ROW_LENGTH) + (tl.load(layer + COLUMN_BIAS_OFFSET) >= 0)  # of the whole row
        count = tl.where(inside, count, 0)
        valid = (e < token_size) & (f < count)
        source, negative, target = source_of(table, l, row, f, vectors, PERMUTE)
        layers_of = e * 0 + l
        length = tl.minimum(tl.maximum(count - begin, 0), token_size)
    else:  # the token may span rows and layers
        layers_of = find_layers(table, l, last_layer, token, e)
        rows_of, f = place_of(table, layers_of, token, e, token_size)
        valid = (e < token_size) & (rows_of < tl.load(table + layers_of * COLUMNS + COLUMN_ROWS))
        f = tl.where(valid, f, 0).to(tl.int32)
        source, negative, target = source_of(table, layers_of, tl.where(valid, rows_of, 0), f, vectors, PERMUTE)
        length = tl.sum(valid.to(tl.int64), 0)
    x = tl.load(weights + tl.load(base + b) + source, mask=valid, other=0.0)
    x = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
    if PERMUTE:
        x = tl.where(negative, -x, x)
    if SCALE:
        x = x * tl.load(scale + layers_of)
    if SHIFT:
        x = x + tl.load(shift + layers_of)
    entry = program * token_size + e
    draw = 2 * offset.to(tl.int64)
    if NOISE:
        x = x * (1.0 + noise * normals(seed.to(tl.int64), draw, entry))
    if ADDITIVE:
        x = x + tl.load(additive + layers_of) * normals(seed.to(tl.int64), draw + NEW_DRAWS, entry)
    if ERASE_NORMAL:
        erase_value = normals(seed.to(tl.int64), draw + NEW_DRAWS, behind + entry).to(x.dtype)
    if ERASE:
        word = word_of(seed.to(tl.int64), draw + 1, entry)
        x = tl.where(word.to(tl.int64) < erase_threshold, erase_value, x)
    if ERASE_BLOCK:
        erased = (target >= tl.load(blocks + 2 * b)) & (target < tl.load(blocks + 2 * b + 1))
        x = tl.where(erased, erase_value, x)
    x = tl.where(valid, x, 0.0)
    tl.store(values + entry, x.to(values.dtype.element_ty), mask=e < token_size)
    tl.store(lengths + program, length.to(tl.int32))
    third = tl.where(chunks > 0, row, token - first_token)
    tl.store(positions + 3 * program, tl.where(inside, token, 0).to(tl.int32))
    tl.store(positions + 3 * program + 1, tl.where(inside, l - first_layer, 0).to(tl.int32))
    tl.store(positions + 3 * program + 2, tl.where(inside, third, 0).to(tl.int32))


def token_views(
    weights: Tensor,
    table: Tensor,
    base: Tensor,
    layers: Tensor,
    start: Tensor,
    permutations: Tensor,
    scale: Tensor,
    shift: Tensor,
    token_size: int,
    window: int,
    noise: float,
    erase_threshold: int,
    seed: int,
    offset: int,
    dtype: torch.dtype,
    additive: Tensor | None = None,
    erase_value: float = 0.0,
    block_threshold: int = 0,
    shortest: int = 0,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(start)
    values = weights.new_empty(batch, window, token_size, dtype=dtype)
    lengths = start.new_empty(batch, window, dtype=torch.int32)
    positions = start.new_empty(batch, window, 3, dtype=torch.int32)
    if lengths.numel() > 0:
        added = scale if additive is None else additive
        tensors = [x.contiguous() for x in (weights, table, base, layers, start, permutations, scale, shift, added)]
        blocks = start.new_empty(batch if block_threshold > 0 else 0, 2)
        if block_threshold > 0:
            lengths_of = block_threshold, shortest, longest
            _draw_blocks_kernel[(batch,)](tensors[1], tensors[3], blocks, *lengths_of, seed, offset)
        sizes = permutations.shape[1], token_size, window
        behind = triton.cdiv(values.numel(), 8) * 8
        random = float(noise), erase_threshold, float(erase_value), behind, seed, offset
        block = triton.next_power_of_2(token_size)
        switches = permutations.shape[1] > 0, len(scale) > 0, len(shift) > 0, noise > 0, erase_threshold > 0
        switches += additive is not None, block_threshold > 0, math.isnan(erase_value)
        outputs = blocks, values, lengths, positions
        _token_views_kernel[(batch * window,)](*tensors, *outputs, *sizes, *random, block, *switches)
    return values, lengths, positions
