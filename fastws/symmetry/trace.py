"""Trace: which axes of which tensors carry the same units, found by watching one forward pass.

``tracer.py`` tells what units are and watches. In the end two units may change places if they occur equally often in
every field of every tensor: the first entry of the one goes to where the first of the other was, the second to the
second, and so on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastws.layout.roles import load_state, storage_key
from fastws.symmetry.copies import FAILURES, Example, fresh, fresh_example, plain_kernels, told
from fastws.symmetry.notes import UNREACHED, Axis, Note, note
from fastws.symmetry.segments import unstorable
from fastws.symmetry.signs import Negated, SignTracer, find_negated
from fastws.symmetry.singles import SingleTracer, add_singles
from fastws.symmetry.tracer import Call, Fields, Tracer, moving, tensors_in
from fastws.symmetry.units import OUTPUT


class Traced(NamedTuple):
    axes: dict[str, tuple[Axis, ...]]  # of every floating tensor of the state dict
    sizes: list[int]  # of the families
    notes: dict[tuple[str, int], Note]  # tensor and axis of which something stays, and why
    random: bool  # whether the module drew random numbers
    negated: Negated  # families whose units may be negated


def families(tracer: Tracer) -> Tensor:
    """For every unit, int64, the number of its family: units that lie alike in every field.

    A unit that was united with others has several names. Where it occurs more than once, the order of its names must
    agree with its family from field to field, or whatever moved them apart would notice a change of places.
    """
    units = tracer.units.find(torch.arange(len(tracer.units.parent)))
    places = torch.zeros_like(units)  # of each name: a hash of where it was seen
    for number, field in enumerate(tracer.seen.values()):
        names = field.flatten()
        order = units[names].argsort(stable=True)
        sorted_units = units[names[order]]
        first = torch.searchsorted(sorted_units, sorted_units)
        occurrence = torch.arange(len(names)) - first
        places.scatter_add_(0, names[order], mix(mix(torch.tensor(number)) + occurrence))
    together = torch.zeros_like(units).scatter_add_(0, units, mix(places))
    return together.unique(return_inverse=True)[1][units]


def mix(x: Tensor) -> Tensor:
    """A hash of int64 numbers (SplitMix64, Steele et al. 2014, with shifts that keep the sign)."""
    x = (x + 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 30)) * 0x14D049BB133111EB
    return x ^ (x >> 31)


def collect(tracer: Tracer, parameters: Mapping[str, Fields], shapes: Mapping[str, tuple[int, ...]]) -> Traced:
    """Numbers the families that can move, and the units in each, in the order in which the parameters name them."""
    family, find = families(tracer), tracer.units.find
    numbers: dict[int, int] = {}
    members: dict[int, int] = {}  # unit: its number in its family
    sizes: list[int] = []
    axes, notes = {}, {}
    for name, fields in parameters.items():
        labels = {moving(field)[0]: field.flatten() for field in fields}
        found = []
        for axis, size in enumerate(shapes[name]):
            units = find(labels[axis]) if axis in labels else torch.zeros(size, dtype=torch.int64)
            kinds = torch.where(units > 0, family[units], -1).tolist()
            for unit, kind in zip(units.tolist(), kinds, strict=True):
                if kind >= 0 and unit not in members:
                    number = numbers.setdefault(kind, len(numbers))
                    sizes += [0] * (number == len(sizes))
                    members[unit] = sizes[number]
                    sizes[number] += 1
            found.append(Axis([numbers.get(k, -1) for k in kinds], [members.get(u, -1) for u in units.tolist()]))
        axes[name] = tuple(found)
    for name, fields in parameters.items():
        for field in fields:
            (axis,) = moving(field)
            notes[name, axis] = note(tracer.units, field.flatten(), axes[name][axis], sizes)
    return Traced(axes, sizes, {place: found for place, found in notes.items() if found}, tracer.random, {})


def trace(
    module: nn.Module,
    examples: Sequence[Example],
    rules: Mapping[str, Callable[[Tracer, Call], list[Fields]]],
    passing,
    inside: bool = True,
) -> Traced:
    """Traces a forward pass for each example, in a copy of a module in eval mode.

    Args:
        module: Any module; it is not changed.
        examples: Arguments of its forward, on its device; small ones do.
        rules: For the name of an ATen operation, the function that gives the fields of its results.
        passing: Names of operations that hand entries on without computing with them.
        inside: Whether channels may move inside the groups of convolutions where that gives more permutations.

    Raises:
        ValueError: If the module does not run, or returns no tensor.
    """
    failures = []
    for double in (True, False):
        try:
            traced, *better = watch(module, examples, Tracer(rules, passing), double)
            found = [traced]
            for numbers in {frozenset(numbers) for numbers in better if inside} - {frozenset()}:
                found.append(watch(module, examples, Tracer(rules, passing, numbers), double)[0])
            traced = max(found, key=freedom)
            found = negated(module, examples, traced, double)
            axes, sizes, found = add_singles(traced.axes, traced.sizes, found, watch_singles(module, examples, double))
            return traced._replace(axes=axes, sizes=sizes, negated=found)
        except Returned as error:
            raise ValueError(f"trace: module must return tensors, got {error}") from None
        except FAILURES as error:
            failures.append(error)
    message = f"trace: module must run on the example inputs in eval mode, got {told(failures[-1])}"
    raise ValueError(message) from failures[-1]


class Returned(Exception):
    """A module returned something else than tensors."""


def freedom(traced: Traced) -> float:
    """The logarithm of the number of permutations that tables can hold."""
    dropped = unstorable(traced.axes, traced.sizes, traced.negated)
    return sum(math.lgamma(size + 1) for family, size in enumerate(traced.sizes) if family not in dropped)


def watch(
    module: nn.Module, examples: Sequence[Example], tracer: Tracer, double: bool
) -> tuple[Traced, list[int], list[int]]:
    """What a tracer finds, and the numbers of the grouped convolutions inside whose groups channels should move.

    First those of which nothing moves, then also those that have few groups of many channels.
    """
    parameters, shapes = run(module, examples, tracer, double)
    traced = collect(tracer, parameters, shapes)
    moved = {family for family, size in enumerate(traced.sizes) if size > 1}
    still = {id(f) for name, fields in parameters.items() for f in fields if not moved & {*traced.axes[name][0].family}}
    stuck = [n for n, conv in enumerate(tracer.grouped) if any(id(field) in still for field in conv.weight)]
    return traced, stuck, sorted({*stuck, *(n for n, conv in enumerate(tracer.grouped) if conv.freer_inside)})


def negated(module: nn.Module, examples: Sequence[Example], traced: Traced, double: bool) -> Negated:
    """The families whose units may be negated: none where signs are not understood."""
    try:
        return find_negated(traced.axes, traced.sizes, watch_signs(module, examples, double))
    except FAILURES:
        return {}


def watch_signs(module: nn.Module, examples: Sequence[Example], double: bool) -> dict[tuple[str, int], list[int]]:
    """The sign of each entry along each axis of each tensor; see ``signs.py``."""
    tracer = SignTracer()
    parameters, shapes = run(module, examples, tracer, double)
    signs = {(name, axis): [0] * size for name, shape in shapes.items() for axis, size in enumerate(shape)}
    for name, fields in parameters.items():
        for field in fields:
            signs[name, moving(field)[0]] = tracer.units.find(field).flatten().tolist()
    return signs


def watch_singles(module: nn.Module, examples: Sequence[Example], double: bool) -> dict[tuple[str, int], int]:
    """The sign of each axis of one entry; see ``singles.py``. None where signs are not understood, or no axis is so."""
    if not any(1 in tensor.shape[:2] for tensor in load_state(module).values() if tensor.is_floating_point()):
        return {}
    tracer = SingleTracer()
    try:
        parameters, _ = run(module, examples, tracer, double)
    except FAILURES:
        return {}
    return {
        (name, tracer.axis_of[id(field)]): int(tracer.units.find(field))
        for name, fields in parameters.items()
        for field in fields
    }


def run(
    module: nn.Module, examples: Sequence[Example], tracer: Tracer, double: bool
) -> tuple[dict[str, Fields], dict[str, tuple[int, ...]]]:
    """Runs a copy of a module before a tracer: the fields of its tensors, and their shapes."""
    ties = {name: storage_key(name, tensor) for name, tensor in load_state(module).items()}
    module, examples = fresh(module, double), [fresh_example(example, double) for example in examples]
    state = {k: v for k, v in load_state(module).items() if v.is_floating_point() and v.numel() > 0}
    with torch.inference_mode(), plain_kernels(double):
        parameters = label_parameters(tracer, state, ties)
        for example in examples:
            tracer.given |= {id(tensor): tensor for tensor in tensors_in(tuple(example))}
            with tracer, Leaving(tracer):
                output = module(*example.args, **example.kwargs)
            results = list(tensors_in(output))
            if not results:
                raise Returned(type(output).__name__)
            for tensor in results:
                tracer.spring(tensor)
                tracer.reach([tensor])
                for field in tracer.fields(tensor):
                    tracer.units.hold(field, OUTPUT)
        tracer.units.hold(tracer.units.unreached(), UNREACHED)
    return parameters, {name: tuple(tensor.shape) for name, tensor in state.items()}


class Leaving(TorchFunctionMode):
    """Holds the units of tensors that leave torch: what comes back is a constant to the tracer."""

    DOORS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__reduce_ex__)

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.DOORS:
            self.tracer.reach(args[:1])
            for field in self.tracer.fields(args[0]):
                self.tracer.units.hold(field, f"Tensor.{function.__name__} takes it out of torch")
        return function(*args, **(kwargs or {}))


def label_parameters(tracer: Tracer, state: Mapping[str, Tensor], ties: Mapping[str, tuple]) -> dict[str, Fields]:
    """Units of their own for every axis of every tensor; tensors of equal ``ties`` share them."""
    tied: dict[tuple, Fields] = {}
    parameters = {}
    for name, tensor in state.items():
        if ties[name] not in tied:
            tied[ties[name]] = tracer.fresh(tensor.shape)
        parameters[name] = tied[ties[name]]
        tracer.label(tensor, parameters[name])
    return parameters
