"""Watching operations: which units the entries of every tensor belong to.

Every entry of every tensor belongs to *units*: a channel, a hidden neuron, an attention head. A *field* of a tensor is
an int64 tensor that broadcasts to its shape and names a unit for each entry; an axis on which no field of a tensor
varies holds still. At first every axis of every parameter has units of its own. Each ATen operation then says which
units must be the same: a sum unites the units of its operands entry by entry, a contraction those of the two axes that
it sums over. Operations that only move entries (views, slices, transposes) are applied to the fields themselves. What
mixes the axes that a field varies over keeps the outermost of them, so of the axes (heads, width of a head) the heads.
Unit 0 never moves.

Operations are watched as they run rather than in an exported graph: they are the same, and modules that cannot be
exported can be traced.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastws.symmetry.units import MET, Units

Fields = list[Tensor]


def moving(field: Tensor) -> list[int]:
    """The axes that a field varies over."""
    return [axis for axis, size in enumerate(field.shape) if size > 1]


@dataclass
class Call:
    """One ATen operation, its arguments and its result."""

    function: torch._ops.OpOverload
    args: tuple
    kwargs: dict
    output: Tensor | tuple
    before: tuple[torch.Size, tuple[int, ...], int] | None  # size, strides and offset of the first argument

    @property
    def x(self) -> Tensor:
        """The first argument."""
        return self.args[0]

    @property
    def spoken(self) -> str:
        """The operation as users of torch call it."""
        name = base_name(self.function).strip("_")
        return SPOKEN.get(name, name)

    @property
    def results(self) -> list[Tensor]:
        return list(tensors_in(self.output))

    def get(self, name: str, default=None):
        """An argument by its name in the schema."""
        names = [argument.name for argument in self.function._schema.arguments]
        return (dict(zip(names, self.args, strict=False)) | self.kwargs).get(name, default)

    def axes(self) -> list[int]:
        """The axes of the first argument that ``dim`` names; all of them where it is absent or empty."""
        axes = self.get("dim")
        axes = [axes] if isinstance(axes, int) else axes
        return [axis % max(1, self.x.dim()) for axis in axes] if axes else list(range(self.x.dim()))


SPOKEN = {
    "select": "an index",
    "slice": "a slice",
    "index": "a list of indices",
    "index_put": "a list of indices",
    "unbind": "unbind or a loop",
    "fft_c2c": "fft",
    "fft_r2c": "rfft",
    "fft_c2r": "irfft",
}


def base_name(function: torch._ops.OpOverload) -> str:
    """``relu`` for ``aten::relu_``: what an operation computes, in place or not."""
    return function._schema.name.removeprefix("aten::").rstrip("_")


def place_of(args: tuple) -> tuple[torch.Size, tuple[int, ...], int] | None:
    """Size, strides and offset of the first argument, which an operation in place may change."""
    if args and isinstance(args[0], Tensor) and args[0].layout == torch.strided:
        return args[0].shape, args[0].stride(), args[0].storage_offset()
    return None


def tensors_in(tree) -> Iterable[Tensor]:
    """The tensors in nested containers, and in objects that are mappings or sequences."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


class Grouped(NamedTuple):
    """A grouped convolution: the fields of its weight, its groups, and their input and output channels."""

    weight: Fields
    groups: int
    inputs: int
    outputs: int

    @property
    def freer_inside(self) -> bool:
        """Whether channels inside groups have far more permutations than the groups; if not, groups are the units."""
        inside = math.lgamma(self.inputs + 1) + self.groups * math.lgamma(self.outputs + 1)
        return inside > 8 * math.lgamma(self.groups + 1)


class Tracer(TorchDispatchMode):
    """Runs every operation as it is and gives its results fields.

    Attributes:
        rules: For the name of an operation, the function that gives the fields of its results.
        passing: Names of operations that hand entries on: what they are given is not reached by that.
        within: Numbers of the grouped convolutions, in the order in which they run, whose channels move inside their
            groups; in all others whole groups move.
    """

    def __init__(self, rules: Mapping[str, Callable[["Tracer", Call], list[Fields]]], passing=(), within=()):
        super().__init__()
        self.rules, self.passing, self.within = rules, frozenset(passing), frozenset(within)
        self.units = Units()
        self.labels: dict[int, tuple[Tensor, Fields]] = {}  # by id; the tensor is kept so that its id stays its own
        self.seen: dict[int, Tensor] = {}  # by id, every field that some tensor has
        self.uniform: set[int] = set()  # ids of constants that hold one number everywhere
        self.loose: set[int] = set()  # ids of parts of constants, whose units are not those of the whole
        self.given: dict[int, Tensor] = {}  # by id, the inputs and what follows from them
        self.traps: dict[int, tuple[Tensor, list[tuple[Tensor, str]]]] = {}  # by id, what must stay once it is read
        self.sharing: dict[int, dict[int, Tensor]] = {}  # by address of their memory and by id, tensors with labels
        self.layers: dict[int, tuple[Tensor, int, list[Fields]]] = {}  # by id, stacks: their axis and what lies on it
        self.random = False  # whether an operation drew random numbers
        self.grouped: list[Grouped] = []  # the grouped convolutions that ran

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default imports the compiler of torch, which takes seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = base_name(function)
        rule = self.rules.get(name)
        if rule is None and torch.Tag.pointwise in function.tags:
            rule = self.rules["pointwise"]
        if rule is None and function._can_decompose():
            with self:
                output = function.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        operands = list(tensors_in((args, kwargs)))
        taken = self.layers_of(name, args)
        for tensor in operands:
            if taken is None or tensor is not args[0]:
                self.spring(tensor)
        self.random |= torch.Tag.nondeterministic_seeded in function.tags
        before = place_of(args)
        call = Call(function, args, kwargs, function(*args, **kwargs), before)
        if rule is not self.rules["pointwise"] and name not in self.passing:
            self.reach(operands)
        for tensor in call.results:
            self.uniform.discard(id(tensor))
        if call.results:
            # a rule may leave trailing results without fields
            results = (rule or not_understood)(self, call) if taken is None else taken
            for tensor, fields in zip(call.results, results, strict=False):
                self.label(tensor, fields)
        if any(id(tensor) in self.given for tensor in operands):
            self.given |= {id(tensor): tensor for tensor in call.results}
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for part in tensors_in(call.get(argument.name)):
                    self.distrust_around(part, f"{call.spoken} changes a part of it in place")
        return call.output

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Notes that an operation computes with tensors."""
        for tensor in tensors:
            for field in self.raw(tensor):
                self.reach_units(field)

    def reach_units(self, units: Tensor) -> None:
        self.units.reached[units] = True

    def stack(self, tensor: Tensor, axis: int, layers: list[Fields]) -> Fields:
        """Fields of tensors that lie side by side on an axis, which need not be united before they are read as one."""
        self.layers[id(tensor)] = (tensor, axis, layers)
        return []

    def layers_of(self, name: str, args: tuple) -> list[Fields] | None:
        """The fields of single layers that an operation takes from a stack, or None."""
        if name not in ("select", "unbind") or id(args[0]) not in self.layers:
            return None
        tensor, axis, layers = self.layers[id(args[0])]
        if (args[1] if len(args) > 1 else 0) % tensor.dim() != axis:
            return None
        return layers if name == "unbind" else [layers[args[2]]]

    def spring(self, tensor: Tensor) -> None:
        """Unites and holds what must move alike or stay once a tensor is read."""
        _, axis, layers = self.layers.pop(id(tensor), (tensor, 0, ()))
        if layers:
            shape = [1 if a == axis else size for a, size in enumerate(tensor.shape)]
            self.label(tensor, self.join(([field.unsqueeze(axis) for field in fields], shape) for fields in layers))
        _, held = self.traps.pop(id(tensor), (tensor, ()))
        for field, reason in held:
            for changed in (field, *self.raw(tensor)):
                self.units.hold(changed, reason)

    def trap(self, tensor: Tensor, fields: Fields, reason: str) -> None:
        """Has units held as soon as a tensor is read."""
        self.traps.setdefault(id(tensor), (tensor, []))[1].extend((field, reason) for field in fields)

    def distrust_around(self, part: Tensor, reason: str) -> None:
        """After a change of a part of a tensor in place: the units of both stay if the tensor is read again."""
        for tensor in list(self.sharing.get(part.untyped_storage().data_ptr(), {}).values()):
            self.uniform.discard(id(tensor))
            larger = tensor.numel() > part.numel() and 0 not in tensor.stride()
            if tensor is not part and (larger or id(tensor) in self.loose):
                self.trap(tensor, [*self.raw(tensor), *self.raw(part)], reason)

    def label(self, tensor: Tensor, fields: Fields) -> None:
        self.labels[id(tensor)] = (tensor, fields)
        if tensor.layout == torch.strided:
            self.sharing.setdefault(tensor.untyped_storage().data_ptr(), {})[id(tensor)] = tensor
        self.seen |= {id(field): field for field in fields}

    def fresh(self, shape: Iterable[int], axes: Iterable[int] | None = None) -> Fields:
        """Units of their own for each axis, or for ``axes``."""
        shape = list(shape)
        axes = range(len(shape)) if axes is None else axes
        return [
            self.units.new(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))])
            for axis in axes
            if shape[axis] > 1
        ]

    def raw(self, tensor: Tensor) -> Fields:
        _, fields = self.labels.get(id(tensor), (tensor, []))
        return fields

    def fields(self, tensor: Tensor) -> Fields:
        """The fields of a tensor in their present state, those that vary over the outermost axis first."""
        return sorted(self.simplify(self.raw(tensor)), key=lambda field: moving(field)[0])

    def simplify(self, fields: Fields) -> Fields:
        """Fields without the axes along which they name one unit; they keep the names that they had at first."""
        simple = []
        for field in fields:
            units = self.units.find(field)
            for axis in moving(field):
                first = units.narrow(axis, 0, 1)
                if units.stride(axis) == 0 or (units == first).all():
                    units, field = first, field.narrow(axis, 0, 1)
            if moving(field):
                simple.append(field)
        return simple

    def still(self, field: Tensor, axes: Iterable[int], reason: str = MET) -> Fields:
        """What is left of a field when nothing may move along ``axes``."""
        left = set(moving(field)) - set(axes)
        if not left:
            self.units.hold(field, reason)
            return []
        for axis in set(moving(field)) - left:
            self.units.unite(field, field.narrow(axis, 0, 1))
        return self.simplify([field])

    def outermost(self, fields: Fields, axes: Iterable[int]) -> Fields:
        """Fields for an operation that mixes the entries along ``axes``: none varies over those and others.

        The outermost axis is kept; but if that is the one that is mixed, as of channels in two halves that are summed,
        the inner ones are, if they have more units.
        """
        axes, result = set(axes), []
        for field in fields:
            first, *others = moving(field)
            if not (others and axes & {first, *others}):
                result.append(field)
            elif axes & {*others} or field.numel() <= field.shape[first] ** 2:
                result += self.still(field, others)
            else:
                result += self.still(field, [first])
        return result

    def without(self, fields: Fields, axes: Iterable[int], reason: str) -> Fields:
        """Fields for an operation that forbids moving entries along ``axes``."""
        axes = set(axes)
        return [
            rest
            for field in fields
            for rest in (self.still(field, axes, reason) if axes & {*moving(field)} else [field])
        ]

    def meet(self, left: Fields, left_shape: list[int], right: Fields, right_shape: list[int]) -> Fields:
        """Fields of an entry-wise function of two tensors whose shapes broadcast, of equal length."""
        wide = [{axis for axis, size in enumerate(shape) if size > 1} for shape in (left_shape, right_shape)]
        result, free = [], list(right)
        for field in left:
            partners = [other for other in free if set(moving(field)) & set(moving(other))]
            if partners:
                self.units.unite(field, partners[0])
                free = [other for other in free if other is not partners[0]]
                result += self.simplify([torch.broadcast_tensors(field, partners[0])[0]])
            else:
                result += self.still(field, wide[1]) if wide[1] & {*moving(field)} else [field]
        for field in free:
            result += self.still(field, wide[0]) if wide[0] & {*moving(field)} else [field]
        return self.simplify(result)

    def join(self, operands: Iterable[tuple[Fields, Iterable[int]]]) -> Fields:
        """Fields of an entry-wise function of tensors, given by fields and shapes, that broadcast."""
        operands = [(fields, list(shape)) for fields, shape in operands]
        length = max((len(shape) for _, shape in operands), default=0)
        result, extent = [], [1] * length
        for fields, shape in operands:
            missing = length - len(shape)
            shape = [1] * missing + shape
            fields = [field.view([1] * missing + list(field.shape)) for field in fields]
            result = self.meet(result, extent, fields, shape)
            extent = [max(sizes) for sizes in zip(extent, shape, strict=True)]
        return result

    def reduce(self, fields: Fields, axes: Iterable[int], keep: bool = False) -> Fields:
        """Fields after a sum over ``axes``, which stay as axes of size 1 or go."""
        axes = set(axes)
        left = [field for field in self.outermost(fields, axes) if not axes & {*moving(field)}]
        return left if keep else [field.squeeze(tuple(axes)) for field in left]


def not_understood(tracer: Tracer, call: Call) -> list[Fields]:
    for tensor in tensors_in((call.args, call.kwargs)):
        for field in tracer.fields(tensor):
            tracer.units.hold(field, f"{call.spoken} is not understood")
    return [[] for _ in call.results]
