"""All lines of a module: looked for in every group of its symmetry."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastws.group.finding import Memory, find_linear, hold
from fastws.group.function import Function
from fastws.group.inner import find_inner
from fastws.group.lines import Inner, Linear, Matrices
from fastws.group.places import Space, across, find_pieces, inside
from fastws.group.shifts import find_carried, find_free
from fastws.group.streams import find_rotation
from fastws.symmetry.symmetry import Symmetry


def find_lines(module: nn.Module, symmetry: Symmetry, function: Function) -> tuple[list, list[str]]:
    """The lines that hold, and sentences about what does not or could not be tried."""
    offsets = {
        f"{name}.running_var".removeprefix("."): part.eps
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm)
    }
    memories = Memory(trusting=True), Memory(trusting=True)
    lines, failed = search(symmetry, function, offsets, *memories)
    if not hold(function, [line for memory in memories for line in memory.recalled]):
        lines, failed = search(symmetry, function, offsets, Memory(), Memory())
    return numbered(without_smaller(symmetry, lines)), failed


def search(
    symmetry: Symmetry, function: Function, offsets: Mapping[str, float], multiplied: Memory, permuted: Memory
) -> tuple[list, list[str]]:
    """All lines, and what failed; the memories say what was found in layers that are alike."""
    lines: list = []
    failed: list[str] = []
    for group, pieces in enumerate(find_pieces(symmetry)):
        if pieces is None:
            failed.append(
                f"lines of {symmetry.names[group]}: not looked for, because its units lie in parts of an axis"
            )
            continue
        for space in (across(symmetry, group, pieces), *inside(symmetry, group, pieces)):
            if len(space.places) > 1 and space.positions > 0:
                found = multiplied.recall(function, space)
                if not found:
                    found, failures = find_linear(function, space, offsets)
                    multiplied.keep(space, found)
                    failed += failures
                lines += found
        found, failures = find_inner(
            function, symmetry, group, pieces, [x for x in lines if isinstance(x, Linear)], permuted
        )
        lines += found
        failed += failures
        for look in (beside, streams):
            found, failures = look(function, symmetry, across(symmetry, group, pieces), lines)
            lines += found
            failed += failures
    return lines, failed


def streams(function: Function, symmetry: Symmetry, space: Space, lines: list) -> tuple[list, list[str]]:
    """Rotations of a group whose units no matrix moves."""
    mine = [line for line in lines if line.group == space.group and isinstance(line, Linear) and line.units == 1]
    if any(isinstance(line, Matrices) for line in mine):
        return [], []
    return find_rotation(function, space, mine)


def beside(function: Function, symmetry: Symmetry, space: Space, lines: list) -> tuple[list, list[str]]:
    """What may be added to biases of a group."""
    free = find_free(function, space, symmetry.shapes)
    for line in lines:
        if line.group == space.group:
            free += find_carried(function, line, symmetry.shapes)
    return free, []


def without_smaller(symmetry: Symmetry, lines: list[Linear]) -> list[Linear]:
    """Lines without those all of whose changes a line with more freedom can make too."""

    def signed(line: Linear) -> tuple:
        return line.group, frozenset((part.place.name, part.power > 0) for part in line.parts)

    alike = defaultdict(list)
    others = [line for line in lines if not isinstance(line, Linear)]
    linear = [line for line in lines if isinstance(line, Linear)]
    inside_units = {signed(line) for line in linear if line.units > 1 and not isinstance(line, Inner)}
    for line in linear:
        if line.units == 1 and signed(line) in inside_units:
            continue
        parts = frozenset((part.place.name, part.place.axis, part.power > 0) for part in line.parts)
        alike[isinstance(line, Inner), parts].append(line)
    kept = others
    for some in alike.values():
        larger: list[tuple[Linear, dict[str, Tensor]]] = []
        for line in sorted(some, key=freedom, reverse=True):
            touched = touched_by(symmetry, line)
            if not any(all((mine <= theirs[key]).all() for key, mine in touched.items()) for _, theirs in larger):
                larger.append((line, touched))
        kept += [line for line, _ in larger]
    order = {id(line): number for number, line in enumerate(lines)}
    return sorted(kept, key=lambda line: order[id(line)])


def freedom(line: Linear) -> int:
    """How many numbers an element of a line has."""
    return line.units * line.positions ** (2 if isinstance(line, Matrices) else 1)


def touched_by(symmetry: Symmetry, line: Linear) -> dict[tuple[str, bool], Tensor]:
    """Of each tensor and direction which entries a line changes."""
    touched: dict[tuple[str, bool], Tensor] = {}
    for place, power, _ in line.parts:
        before = touched.get((place.name, power > 0), torch.zeros(symmetry.shapes[place.name]))
        touched[place.name, power > 0] = place.put(before, torch.ones_like(place.get(before)))
    return touched


def numbered(lines: list[Linear]) -> list[Linear]:
    """Lines with names of their own: a number is put behind a name that an earlier line of the same kind has."""
    seen: Counter[str] = Counter()
    result = []
    for line in lines:
        seen[line.key] += 1
        count = seen[line.key]
        result.append(line if count == 1 else replace(line, name=f"{line.name} ({count})"))
    return result
