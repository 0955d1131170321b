"""Signs: which units may be negated, found by watching the operations once more.

A unit may change its sign where only linear and odd operations (tanh, sin, average pooling) lie between what writes it
and what reads it. Fields (``tracer.py``) name here a *sign* for each entry, and the sign of an entry is the product of
those that its fields name: a sum needs equal signs, a product multiplies them, a contraction needs equal signs of both
operands along the axis that it sums over. Sign 0 is plus: what is not understood, or minds signs, holds them there.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from fastws.symmetry.picking import col2im, embedding, gather, im2col, move, moved, pad
from fastws.symmetry.rules import MOVES, named
from fastws.symmetry.tracer import Call, Fields, Tracer, base_name, moving, tensors_in

MINDS = "an operation minds its sign"
Labelled = tuple[Fields, int]  # fields and number of axes of a tensor
Negated = dict[int, set[tuple[str, int, int]]]  # family: tensor, axis and which of the entries of each unit there


class SignTracer(Tracer):
    """Gives signs to the axes of parameters; see ``Tracer``.

    Attributes:
        zeros: By id, constants that hold zeros, whose sign is any: what recurrent layers begin with.
    """

    def __init__(self):
        super().__init__(SIGN_RULES, ())
        self.zeros: dict[int, Tensor] = {}

    def simplify(self, fields: Fields) -> Fields:
        """Fields without the axes along which they name one sign. What would name one for a whole tensor is plus."""
        simple = []
        for field in fields:
            left = super().simplify([field])
            if not left:
                self.units.hold(field, MINDS)
            simple += left
        return simple

    def is_zero(self, x: object) -> bool:
        if not isinstance(x, Tensor):
            return x == 0
        return id(x) in self.zeros and not x.any()

    def note_zeros(self, call: Call) -> None:
        """The results of a call are zeros."""
        self.zeros |= {id(result): result for result in call.results}

    def hold_all(self, fields: Fields) -> None:
        for field in fields:
            self.units.hold(field, MINDS)


def minds(tracer: SignTracer, call: Call) -> list[Fields]:
    """An operation that is not odd: signs stay before it."""
    for tensor in tensors_in((call.args, call.kwargs)):
        tracer.hold_all(tracer.fields(tensor))
    return [[] for _ in call.results]


def odd(tracer: SignTracer, call: Call) -> list[Fields]:
    if tracer.is_zero(call.x):
        tracer.note_zeros(call)
    return [tracer.fields(call.x) for _ in call.results]


def even(tracer: SignTracer, call: Call) -> list[Fields]:
    return [[] for _ in call.results]


def power(tracer: SignTracer, call: Call) -> list[Fields]:
    exponent = call.args[1]
    whole = not isinstance(exponent, Tensor) and isinstance(call.x, Tensor) and exponent % 1 == 0
    return ((odd if exponent % 2 else even) if whole else minds)(tracer, call)


def is_odd_clamp(call: Call) -> bool:
    """Whether the bounds are each other's negative."""
    bounds = {"clamp": ("min", "max", None), "hardtanh": ("min_val", "max_val", 1)}
    least, most, default = bounds[base_name(call.function)]
    low, high = call.get(least, default and -default), call.get(most, default)
    plain = isinstance(low, int | float) and isinstance(high, int | float)
    return plain and low == -high


def clamp(tracer: SignTracer, call: Call) -> list[Fields]:
    return (odd if is_odd_clamp(call) else minds)(tracer, call)


# --- sums and products


def equal(tracer: SignTracer, operands: list[Labelled], length: int) -> Fields:
    """Fields of a sum, of ``length`` axes, of tensors that broadcast: an entry has the same sign in all of them."""
    wide = [[field.view([1] * (length - axes) + list(field.shape)) for field in fields] for fields, axes in operands]
    left = wide[0] if wide else []
    for right in wide[1:]:
        matched, right = [], list(right)
        for field in left:
            at = next((i for i, other in enumerate(right) if moving(other) == moving(field)), None)
            if at is None:
                tracer.units.hold(field, MINDS)
            else:
                tracer.units.unite(field, right.pop(at))
                matched.append(field)
        tracer.hold_all(right)
        left = matched
    return tracer.simplify(left)


def labelled(tracer: SignTracer, x: object) -> Labelled:
    return (tracer.fields(x), x.dim()) if isinstance(x, Tensor) else ([], 0)


def total(tracer: SignTracer, call: Call) -> list[Fields]:
    """Sums, differences and choices of the first two arguments; a constant that is added must be zero."""
    parts = [x for x in call.args[:2] if not tracer.is_zero(x)]
    if not parts:
        tracer.note_zeros(call)
    return [equal(tracer, [labelled(tracer, x) for x in parts], call.output.dim())]


def choice(tracer: SignTracer, call: Call) -> list[Fields]:
    condition, *parts = call.args[:3]
    tracer.hold_all(tracer.fields(condition))
    parts = [labelled(tracer, x) for x in parts if not tracer.is_zero(x)]
    return [equal(tracer, parts, call.output.dim())]


def masked_fill(tracer: SignTracer, call: Call) -> list[Fields]:
    return (odd if tracer.is_zero(call.args[2]) else minds)(tracer, call)


def copy(tracer: SignTracer, call: Call) -> list[Fields]:
    source = call.args[1]
    if tracer.is_zero(source):
        tracer.note_zeros(call)
    return [equal(tracer, [labelled(tracer, source)], call.output.dim())]


def multiplied(tracer: SignTracer, left: Labelled, right: Labelled) -> Fields:
    """Fields of an entry-wise product of tensors that broadcast; a sign times itself is plus."""
    length = max(left[1], right[1])
    result: Fields = []
    for fields, axes in (left, right):
        for field in fields:
            field = field.view([1] * (length - axes) + list(field.shape))
            found = tracer.units.find(field)
            same = next((i for i, f in enumerate(result) if torch.equal(tracer.units.find(f), found)), None)
            if same is None:
                result.append(field)
            else:
                result.pop(same)
    return result


def product(tracer: SignTracer, call: Call) -> list[Fields]:
    """Products and quotients."""
    left, right = call.args[:2]
    if tracer.is_zero(left) or (tracer.is_zero(right) and "mul" in call.function._schema.name):
        tracer.note_zeros(call)
        return [[]]
    return [multiplied(tracer, labelled(tracer, left), labelled(tracer, right))]


def addcmul(tracer: SignTracer, call: Call) -> list[Fields]:
    x, *factors = call.args[:3]
    term = multiplied(tracer, *(labelled(tracer, factor) for factor in factors))
    operands = [labelled(tracer, x), (term, max(factor.dim() for factor in factors))]
    return [equal(tracer, operands, call.output.dim())]


def contract(tracer: SignTracer, left: Labelled, right: Labelled, axis: int) -> Fields:
    """Fields of an entry-wise product, summed over an axis, which goes: one sign of each operand along it is shared."""
    length = max(left[1], right[1])
    axis %= length
    summed, rest = [], []
    for fields, axes in (left, right):
        wide = [field.view([1] * (length - axes) + list(field.shape)) for field in fields]
        summed.append([field for field in wide if field.shape[axis] > 1])
        rest += [field.squeeze(axis) for field in wide if field.shape[axis] == 1]
    equal(tracer, [(fields, length) for fields in summed], length)
    return tracer.simplify(rest)


def matmul(tracer: SignTracer, call: Call) -> list[Fields]:
    """mm, bmm; addmm and baddbmm, which add their first argument."""
    added = "add" in call.function._schema.name
    bias, left, right = call.args[:3] if added else (None, *call.args[:2])
    columns = [field.unsqueeze(-3) for field in tracer.fields(right)], right.dim() + 1
    rows = [field.unsqueeze(-1) for field in tracer.fields(left)], left.dim() + 1
    zero = tracer.is_zero(left) or tracer.is_zero(right)
    parts = [] if zero else [(contract(tracer, rows, columns, -2), left.dim())]
    if added and not tracer.is_zero(bias):
        parts.append(labelled(tracer, bias))
    if not parts:
        tracer.note_zeros(call)
    return [equal(tracer, parts, call.output.dim())]


def linear(tracer: SignTracer, call: Call) -> list[Fields]:
    x, weight, bias = (*call.args, None)[:3]
    parts = []
    if not tracer.is_zero(x):
        rows = [field.unsqueeze(-2) for field in tracer.fields(x)], x.dim() + 1
        parts.append((contract(tracer, rows, labelled(tracer, weight), -1), x.dim()))
    if bias is not None:
        parts.append(labelled(tracer, bias))
    return [equal(tracer, parts, call.output.dim())]


def convolution(tracer: SignTracer, call: Call) -> list[Fields]:
    """Channels as ``[group, out, in]``: the product of input and weight, summed over the inputs of a group."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    inputs, outputs = x.shape[1] // groups, call.output.shape[1] // groups
    channels, kernel = [], []
    for field in tracer.fields(x):
        if moving(field) == [1]:
            channels.append(field.view(groups, 1, inputs))
        else:
            tracer.units.hold(field, MINDS)
    for field in tracer.fields(weight):
        if moving(field) == [0]:
            kernel.append(field.view(groups, 1, inputs) if transposed else field.view(groups, outputs, 1))
        elif moving(field) == [1]:
            kernel.append(field.view(1, outputs, 1) if transposed else field.view(1, 1, inputs))
        else:
            tracer.units.hold(field, MINDS)
    found = contract(tracer, (channels, 3), (kernel, 3), 2)
    wide = [1, call.output.shape[1], *[1] * (x.dim() - 2)]
    parts = [([field.expand(groups, outputs).reshape(wide) for field in found], x.dim())]
    if bias is not None:
        parts.append(([field.view(wide) for field in tracer.fields(bias)], x.dim()))
    return [equal(tracer, parts, call.output.dim())]


# --- what mixes entries


def mixed(tracer: SignTracer, fields: Fields, axes: set[int]) -> Fields:
    """Fields for a linear operation along some axes: signs that vary over them stay."""
    tracer.hold_all([field for field in fields if axes & {*moving(field)}])
    return tracer.simplify([field for field in fields if not axes & {*moving(field)}])


def reduce(tracer: SignTracer, call: Call) -> list[Fields]:
    axes = set(call.axes())
    fields = mixed(tracer, tracer.fields(call.x), axes)
    return [fields if call.get("keepdim", False) else [field.squeeze(tuple(axes)) for field in fields]]


def spatial(tracer: SignTracer, call: Call) -> list[Fields]:
    """Average pooling, interpolation and padding by what is there, along the last axes."""
    dimensions = next(int(letter) for letter in call.function._schema.name[::-1] if letter.isdigit())
    axes = set(range(call.x.dim() - dimensions, call.x.dim()))
    return [mixed(tracer, tracer.fields(call.x), axes) for _ in call.results]


def cumulate(tracer: SignTracer, call: Call) -> list[Fields]:
    return [mixed(tracer, tracer.fields(call.x), set(call.axes()))]


def batch_norm(tracer: SignTracer, call: Call) -> list[Fields]:
    """The sign of a unit is that of gain and bias; what is normalised keeps its own."""
    x, weight, bias, mean, variance = call.args[:5]
    for tensor in (x, mean, variance):
        tracer.hold_all(tracer.fields(tensor) if tensor is not None else [])
    fields = equal(tracer, [labelled(tracer, tensor) for tensor in (weight, bias) if tensor is not None], 1)
    return [[field.view(1, -1, *[1] * (x.dim() - 2)) for field in fields]]


def padding(tracer: SignTracer, call: Call) -> list[Fields]:
    return (pad if call.get("value", 0) in (0, None) else minds)(tracer, call)


def create(tracer: SignTracer, call: Call) -> list[Fields]:
    for result in call.results:
        if not result.any():
            tracer.zeros[id(result)] = result
    return [[] for _ in call.results]


def expand(tracer: SignTracer, call: Call) -> list[Fields]:
    return moves(tracer, call, lambda *given: moved(*given, tracer.fields(call.x)))


def moves(tracer: SignTracer, call: Call, rule=move) -> list[Fields]:
    if tracer.is_zero(call.x):
        tracer.note_zeros(call)
    return rule(tracer, call)


SIGN_RULES = {
    **{name: moves if rule is move else rule for name, rule in MOVES.items()},
    **named(expand, "expand repeat"),
    **named(minds, "pointwise"),
    **named(odd, "tanh sin sinh asin asinh atan atanh tan erf erfinv neg sign sgn trunc round hardshrink softshrink"),
    **named(odd, "clone _to_copy positive reciprocal"),
    **named(even, "abs square cos cosh"),
    **named(power, "pow"),
    **named(clamp, "clamp hardtanh"),
    **named(total, "add sub"),
    **named(choice, "where"),
    **named(masked_fill, "masked_fill"),
    **named(copy, "copy"),
    **named(product, "mul div"),
    **named(addcmul, "addcmul"),
    **named(matmul, "mm bmm addmm baddbmm"),
    **named(linear, "linear"),
    **named(convolution, "convolution"),
    **named(batch_norm, "_native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm"),
    **named(reduce, "mean sum"),
    **named(cumulate, "cumsum"),
    **named(spatial, "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d"),
    **named(spatial, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d"),
    **named(spatial, "upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d"),
    **named(spatial, "replication_pad2d replication_pad3d"),
    **named(padding, "constant_pad_nd"),
    **named(create, "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full"),
    **named(create, "new_empty scalar_tensor fill zero"),
    **named(gather, "gather"),
    **named(im2col, "im2col"),
    **named(col2im, "col2im"),
    **named(embedding, "embedding"),
}


# --- which families of units may be negated


def find_negated(axes: Mapping[str, tuple], sizes: list[int], signs: Mapping[tuple[str, int], list[int]]) -> Negated:
    """Families each of whose units has a sign of its own, and the places that it reaches, the same for all of them.

    Where a unit has several signs, that of the most places is taken.

    Args:
        axes: Family and member of each entry of each axis of each tensor.
        sizes: Of the families.
        signs: The sign of each entry along an axis of a tensor; 0 is plus.
    """
    owner: dict[int, tuple[int, int]] = {}  # of a sign: family and member, or what is none if it is of several
    places: dict[int, set] = defaultdict(set)
    for name, found in axes.items():
        for number, axis in enumerate(found):
            rank: dict[tuple[int, int], int] = defaultdict(int)
            for unit, sign in zip(zip(axis.family, axis.member, strict=True), signs[name, number], strict=True):
                if sign:
                    owner[sign] = unit if owner.get(sign, unit) == unit else (-1, -1)
                    places[sign].add((name, number, rank[unit]))
                rank[unit] += 1
    patterns: dict[tuple[int, int], set[frozenset]] = defaultdict(set)
    for sign, unit in owner.items():
        if unit[0] >= 0:
            patterns[unit].add(frozenset(places[sign]))
    negated = {}
    for family, size in enumerate(sizes):
        for pattern in sorted(patterns.get((family, 0), ()), key=lambda found: (-len(found), sorted(found))):
            if all(pattern in patterns.get((family, member), ()) for member in range(size)):
                negated[family] = set(pattern)
                break
    return negated
