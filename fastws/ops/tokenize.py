"""Tokenize: flat checkpoints to grids of tokens, and back."""

import torch
from torch import Tensor

from fastws import _native
from fastws.checks import check_table, prepare_out
from fastws.table import count_tokens, table_rows


def tokenize(
    flat: Tensor, table: Tensor, token_size: int, num_tokens: int | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Cuts flat checkpoints into zero-padded tokens, each a piece of one row of one layer.

    For token n = (layer l, row c, chunk q) and entry e, with ``f = q * token_size + e``, R weights per row::

        tokens[b, n, e] = flat[b, weight_offset[l] + c * R + f]    f < R
                        = flat[b, bias_offset[l] + c]              f = R, if the layer has a bias
                        = 0                                        otherwise

    Where tokens span rows, c and f are those of the entry: rows follow each other without padding, ``R + 1`` entries
    each with a bias, from where the layer begins.
    Differentiable in ``flat`` but where ``out`` is given; the gradient is :func:`detokenize`. Source: SANE, arXiv
    2406.09997, section 2.

    Args:
        flat: Flat checkpoints, ``[B, P]``, floating point.
        table: ``layout.table``, ``[L, 11]``, int64, on the device of ``flat``, where that is a GPU trusted.
        token_size: Entries per token, ``T``, from 1; the one that ``table`` was made for.
        num_tokens: Tokens per checkpoint, ``N``; read from ``table`` when left out, which waits for the device.
        out: Where to write, ``[B, N, T]``, contiguous, with the dtype and device of ``flat`` and apart from it in
            memory: large new tensors take the system longer to hand out than to fill.

    Returns:
        Tokens, ``[B, N, T]``, with the dtype and device of ``flat``; ``out`` where it is given.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or ``out`` is given where a gradient is wanted.
        RuntimeError: On a CPU, if ``table`` is that of other weights or tokens.

    Example:
        >>> layout = fastws.Layout.from_checkpoint({"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)})
        >>> fastws.tokenize(torch.arange(8.0)[None], layout.table, token_size=4)
        tensor([[[0., 1., 2., 6.],
                 [3., 4., 5., 7.]]])
    """
    if flat.dim() != 2 or not flat.is_floating_point():
        raise ValueError(f"tokenize: flat must be [B, P] floating point, got {list(flat.shape)} {flat.dtype}")
    check_table("tokenize", table, flat.device)
    if token_size < 1:
        raise ValueError(f"tokenize: token_size must be at least 1, got {token_size}")
    num_tokens = count_tokens(table, token_size) if num_tokens is None else num_tokens
    if out is None:
        return torch.ops.fastws.tokenize(flat, table, token_size, num_tokens)
    prepare_out("tokenize", out, (len(flat), num_tokens, token_size), "flat", flat, table)
    torch.ops.fastws.tokenize_out(flat, table, token_size, out)
    return out


def detokenize(tokens: Tensor, table: Tensor, num_weights: int, *, out: Tensor | None = None) -> Tensor:
    """Puts tokens back into flat checkpoints; weights that no token holds are 0, padding is ignored.

    The adjoint of :func:`tokenize`, and its exact inverse on the weights that ``table`` covers.
    Differentiable in ``tokens`` but where ``out`` is given; the gradient is :func:`tokenize`.

    Args:
        tokens: Tokens, ``[B, N, T]``, floating point.
        table: ``layout.table``, ``[L, 11]``, int64, on the device of ``tokens``, where that is a GPU
            trusted.
        num_weights: Weights per checkpoint, ``P``.
        out: Where to write, ``[B, P]``, contiguous, with the dtype and device of ``tokens`` and apart from them in
            memory.

    Returns:
        Flat checkpoints, ``[B, P]``, with the dtype and device of ``tokens``; ``out`` where it is given.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or ``out`` is given where a gradient is wanted.
        RuntimeError: On a CPU, if ``table`` is that of other weights or tokens.

    Example:
        >>> layout = fastws.Layout.from_checkpoint({"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)})
        >>> fastws.detokenize(torch.tensor([[[0.0, 1.0, 2.0, 6.0], [3.0, 4.0, 5.0, 7.0]]]), layout.table, 8)
        tensor([[0., 1., 2., 3., 4., 5., 6., 7.]])
    """
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(
            f"detokenize: tokens must be [B, N, T] floating point, got {list(tokens.shape)} {tokens.dtype}"
        )
    check_table("detokenize", table, tokens.device)
    if out is None:
        return torch.ops.fastws.detokenize(tokens, table, num_weights)
    prepare_out("detokenize", out, (len(tokens), num_weights), "tokens", tokens, table)
    torch.ops.fastws.detokenize_out(tokens, table, out)
    return out


def tokenize_reference(flat: Tensor, table: Tensor, token_size: int, num_tokens: int) -> Tensor:
    tokens = flat.new_zeros(len(flat), num_tokens * token_size)
    for row in table_rows(table):
        weights = flat[:, row.weight_offset : row.weight_offset + row.rows * row.row_length]
        layer = weights.reshape(len(flat), row.rows, row.row_length)
        if row.bias_offset >= 0:
            layer = torch.cat([layer, flat[:, row.bias_offset : row.bias_offset + row.rows, None]], 2)
        begin, stride = row.first_entry(token_size), row.stride(token_size)
        layer = torch.nn.functional.pad(layer, (0, stride - layer.shape[2]))
        tokens[:, begin : begin + row.rows * stride] = layer.flatten(1)
    return tokens.view(len(flat), num_tokens, token_size)


def detokenize_reference(tokens: Tensor, table: Tensor, num_weights: int) -> Tensor:
    flat, token_size = tokens.new_zeros(len(tokens), num_weights), tokens.shape[2]
    for row in table_rows(table):
        begin, stride = row.first_entry(token_size), row.stride(token_size)
        layer = tokens.flatten(1)[:, begin : begin + row.rows * stride]
        layer = layer.reshape(len(tokens), row.rows, stride)
        weights = flat[:, row.weight_offset : row.weight_offset + row.rows * row.row_length]
        weights.copy_(layer[:, :, : row.row_length].reshape(weights.shape))
        if row.bias_offset >= 0:
            flat[:, row.bias_offset : row.bias_offset + row.rows] = layer[:, :, row.row_length]
    return flat


def tokenize_out_reference(flat: Tensor, table: Tensor, token_size: int, out: Tensor) -> None:
    out.copy_(tokenize_reference(flat, table, token_size, out.shape[1]))


def detokenize_out_reference(tokens: Tensor, table: Tensor, out: Tensor) -> None:
    out.copy_(detokenize_reference(tokens, table, out.shape[1]))


torch.library.define("fastws::tokenize", "(Tensor flat, Tensor table, int token_size, SymInt num_tokens) -> Tensor")
torch.library.define("fastws::detokenize", "(Tensor tokens, Tensor table, SymInt num_weights) -> Tensor")
torch.library.define("fastws::tokenize_out", "(Tensor flat, Tensor table, int token_size, Tensor(a!) out) -> ()")
torch.library.define("fastws::detokenize_out", "(Tensor tokens, Tensor table, Tensor(a!) out) -> ()")
torch.library.register_kernel("fastws::tokenize", "default", tokenize_reference)
torch.library.register_kernel("fastws::detokenize", "default", detokenize_reference)
torch.library.register_kernel("fastws::tokenize_out", "default", tokenize_out_reference)
torch.library.register_kernel("fastws::detokenize_out", "default", detokenize_out_reference)


@torch.library.register_fake("fastws::tokenize")
def tokenize_fake(flat, table, token_size, num_tokens):
    return flat.new_empty(flat.shape[0], num_tokens, token_size)


@torch.library.register_fake("fastws::detokenize")
def detokenize_fake(tokens, table, num_weights):
    return tokens.new_empty(tokens.shape[0], num_weights)


@torch.library.register_fake("fastws::tokenize_out")
def tokenize_out_fake(flat, table, token_size, out):
    return None


@torch.library.register_fake("fastws::detokenize_out")
def detokenize_out_fake(tokens, table, out):
    return None


def tokenize_setup_context(ctx, inputs, output):
    flat, table, _, _ = inputs
    ctx.save_for_backward(table)
    ctx.num_weights = flat.shape[1]


def tokenize_backward(ctx, grad_tokens):
    (table,) = ctx.saved_tensors
    return torch.ops.fastws.detokenize(grad_tokens, table, ctx.num_weights), None, None, None


def detokenize_setup_context(ctx, inputs, output):
    tokens, table, _ = inputs
    ctx.save_for_backward(table)
    ctx.num_tokens, ctx.token_size = tokens.shape[1:]


def detokenize_backward(ctx, grad_flat):
    (table,) = ctx.saved_tensors
    return torch.ops.fastws.tokenize(grad_flat, table, ctx.token_size, ctx.num_tokens), None, None


torch.library.register_autograd("fastws::tokenize", tokenize_backward, setup_context=tokenize_setup_context)
torch.library.register_autograd("fastws::detokenize", detokenize_backward, setup_context=detokenize_setup_context)

_native.register_without_gradient("tokenize_out")
_native.register_without_gradient("detokenize_out")

for op in ("tokenize", "detokenize", "tokenize_out", "detokenize_out"):
    _native.register_triton(op, file="tokenize")
