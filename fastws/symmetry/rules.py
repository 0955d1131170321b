"""Rules: what each ATen operation says about the units of its operands and results. ``tracer.py`` tells the idea."""

import math
import re

import torch
from torch import Tensor

from fastws.symmetry.tracer import Call, Fields, Tracer, moving, not_understood

Labelled = tuple[Fields, list[int]]  # fields and shape of a tensor


def same(call: Call, fields: Fields) -> list[Fields]:
    return [fields for _ in call.results]


def pointwise(tracer: Tracer, call: Call) -> list[Fields]:
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
    return same(call, tracer.join((tracer.fields(x), x.shape) for x in tensors))


def create(tracer: Tracer, call: Call) -> list[Fields]:
    """A constant looks the same whatever is permuted: each of its axes has free units."""
    return [tracer.fresh(result.shape) for result in call.results]


# --- operations that move entries


def moved(tracer: Tracer, call: Call, fields: Fields) -> list[Fields]:
    """Applies the operation to the fields of its first argument."""
    results: list[Fields] = [[] for _ in call.results]
    args = on_cpu(call.args[1:])
    for field in fields:
        field = field.expand(call.x.shape)
        if call.function._schema.name in ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"):
            pieces = [field.reshape(call.output.shape)]  # a field has other strides than its tensor
        else:
            piece = call.function(field, *args, **call.kwargs)
            pieces = [piece] if isinstance(piece, Tensor) else piece
        for result, piece in zip(results, pieces, strict=True):
            result += tracer.simplify([piece])
    return results


def on_cpu(args):
    """Arguments for an operation on fields, which lie on the CPU whatever the device of the module is."""
    if isinstance(args, list | tuple):
        return [on_cpu(arg) for arg in args]
    return args.cpu() if isinstance(args, Tensor) else args


def move(tracer: Tracer, call: Call) -> list[Fields]:
    in_place = call.function._schema.name.endswith("_")  # then the first argument has its new shape already
    if in_place or call.get("dtype") is not None:
        return not_understood(tracer, call)
    return moved(tracer, call, tracer.fields(call.x))


def expand(tracer: Tracer, call: Call) -> list[Fields]:
    """``expand`` and ``repeat``: an axis of copies has free units."""
    missing = call.output.dim() - call.x.dim()
    sizes = [1] * missing + list(call.x.shape)
    copies = [axis for axis, size in enumerate(sizes) if size == 1]
    return [moved(tracer, call, tracer.fields(call.x))[0] + tracer.fresh(call.output.shape, copies)]


def index(tracer: Tracer, call: Call) -> list[Fields]:
    """Indexing by tensors: nothing moves along the indexed axes."""
    if isinstance(call.args[1], int):  # index_select
        axes = [call.args[1] % call.x.dim()]
    else:
        axes, axis = [], 0
        for by in call.args[1]:
            width = by.dim() if by is not None and by.dtype == torch.bool else 1
            axes += range(axis, axis + width) if by is not None else []
            axis += width
    return moved(tracer, call, tracer.without(tracer.fields(call.x), axes, f"{call.function} picks entries of it"))


def embedding(tracer: Tracer, call: Call) -> list[Fields]:
    lead = [1] * call.args[1].dim()
    fields = tracer.without(tracer.fields(call.x), [0])
    return [[field.view(*lead, field.shape[1]) for field in fields]]


def cat(tracer: Tracer, call: Call) -> list[Fields]:
    tensors = [tensor for tensor in call.args[0] if tensor.numel() > 0]
    axis = call.get("dim", 0) % call.output.dim()
    pieces, others = [], []
    for tensor in tensors:
        mixed = tracer.outermost(tracer.fields(tensor), [axis])
        along = [field for field in mixed if moving(field) == [axis]]
        for field in along[1:]:  # an axis of two kinds of units keeps the outer
            tracer.units.hold(field)
        shape = [size if a == axis else 1 for a, size in enumerate(tensor.shape)]
        pieces.append(along[0] if along else torch.zeros(shape, dtype=torch.int64))
        rest = [1 if a == axis else size for a, size in enumerate(tensor.shape)]
        others.append(([field for field in mixed if moving(field) != [axis]], rest))
    return [tracer.simplify([torch.cat(pieces, axis)]) + tracer.join(others)]


def stack(tracer: Tracer, call: Call) -> list[Fields]:
    axis = call.get("dim", 0) % call.output.dim()
    shape = [1 if a == axis else size for a, size in enumerate(call.output.shape)]
    operands = [([field.unsqueeze(axis) for field in tracer.fields(tensor)], shape) for tensor in call.args[0]]
    return [tracer.join(operands)]


def pad(tracer: Tracer, call: Call) -> list[Fields]:
    """Padding with a constant: along an axis that moves the new entries are free units."""
    padding, results = list(call.args[1]), []
    for field in tracer.fields(call.x):
        sides = [side if field.shape[-1 - i // 2] > 1 else 0 for i, side in enumerate(padding)]
        field = torch.constant_pad_nd(field, sides, -1)
        holes = field < 0
        field[holes] = tracer.units.new(int(holes.sum()))
        results.append(field)
    return [results]


# --- operations that mix entries


def reduce(tracer: Tracer, call: Call) -> list[Fields]:
    return same(call, tracer.reduce(tracer.fields(call.x), call.axes(), call.get("keepdim", False)))


def ordered_reduce(tracer: Tracer, call: Call) -> list[Fields]:
    """Reductions that also tell where they found their value."""
    fields = tracer.without(tracer.fields(call.x), call.axes(), f"{call.function} counts along it")
    return same(call, tracer.reduce(fields, call.axes(), call.get("keepdim", False)))


def ordered(tracer: Tracer, call: Call) -> list[Fields]:
    """Cumulative sums, sorts: the entries along an axis have an order."""
    axes = call.axes() if call.get("dim") is not None else [call.x.dim() - 1]
    return same(call, tracer.without(tracer.fields(call.x), axes, f"{call.function} counts along it"))


def triangle(tracer: Tracer, call: Call) -> list[Fields]:
    return same(call, tracer.without(tracer.fields(call.x), range(call.x.dim() - 2, call.x.dim())))


def along(tracer: Tracer, call: Call) -> list[Fields]:
    """Softmax and its kin: an axis is normalised as a whole."""
    return same(call, tracer.outermost(tracer.fields(call.x), call.axes()))


def spatial(tracer: Tracer, call: Call) -> list[Fields]:
    """Pooling, interpolation, padding by reflection: neighbours matter along the last axes."""
    dimensions = int(re.search(r"(\d)d", call.function._schema.name)[1])
    axes = range(call.x.dim() - dimensions, call.x.dim())
    return same(call, tracer.without(tracer.fields(call.x), axes))


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
    fields = tracer.without(tracer.fields(x), range(2, x.dim()))
    fields = tracer.outermost(fields, [1])
    batch = [field for field in fields if moving(field) == [0]]
    channels = [field.view(groups, 1, inputs) for field in fields if moving(field) == [1]]
    kernel = []
    for field in tracer.without(tracer.fields(weight), range(2, weight.dim())):
        if moving(field) == [0]:
            kernel.append(field.view(groups, 1, inputs) if transposed else field.view(groups, outputs, 1))
        else:
            kernel.append(field.view(1, outputs, 1) if transposed else field.view(1, 1, inputs))
    product = tracer.join([(channels, [groups, 1, inputs]), (kernel, [groups, outputs, inputs])])
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


RULES = {
    **named(pointwise, "pointwise copy _to_copy fill zero clone where masked_fill floor_divide"),
    **named(pointwise, "_prelu_kernel hardswish log_sigmoid_forward"),
    **named(create, "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full"),
    **named(create, "new_empty scalar_tensor"),
    **named(move, "view _unsafe_view _reshape_alias permute transpose t numpy_T unsqueeze squeeze select slice alias"),
    **named(move, "split split_with_sizes unsafe_split chunk unbind flip roll unfold diagonal pixel_shuffle detach"),
    **named(move, "pixel_unshuffle channel_shuffle native_channel_shuffle repeat_interleave lift_fresh rot90"),
    **named(expand, "expand repeat"),
    **named(index, "index index_select"),
    **named(embedding, "embedding"),
    **named(cat, "cat"),
    **named(stack, "stack"),
    **named(pad, "constant_pad_nd"),
    **named(reduce, "mean sum amax amin prod var std var_mean std_mean linalg_vector_norm logsumexp any all"),
    **named(ordered_reduce, "max min argmax argmin median mode"),
    **named(ordered, "cumsum cumprod sort topk logcumsumexp cummax cummin"),
    **named(triangle, "tril triu"),
    **named(along, "_softmax _log_softmax _safe_softmax"),
    **named(spatial, "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d"),
    **named(spatial, "adaptive_max_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d"),
    **named(spatial, "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d reflection_pad1d"),
    **named(spatial, "reflection_pad2d replication_pad1d replication_pad2d _upsample_bilinear2d_aa"),
    **named(glu, "glu"),
    **named(vector, "mv dot vdot"),
    **named(weight_norm, "_weight_norm_interface"),
    **named(matmul, "mm bmm addmm baddbmm"),
    **named(linear, "linear"),
    **named(convolution, "convolution"),
    **named(batch_norm, "_native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm"),
    **named(group_norm, "native_group_norm"),
    **named(layer_norm, "native_layer_norm _fused_rms_norm"),
}
