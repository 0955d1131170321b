"""Token views: windows of tokens cut from a zoo, permuted, standardised, noised and erased in one pass."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastws import _native
from fastws.checks import check_permutations
from fastws.random.philox import check_stream, normal_reference, philox_reference
from fastws.signed import split
from fastws.table import Row, table_columns
from fastws.tokens import Tokens

NEW_DRAWS = 2**63  # where the draws of additive noise and of blocks begin
TRIES = 10  # of a block that would pass the end of a network
WORDS = 24  # of random numbers for the block of a view


class Noise(NamedTuple):
    """Noise of weights: ``x * (1 + multiplicative * normal) + additive * normal``, each normal of its own."""

    multiplicative: float = 0.0  # standard deviation, from 0
    additive: float | Tensor = 0.0  # standard deviation, from 0, or that of each row of the table, [L], float32


class Erasing(NamedTuple):
    """Which entries are erased, and what stands there then."""

    share: float = 0.0  # probability with which an entry is erased, each on its own
    block: float = 0.0  # probability with which a block of a network is erased: weights that follow each other
    shortest: float = 0.02  # least and largest length of a block, as parts of the network; published, for vectors
    longest: float = 0.33
    value: float | None = 0.0  # of what is erased; None: a standard normal for each entry


def token_views(
    weights: Tensor,
    table: Tensor,
    token_size: int,
    model: Tensor,
    start: Tensor,
    window: int,
    permutations: Tensor | None = None,
    *,
    noise: float | Noise = 0.0,
    erase: float | Erasing = 0.0,
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
    with ``f = q * token_size + e`` and the vectors ``out``, ``in`` and ``bias`` of ``permutations[b]``, is (where
    tokens span rows, c and f are those of the entry)::

        x = weight_offset + out[c] * R + f // period * period + in[f % period // block] * block + f % block   f < R
          = bias_offset + bias[c]                                              f = R, if the layer has a bias
        values[b, w, e] = (weights[model[b], x] * scale[l] + shift[l]) * (1 + noise * normal) + additive[l] * normal'

    ``erase.value`` where the entry is erased, and 0 in the padding. Nothing else is read or written: no permuted copy,
    no index. Computed in fp32 (float64 for float64 weights). Not differentiable: weights are data here; differentiate
    through ``fastws.permute`` and ``fastws.tokenize``. Sources: SANE, arXiv 2406.09997, section 3; blocks and additive
    noise, arXiv 2110.15288.

    Counted along ``values``, normals are Philox draw ``2 * offset`` of ``seed``, erased entries draw ``2 * offset + 1``
    and normals of additive noise draw ``2**63 + 2 * offset``. Draw ``2**63 + 2 * offset + 1`` has 24 words for each
    view: word 0 says whether a block is erased, words ``2 + 2 * t`` and ``3 + 2 * t`` its length and its first weight,
    in the first of ten tries t in which it ends before the end of the network. With ``u = (word >> 8) * 2**-24`` and a
    network of n weights these are ``int(n * (shortest + (longest - shortest) * u))`` and ``int(n * u)``, in units of
    2**-24. Blocks count the flat vector of the permuted network, up to the last weight that is in a token. Normals that
    stand for what is erased are those of additive noise from the next multiple of 8 behind its last on.

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
        noise: Standard deviation of multiplicative noise, from 0; or a ``Noise``, which may be additive too.
        erase: Probability with which an entry becomes 0, in ``[0, 1]``; or an ``Erasing``, for blocks and other values.
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
    noise = noise if isinstance(noise, Noise) else Noise(noise)
    erase = erase if isinstance(erase, Erasing) else Erasing(erase)
    check_augmentation(noise, erase)
    additive = noise.additive
    if not isinstance(additive, Tensor):
        additive = torch.full((len(table),), additive, device=weights.device) if additive > 0 else None
    per_layer = {"scale": scale, "shift": shift, "additive": additive}
    check_arguments(weights, table, token_size, model, start, window, per_layer, base, layers)
    check_stream("token_views", seed, 2 * offset)
    if permutations is None:
        permutations = torch.empty(len(model), 0, dtype=torch.int32, device=model.device)
    elif layers is None or not _native.CHECK:
        check_permutations("token_views", permutations, len(model), table)
    else:  # a network uses the vectors of its own layout only
        for first, last in set(map(tuple, layers.tolist())):
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
        noise.multiplicative,
        round(erase.share * 2**32),
        seed,
        offset,
        dtype or weights.dtype,
        additive,
        math.nan if erase.value is None else erase.value,
        round(erase.block * 2**32),
        round(erase.shortest * 2**24),
        round(erase.longest * 2**24),
    )
    return Tokens(values, lengths, positions)


def check_augmentation(noise: Noise, erase: Erasing) -> None:
    additive = 0.0 if isinstance(noise.additive, Tensor) else noise.additive
    if not 0 <= erase.share <= 1 or not 0 <= noise.multiplicative < math.inf or not 0 <= additive < math.inf:
        got = f"{noise.multiplicative}, {additive} and {erase.share}"
        raise ValueError(f"token_views: noise must be at least 0 and erase in [0, 1], got {got}")
    if not 0 <= erase.block <= 1 or not 0 <= erase.shortest <= erase.longest <= 1:
        got = f"{erase.block}, {erase.shortest} and {erase.longest}"
        raise ValueError(
            f"token_views: erase.block must be in [0, 1], and shortest not above longest in [0, 1], got {got}"
        )
    if erase.value is not None and not math.isfinite(erase.value):
        raise ValueError(f"token_views: erase.value must be finite, got {erase.value}")


def check_arguments(weights, table, token_size, model, start, window, per_layer, base, layers) -> None:
    if token_size < 1 or window < 1:
        raise ValueError(f"token_views: token_size and window must be at least 1, got {token_size} and {window}")
    count, num_layers, int64 = len(model), len(table), torch.int64
    expected = [("table", table, (num_layers, len(Row._fields)), int64), ("model", model, (count,), int64)]
    expected += [("start", start, (count,), int64)]
    expected += [(name, x, (num_layers,), torch.float32) for name, x in per_layer.items() if x is not None]
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
    sequence = last.end_token(token_size)
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
    additive: Tensor | None = None,
    erase_value: float = 0.0,
    block_threshold: int = 0,
    shortest: int = 0,
    longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    device = weights.device
    n = start[:, None] + torch.arange(window, device=device)  # [B, W]
    layer, row, f = places(table, layers, n, token_size)  # [B, W, 1], or where tokens span rows [B, W, T]; [B, W, T]
    own = table_columns(table[layer])
    inside = row < own.rows
    row = torch.where(inside, row, 0)

    def permuted(place: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        if permutations.shape[1] == 0:
            return split(i)
        index = torch.where(place >= 0, place + i, 0)
        return split(torch.where(place >= 0, permutations.gather(1, index.flatten(1)).view(index.shape).long(), i))

    period, weight = own.units * own.block, f < own.row_length
    unit, negative_unit = permuted(own.first_in, torch.where(weight, f % period // own.block, 0))
    weight_row, negative_row = permuted(own.first_out, row)
    bias_row, negative_bias = permuted(own.first_bias, row)
    source = own.weight_offset + weight_row * own.row_length + f // period * period + unit * own.block + f % own.block
    source = torch.where(weight, source, own.bias_offset + bias_row)
    negative = torch.where(weight, negative_unit ^ negative_row, negative_bias)
    valid = inside & (f < own.row_entries)
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    values = weights.reshape(-1)[torch.where(valid, base[:, None, None] + source, 0)].to(wide)
    values = values * (1 + 2 * negative).to(wide)
    if len(scale):
        values = values * scale[layer]
    if len(shift):
        values = values + shift[layer]
    if noise > 0:
        values = values * (1 + noise * normal_reference(seed, 2 * offset, values.numel(), device).view(values.shape))
    if additive is not None:
        normals = normal_reference(seed, NEW_DRAWS + 2 * offset, values.numel(), device).view(values.shape)
        values = values + additive[layer] * normals
    if math.isnan(erase_value):
        behind = -(-values.numel() // 8) * 8
        normals = normal_reference(seed, NEW_DRAWS + 2 * offset, behind + values.numel(), device)
        erase_value = normals[behind:].view(values.shape).to(wide)
    if erase_threshold > 0:
        words = philox_reference(seed, 2 * offset + 1, values.numel(), device).view(values.shape)
        values = torch.where(words < erase_threshold, erase_value, values)
    if block_threshold > 0:
        block = draw_blocks(table, layers, seed, offset, block_threshold, shortest, longest)[:, :, None, None]
        target = torch.where(weight, own.weight_offset + row * own.row_length + f, own.bias_offset + row)
        values = torch.where((target >= block[:, 0]) & (target < block[:, 1]), erase_value, values)
    values = torch.where(valid, values, 0).to(dtype)
    first = [x[..., 0] for x in (layer, row, own.dense, own.first_token)]
    layer, row, dense, first_token = first
    positions = torch.stack([n, layer - layers[:, :1], torch.where(dense, n - first_token, row)], -1)
    return values, valid.sum(-1).int(), torch.where(inside[..., :1], positions, 0).int()


def places(table: Tensor, layers: Tensor, n: Tensor, token_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Layer, row and number within the row of each entry of tokens ``n`` ``[B, W]``; the first two as few as differ."""
    columns, e = table_columns(table), torch.arange(token_size, device=n.device)
    spanning = bool(columns.dense.any())
    begins = columns.first_entry(token_size)
    network = (begins == 0).cumsum(0) * 2**48  # tables that lie one below the other, in order
    x = n[..., None] * token_size + (e if spanning else e[:1])
    layer = torch.searchsorted(network + begins, network[layers[:, :1, None]] + x, right=True) - 1
    layer = layer.clamp(max=layers[:, 1:, None] - 1)
    own = table_columns(table[layer])
    row = (x - begins[layer]) // own.stride(token_size)
    return layer, row, n[..., None] * token_size + e - begins[layer] - row * own.stride(token_size)


def draw_blocks(
    table: Tensor, layers: Tensor, seed: int, offset: int, threshold: int, shortest: int, longest: int
) -> Tensor:
    """First weight and end of the block that each view erases, ``[B, 2]``; 0 and 0 where none is erased."""
    columns, rows = table_columns(table), torch.arange(len(table), device=table.device)
    ends = columns.weight_offset + columns.rows * columns.row_length
    ends = torch.maximum(ends, torch.where(columns.bias_offset >= 0, columns.bias_offset + columns.rows, 0))
    size = torch.where((rows >= layers[:, :1]) & (rows < layers[:, 1:]), ends, 0).amax(1, keepdim=True)  # [B, 1]
    words = philox_reference(seed, NEW_DRAWS + 2 * offset + 1, len(layers) * WORDS, table.device).view(-1, WORDS)
    length, start = ((words[:, first : first + 2 * TRIES : 2] >> 8) for first in (2, 3))
    length = size * (shortest + ((longest - shortest) * length >> 24)) >> 24
    start = size * start >> 24
    fits = start + length < size
    place = fits.long().argmax(1, keepdim=True)
    erased = (words[:, :1] < threshold) & fits.any(1, keepdim=True)
    block = torch.cat([start.gather(1, place), (start + length).gather(1, place)], 1)
    return torch.where(erased, block, 0)


torch.library.define(
    "fastws::token_views",
    "(Tensor weights, Tensor table, Tensor base, Tensor layers, Tensor start, Tensor permutations, Tensor scale, "
    "Tensor shift, int token_size, int window, float noise, int erase_threshold, SymInt seed, SymInt offset, "
    "ScalarType dtype, Tensor? additive=None, float erase_value=0.0, int block_threshold=0, int shortest=0, "
    "int longest=0) -> (Tensor, Tensor, Tensor)",
)
torch.library.register_kernel("fastws::token_views", "default", token_views_reference)


@torch.library.register_fake("fastws::token_views")
def token_views_fake(weights, table, base, layers, start, permutations, scale, shift, token_size, window, *rest):
    batch = start.shape[0]
    dtype = rest[4]  # behind noise, erase_threshold, seed and offset
    values = weights.new_empty(batch, window, token_size, dtype=dtype)
    return (
        values,
        start.new_empty(batch, window, dtype=torch.int32),
        start.new_empty(batch, window, 3, dtype=torch.int32),
    )


def token_views_backward(ctx, *grads):
    raise NotImplementedError("token_views: weights are data; differentiate through fastws.permute and fastws.tokenize")


torch.library.register_autograd("fastws::token_views", token_views_backward)
_native.register_triton("token_views", file="token_views")
