"""Triton kernel of fastws::token_views."""

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
    permuted,
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


@triton.jit(do_not_specialize=["noise", "erase_threshold", "seed", "offset"])
def _token_views_kernel(
    weights,
    table,
    base,
    layers,
    start,
    permutations,
    scale,
    shift,
    values,
    lengths,
    positions,
    indices,
    token_size,
    window,
    noise,
    erase_threshold,
    seed,
    offset,
    BLOCK: tl.constexpr,
    PERMUTE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    NOISE: tl.constexpr,
    ERASE: tl.constexpr,
):
    """values[b, w, e], the formula of fastws/ops/token_views.py.

    One program per token of a view; BLOCK >= token_size.
    """
    program = tl.program_id(0).to(tl.int64)
    b, w = program // window, program % window
    token = tl.load(start + b) + w
    first_layer, last_layer = tl.load(layers + 2 * b), tl.load(layers + 2 * b + 1)
    l = find_layer(table, first_layer, last_layer, token)  # noqa: E741
    layer = table + l * COLUMNS
    weight, bias = tl.load(layer + COLUMN_WEIGHT_OFFSET), tl.load(layer + COLUMN_BIAS_OFFSET)
    rows, length = tl.load(layer + COLUMN_ROWS), tl.load(layer + COLUMN_ROW_LENGTH)
    block, period = tl.load(layer + COLUMN_BLOCK), tl.load(layer + COLUMN_BLOCK) * tl.load(layer + COLUMN_UNITS)
    chunks, first_token = tl.load(layer + COLUMN_CHUNKS), tl.load(layer + COLUMN_FIRST_TOKEN)
    row, chunk = (token - first_token) // chunks, (token - first_token) % chunks
    inside = row < rows  # else the sequence is over
    row = tl.where(inside, row, 0)
    e = tl.arange(0, BLOCK)
    f = (chunk * token_size).to(tl.int32) + e  # rows are short: 32 bits, in which division is several times faster
    block, period = block.to(tl.int32), period.to(tl.int32)
    count = tl.where(inside, length + (bias >= 0), 0)  # entries of the whole row
    valid = (e < token_size) & (f < count)
    unit, weight_row, bias_row = f % period // block, row, row
    if PERMUTE:
        vectors = permutations + b * indices
        unit, negative_unit = permuted(vectors, tl.load(layer + COLUMN_FIRST_IN), unit)
        weight_row, negative_row = permuted(vectors, tl.load(layer + COLUMN_FIRST_OUT), row)
        bias_row, negative_bias = permuted(vectors, tl.load(layer + COLUMN_FIRST_BIAS), row)
        unit = unit.to(tl.int32)
    source = weight + weight_row * length + f // period * period + unit * block + f % block
    source = tl.load(base + b) + tl.where(f < length, source, bias + bias_row)
    x = tl.load(weights + source, mask=valid, other=0.0)
    x = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
    if PERMUTE:
        x = tl.where(tl.where(f < length, negative_row != negative_unit, negative_bias), -x, x)
    if SCALE:
        x = x * tl.load(scale + l)
    if SHIFT:
        x = x + tl.load(shift + l)
    entry = program * token_size + e
    if NOISE:
        x = x * (1.0 + noise * normals(seed.to(tl.int64), 2 * offset.to(tl.int64), entry))
    if ERASE:
        word = word_of(seed.to(tl.int64), 2 * offset.to(tl.int64) + 1, entry)
        x = tl.where(word.to(tl.int64) < erase_threshold, 0.0, x)
    x = tl.where(valid, x, 0.0)
    tl.store(values + entry, x.to(values.dtype.element_ty), mask=e < token_size)
    tl.store(lengths + program, tl.minimum(tl.maximum(count - chunk * token_size, 0), token_size).to(tl.int32))
    tl.store(positions + 3 * program, tl.where(inside, token, 0).to(tl.int32))
    tl.store(positions + 3 * program + 1, tl.where(inside, l - first_layer, 0).to(tl.int32))
    tl.store(positions + 3 * program + 2, row.to(tl.int32))


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
) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(start)
    values = weights.new_empty(batch, window, token_size, dtype=dtype)
    lengths = start.new_empty(batch, window, dtype=torch.int32)
    positions = start.new_empty(batch, window, 3, dtype=torch.int32)
    if lengths.numel() > 0:
        tensors = [x.contiguous() for x in (weights, table, base, layers, start, permutations, scale, shift)]
        sizes = permutations.shape[1], token_size, window, float(noise), erase_threshold, seed, offset
        block = triton.next_power_of_2(token_size)
        switches = permutations.shape[1] > 0, len(scale) > 0, len(shift) > 0, noise > 0, erase_threshold > 0
        _token_views_kernel[(batch * window,)](*tensors, values, lengths, positions, *sizes, block, *switches)
    return values, lengths, positions
