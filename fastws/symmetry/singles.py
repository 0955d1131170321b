"""Signs of axes that have one entry: layers of one unit, whose permutations move nothing but which may be negated.

Fields (``tracer.py``) of a tensor name here signs of the whole tensor, which are multiplied; they begin with a sign for
each axis of a parameter that has one entry and may be one of units, the first two. Operations mind them as in
``signs.py``. Where the product of several signs has to be plus, two are the same and more are plus.
"""

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor

from fastws.symmetry.notes import Axis
from fastws.symmetry.rules import named
from fastws.symmetry.signs import MINDS, Negated, is_odd_clamp
from fastws.symmetry.tracer import Call, Fields, Tracer, tensors_in

Signs = dict[tuple[str, int], int]  # tensor and axis: the number of its sign; 0 is plus


class SingleTracer(Tracer):
    """Gives signs to axes of one entry; see ``Tracer``."""

    def __init__(self):
        super().__init__(SINGLE_RULES)
        self.axis_of: dict[int, int] = {}  # by id of a field of a parameter

    def fresh(self, shape: Iterable[int], axes: Iterable[int] | None = None) -> Fields:
        found = []
        for axis, size in enumerate(list(shape)[:2]):
            if size == 1:
                found.append(self.units.new(1))
                self.axis_of[id(found[-1])] = axis
        return found

    def fields(self, tensor: Tensor) -> Fields:
        return self.cancelled(self.raw(tensor))

    def cancelled(self, fields: Fields) -> Fields:
        """Fields without those that name plus, or one sign twice."""
        left: dict[int, Tensor] = {}
        for field in fields:
            sign = int(self.units.find(field))
            if left.pop(sign, None) is None and sign > 0:
                left[sign] = field
        return list(left.values())

    def equate(self, left: Fields, right: Fields) -> None:
        rest = self.cancelled([*left, *right])
        if len(rest) == 2:
            self.units.unite(*rest)
        else:
            self.hold(rest)

    def hold(self, fields: Fields) -> None:
        for field in fields:
            self.units.hold(field, MINDS)

    def along(self, tensor: Tensor, axis: int) -> tuple[Fields, Fields]:
        """The field of a parameter's axis, and its others."""
        raw = self.raw(tensor)
        own = [field for field in raw if self.axis_of.get(id(field)) == axis]
        return own, [field for field in raw if self.axis_of.get(id(field)) != axis]


def minds(tracer: SingleTracer, call: Call) -> list[Fields]:
    for tensor in tensors_in((call.args, call.kwargs)):
        tracer.hold(tracer.fields(tensor))
    return [[] for _ in call.results]


def carry(tracer: SingleTracer, call: Call) -> list[Fields]:
    return [tracer.fields(call.x) for _ in call.results]


def even(tracer: SingleTracer, call: Call) -> list[Fields]:
    return [[] for _ in call.results]


def power(tracer: SingleTracer, call: Call) -> list[Fields]:
    exponent = call.args[1]
    whole = isinstance(call.x, Tensor) and isinstance(exponent, int | float) and exponent % 1 == 0
    return ((carry if exponent % 2 else even) if whole else minds)(tracer, call)


def clamp(tracer: SingleTracer, call: Call) -> list[Fields]:
    return (carry if is_odd_clamp(call) else minds)(tracer, call)


def padding(tracer: SingleTracer, call: Call) -> list[Fields]:
    return (carry if call.get("value", 0) in (0, None) else minds)(tracer, call)


def total(tracer: SingleTracer, call: Call) -> list[Fields]:
    left, right = call.args[:2]
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return minds(tracer, call)
    tracer.equate(tracer.fields(left), tracer.fields(right))
    return [tracer.fields(left)]


def product(tracer: SingleTracer, call: Call) -> list[Fields]:
    """Products and quotients, and those of matrices."""
    factors = [tracer.fields(x) for x in call.args[:2] if isinstance(x, Tensor)]
    return [tracer.cancelled(sum(factors, []))]


def contract(tracer: SingleTracer, x: Tensor, weight: Tensor, bias: Tensor | None, axis: int, groups: int) -> Fields:
    """A layer that sums over an axis of its weight: one input unit has there the sign that it has in the input."""
    own, rest = tracer.along(weight, axis)
    given = tracer.fields(x)
    if own and groups == 1:
        tracer.equate(given, own)
        given = []
    tracer.hold(own if groups > 1 else [])
    result = tracer.cancelled([*given, *rest])
    if bias is not None:
        tracer.equate(result, tracer.fields(bias))
    return tracer.cancelled(result)


def linear(tracer: SingleTracer, call: Call) -> list[Fields]:
    x, weight, bias = (*call.args, None)[:3]
    return [contract(tracer, x, weight, bias, 1, 1)]


def convolution(tracer: SingleTracer, call: Call) -> list[Fields]:
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    return [contract(tracer, x, weight, bias, 0 if transposed else 1, groups)]


def batch_norm(tracer: SingleTracer, call: Call) -> list[Fields]:
    """The sign of a unit is that of gain and bias; what is normalised keeps its own."""
    x, weight, bias, mean, variance = call.args[:5]
    for tensor in (x, mean, variance):
        tracer.hold(tracer.fields(tensor) if tensor is not None else [])
    gain, shift = (tracer.fields(tensor) if tensor is not None else [] for tensor in (weight, bias))
    tracer.equate(gain, shift)
    return [tracer.cancelled(gain)]


SINGLE_RULES = {
    **named(minds, "pointwise"),
    **named(carry, "view _unsafe_view _reshape_alias permute transpose t numpy_T unsqueeze squeeze select slice alias"),
    **named(carry, "split split_with_sizes unsafe_split unsafe_chunk chunk unbind flip roll detach expand repeat"),
    **named(carry, "tanh sin sinh asin asinh atan atanh tan erf erfinv neg sign sgn trunc round hardshrink softshrink"),
    **named(carry, "clone _to_copy positive reciprocal mean sum cumsum"),
    **named(carry, "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d"),
    **named(carry, "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d"),
    **named(even, "abs square cos cosh"),
    **named(power, "pow"),
    **named(clamp, "clamp hardtanh"),
    **named(padding, "constant_pad_nd"),
    **named(total, "add sub"),
    **named(product, "mul div mm bmm"),
    **named(linear, "linear"),
    **named(convolution, "convolution"),
    **named(batch_norm, "_native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm"),
}


def add_singles(
    axes: dict[str, tuple[Axis, ...]], sizes: list[int], negated: Negated, signs: Signs
) -> tuple[dict[str, tuple[Axis, ...]], list[int], Negated]:
    """Axes, sizes and places of families, and one more family for each sign of axes of one entry."""
    axes, sizes, negated = dict(axes), list(sizes), dict(negated)
    places = defaultdict(list)
    for (name, axis), sign in signs.items():
        if sign > 0 and axes[name][axis].family == [-1]:
            places[sign].append((name, axis))
    for found in places.values():
        family = len(sizes)
        sizes.append(1)
        negated[family] = {(name, axis, 0) for name, axis in found}
        for name, axis in found:
            axes[name] = tuple(Axis([family], [0]) if k == axis else a for k, a in enumerate(axes[name]))
    return axes, sizes, negated
