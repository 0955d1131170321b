"""Places: where the units of a group, or the positions inside each of its units, lie in tensors.

A *space* is ``[U, n]``: n positions in each of U units. The units of a group themselves are the space ``[1, n]``; the
dimensions inside attention heads are ``[heads, width]``. A *place* is a part of one tensor on which a space lies: it
can be seen as ``[U, n, m]``, with m other numbers that belong to each position.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.layout.roles import bias_name
from fastws.symmetry.segments import Segments
from fastws.symmetry.symmetry import Symmetry

MOST_CUTS = 8  # parts of a unit that are looked at one by one


class Place(NamedTuple):
    """A part of a tensor on which a space lies.

    Attributes:
        name: The tensor.
        shape: What the tensor is seen as.
        start: Of the part, along the axes of ``shape``.
        stop: Of the part, along the axes of ``shape``.
        units: The axis of the units; -1 if there is one unit.
        positions: The axis of the positions.
        axis: The axis of the tensor that the positions are part of.
        reads: Whether the tensor reads the units, as the columns of a weight do, or else writes them.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    units: int
    positions: int
    axis: int
    reads: bool

    def _seen(self, tensor: Tensor) -> Tensor:
        part = tensor.view(self.shape)[tuple(map(slice, self.start, self.stop))]
        part = part.unsqueeze(0) if self.units < 0 else part.movedim(self.units, 0)
        axis = self.positions + 1 if self.units < 0 else self.positions + (self.positions < self.units)
        return part.movedim(axis, 1)

    def get(self, tensor: Tensor) -> Tensor:
        """The part, float64 ``[U, n, m]``."""
        part = self._seen(tensor.detach().contiguous())
        return part.reshape(*part.shape[:2], -1).double()

    def put(self, tensor: Tensor, values: Tensor) -> Tensor:
        """A float64 copy of a tensor in which the part holds ``values``, ``[U, n, m]``."""
        changed = tensor.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        part = self._seen(changed)
        part.copy_(values.reshape(part.shape))
        return changed

    @property
    def extent(self) -> tuple[int, int, int]:
        """How many units, positions, and numbers that belong to each position: ``U, n, m``."""
        sizes = [b - a for a, b in zip(self.start, self.stop, strict=True)]
        units, positions = 1 if self.units < 0 else sizes[self.units], sizes[self.positions]
        return units, positions, math.prod(sizes) // max(1, units * positions)

    @property
    def numbers(self) -> int:
        """How many numbers belong to one position, ``m``."""
        return self.extent[2]


class Space(NamedTuple):
    """The positions of a space, the group of the symmetry that it is of, and the places on which it lies."""

    group: int
    units: int
    positions: int
    places: tuple[Place, ...]

    @property
    def shape(self) -> tuple:
        """The same for spaces that lie alike in layers whose names differ in numbers alone."""
        alike = (place._replace(name=re.sub(r"\d+", "#", place.name)) for place in self.places)
        return self.units, self.positions, tuple(alike)


class Piece(NamedTuple):
    """Where along an axis of a tensor a whole group lies: ``size`` units of ``block`` entries from ``first`` on."""

    name: str
    axis: int
    first: int
    block: int
    negated: bool
    reads: bool
    even: bool  # whether the whole axis can be cut into blocks of this size, the first of the units among them


def find_pieces(symmetry: Symmetry) -> list[list[Piece] | None]:
    """Of each group all its pieces; None where some axis holds the group in parts that do not follow each other."""
    found: list[list[Piece] | None] = [[] for _ in symmetry.sizes]
    for name, axes in symmetry.axes.items():
        if name in symmetry.aliases:
            continue
        for axis in range(len(axes)):
            for group, piece in pieces_of(symmetry, name, axis):
                pieces = found[group]
                if piece is None:
                    found[group] = None
                elif pieces is not None:
                    pieces.append(piece)
    return found


def pieces_of(symmetry: Symmetry, name: str, axis: int) -> Iterator[tuple[int, Piece | None]]:
    first = 0
    for group, count, block, negated in symmetry.axes[name][axis] or ():
        if group is not None:
            whole = count == symmetry.sizes[group]
            even = first % block == 0 and symmetry.shapes[name][axis] % block == 0
            read = reads(symmetry, name, axis, group)
            yield group, Piece(name, axis, first, block, negated, read, even) if whole else None
        first += count * block


def reads(symmetry: Symmetry, name: str, axis: int, group: int) -> bool:
    """Whether a tensor reads a group: its bias is not of it, or it writes the group along another axis.

    Without a bias the first axis is taken for the one that is written.
    """

    def holds(segments: Segments | None) -> bool:
        return any(g == group for g, *_ in segments or ())

    bias = symmetry.axes.get(bias_name(name)) if bias_name(name) != name else None
    if len(symmetry.shapes[name]) < 2 or bias is None or len(bias) != 1:
        return axis > 0
    return not holds(bias[0]) or (axis > 0 and holds(symmetry.axes[name][0]))


def across(symmetry: Symmetry, group: int, pieces: list[Piece]) -> Space:
    """The units of a group as one space."""
    size = symmetry.sizes[group]
    places = []
    for piece in pieces:
        shape = symmetry.shapes[piece.name]
        start, stop = [0] * len(shape), list(shape)
        start[piece.axis], stop[piece.axis] = piece.first, piece.first + size * piece.block
        if piece.block == 1:
            places.append(Place(piece.name, shape, tuple(start), tuple(stop), -1, piece.axis, piece.axis, piece.reads))
        elif piece.even:
            cut = shape[piece.axis] // piece.block
            seen = (*shape[: piece.axis], cut, piece.block, *shape[piece.axis + 1 :])
            begin = piece.first // piece.block
            start[piece.axis : piece.axis + 1] = [begin, 0]
            stop[piece.axis : piece.axis + 1] = [begin + size, piece.block]
            places.append(Place(piece.name, seen, tuple(start), tuple(stop), -1, piece.axis, piece.axis, piece.reads))
    return Space(group, 1, size, tuple(places))


def inside(symmetry: Symmetry, group: int, pieces: list[Piece]) -> list[Space]:
    """The spaces inside the units of a group: one for each number of positions that several places can have."""
    lengths = {piece.block for piece in pieces if piece.block > 1}
    lengths |= {math.gcd(a, b) for a in lengths for b in lengths}
    for piece in pieces:
        for axis in free_axes(symmetry, piece) if len(symmetry.shapes[piece.name]) > 2 else ():
            lengths |= {symmetry.shapes[piece.name][axis], symmetry.shapes[piece.name][axis] // 2}
    spaces = []
    for length in sorted(lengths - {0, 1}):
        places = [place for piece in pieces for place in slots(symmetry, group, piece, length)]
        if len(places) > 1:
            spaces.append(Space(group, symmetry.sizes[group], length, tuple(dict.fromkeys(places))))
    return spaces


def free_axes(symmetry: Symmetry, piece: Piece) -> list[int]:
    """The other axes of a tensor along which each unit may have positions of its own.

    Those of matrices that a group moves are the same for all units; stacks have a matrix for each unit.
    """
    dimensions = len(symmetry.shapes[piece.name])
    axes = symmetry.axes[piece.name][: 3 if dimensions == 3 else 2]  # not those of a kernel
    stacked = dimensions == 3 and piece.axis == 0
    return [n for n, segments in enumerate(axes) if n != piece.axis and (stacked or segments is None)]


def slots(symmetry: Symmetry, group: int, piece: Piece, length: int) -> Iterator[Place]:
    """The places of ``length`` positions inside the units of a piece: parts of each block, and parts of other axes."""
    size, shape = symmetry.sizes[group], symmetry.shapes[piece.name]
    if not piece.even:
        return
    begin = piece.first // piece.block
    seen = [*shape[: piece.axis], shape[piece.axis] // piece.block, piece.block, *shape[piece.axis + 1 :]]
    units = piece.axis
    axes = [piece.axis + 1, *(axis + (axis > piece.axis) for axis in free_axes(symmetry, piece))]
    for axis in axes:
        parts, left = divmod(seen[axis], length)
        if left or parts == 0:
            continue
        tensor_axis = axis - (axis > piece.axis)
        read = piece.reads if tensor_axis == piece.axis else tensor_axis == 1
        for order in ("side by side", "one by one") if parts > 1 else ("whole",):
            cut = [length, parts] if order == "one by one" else [parts, length]
            fine = (*seen[:axis], *cut, *seen[axis + 1 :])
            where, which = (axis, axis + 1) if order == "one by one" else (axis + 1, axis)
            start, stop = [0] * len(fine), list(fine)
            holder = units + (units > axis)
            start[holder], stop[holder] = begin, begin + size
            for part in range(parts) if parts <= MOST_CUTS else ():
                start[which], stop[which] = part, part + 1
                yield Place(piece.name, fine, tuple(start), tuple(stop), holder, where, tensor_axis, read)
