"""Trace: which axes of which tensors carry the same units, found by watching one forward pass.

``tracer.py`` tells what units are and watches. In the end two units may change places if they occur equally often in
every field of every tensor: the first entry of the one goes to where the first of the other was, the second to the
second, and so on.
"""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastws.layout.roles import storage_key
from fastws.symmetry.tracer import Call, Fields, Tracer, moving, tensors_in


class Axis(NamedTuple):
    """The units along one axis of a parameter.

    ``family[i]`` is the number of the set of units that may change places with the unit of entry i, or -1 where the
    entry must stay; ``member[i]`` is the number of the unit in that set.
    """

    family: list[int]
    member: list[int]


class Traced(NamedTuple):
    axes: dict[str, tuple[Axis, ...]]  # of every floating tensor of the state dict
    sizes: list[int]  # of the families
    notes: dict[tuple[str, int], str]  # tensor and axis that an operation holds still, and why


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
            if axis in labels and not units.any():
                notes[name, axis] = tracer.units.reason(int(labels[axis][0]))
            for unit, kind in zip(units.tolist(), kinds, strict=True):
                if kind >= 0 and unit not in members:
                    number = numbers.setdefault(kind, len(numbers))
                    sizes += [0] * (number == len(sizes))
                    members[unit] = sizes[number]
                    sizes[number] += 1
            found.append(Axis([numbers.get(k, -1) for k in kinds], [members.get(u, -1) for u in units.tolist()]))
        axes[name] = tuple(found)
    return Traced(axes, sizes, {place: note for place, note in notes.items() if note})


def in_double(module: nn.Module, inputs: tuple) -> tuple[nn.Module, tuple]:
    """A copy of a module in eval mode and float64, where no library fuses operations, and inputs for it."""
    inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return copy.deepcopy(module).to(torch.float64).eval(), inputs


def trace(module: nn.Module, inputs: tuple, rules: Mapping[str, Callable[[Tracer, Call], list[Fields]]]) -> Traced:
    """Traces one forward pass of a copy of a module in eval mode.

    Args:
        module: Any module; it is not changed.
        inputs: Arguments of its forward, on its device; small ones do.
        rules: For the name of an ATen operation, the function that gives the fields of its results.

    Raises:
        ValueError: If the module returns no tensor.
    """
    ties = {name: storage_key(name, tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    module, inputs = in_double(module, inputs)
    state = {k: v for k, v in module.state_dict(keep_vars=True).items() if v.is_floating_point() and v.numel() > 0}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides a whole encoder layer in one operation
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            tracer = Tracer(rules)
            parameters = label_parameters(tracer, state, ties)
            with tracer:
                output = module(*inputs)
            results = list(tensors_in(output))
            if not results:
                raise ValueError(f"trace: module must return tensors, got {type(output).__name__}")
            for field in (field for tensor in results for field in tracer.fields(tensor)):
                tracer.units.hold(field)
            used = {id(field) for tensor in state.values() if id(tensor) in tracer.used for field in tracer.raw(tensor)}
            for field in (field for fields in parameters.values() for field in fields if id(field) not in used):
                tracer.units.hold(field, "the example inputs do not reach it")
            return collect(tracer, parameters, {name: tuple(tensor.shape) for name, tensor in state.items()})
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


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
