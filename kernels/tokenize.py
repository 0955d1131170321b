"""Triton kernels of fastws::tokenize and fastws::detokenize."""

import triton
import triton.language as tl
from torch import Tensor

from fastws.kernels.table import (
    COLUMN_BIAS_OFFSET,
    COLUMN_CHUNKS,
    COLUMN_FIRST_TOKEN,
    COLUMN_ROW_LENGTH,
    COLUMN_WEIGHT_OFFSET,
    COLUMNS,
    find_layer,
)


@triton.jit
def _tokenize_kernel(
    flat, table, tokens, num_weights, num_tokens, num_layers, token_size, BLOCK: tl.constexpr, INVERSE: tl.constexpr
):
    """tokens[b, n, e] = flat[b, source of (n, e)], 0 in the padding; INVERSE writes where it would read.

    One program per token and checkpoint; BLOCK >= token_size.
    """
    program = tl.program_id(0).to(tl.int64)
    b, n = program // num_tokens, program % num_tokens
    layer = table + find_layer(table, tl.zeros([], tl.int64), tl.zeros([], tl.int64) + num_layers, n) * COLUMNS
    weight, bias = tl.load(layer + COLUMN_WEIGHT_OFFSET), tl.load(layer + COLUMN_BIAS_OFFSET)
    length, chunks = tl.load(layer + COLUMN_ROW_LENGTH), tl.load(layer + COLUMN_CHUNKS)
    first = tl.load(layer + COLUMN_FIRST_TOKEN)
    row, chunk = (n - first) // chunks, (n - first) % chunks
    e = tl.arange(0, BLOCK)
    f = chunk * token_size + e
    valid = (e < token_size) & (f < length + (bias >= 0))
    source = flat + b * num_weights + tl.where(f < length, weight + row * length + f, bias + row)
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
