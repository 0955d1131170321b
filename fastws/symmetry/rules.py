"""Rules: what each ATen operation says about the units of its operands and results. ``tracer.py`` tells the idea."""

import math
import re

from torch import Tensor

from fastws.symmetry.picking import (
    as_strided,
    cat,
    col2im,
    counts,
    create,
    embedding,
    embedding_bag,
    expand,
    gather,
    im2col,
    index,
    index_put,
    move,
    order,
    other_memory,
    pad,
    picks,
    scatter,
    stack,
)
from fastws.symmetry.tracer import Call, Fields, Grouped, Tracer, moving, not_understood, tensors_in
from fastws.symmetry.units import NEIGHBOURS, TRIANGLE

Labelled = tuple[Fields, list[int]]  # fields and shape of a tensor


def same(call: Call, fields: Fields) -> list[Fields]:
    return [fields for _ in call.results]


def pointwise(tracer: Tracer, call: Call) -> list[Fields]:
    tensors = list(tensors_in((call.args, call.kwargs)))
    if tensors and all(id(x) in tracer.uniform for x in tensors):
        tracer.uniform |= {id(result) for result in call.results}
    return same(call, tracer.join((tracer.fields(x), x.shape) for x in tensors))


# --- operations that mix entries


def reduce(tracer: Tracer, call: Call) -> list[Fields]:
    return same(call, tracer.reduce(tracer.fields(call.x), call.axes(), call.get("keepdim", False)))


def ordered(tracer: Tracer, call: Call) -> list[Fields]:
    """Cumulative sums, sorts: the entries along an axis have an order."""
    axes = call.axes() if call.get("dim") is not None else [call.x.dim() - 1]
    return same(call, tracer.without(tracer.fields(call.x), axes, counts(call)))


def extremes(tracer: Tracer, call: Call) -> list[Fields]:
    """The largest or least along an axis, or of two tensors."""
    return pointwise(tracer, call) if call.get("other") is not None else order(tracer, call)


def triangle(tracer: Tracer, call: Call) -> list[Fields]:
    return same(call, tracer.without(tracer.fields(call.x), range(call.x.dim() - 2, call.x.dim()), TRIANGLE))


def along(tracer: Tracer, call: Call) -> list[Fields]:
    """Softmax and its kin: an axis is normalised as a whole."""
    return same(call, tracer.outermost(tracer.fields(call.x), call.axes()))


def spatial(tracer: Tracer, call: Call) -> list[Fields]:
    """Pooling, interpolation, padding by reflection: neighbours matter along the last axes."""
    dimensions = int(re.search(r"(\d)d", call.function._schema.name)[1])
    axes = range(call.x.dim() - dimensions, call.x.dim())
    return same(call, tracer.without(tracer.fields(call.x), axes, NEIGHBOURS))


def sampled(tracer: Tracer, call: Call) -> list[Fields]:
    """``grid_sample``: images read at places that a grid tells; channels move, nothing along images and grids does."""
    x, grid = call.args[:2]
    images = tracer.without(tracer.fields(x), range(2, x.dim()), NEIGHBOURS)
    places = tracer.without(tracer.fields(grid), range(1, grid.dim()), NEIGHBOURS)
    batch = [field.flatten().view(-1, *[1] * (x.dim() - 1)) for field in places]
    shape = [*x.shape[:2], *[1] * (x.dim() - 2)]
    return [tracer.join([(images, shape), (batch, [len(x), *[1] * (x.dim() - 1)])])]


def glu(tracer: Tracer, call: Call) -> list[Fields]:
    """An entry-wise function of both halves of an axis."""
    axis = call.get("dim", -1) % call.x.dim()
    fields, size = tracer.fields(call.x), call.output.shape[axis]
    halves = []
    for start in (0, size):
        half = [field if field.shape[axis] == 1 else field.narrow(axis, start, size) for field in fields]
        tracer.seen |= {id(field): field for field in half}
        halves.append((tracer.simplify(half), call.output.shape))
    return [tracer.join(halves)]


def contract(tracer: Tracer, left: Labelled, right: Labelled, bias: Tensor | None) -> Fields:
    """``[.., i, k] @ [.., k, j] + bias``: an entry-wise product, summed over k."""
    (a, a_shape), (b, b_shape) = left, right
    product = tracer.join(
        [
            ([field.unsqueeze(-1) for field in a], [*a_shape, 1]),
            ([field.unsqueeze(-3) for field in b], [*b_shape[:-2], 1, *b_shape[-2:]]),
        ]
    )
    total = tracer.reduce(product, [max(len(a_shape), len(b_shape)) - 1])
    if bias is None:
        return total
    return tracer.join([(total, [*a_shape[:-1], b_shape[-1]]), (tracer.fields(bias), bias.shape)])


def matmul(tracer: Tracer, call: Call) -> list[Fields]:
    """mm, bmm; addmm and baddbmm, which add their first argument."""
    bias = call.args[0] if "add" in call.function._schema.name else None
    left, right = call.args[:2] if bias is None else call.args[1:3]
    return [contract(tracer, (tracer.fields(left), left.shape), (tracer.fields(right), right.shape), bias)]


def vector(tracer: Tracer, call: Call) -> list[Fields]:
    """mv, dot, vdot: an entry-wise product, summed over the last axis."""
    left, right = call.args[:2]
    product = tracer.join([(tracer.fields(left), left.shape), (tracer.fields(right), right.shape)])
    return [tracer.reduce(product, [left.dim() - 1])]


def matrix_vector(tracer: Tracer, call: Call) -> list[Fields]:
    """``bias + matrix @ vector``."""
    bias, matrix, right = call.args[:3]
    column = [field.unsqueeze(-1) for field in tracer.fields(right)], [*right.shape, 1]
    total = contract(tracer, (tracer.fields(matrix), matrix.shape), column, None)
    return [tracer.join([([field[..., 0] for field in total], call.output.shape), (tracer.fields(bias), bias.shape)])]


def batched_sum(tracer: Tracer, call: Call) -> list[Fields]:
    """``bias + (left @ right).sum(0)``."""
    bias, left, right = call.args[:3]
    total = contract(tracer, (tracer.fields(left), left.shape), (tracer.fields(right), right.shape), None)
    return [tracer.join([(tracer.reduce(total, [0]), call.output.shape), (tracer.fields(bias), bias.shape)])]


def outer(tracer: Tracer, call: Call) -> list[Fields]:
    """``bias + left x right``."""
    bias, left, right = call.args[:3]
    rows = [field.unsqueeze(-1) for field in tracer.fields(left)], [len(left), 1]
    return [tracer.join([rows, (tracer.fields(right), right.shape), (tracer.fields(bias), bias.shape)])]


def trilinear(tracer: Tracer, call: Call) -> list[Fields]:
    """An entry-wise product of three tensors, each with axes of length 1 put in, summed over some axes."""
    operands = []
    for tensor, new in zip(call.args[:3], call.args[3:6], strict=True):
        fields, shape = tracer.fields(tensor), list(tensor.shape)
        for axis in new:
            fields = [field.unsqueeze(axis) for field in fields]
            shape.insert(axis, 1)
        operands.append((fields, shape))
    return [tracer.reduce(tracer.join(operands), call.args[6])]


def distances(tracer: Tracer, call: Call) -> list[Fields]:
    """Distances between the rows of two tensors: sums over the last axis."""
    left, right = call.args[:2]
    columns = [field.transpose(-1, -2) for field in tracer.fields(right)], right.mT.shape
    return [contract(tracer, (tracer.fields(left), left.shape), columns, None)]


def grouped_mm(tracer: Tracer, call: Call) -> list[Fields]:
    """``[rows, k] @ [experts, k, n]``: stretches of rows, each with the matrix of its expert."""
    left, right = call.args[:2]
    if (left.dim(), right.dim()) != (2, 3):
        return not_understood(tracer, call)
    fields = tracer.without(tracer.fields(right), [0], picks(call))
    matrix = [field[0] for field in fields], right.shape[1:]
    rows = tracer.without(tracer.fields(left), [0], picks(call))
    return [contract(tracer, (rows, left.shape), matrix, call.get("bias"))]


def weight_norm(tracer: Tracer, call: Call) -> list[Fields]:
    direction, scale = call.args[:2]
    fields = tracer.outermost(tracer.fields(direction), range(direction.dim()))
    return [tracer.join([(fields, direction.shape), (tracer.fields(scale), scale.shape)])]


def linear(tracer: Tracer, call: Call) -> list[Fields]:
    x, weight, bias = (*call.args, None)[:3]
    transposed = [field.t() for field in tracer.fields(weight)], weight.t().shape
    fields = [field.expand(1, *field.shape) for field in tracer.fields(x)]  # a vector is a batch of one
    fields = contract(tracer, (fields, [1, *x.shape]), transposed, bias)
    return [[field[0] for field in fields]]


def convolution(tracer: Tracer, call: Call) -> list[Fields]:
    """Channels as ``[group, out, in]``: the product of input and weight, summed over the inputs of a group."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    inputs, outputs = x.shape[1] // groups, call.output.shape[1] // groups
    within = False
    if groups > 1 and inputs > 1 and not transposed:
        within = len(tracer.grouped) in tracer.within
        tracer.grouped.append(Grouped(tracer.raw(weight), groups, inputs, outputs))
    fields = tracer.without(tracer.fields(x), range(2, x.dim()), NEIGHBOURS)
    fields = tracer.outermost(fields, [1])
    batch = [field for field in fields if moving(field) == [0]]
    channels = [field.view(groups, 1, inputs) for field in fields if moving(field) == [1]]
    kernel = []
    for field in tracer.without(tracer.fields(weight), range(2, weight.dim()), NEIGHBOURS):
        if moving(field) == [0]:
            kernel.append(field.view(groups, 1, inputs) if transposed else field.view(groups, outputs, 1))
        else:
            kernel.append(field.view(1, outputs, 1) if transposed else field.view(1, 1, inputs))
    if within:  # channels move alike in all groups, those that come out in each group for themselves
        for field in channels:
            tracer.units.unite(field, field[:1])
        channels = tracer.simplify(channels)
        tracer.seen |= {id(group): group for field in kernel for group in field.split(1) if field.shape[0] > 1}
    product = tracer.join([(channels, [1 if within else groups, 1, inputs]), (kernel, [groups, outputs, inputs])])
    total = tracer.reduce(product, [2])
    result = [field.expand(groups, outputs).reshape(1, -1, *[1] * (x.dim() - 2)) for field in total]
    if bias is not None:
        width = [1, call.output.shape[1], *[1] * (x.dim() - 2)]
        result = tracer.join([(result, width), ([field.view(width) for field in tracer.fields(bias)], width)])
    return [tracer.simplify(batch + result)]


def per_channel(tracer: Tracer, x: Tensor, fields: Fields, parameters: tuple[Tensor | None, ...]) -> Fields:
    """Fields of an entry-wise function of x and of vectors that have a value per channel."""
    width = [1, x.shape[1], *[1] * (x.dim() - 2)]
    operands = [(fields, x.shape)]
    for parameter in parameters:
        if parameter is not None:
            operands.append(([field.view(width) for field in tracer.fields(parameter)], width))
    return tracer.join(operands)


def batch_norm(tracer: Tracer, call: Call) -> list[Fields]:
    fields = tracer.outermost(tracer.fields(call.x), [1])
    return [per_channel(tracer, call.x, fields, call.args[1:5])]


def group_norm(tracer: Tracer, call: Call) -> list[Fields]:
    """Channels move within their group, or groups as a whole: whichever gives more permutations."""
    x, weight, bias, _, channels, _, groups = call.args[:7]
    size = channels // groups
    fields = []
    for field in tracer.outermost(tracer.fields(x), range(1, x.dim())):
        if moving(field) == [1]:
            within = groups * math.lgamma(size + 1) >= math.lgamma(groups + 1)
            for group in field.split(size, 1):
                if within:
                    tracer.seen[id(group)] = group  # a field of its own, so that its units are a family of their own
                else:
                    tracer.units.unite(group, group.narrow(1, 0, 1))
        fields.append(field)
    return [per_channel(tracer, x, tracer.simplify(fields), (weight, bias))]


def layer_norm(tracer: Tracer, call: Call) -> list[Fields]:
    """Layer norm and root mean square norm."""
    x, shape = call.args[:2]
    parameters = [p for p in call.args[2:4] if isinstance(p, Tensor)]
    fields = tracer.outermost(tracer.fields(x), range(x.dim() - len(shape), x.dim()))
    return [tracer.join([(fields, x.shape), *((tracer.fields(p), p.shape) for p in parameters)])]


def named(rule, names: str) -> dict:
    return dict.fromkeys(names.split(), rule)


MOVES = {
    **named(move, "view _unsafe_view _reshape_alias permute transpose t numpy_T unsqueeze squeeze select slice alias"),
    **named(move, "split split_with_sizes unsafe_split unsafe_chunk chunk unbind flip roll unfold diagonal detach"),
    **named(move, "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle repeat_interleave lift_fresh"),
    **named(move, "rot90 swapaxes narrow movedim swapdims"),
    **named(as_strided, "as_strided"),
    **named(other_memory, "set"),
    **named(expand, "expand repeat"),
    **named(index, "index index_select"),
    **named(cat, "cat"),
    **named(stack, "stack"),
    **named(pad, "constant_pad_nd"),
}

RULES = MOVES | {
    **named(pointwise, "pointwise copy _to_copy fill zero clone where masked_fill floor_divide _conj resolve_conj"),
    **named(pointwise, "_prelu_kernel hardswish log_sigmoid_forward real imag polar complex nan_to_num"),
    **named(create, "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full"),
    **named(create, "new_empty scalar_tensor"),
    **named(gather, "gather"),
    **named(scatter, "scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce"),
    **named(index_put, "index_put _index_put_impl"),
    **named(embedding, "embedding"),
    **named(embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    **named(reduce, "mean sum amax amin prod var std var_mean std_mean linalg_vector_norm logsumexp any all nansum"),
    **named(reduce, "norm count_nonzero"),
    **named(extremes, "max min"),
    **named(order, "argmax argmin median nanmedian mode kthvalue sort topk"),
    **named(ordered, "cumsum cumprod logcumsumexp cummax cummin"),
    **named(triangle, "tril triu"),
    **named(along, "_softmax _log_softmax _safe_softmax"),
    **named(spatial, "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d"),
    **named(spatial, "adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d"),
    **named(spatial, "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d"),
    **named(spatial, "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_bilinear2d upsample_bicubic2d"),
    **named(spatial, "upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    **named(spatial, "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d"),
    **named(spatial, "replication_pad3d"),
    **named(sampled, "grid_sampler_2d grid_sampler_3d"),
    **named(im2col, "im2col"),
    **named(col2im, "col2im"),
    **named(glu, "glu"),
    **named(vector, "mv dot vdot"),
    **named(matrix_vector, "addmv"),
    **named(outer, "addr"),
    **named(trilinear, "_trilinear"),
    **named(distances, "_cdist_forward _euclidean_dist"),
    **named(grouped_mm, "_grouped_mm"),
    **named(weight_norm, "_weight_norm_interface"),
    **named(matmul, "mm bmm addmm baddbmm"),
    **named(batched_sum, "addbmm"),
    **named(linear, "linear"),
    **named(convolution, "convolution"),
    **named(batch_norm, "_native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm"),
    **named(group_norm, "native_group_norm"),
    **named(layer_norm, "native_layer_norm _fused_rms_norm"),
}
PASSING = MOVES.keys() | {"clone", "_to_copy"}  # what they are given is not reached by that
