"""Networks with the weights of each unit side by side, for ``fastws.matched_distance``."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.matching.places import find_places
from fastws.ops.matched_distance import Group, Part
from fastws.symmetry.symmetry import Symmetry


class Packing(NamedTuple):
    """How flat vectors are packed, and the tables of what was packed."""

    index: Tensor  # [W]: which weight stands where
    groups: Tensor  # [G, 6] int64, rows of ``Group``
    parts: Tensor  # [L, 6] int64, rows of ``Part``
    once: Tensor  # [W] float32

    def pack(self, flat: Tensor) -> Tensor:
        """Flat vectors ``[B, P]`` to packed ones ``[B, W]``, float32."""
        return flat.float().index_select(1, self.index.to(flat.device))


def packing_of(symmetry: Symmetry, layout: Layout, may_flip: tuple[bool, ...] = ()) -> Packing:
    """The packing of an architecture.

    Args:
        symmetry: Whose groups are whole axes: those of perceptrons, and of convolutional networks and residual ones
            without concatenation.
        layout: Of the flat vectors.
        may_flip: For each group whether its units may be multiplied by -1; by default none.

    Raises:
        ValueError: If an axis is made of several groups, or a tensor has the same group on both axes.
    """
    symmetry.require_same(layout)
    entries = [entry for entry in layout.entries if entry.offset >= 0 and entry.numel]
    starts = {start: group for group, start in enumerate(symmetry.starts[:-1])}
    index, groups, parts, seen = [], [], [], torch.zeros(layout.num_weights, dtype=torch.int64)
    for group, places in enumerate(find_places(symmetry, layout, torch.device("cpu"))):
        size, found, start = symmetry.sizes[group], [], 0
        for place in places:
            entry = entries[place.tensor]
            weights = torch.arange(entry.offset, entry.offset + entry.numel)
            units = place.arrange(weights[None], size)[0]  # [size, weights of a unit]
            if place.other is None:
                other, before, block = -1, 1, units.shape[1]
            else:
                other = starts.get(place.other.start, -1)
                length = place.other.stop - place.other.start
                if other < 0 or symmetry.sizes[other] != length or other == group:
                    raise ValueError(
                        f"packing: groups must be whole axes, each on one axis of a tensor, got others in {entry.name}"
                    )
                if place.axis > 0:
                    before, block = entry.shape[place.axis] // size, entry.numel // (length * entry.shape[place.axis])
                else:
                    before, block = place.view[1], place.view[3]
            found.append(units)
            parts.append(Part(start, units.shape[1], other, before, block, 1))
            start += units.shape[1]
        rows = torch.cat(found, 1)
        first = sum(len(part) for part in index)
        flip = bool(may_flip and may_flip[group])
        groups.append(Group(size, start, first, len(parts) - len(places), len(places), int(flip)))
        index.append(rows.flatten())
        seen.index_add_(0, rows.flatten(), torch.ones(rows.numel(), dtype=torch.int64))
    index.append((seen == 0).nonzero().flatten())  # weights that nothing moves
    packed = torch.cat(index)
    once = seen[packed].clamp(min=1).float().rsqrt()
    tables = (torch.tensor(rows, dtype=torch.int64).reshape(-1, 6) for rows in (groups, parts))
    return Packing(packed, *tables, once)
