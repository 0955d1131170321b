"""Where the groups of a symmetry lie in the tensors of a network, and the weights of their units."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.signed import split
from fastws.symmetry.segments import Segments
from fastws.symmetry.symmetry import Symmetry
from fastws.table import table_rows

LARGE = 2**14  # weights of a tensor whose units are picked faster network by network


class Place(NamedTuple):
    """Where a group lies in a tensor, and how the other axis of that tensor is permuted.

    Entries of a unit that change their sign with it and such that do not are two places.
    """

    tensor: int
    axis: int
    negated: bool  # whether the entries change their sign with their unit
    index: Tensor | None  # entries of the axis, all those of a unit together; None: the axis as it is
    other: slice | None  # of a row of permutations: how the other axis moves; None: it stays
    shape: tuple[int, ...]  # of the tensor
    view: tuple[int, ...]  # of the tensor, with what moves on the other axis in dimension ``along``
    along: int

    def select(self, tensors: Tensor, chosen: Tensor) -> Tensor:
        """Of tensors ``[k, numel]`` the units ``chosen`` ``[k, m]`` of the other axis: ``[k, numel * m / units]``.

        What a signed permutation negates is negated.
        """
        tensors = tensors.view(-1, *self.view).expand(len(chosen), *self.view)
        chosen, negative = split(chosen)
        if negative.any():
            before, behind = self.view[: self.along], self.view[self.along + 1 :]
            picked = self.picked(tensors, chosen).view(len(chosen), math.prod(before), -1, math.prod(behind))
            return (picked * (1 + 2 * negative).to(picked)[:, None, :, None]).flatten(1)
        return self.picked(tensors, chosen)

    def picked(self, tensors: Tensor, chosen: Tensor) -> Tensor:
        if math.prod(self.view) < LARGE:
            everyone = torch.arange(len(chosen), device=chosen.device)[:, None]
            along = 1 + self.along
            return tensors.movedim(along, 1)[everyone, chosen].movedim(1, along).flatten(1)
        selected = [x.index_select(self.along, index) for x, index in zip(tensors, chosen, strict=True)]
        return (selected[0][None] if len(selected) == 1 else torch.stack(selected)).flatten(1)

    def arrange(self, tensor: Tensor, size: int) -> Tensor:
        """Weights of whole tensors or of ``select``, ``[k, any]`` -> ``[k, size, weights of a unit]``."""
        if self.axis > 0:
            tensor = tensor.view(len(tensor), -1, *self.shape[1:]).movedim(1 + self.axis, 1)
        else:
            tensor = tensor.view(len(tensor), self.shape[0], -1)
        tensor = tensor if self.index is None else tensor.index_select(1, self.index)
        return tensor.reshape(len(tensor), size, -1)


def find_places(symmetry: Symmetry, layout: Layout, device: torch.device) -> list[list[Place]]:
    """The places of each group, tensor by tensor; tensors are counted without those that are empty."""
    places: list[list[Place]] = [[] for _ in symmetry.sizes]
    entries = [entry for entry in layout.entries if entry.offset >= 0 and entry.numel]
    for tensor, (entry, row) in enumerate(zip(entries, table_rows(symmetry.tensor_table(layout)), strict=True)):
        for axis, segments in enumerate(symmetry.axes[entry.name]):
            for (group, negated), index in units(segments or (), symmetry.sizes).items():
                in_order = index == list(range(entry.shape[axis]))
                index = None if in_order else torch.tensor(index).to(device)
                other = slice(row.first_out, row.first_out + row.rows)
                other = other if axis else slice(row.first_in, row.first_in + row.units)
                other = None if other.start < 0 else other
                repeats = row.row_length // (row.units * row.block)
                view = (row.rows, row.row_length) if axis else (row.rows, repeats, row.units, row.block)
                places[group].append(Place(tensor, axis, negated, index, other, entry.shape, view, 0 if axis else 2))
    return places


def units(segments: Segments, sizes: Sequence[int]) -> dict[tuple[int, bool], list[int]]:
    """The groups along an axis: for each its entries, those of its first unit before those of the second.

    Entries that are negated with their unit are apart from the others.
    """
    found: dict[tuple[int, bool], list[tuple[int, int]]] = {}  # numbers of units and entries
    seen = Counter()
    entry = 0
    for group, count, block, negated in segments:
        if group is not None:
            first, size = seen[group], sizes[group]
            members = (((first + i // block) % size, entry + i) for i in range(count * block))
            found.setdefault((group, negated), []).extend(members)
            seen[group] += count
        entry += count * block
    return {key: [entry for _, entry in sorted(members)] for key, members in found.items()}
