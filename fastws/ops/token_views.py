"""Token views: windows of tokens cut from a zoo, permuted, standardised, noised and erased in one pass."""

import math

import torch
from torch import Tensor

from fastws import _native
from fastws.checks import check_permutations
from fastws.random.philox import check_stream, normal_reference, philox_reference
from fastws.signed import split
from fastws.table import Row, table_columns
from fastws.tokens import Tokens


def token_views(
    weights: Tensor,
    table: Tensor,
    token_size: int,
    model: Tensor,
    start: Tensor,
    window: int,
    permutations: Tensor | None = None,
    *,
    noise: float = 0.0,
    erase: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    base: Tensor | None = None,
    layers: Tensor | None = None,
) -> Tokens:
    """Cuts one window of tokens from each of B networks of a zoo, as a network with permuted neurons would give it.

    Token w of view b is token ``n = start[b] + w`` of network ``model[b]``: chunk q of row c of layer l. Its entry e,
    with ``f = q * token_size + e`` and the vectors ``out``, ``in`` and ``bias`` of ``permutations[b]``, is::

        x = weight_offset + out[c] * R + f // period * period + in[f % period // block] * block + f % block   f < R
          = bias_offset + bias[c]                                              f = R, if the layer has a bias
        values[b, w, e] = (weights[model[b], x] * scale[l] + shift[l]) * (1 + noise * normal)

    and 0 in the padding and where the entry is erased. Nothing else is read or written: no permuted copy, no index.
    Normals are Philox draw ``2 * offset`` of ``seed``, erased entries draw ``2 * offset + 1``, both counted along
    ``values``. Computed in fp32 (float64 for float64 weights). Not differentiable: weights are data here;
    differentiate through ``fastws.permute`` and ``fastws.tokenize``. Source: SANE, arXiv 2406.09997, section 3.

    A zoo of several architectures is one vector ``weights`` ``[A]``, with ``base`` and ``layers`` saying where each
    network begins and which rows of the stacked tables are its layout. Tokens past the end of a network are padding.

    Args:
        weights: The zoo, ``[M, P]`` or ``[A]``, contiguous, floating point.
        table: ``layout.table``, or ``symmetry.table(layout)`` with permutations, ``[L, 11]``, int64; of several
            architectures the tables one below the other.
        token_size: Entries per token, ``T``; the one that ``table`` was made for.
        model: Row of each view's network in the zoo, ``[B]``, int64.
        start: First token of each window, ``[B]``, int64.
        window: Tokens per view, ``W``, from 1.
        permutations: ``symmetry.random(B)``, ``[B, S]``, int32; None cuts the networks as they are.
        noise: Standard deviation of the multiplicative noise, from 0.
        erase: Probability with which an entry becomes 0, in ``[0, 1]``.
        scale: Factor of each row of ``table``, ``[L]``, float32; to standardise, 1 / standard deviation.
        shift: Summand of each row of ``table``, ``[L]``, float32; to standardise, - mean / standard deviation.
        seed: Names the stream of random numbers, in ``[0, 2**63)``.
        offset: Names the draw within the stream, in ``[0, 2**62)``; training steps count it up.
        dtype: Of the values; by default that of ``weights``.
        base: With weights ``[A]``: first weight of each network, ``[M]``, int64.
        layers: With weights ``[A]``: first and one past the last row of each network in ``table``, ``[M, 2]``, int64.

    Returns:
        Tokens: values ``[B, W, T]``; lengths ``[B, W]``, int32, entries that hold weights; positions ``[B, W, 3]``,
        int32: token, layer, row. All on the device of ``weights``, as all arguments must be.

    Raises:
        ValueError: If an argument does not fit. Indices are checked on the CPU only, vectors of permutations with
            FASTWS_CHECK=1 only.
        RuntimeError: On a CPU, if ``table`` is that of other weights or tokens, or a permutation is out of range.

    Example:
        >>> layout = fastws.Layout.from_checkpoint({"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)})
        >>> zoo = torch.arange(16.0).view(2, 8)
        >>> views = fastws.token_views(zoo, layout.table, 4, torch.tensor([1]), torch.tensor([1]), window=1)
        >>> views.values, views.positions
        (tensor([[[11., 12., 13., 15.]]]), tensor([[[1, 0, 1]]], dtype=torch.int32))
    """
    if not weights.is_floating_point() or not weights.is_contiguous() or weights.dim() != (2 if base is None else 1):
        shape = "[M, P]" if base is None else "[A]"
        got = f"{list(weights.shape)} {weights.dtype} with strides {weights.stride()}"
        raise ValueError(f"token_views: weights must be {shape}, floating point and contiguous, got {got}")
    check_arguments(weights, table, token_size, model, start, window, noise, erase, scale, shift, base, layers)
    check_stream("token_views", seed, 2 * offset)
    if permutations is None:
        permutations = torch.empty(len(model), 0, dtype=torch.int32, device=model.device)
    elif layers is None:
        check_permutations("token_views", permutations, len(model), table)
    else:  # a network uses the vectors of its own layout only
        for first, last in set(map(tuple, layers.tolist())) if _native.CHECK else [(0, 0)]:
            own = (layers[model] == torch.tensor([first, last], device=model.device)).all(1)
            check_permutations("token_views", permutations[own], int(own.sum()), table[first:last])
    if base is None:
        begin = model * weights.shape[1]
        rows = (torch.arange(2, device=model.device) * len(table)).expand(len(model), 2)
    else:
        begin, rows = base[model], layers[model]
    nothing = torch.empty(0, device=model.device)
    values, lengths, positions = torch.ops.fastws.token_views(
        weights,
        table,
        begin,
        rows,
        start,
        permutations,
        nothing if scale is None else scale,
        nothing if shift is None else shift,
        token_size,
        window,
        noise,
        round(erase * 2**32),
        seed,
        offset,
        dtype or weights.dtype,
    )
    return Tokens(values, lengths, positions)


def check_arguments(weights, table, token_size, model, start, window, noise, erase, scale, shift, base, layers) -> None:
    if token_size < 1 or window < 1:
        raise ValueError(f"token_views: token_size and window must be at least 1, got {token_size} and {window}")
    if not 0 <= erase <= 1 or not 0 <= noise < math.inf:
        raise ValueError(f"token_views: noise must be at least 0 and erase in [0, 1], got {noise} and {erase}")
    count, num_layers, int64 = len(model), len(table), torch.int64
    expected = [("table", table, (num_layers, len(Row._fields)), int64), ("model", model, (count,), int64)]
    expected += [("start", start, (count,), int64)]
    expected += [(n, x, (num_layers,), torch.float32) for n, x in [("scale", scale), ("shift", shift)] if x is not None]
    if base is not None:
        expected += [("base", base, (len(base),), int64), ("layers", layers, (len(base), 2), int64)]
    for name, x, shape, kind in expected:
        if not isinstance(x, Tensor) or x.shape != shape or x.dtype != kind or x.device != weights.device:
            got = f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else x
            raise ValueError(f"token_views: {name} must be {list(shape)} {kind} on {weights.device}, got {got}")
    if torch.compiler.is_compiling() or not (_native.CHECK or weights.device.type == "cpu") or count == 0:
        return
    models = len(weights) if base is None else len(base)
    if model.min() < 0 or model.max() >= models:
        got = f"{model.min()}..{model.max()}"
        raise ValueError(f"token_views: model must be in [0, {models}), got {got}")
    last = table_columns(table[torch.full_like(model, num_layers - 1) if base is None else layers[model, 1] - 1])
    sequence = last.first_token + last.rows * last.chunks
    if base is None and window > sequence[0]:
        raise ValueError(f"token_views: window must be at most the {sequence[0]} tokens of a network, got {window}")
    if (start < 0).any() or (start > (sequence - window).clamp(min=0)).any():
        got = f"{start.min()}..{start.max()}"
        raise ValueError(f"token_views: start must leave room for the window of {window} tokens, got {got}")


def token_views_reference(
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
    device = weights.device
    n = start[:, None] + torch.arange(window, device=device)  # [B, W]
    candidates = torch.arange(len(table), device=device)
    candidates = (candidates >= layers[:, :1]) & (candidates < layers[:, 1:])  # [B, L]
    layer = layers[:, :1] + (candidates[:, None] & (table_columns(table).first_token <= n[..., None])).sum(-1) - 1
    own = table_columns(table[layer][..., None, :])  # [B, W, 1]
    inside = n[..., None] < own.first_token + own.rows * own.chunks
    number = n[..., None] - own.first_token
    row, chunk = torch.where(inside, number // own.chunks, 0), number % own.chunks

    def permuted(place: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        if permutations.shape[1] == 0:
            return split(i)
        index = torch.where(place >= 0, place + i, 0)
        return split(torch.where(place >= 0, permutations.gather(1, index.flatten(1)).view(index.shape).long(), i))

    f = chunk * token_size + torch.arange(token_size, device=device)  # [B, W, T]
    period, length = own.units * own.block, own.row_length + (own.bias_offset >= 0)
    unit, negative_unit = permuted(own.first_in, torch.where(f < own.row_length, f % period // own.block, 0))
    weight_row, negative_row = permuted(own.first_out, row)
    bias_row, negative_bias = permuted(own.first_bias, row)
    source = own.weight_offset + weight_row * own.row_length + f // period * period + unit * own.block + f % own.block
    source = torch.where(f < own.row_length, source, own.bias_offset + bias_row)
    negative = torch.where(f < own.row_length, negative_unit ^ negative_row, negative_bias)
    valid = inside & (f < length)
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    values = weights.reshape(-1)[torch.where(valid, base[:, None, None] + source, 0)].to(wide)
    values = values * (1 + 2 * negative).to(wide)
    if len(scale):
        values = values * scale[layer][..., None]
    if len(shift):
        values = values + shift[layer][..., None]
    if noise > 0:
        values = values * (1 + noise * normal_reference(seed, 2 * offset, values.numel(), device).view(values.shape))
    if erase_threshold > 0:
        words = philox_reference(seed, 2 * offset + 1, values.numel(), device).view(values.shape)
        valid = valid & (words >= erase_threshold)
    values = torch.where(valid, values, 0).to(dtype)
    lengths = torch.where(inside, (length - chunk * token_size).clamp(0, token_size), 0)[..., 0]
    positions = torch.where(inside, torch.stack([n, layer - layers[:, :1], row[..., 0]], -1), 0)
    return values, lengths.int(), positions.int()


torch.library.define(
    "fastws::token_views",
    "(Tensor weights, Tensor table, Tensor base, Tensor layers, Tensor start, Tensor permutations, Tensor scale, "
    "Tensor shift, int token_size, int window, float noise, int erase_threshold, SymInt seed, SymInt offset, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
)
torch.library.register_kernel("fastws::token_views", "default", token_views_reference)


@torch.library.register_fake("fastws::token_views")
def token_views_fake(weights, table, base, layers, start, permutations, scale, shift, token_size, window, *rest):
    batch = start.shape[0]
    values = weights.new_empty(batch, window, token_size, dtype=rest[-1])
    return (
        values,
        start.new_empty(batch, window, dtype=torch.int32),
        start.new_empty(batch, window, 3, dtype=torch.int32),
    )


def token_views_backward(ctx, *grads):
    raise NotImplementedError("token_views: weights are data; differentiate through fastws.permute and fastws.tokenize")


torch.library.register_autograd("fastws::token_views", token_views_backward)
_native.register_triton("token_views", file="token_views")
