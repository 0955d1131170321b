"""Triton kernels of fastws::tokenize and fastws::detokenize."""

import triton
import triton.language as tl
from torch import Tensor

from fastws.kernels.table import (
    COLUMN_BIAS_OFFSET,
    COLUMN_CHUNKS,
    COLUMN_ROW_LENGTH,
    COLUMN_ROWS,
    COLUMN_WEIGHT_OFFSET,
    COLUMNS,
    find_layer,
    find_layers,
    place_of,
)


@triton.jit
def place_in_flat(table, l, row, f):  # noqa: E741
    """Where entries f of rows of layer l lie in a flat vector, and whether the rows have such: scalars, or a vector."""
    layer = table + l * COLUMNS
    weight, bias = tl.load(layer + COLUMN_WEIGHT_OFFSET), tl.load(layer + COLUMN_BIAS_OFFSET)
    length = tl.load(layer + COLUMN_ROW_LENGTH)
    count = tl.where(row < tl.load(layer + COLUMN_ROWS), length + (bias >= 0), 0)
    return tl.where(f < length, weight + row * length + f, bias + row), f < count


@triton.jit
def _tokenize_kernel(
    flat, table, tokens, num_weights, num_tokens, num_layers, token_size, BLOCK: tl.constexpr, INVERSE: tl.constexpr
):
    """tokens[b, n, e] = flat[b, source of (n, e)], 0 in the padding; INVERSE writes where it would read.

    One program per token and checkpoint; BLOCK >= token_size.
    """
    program = tl.program_id(0).to(tl.int64)
    b, n = program // num_tokens, program % num_tokens
    zero = tl.zeros([], tl.int64)
    l = find_layer(table, zero, zero + num_layers, n, zero)  # noqa: E741
    e = tl.arange(0, BLOCK)
    if tl.load(table + l * COLUMNS + COLUMN_CHUNKS) > 0:
        row, begin = place_of(table, l, n, zero, token_size)
        place, valid = place_in_flat(table, l, row, begin + e)
    else:  # the token may span rows and layers
        layers = find_layers(table, l, zero + num_layers, n, e)
        rows, f = place_of(table, layers, n, e, token_size)
        place, valid = place_in_flat(table, layers, rows, f)
    valid = valid & (e < token_size)
    source = flat + b * num_weights + place
    target = tokens + program * token_size + e
    if INVERSE:
        # no atomics: each weight is in at most one token
        tl.store(source, tl.load(target, mask=valid, other=0.0), mask=valid)
    else:
        tl.store(target, tl.load(source, mask=valid, other=0.0), mask=e < token_size)


def tokenize(flat: Tensor, table: Tensor, token_size: int, num_tokens: int) -> Tensor:
    tokens = flat.new_empty(len(flat), num_tokens, token_size)
    tokenize_out(flat, table, token_size, tokens)
    return tokens


def tokenize_out(flat: Tensor, table: Tensor, token_size: int, tokens: Tensor) -> None:
    flat, table = flat.contiguous(), table.contiguous()
    if tokens.numel() > 0:
        block, num_tokens = triton.next_power_of_2(token_size), tokens.shape[1]
        sizes = flat.shape[1], num_tokens, len(table), token_size
        _tokenize_kernel[(len(flat) * num_tokens,)](flat, table, tokens, *sizes, block, False)


def detokenize(tokens: Tensor, table: Tensor, num_weights: int) -> Tensor:
    flat = tokens.new_empty(len(tokens), num_weights)
    detokenize_out(tokens, table, flat)
    return flat


def detokenize_out(tokens: Tensor, table: Tensor, flat: Tensor) -> None:
    tokens, table = tokens.contiguous(), table.contiguous()
    flat.zero_()  # weights that no token holds
    if tokens.numel() > 0:
        num_tokens, token_size = tokens.shape[1:]
        block = triton.next_power_of_2(token_size)
        sizes = flat.shape[1], num_tokens, len(table), token_size
        _tokenize_kernel[(len(tokens) * num_tokens,)](flat, table, tokens, *sizes, block, True)
