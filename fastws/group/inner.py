"""Permutations inside units: channels inside the groups of a convolution, units of experts, queries that share a key.

Which places move together is not read off the graph but tried: places of one layer side are one candidate, and the
smallest sets of candidates are found whose positions may be permuted alike, in each unit for itself.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from fastws.group.finding import EXACT, Memory, tried
from fastws.group.function import Function
from fastws.group.lines import Inner, Linear, Matrices, Pairs, Part
from fastws.group.places import Piece, Place, Space, free_axes
from fastws.symmetry.symmetry import Symmetry

MOST = 10  # candidates of which all sets are tried


def find_inner(
    function: Function,
    symmetry: Symmetry,
    group: int,
    pieces: Sequence[Piece],
    lines: Sequence[Linear],
    memory: Memory,
) -> tuple[list[Linear], list[str]]:
    """The permutations inside the units of a group, where no line of matrices or pairs moves them."""
    found: list[Linear] = []
    failed = []
    taken = {
        (part.place.name, part.place.axis, line.positions)
        for line in lines
        if line.group == group and line.units > 1 and isinstance(line, Matrices | Pairs)
        for part in line.parts
    }
    for length, places in spaces(symmetry, group, pieces):
        places = [place for place in places if (place.name, place.axis, length) not in taken]
        sides = defaultdict(list)
        for place in places:
            sides[side(place)].append(place)
        if len(sides) > MOST:
            failed.append(
                f"permutations inside {symmetry.names[group]}: not looked for, {len(sides)} places are too many"
            )
        elif len(sides) > 1:
            space = Space(group, symmetry.sizes[group], length, tuple(places))
            known = memory.recall(function, space)
            found += known or memory.keep(space, smallest_sets(function, space, list(sides.values())))
    return found, failed


def spaces(symmetry: Symmetry, group: int, pieces: Sequence[Piece]) -> Iterator[tuple[int, list[Place]]]:
    """Numbers of positions, and the places that can have so many."""
    pieces = [piece for piece in pieces if piece.even]
    blocks = {piece.block for piece in pieces if piece.block > 1}
    free = [(piece, axis) for piece in pieces for axis in free_axes(symmetry, piece)]
    lengths = {symmetry.shapes[piece.name][axis] for piece, axis in free if len(symmetry.shapes[piece.name]) > 2}
    for length in sorted((blocks | lengths) - {1}):
        whole = [place(symmetry, group, piece, piece.axis, length, 1) for piece in pieces if piece.block == length]
        for piece, axis in free:
            parts, left = divmod(symmetry.shapes[piece.name][axis], length)
            if not left and parts == 1:
                whole.append(place(symmetry, group, piece, axis, length, 1))
            elif not left and parts == 2:
                whole += [place(symmetry, group, piece, axis, length, parts, order) for order in (False, True)]
        yield length, whole
    for larger, smaller in itertools.permutations(sorted(blocks), 2):
        if larger % smaller == 0:
            held, length = [piece for piece in pieces if piece.block == larger], larger // smaller
            yield length, [place(symmetry, group, piece, piece.axis, length, smaller, True) for piece in held]


def place(
    symmetry: Symmetry, group: int, piece: Piece, axis: int, length: int, parts: int, first: bool = False
) -> Place:
    """Positions inside the units of a piece, along its own axis or another, which consists of ``length * parts``.

    ``first`` tells whether the positions are counted first, or else the parts.
    """
    shape, size = symmetry.shapes[piece.name], symmetry.sizes[group]
    cut = [length, parts] if first else [parts, length]
    seen, units, positions = [], 0, 0
    for number, extent in enumerate(shape):
        if number == piece.axis:
            units = len(seen)
            inside = cut if axis == piece.axis else [piece.block]
            seen += [extent // piece.block, *inside]
        elif number == axis:
            seen += cut
        else:
            seen.append(extent)
        if number == axis:
            positions = len(seen) - (2 if first else 1)
    begin = piece.first // piece.block
    start, stop = [0] * len(seen), list(seen)
    start[units], stop[units] = begin, begin + size
    read = piece.reads if axis == piece.axis else axis == 1
    return Place(piece.name, tuple(seen), tuple(start), tuple(stop), units, positions, axis, read)


def side(place: Place) -> tuple:
    """What surely moves alike: a weight's rows with its bias, all vectors of a norm."""
    layer = re.sub(r"[._]?(weight|bias|running_mean|running_var)$", "", place.name)
    return layer, place.axis > 0, place.positions - place.units if place.axis > 0 else 0


def smallest_sets(function: Function, space: Space, sides: list[list[Place]]) -> list[Linear]:
    """Lines of permutations for the smallest sets of sides that hold, none of which shares a side with another."""
    found: list[Linear] = []
    left = list(range(len(sides)))
    for count in range(2, len(sides) + 1):
        for chosen in itertools.combinations(range(len(sides)), count):
            if not set(chosen) <= set(left):
                continue
            parts = tuple(Part(place, 1) for number in chosen for place in sides[number])
            if len({(part.place.name, part.place.axis) for part in parts}) < len(parts):
                continue
            line = Inner("P", parts[0].place.name, space.group, space.units, space.positions, parts)
            if tried(function, line) < EXACT:
                found.append(line)
                left = [number for number in left if number not in chosen]
    return found
