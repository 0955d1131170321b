"""Coordinate MLP: a small network that predicts kernels of another from their coordinates."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastws import _native

CHUNK = 2048  # rows that the reference computes at once
NARROW = 192  # width of layers that CUDA C++ computes, at most
SUMMED = 2**14  # rows of a table whose gradient CUDA C++ sums, at most
KEPT = 2**26  # bytes of activations that a CPU keeps for the backward pass, at most
ACTIVATIONS = {  # name: the function, and its derivative
    "relu": (functional.relu, lambda x: (x > 0).to(x.dtype)),
    "leaky_relu": (functional.leaky_relu, lambda x: torch.full_like(x, 0.01).masked_fill(x > 0, 1)),
    "hardswish": (functional.hardswish, lambda x: ((2 * x + 3) / 6).where(x > -3, 0).where(x < 3, 1)),
    "gelu": (functional.gelu, lambda x: torch.special.ndtr(x) + x * (-x * x / 2).exp() * (2 * torch.pi) ** -0.5),
    "relu6": (functional.relu6, lambda x: ((x > 0) & (x < 6)).to(x.dtype)),
    "elu": (functional.elu, lambda x: x.clamp(max=0).exp()),
}


def coordinate_mlp(
    tables: Sequence[Tensor],
    grid: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
) -> Tensor:
    """Evaluates an MLP at coordinates (layer, filter, channel), each row of the grid that a network's kernels form.

    Kernel ``row`` of the network, counted layer by layer, filter by filter and channel by channel, has coordinates
    ``(l, f, c)``; ``x = act(tables[0][l] + tables[1][f] + tables[2][c])``, then ``x = act(weights[j] @ x + biases[j])``
    for all but the last weight, and ``weights[-1] @ x + biases[-1]`` is the result. A first linear layer on joined
    embeddings of the three coordinates is such a sum of tables, exactly: each table is the embeddings of one axis times
    its columns of the weight, and one of them holds the bias. Of added embeddings all three share one weight. For any
    other first layer ``tables[1]`` holds a row for each of n filters of one channel, and the other tables a row of
    zeros.

    Activations of more rows than 64 MiB hold are not stored: the backward pass computes each block of rows again, so
    that memory does not grow with the number of rows. Sums are at least float32. Differentiable once, in tables,
    weights and biases. Source: NeRN, arXiv 2212.13554.

    Args:
        tables: Three tables of what each coordinate adds to the first layer, ``[>= L, h]``, ``[>= filters, h]`` and
            ``[>= channels, h]``, floating point.
        grid: Filters and channels of each layer, ``[L, 2]``, int64, at least 1.
        rows: Kernels to predict, ``[n]``, int64, in any order; ``torch.arange`` of all of them, or their ranks in a
            permutation, for the whole network. Trusted, not checked, on a GPU.
        weights: Weights of the layers that follow, ``[h, h]`` each, the last ``[out, h]``.
        biases: Their biases, ``[h]`` each, the last ``[out]``.
        activation: ``relu``, ``leaky_relu`` (slope 0.01), ``hardswish``, ``gelu`` (exact), ``relu6`` or ``elu``.

    Returns:
        Predictions ``[n, out]``, of the dtype of the tables.

    Raises:
        ValueError: If an argument does not fit. Values are checked on the CPU only.

    Example:
        >>> tables = [torch.tensor([[0.0], [10.0]]), torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]])]
        >>> grid = torch.tensor([[1, 2], [2, 2]])  # two kernels, then two filters of two channels
        >>> weights, biases = [torch.ones(1, 1)], [torch.zeros(1)]
        >>> fastws.coordinate_mlp(tables, grid, torch.arange(6), weights, biases).T
        tensor([[ 0.,  1., 10., 11., 12., 13.]])
    """
    check(tables, grid, rows, weights, biases, activation)
    width = tables[0].shape[1]
    hidden_weights = torch.stack(list(weights[:-1])) if len(weights) > 1 else tables[0].new_empty(0, width, width)
    hidden_biases = torch.stack(list(biases[:-1])) if len(weights) > 1 else tables[0].new_empty(0, width)
    arguments = *tables, grid, rows, hidden_weights, hidden_biases, weights[-1], biases[-1]
    kind = list(ACTIVATIONS).index(activation)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in arguments)
    size = 4 * math.prod(kept_shape(len(rows), len(hidden_weights), width, len(biases[-1])))
    keep = learns and size <= KEPT and rows.device.type == "cpu"
    return torch.ops.fastws.coordinate_mlp(*arguments, kind, keep)[0]


def kept_shape(count: int, depth: int, width: int, outputs: int) -> tuple[int, int, int]:
    """Room for activations and their slopes in any arrangement: rows and columns for whole vectors and tiles."""
    return 2 * (depth + 1), -(-count // 32) * 32, -(-max(width, outputs) // 96) * 96


def check(tables, grid, rows, weights, biases, activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"coordinate_mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if len(tables) != 3 or any(table.dim() != 2 or table.numel() == 0 for table in tables):
        got = [list(table.shape) for table in tables]
        raise ValueError(f"coordinate_mlp: tables must be three of [indices, h], not empty, got {got}")
    if len(weights) == 0 or len(biases) != len(weights):
        counts = f"{len(weights)} and {len(biases)}"
        raise ValueError(f"coordinate_mlp: weights and biases must be of as many layers, at least 1, got {counts}")
    width, like, layers = tables[0].shape[1], tables[0], len(weights)
    last = weights[-1].shape[0] if weights[-1].dim() == 2 else 0
    shapes = {f"tables[{i}]": (table, [len(table), width]) for i, table in enumerate(tables)}
    shapes |= {f"weights[{j}]": (x, [width if j + 1 < layers else last, width]) for j, x in enumerate(weights)}
    shapes |= {f"biases[{j}]": (x, [width if j + 1 < layers else last]) for j, x in enumerate(biases)}
    for name, (x, shape) in shapes.items():
        if list(x.shape) != shape or 0 in shape or x.dtype != like.dtype or x.device != like.device:
            shape = shape if 0 not in shape else f"[out, {width}]"
            wanted, got = f"{shape} {like.dtype} on {like.device}", f"{list(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"coordinate_mlp: {name} must be {wanted}, got {got}")
    if not like.is_floating_point():
        raise ValueError(f"coordinate_mlp: tables must be floating point, got {like.dtype}")
    for name, x, shape in (("grid", grid, "[L, 2]"), ("rows", rows, "[n]")):
        if x.dim() != shape.count(",") + 1 or x.dtype != torch.int64 or x.device != like.device:
            got = f"{list(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"coordinate_mlp: {name} must be {shape} int64 on {like.device}, got {got}")
    if grid.shape[1] != 2:
        raise ValueError(f"coordinate_mlp: grid must be [L, 2] of filters and channels, got {list(grid.shape)}")
    if (like.device.type == "cpu" or _native.CHECK) and not torch.compiler.is_compiling():
        check_values(tables, grid, rows)


def check_values(tables, grid, rows) -> None:
    if len(grid) and grid.min() < 1:
        raise ValueError(f"coordinate_mlp: grid must hold at least 1 filter and 1 channel, got {grid.min()}")
    needed = [len(grid), *(grid.max(0).values.tolist() if len(grid) else (0, 0))]
    for i, axis in enumerate(("layers", "filters", "channels")):
        if len(tables[i]) < needed[i]:
            raise ValueError(
                f"coordinate_mlp: tables[{i}] must have a row for each of {needed[i]} {axis}, got {len(tables[i])}"
            )
    kernels = int(grid.prod(1).sum())
    if len(rows) and not (rows.min() >= 0 and rows.max() < kernels):
        got = f"{rows.min()} to {rows.max()}"
        raise ValueError(f"coordinate_mlp: rows must be kernels of the grid, 0 to {kernels - 1}, got {got}")


def coordinates(grid: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer, filter and channel of each row."""
    sizes = grid.prod(1)
    ends = sizes.cumsum(0)
    layer = torch.searchsorted(ends, rows.contiguous(), right=True)
    within, channels = rows - (ends - sizes)[layer], grid[layer, 1]
    return layer, within // channels, within % channels


def hidden_layers(places, tables, hidden_weights, hidden_biases, activation) -> list[Tensor]:
    """Input of the activation of each layer, ``[rows, h]``."""
    function = list(ACTIVATIONS.values())[activation][0]
    x = [tables[0][places[0]] + tables[1][places[1]] + tables[2][places[2]]]
    for weight, bias in zip(hidden_weights, hidden_biases, strict=True):
        x.append(functional.linear(function(x[-1]), weight, bias))
    return x


def coordinate_mlp_reference(
    layer_table: Tensor,
    filter_table: Tensor,
    channel_table: Tensor,
    grid: Tensor,
    rows: Tensor,
    hidden_weights: Tensor,
    hidden_biases: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    tables = layer_table, filter_table, channel_table
    function = list(ACTIVATIONS.values())[activation][0]
    predictions = layer_table.new_empty(len(rows), len(out_bias))
    for begin in range(0, len(rows), CHUNK):
        places = coordinates(grid, rows[begin : begin + CHUNK])
        x = hidden_layers(places, tables, hidden_weights, hidden_biases, activation)[-1]
        predictions[begin : begin + CHUNK] = functional.linear(function(x), out_weight, out_bias)
    shape = kept_shape(len(rows), *hidden_biases.shape, len(out_bias)) if keep else (0,)
    return predictions, layer_table.new_zeros(shape, dtype=torch.promote_types(layer_table.dtype, torch.float32))


def coordinate_mlp_backward_reference(
    grad: Tensor,
    kept: Tensor,  # what compiled kernels keep for themselves
    layer_table: Tensor,
    filter_table: Tensor,
    channel_table: Tensor,
    grid: Tensor,
    rows: Tensor,
    hidden_weights: Tensor,
    hidden_biases: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tables = layer_table, filter_table, channel_table
    function, slope = list(ACTIVATIONS.values())[activation]
    arguments = *tables, hidden_weights, hidden_biases, out_weight, out_bias
    sum_dtype = torch.promote_types(grad.dtype, torch.float32)
    sums = [torch.zeros(x.shape, dtype=sum_dtype, device=x.device) for x in arguments]
    for begin in range(0, len(rows), CHUNK):
        places = coordinates(grid, rows[begin : begin + CHUNK])
        x = hidden_layers(places, tables, hidden_weights, hidden_biases, activation)
        grad_y = grad[begin : begin + CHUNK]
        sums[5] += grad_y.T @ function(x[-1])
        sums[6] += grad_y.sum(0, dtype=sum_dtype)
        grad_x = grad_y @ out_weight * slope(x[-1])
        for j in reversed(range(len(hidden_weights))):
            sums[3][j] += grad_x.T @ function(x[j])
            sums[4][j] += grad_x.sum(0, dtype=sum_dtype)
            grad_x = grad_x @ hidden_weights[j] * slope(x[j])
        for total, place in zip(sums, places, strict=False):
            total.index_add_(0, place, grad_x.to(sum_dtype))
    return tuple(total.to(grad.dtype, copy=True) for total in sums)


ARGUMENTS = (
    "Tensor layer_table, Tensor filter_table, Tensor channel_table, Tensor grid, Tensor rows, Tensor hidden_weights, "
    "Tensor hidden_biases, Tensor out_weight, Tensor out_bias, int activation"
)
for name in ("coordinate_mlp", "coordinate_mlp_narrow"):  # CUDA C++ computes the second
    torch.library.define(f"fastws::{name}", f"({ARGUMENTS}, bool keep) -> (Tensor predictions, Tensor kept)")
    torch.library.define(
        f"fastws::{name}_backward",
        f"(Tensor grad, Tensor kept, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    torch.library.register_kernel(f"fastws::{name}", "default", coordinate_mlp_reference)
    torch.library.register_kernel(f"fastws::{name}_backward", "default", coordinate_mlp_backward_reference)


def coordinate_mlp_fake(*arguments):
    layer_table, rows, hidden_biases, out_bias = (arguments[i] for i in (0, 4, 6, 8))
    shape = kept_shape(rows.shape[0], *hidden_biases.shape, out_bias.shape[0]) if arguments[-1] else (0,)
    kept = layer_table.new_empty(shape, dtype=torch.promote_types(layer_table.dtype, torch.float32))
    return layer_table.new_empty(rows.shape[0], out_bias.shape[0]), kept


def coordinate_mlp_backward_fake(grad, kept, *arguments):
    differentiable = *arguments[:3], *arguments[5:9]
    return tuple(x.new_empty(x.shape) for x in differentiable)


def coordinate_mlp_setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _ = inputs
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # else autograd makes as many zeros as were kept, for no one
    ctx.save_for_backward(kept, *tensors)


def coordinate_mlp_backward(ctx, grad, grad_kept):
    if grad is None:  # nothing depends on the predictions
        return (None,) * len(ctx.needs_input_grad)
    grads = torch.ops.fastws.coordinate_mlp_backward(grad, *ctx.saved_tensors, ctx.activation)
    return *grads[:3], None, None, *grads[3:], None, None


def coordinate_mlp_double_backward(ctx, *grads):
    raise NotImplementedError("coordinate_mlp: differentiable once")


def fits_narrow(layer_table, *arguments) -> bool:
    out_weight, dtypes = arguments[6], (torch.float32, torch.bfloat16, torch.float16)
    return layer_table.dtype in dtypes and max(out_weight.shape) <= NARROW


for name in ("coordinate_mlp", "coordinate_mlp_narrow"):
    torch.library.register_fake(f"fastws::{name}", coordinate_mlp_fake)
    torch.library.register_fake(f"fastws::{name}_backward", coordinate_mlp_backward_fake)
    torch.library.register_autograd(
        f"fastws::{name}", coordinate_mlp_backward, setup_context=coordinate_mlp_setup_context
    )
    torch.library.register_autograd(f"fastws::{name}_backward", coordinate_mlp_double_backward)
_native.register_part(
    "coordinate_mlp", "coordinate_mlp_narrow", fits_narrow, coordinate_mlp_reference, file="coordinate_mlp"
)
_native.register_part(
    "coordinate_mlp_backward",
    "coordinate_mlp_narrow_backward",
    lambda grad, kept, *arguments: fits_narrow(*arguments) and max(map(len, arguments[:3])) <= SUMMED,
    coordinate_mlp_backward_reference,
)
