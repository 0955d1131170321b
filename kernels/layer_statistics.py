"""Triton kernel of fastws::layer_statistics."""

import triton
import triton.language as tl
from torch import Tensor, float64

STATISTICS = tl.constexpr(7)
BLOCK = 1024


@triton.jit
def ordered_bits(x, BITS: tl.constexpr):
    """Signed integers in the order of the numbers, and back again."""
    integer: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    bits = x.to(integer, bitcast=True)
    return bits ^ ((bits >> (BITS - 1)) & ((tl.full([], 1, integer) << (BITS - 1)) - 1))


@triton.jit
def _layer_statistics_kernel(
    flat, offsets, statistics, num_weights, num_layers, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """statistics[b, l] = mean, variance and quantiles of flat[b, offsets[l, 0] : offsets[l, 1]].

    One program per segment and row. An order statistic is found bit by bit, from the highest: the bit is set if at most
    rank numbers are smaller than what then begins with these bits. All quantiles share the passes.
    """
    program = tl.program_id(0).to(tl.int64)
    layer = program % num_layers
    begin, end = tl.load(offsets + 2 * layer), tl.load(offsets + 2 * layer + 1)
    x = flat + program // num_layers * num_weights + begin
    size = end - begin
    real: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    integer: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    i = tl.arange(0, BLOCK)

    sums, bad = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        entry = tl.load(x + start + i, mask=start + i < size, other=0.0).to(tl.float64)
        sums += entry
        bad |= (tl.abs(entry) < float("inf")).to(tl.int32) ^ 1
    finite = (tl.max(bad) == 0) & (size > 0)
    count = tl.maximum(size, 1).to(tl.float64)
    mean = tl.sum(sums) / count
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        entry = tl.load(x + start + i, mask=start + i < size, other=0.0).to(tl.float64)
        squares += tl.where(start + i < size, (entry - mean) * (entry - mean), 0.0)

    q = tl.arange(0, 8)  # five quantiles, and three that nobody asks for
    percent = tl.where(q == 0, 1, tl.where(q < 4, 25 * q, 99)).to(tl.int64)
    rank, rest = percent * (size - 1) // 100, percent * (size - 1) % 100
    one = tl.full([8], 1, integer)
    below = one << (BITS - 1)  # the smallest integer
    none = tl.zeros([8], tl.int64)
    for bit in range(BITS):
        candidate = below ^ (one << (BITS - 1 - bit))
        smaller = none
        for start in range(0, size, BLOCK):
            inside = start + i < size
            key = ordered_bits(tl.load(x + start + i, mask=inside, other=0.0).to(real), BITS)
            smaller += tl.sum(((key[:, None] < candidate[None, :]) & inside[:, None]).to(tl.int32), 0)
        below = tl.where(smaller <= rank, candidate, below)

    largest = (one << (BITS - 1)) - 1
    above, at_most = largest, none
    for start in range(0, size, BLOCK):
        inside = start + i < size
        key = ordered_bits(tl.load(x + start + i, mask=inside, other=0.0).to(real), BITS)
        larger = (key[:, None] > below[None, :]) & inside[:, None]
        at_most += tl.sum((inside[:, None] & (larger == 0)).to(tl.int32), 0)
        above = tl.minimum(above, tl.min(tl.where(larger, key[:, None], largest[None, :]), 0))
    above = tl.where((at_most > rank + 1) | (rest == 0), below, above)

    low = ordered_bits(below, BITS).to(real, bitcast=True).to(tl.float64)
    high = ordered_bits(above, BITS).to(real, bitcast=True).to(tl.float64)
    quantile = low + (high - low) * (rest.to(tl.float64) / 100)
    out = statistics + program * STATISTICS
    tl.store(out, tl.where(finite, mean, float("nan")))
    tl.store(out + 1, tl.where(finite, tl.sum(squares) / count, float("nan")))
    tl.store(out + 2 + q, tl.where(finite, quantile, float("nan")), mask=q < 5)


def layer_statistics(flat: Tensor, offsets: Tensor) -> Tensor:
    flat, offsets = flat.contiguous(), offsets.contiguous()
    statistics = flat.new_empty(len(flat), len(offsets), STATISTICS.value, dtype=float64)
    if statistics.numel() > 0:
        bits = 64 if flat.dtype == float64 else 32
        grid = (len(flat) * len(offsets),)
        block = min(BLOCK, triton.next_power_of_2(flat.shape[1] + 1))
        _layer_statistics_kernel[grid](flat, offsets, statistics, flat.shape[1], len(offsets), block, bits)
    return statistics
