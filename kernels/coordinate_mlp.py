"""Triton kernel of fastws::coordinate_mlp. Its gradient is the reference, whose time goes into matrix products."""

import triton
import triton.language as tl
from torch import Tensor, float32, promote_types

ROWS = 64  # rows of a block
COLUMNS = 64  # of a layer that are computed at once
DEPTH = 16  # entries of a row per product
PROGRAMS = 264  # at most: two for each multiprocessor of an H200
RELU, LEAKY_RELU, HARDSWISH, GELU, RELU6, ELU = (tl.constexpr(kind) for kind in range(6))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activations of fastws/ops/coordinate_mlp.py; NaN stays NaN."""
    if ACTIVATION == RELU:
        y = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == LEAKY_RELU:
        y = tl.where(x > 0, x, 0.01 * x)
    elif ACTIVATION == HARDSWISH:
        y = tl.where(x <= -3, 0.0, tl.where(x >= 3, x, x * (x + 3) / 6))
    elif ACTIVATION == GELU:
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865475244))
    elif ACTIVATION == RELU6:
        y = tl.where(x <= 0, 0.0, tl.where(x >= 6, 6.0, x))
    else:
        y = tl.where(x > 0, x, tl.exp(tl.where(x > 0, 0.0, x)) - 1)
    return y.to(x.dtype)


@triton.jit
def linear(x, n, weight, bias, depth, outs, real: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Columns n of x @ weight.T + bias, for the ROWS rows of x and weight [outs, depth]."""
    row = tl.arange(0, ROWS)
    y = tl.zeros([ROWS, n.shape[0]], real)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(x + row[:, None] * depth + k[None, :], mask=(k < depth)[None, :], other=0.0)
        inside = (n < outs)[None, :] & (k < depth)[:, None]
        right = tl.load(weight + n[None, :] * depth + k[:, None], mask=inside, other=0.0)
        y = tl.dot(left, right, y, input_precision="ieee", out_dtype=real)
    return y + tl.load(bias + n, mask=n < outs, other=0.0).to(real)[None, :]


# a search whose size is a constant 1 breaks the compiler of Triton 3.6
@triton.jit(do_not_specialize=["num_layers"])
def _coordinate_mlp_kernel(
    layer_table,
    filter_table,
    channel_table,
    grid,
    ends,
    rows,
    hidden_weights,
    hidden_biases,
    out_weight,
    out_bias,
    scratch,
    predictions,
    count,
    num_layers,
    depth,
    width,
    outputs,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """predictions[r] = the network at the coordinates of rows[r], where layer l has the kernels before ends[l].

    Each program takes block after block of ROWS rows through all layers. What layers hand on lies in the program's part
    of scratch, [programs, 2, ROWS, width], which stays in cache.
    """
    dtype: tl.constexpr = layer_table.dtype.element_ty
    real: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    first = scratch + 2 * program * ROWS * width
    within = tl.arange(0, ROWS)[:, None] * width
    for block in range(program, tl.cdiv(count, ROWS), tl.num_programs(0)):
        r = block * ROWS + tl.arange(0, ROWS)
        kernel = tl.load(rows + r, mask=r < count, other=0)
        layer, last = tl.zeros([ROWS], tl.int64), tl.zeros([ROWS], tl.int64) + num_layers
        size = num_layers
        while size > 1:  # a binary search: there may be as many layers as rows
            middle = (layer + last) // 2
            before = tl.load(ends + middle - 1, mask=middle > layer, other=0) <= kernel
            layer, last = tl.where(before, middle, layer), tl.where(before, last, middle)
            size = (size + 1) // 2
        kernel -= tl.load(ends + layer - 1, mask=layer > 0, other=0)
        channels = tl.load(grid + 2 * layer + 1)
        f, c = kernel // channels, kernel % channels
        for start in range(0, width, COLUMNS):
            n = start + tl.arange(0, COLUMNS)
            inside = (n < width)[None, :]
            x = tl.load(layer_table + layer[:, None] * width + n[None, :], mask=inside, other=0.0).to(real)
            x += tl.load(filter_table + f[:, None] * width + n[None, :], mask=inside, other=0.0)
            x += tl.load(channel_table + c[:, None] * width + n[None, :], mask=inside, other=0.0)
            tl.store(first + within + n[None, :], activate(x, ACTIVATION), mask=inside)
        weight, bias = hidden_weights, hidden_biases
        for j in range(depth):
            tl.debug_barrier()  # all threads have written what all of them read now
            x, y = first + j % 2 * ROWS * width, first + (j + 1) % 2 * ROWS * width
            for start in range(0, width, COLUMNS):
                n = start + tl.arange(0, COLUMNS)
                sums = linear(x, n, weight, bias, width, width, real, ROWS, DEPTH)
                tl.store(y + within + n[None, :], activate(sums, ACTIVATION), mask=(n < width)[None, :])
            weight += width * width
            bias += width
        tl.debug_barrier()
        for start in range(0, outputs, 16):
            n = start + tl.arange(0, 16)
            x = first + depth % 2 * ROWS * width
            sums = linear(x, n, out_weight, out_bias, width, outputs, real, ROWS, DEPTH)
            inside = (r < count)[:, None] & (n < outputs)[None, :]
            tl.store(predictions + r[:, None] * outputs + n[None, :], sums, mask=inside)
        tl.debug_barrier()  # before the next block overwrites what was read


def coordinate_mlp(
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
    keep: bool,  # asked of CPUs only
) -> tuple[Tensor, Tensor]:
    tables = layer_table.contiguous(), filter_table.contiguous(), channel_table.contiguous()
    grid, rows = grid.contiguous(), rows.contiguous()
    hidden = hidden_weights.contiguous(), hidden_biases.contiguous()
    last = out_weight.contiguous(), out_bias.contiguous()
    outputs, width = last[0].shape
    predictions = layer_table.new_empty(len(rows), outputs)
    if len(rows) > 0:
        ends = grid.prod(1).cumsum(0)
        programs = min(triton.cdiv(len(rows), ROWS), PROGRAMS)
        scratch = layer_table.new_empty(programs, 2, ROWS, width)
        sizes = len(rows), len(grid), len(hidden[0]), width, outputs
        blocks = activation, ROWS, COLUMNS, DEPTH
        _coordinate_mlp_kernel[(programs,)](
            *tables, grid, ends, rows, *hidden, *last, scratch, predictions, *sizes, *blocks
        )
    return predictions, layer_table.new_empty(0, dtype=promote_types(layer_table.dtype, float32))
