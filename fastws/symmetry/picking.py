"""Rules for operations that move, pick or scatter entries. ``tracer.py`` tells the idea of rules."""

import torch
from torch import Tensor

from fastws.symmetry.tracer import Call, Fields, Tracer, moving, not_understood
from fastws.symmetry.units import INSIDE, NEIGHBOURS, ROWS


def picks(call: Call) -> str:
    return f"{call.spoken} picks entries of it"


def counts(call: Call) -> str:
    return f"{call.spoken} counts along it"


def create(tracer: Tracer, call: Call) -> list[Fields]:
    """A constant looks the same whatever is permuted: each of its axes has free units."""
    tracer.uniform |= {id(result) for result in call.results}
    return [tracer.fresh(result.shape) for result in call.results]


# --- views, slices, transposes


def on_cpu(args):
    """Arguments for an operation on fields, which lie on the CPU whatever the device of the module is."""
    if isinstance(args, list | tuple):
        return [on_cpu(arg) for arg in args]
    return args.cpu() if isinstance(args, Tensor) else args


def moved(tracer: Tracer, call: Call, fields: Fields) -> list[Fields]:
    """Applies the operation to the fields of its first argument; a unit that is picked alone must stay."""
    results: list[Fields] = [[] for _ in call.results]
    shape, args = call.before[0], on_cpu(call.args[1:])
    for field in fields:
        field = field.expand(shape)
        if call.function._schema.name in ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"):
            pieces = [field.reshape(call.output.shape)]  # a field has other strides than its tensor
        else:
            piece = call.function(field, *args, **call.kwargs)
            pieces = [piece] if isinstance(piece, Tensor) else piece
        for result, piece in zip(results, pieces, strict=True):
            left = tracer.simplify([piece])
            if not left:
                tracer.reach_units(piece)
                tracer.units.hold(piece, picks(call))
            result += left
    return results


def move(tracer: Tracer, call: Call) -> list[Fields]:
    if call.get("dtype") is not None:
        return not_understood(tracer, call)
    results = moved(tracer, call, tracer.fields(call.x))
    if id(call.x) in tracer.uniform:
        for place, result in enumerate(call.results):
            tracer.uniform.add(id(result))
            if result.numel() < call.x.numel():  # a part of a constant is a constant with units of its own
                tracer.loose.add(id(result))
                results[place] = tracer.fresh(result.shape)
    return results


def other_memory(tracer: Tracer, call: Call) -> list[Fields]:
    """``set_``: a tensor that lets go of its memory, or takes that of another one."""
    source = call.get("source")
    if isinstance(source, Tensor) and source.shape == call.output.shape:
        return [tracer.raw(source)]
    return [[]] if call.output.numel() == 0 else not_understood(tracer, call)


def expand(tracer: Tracer, call: Call) -> list[Fields]:
    """``expand`` and ``repeat``: an axis of copies has free units."""
    missing = call.output.dim() - call.x.dim()
    sizes = [1] * missing + list(call.x.shape)
    copies = [axis for axis, size in enumerate(sizes) if size == 1]
    return [moved(tracer, call, tracer.fields(call.x))[0] + tracer.fresh(call.output.shape, copies)]


def as_strided(tracer: Tracer, call: Call) -> list[Fields]:
    """Other sizes and strides over the same memory."""
    shape, strides, offset = call.before
    size, steps = call.args[1:3]
    start = call.get("storage_offset")
    start = offset if start is None else start
    ends = [
        first + sum((n - 1) * step for n, step in zip(sizes, by, strict=True)) + 1
        for first, sizes, by in ((offset, shape, strides), (start, size, steps))
    ]
    results = []
    for field in tracer.fields(call.x):
        memory = torch.full((max(ends),), -1)
        memory.as_strided(shape, strides, offset).copy_(field.expand(shape))
        piece = memory.as_strided(size, steps, start)
        if (piece < 0).any():
            return not_understood(tracer, call)
        results += tracer.simplify([piece.clone()])
    return [results]


def cat(tracer: Tracer, call: Call) -> list[Fields]:
    tensors = [tensor for tensor in call.args[0] if tensor.numel() > 0]
    axis = call.get("dim", 0) % call.output.dim()
    if is_uniform(tracer, call, tensors):
        return create(tracer, call)
    if all(tensor.shape[axis] == 1 for tensor in tensors):
        layers = [[field.squeeze(axis) for field in tracer.fields(tensor)] for tensor in tensors]
        return [tracer.stack(call.output, axis, layers)]
    pieces, others = [], []
    for tensor in tensors:
        mixed = tracer.outermost(tracer.fields(tensor), [axis])
        along = [field for field in mixed if moving(field) == [axis]]
        for field in along[1:]:  # an axis of two kinds of units keeps the outer
            tracer.units.hold(field, INSIDE)
        shape = [size if a == axis else 1 for a, size in enumerate(tensor.shape)]
        pieces.append(along[0] if along else torch.zeros(shape, dtype=torch.int64))
        rest = [1 if a == axis else size for a, size in enumerate(tensor.shape)]
        others.append(([field for field in mixed if moving(field) != [axis]], rest))
    return [tracer.simplify([torch.cat(pieces, axis)]) + tracer.join(others)] if pieces else [[]]


def stack(tracer: Tracer, call: Call) -> list[Fields]:
    if is_uniform(tracer, call, call.args[0]):
        return create(tracer, call)
    axis = call.get("dim", 0) % call.output.dim()
    return [tracer.stack(call.output, axis, [tracer.fields(tensor) for tensor in call.args[0]])]


def is_uniform(tracer: Tracer, call: Call, tensors: list[Tensor]) -> bool:
    """Whether constants side by side are one constant."""
    alike = call.output.numel() > 0 and all(id(tensor) in tracer.uniform for tensor in tensors)
    return alike and bool((call.output == call.output.flatten()[0]).all())


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


# --- entries found by index tensors


def index(tracer: Tracer, call: Call) -> list[Fields]:
    """Indexing by tensors: nothing moves along the indexed axes, unless a constant brings them in another order."""
    if isinstance(call.args[1], int):  # index_select
        axes, tensors = [call.args[1] % call.x.dim()], [call.args[2]]
    else:
        tensors = [by for by in call.args[1] if by is not None]
        axes = indexed(call.args[1])
    if len(tensors) == 1 and distinct(tracer, tensors[0]):
        return moved(tracer, call, tracer.fields(call.x))
    return moved(tracer, call, tracer.without(tracer.fields(call.x), axes, picks(call)))


def indexed(tensors: list[Tensor | None]) -> list[int]:
    """The axes that index tensors, or None, stand for."""
    axes, axis = [], 0
    for by in tensors:
        width = by.dim() if by is not None and by.dtype == torch.bool else 1
        axes += range(axis, axis + width) if by is not None else []
        axis += width
    return axes


def distinct(tracer: Tracer, by: Tensor) -> bool:
    """Whether an index tensor is a constant, of one axis, that names no entry twice."""
    constant = id(by) not in tracer.given and not tracer.raw(by)
    return constant and by.dim() == 1 and by.dtype in (torch.int64, torch.int32) and len(by.unique()) == len(by)


def varying(by: Tensor) -> list[int]:
    """The shape of an index tensor, with 1 for axes along which it does not vary."""
    same = [bool((by == by.narrow(axis, 0, 1)).all()) if size else True for axis, size in enumerate(by.shape)]
    return [1 if alike else size for alike, size in zip(same, by.shape, strict=True)]


def gather(tracer: Tracer, call: Call) -> list[Fields]:
    x, axis, by = call.args[:3]
    if x.dim() == 0 or by.dim() == 0:
        return [[]]
    axis %= x.dim()
    fields = tracer.without(tracer.fields(x), [axis], picks(call))
    for a, size in enumerate(by.shape):
        fields = [field if a == axis or field.shape[a] == 1 else field.narrow(a, 0, size) for field in fields]
    shape = [1 if a == axis else size for a, size in enumerate(by.shape)]
    return [tracer.join([(tracer.simplify(fields), shape), (tracer.fields(by), varying(by))])]


def scatter(tracer: Tracer, call: Call) -> list[Fields]:
    """scatter, scatter_add, index_add, index_copy, index_fill: nothing moves along the axis of the index."""
    x, axis, by = call.args[:3]
    source = call.args[3] if len(call.args) > 3 and isinstance(call.args[3], Tensor) else None
    if x.dim() == 0 or (source is not None and source.dim() != x.dim() and source.dim() > 0):
        return not_understood(tracer, call)
    axis %= x.dim()
    shape = [1 if a == axis else size for a, size in enumerate(x.shape)]
    operands = [(tracer.without(tracer.fields(x), [axis], picks(call)), shape)]
    if source is not None and source.dim() > 0:
        if any(a != axis and n != x.shape[a] for a, n in enumerate(source.shape)):
            return not_understood(tracer, call)
        operands.append((tracer.without(tracer.fields(source), [axis], picks(call)), shape))
    if by.dim() == x.dim() > 1:
        wide = [1 if a == axis else size for a, size in enumerate(varying(by))]
        operands.append((tracer.without(tracer.fields(by), [axis], picks(call)), wide))
    return [tracer.join(operands)]


def index_put(tracer: Tracer, call: Call) -> list[Fields]:
    """``x[by] = values`` for index tensors of the first axes."""
    x, by, values = call.args[:3]
    axes = indexed(by)
    if axes != list(range(len(axes))):
        return not_understood(tracer, call)
    rest = x.dim() - len(axes)
    kept = tracer.without(tracer.fields(x), axes, picks(call))
    shape = [1] * len(axes) + list(x.shape[len(axes) :])
    lead = max(0, values.dim() - rest)
    given = tracer.without(tracer.fields(values), range(lead), picks(call))
    tail = list(values.shape[lead:])
    given = [field.view([1] * len(axes) + [1] * (rest - len(tail)) + list(field.shape[lead:])) for field in given]
    tail = [1] * (x.dim() - len(tail)) + tail
    return [tracer.join([(kept, shape), (given, tail)])]


def embedding(tracer: Tracer, call: Call) -> list[Fields]:
    lead = [1] * call.args[1].dim()
    fields = tracer.without(tracer.fields(call.x), [0], ROWS)
    return [[field.view(*lead, field.shape[1]) for field in fields]]


def embedding_bag(tracer: Tracer, call: Call) -> list[Fields]:
    """Rows of a table, summed by bags."""
    return [tracer.without(tracer.fields(call.x), [0], ROWS)]


# --- values in their order, and where they were


REDUCED = {f"aten::{name}" for name in ("max", "min", "argmax", "argmin", "median", "nanmedian", "mode", "kthvalue")}


def order(tracer: Tracer, call: Call) -> list[Fields]:
    """Sorts and reductions that tell where they found what: values depend on no order, places do."""
    axes = call.axes() if call.get("dim") is not None or call.function._schema.name in REDUCED else [call.x.dim() - 1]
    fields = tracer.outermost(tracer.fields(call.x), axes)
    along = [field for field in fields if set(axes) & {*moving(field)}]
    left = [field for field in fields if not set(axes) & {*moving(field)}]
    for result in call.results:
        if not result.is_floating_point():
            tracer.trap(result, along, counts(call))
    if call.function._schema.name in REDUCED and not call.get("keepdim", False):
        left = [field.squeeze(tuple(axes)) for field in left]
    return [left for _ in call.results]


# --- patches of images


def im2col(tracer: Tracer, call: Call) -> list[Fields]:
    """``[B, C, H, W]`` to ``[B, C * kernel, L]``."""
    kernel = call.output.shape[-2] // call.x.shape[-3]
    fields = tracer.without(tracer.fields(call.x), [call.x.dim() - 2, call.x.dim() - 1], NEIGHBOURS)
    result = []
    for field in fields:
        field = field.squeeze(-1)
        wide = field.shape[-2] > 1
        result.append(field.repeat_interleave(kernel, -2) if wide else field)
    return [result]


def col2im(tracer: Tracer, call: Call) -> list[Fields]:
    """``[B, C * kernel, L]`` to ``[B, C, H, W]``."""
    channels, result = call.output.shape[-3], []
    for field in tracer.without(tracer.fields(call.x), [call.x.dim() - 1], NEIGHBOURS):
        if field.shape[-2] > 1:
            field = field.reshape(*field.shape[:-2], channels, -1)
            tracer.units.unite(field, field[..., :1])
        result.append(field[..., 0, None, None])
    return [tracer.simplify(result)]
