"""What a model is told of where a token is: its position, whole or as parts of the network, and the kind of layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastws.layout.layout import Layout

PARTS = 1024  # that a network, its layers and the units of a layer are divided into by relative positions
LAYER_TYPES = ("matrix", "convolution", "norm", "norm statistic", "other")


class Places(NamedTuple):
    """Of each layer of one or several architectures, one below the other."""

    extents: Tensor  # int32 [L, 3]: tokens and layers of its network, its own units
    layer_type: Tensor  # int32 [L], of LAYER_TYPES

    def describe(self, positions: Tensor, row: Tensor, *, relative: bool, layer_types: bool) -> Tensor:
        """What a model gets for positions ``[.., 3]`` of tokens of layers ``row`` ``[..]``: int32 ``[.., 3 or 4]``.

        Args:
            positions: Numbers of token, layer and unit.
            row: Which of the layers each token is of.
            relative: Whether numbers are to be parts of what there is of them, of 1024: a model then is bound to no
                size of networks.
            layer_types: Whether a fourth number is to say what kind of layer it is.
        """
        if relative:
            positions = positions * PARTS // self.extents[row]
        if layer_types:
            positions = torch.cat([positions, self.layer_type[row][..., None]], -1)
        return positions


def places_of(*layouts: Layout) -> Places:
    extents, kinds = [], []
    for layout in layouts:
        number, unit = layout.positions[:, 1].long(), layout.positions[:, 2]
        units = torch.zeros(len(layout.table), dtype=torch.int32).scatter_reduce(0, number, unit + 1, "amax")
        sizes = torch.tensor([layout.num_tokens, len(layout.table)], dtype=torch.int32)
        extents.append(torch.cat([sizes.expand(len(units), 2), units.clamp(min=1)[:, None]], 1))
        entries = {entry.name: entry for entry in layout.entries}
        kinds += [layer_type(entries[name].role, len(entries[name].shape)) for name, _ in layout.layers]
    return Places(torch.cat(extents), torch.tensor(kinds, dtype=torch.int32))


def layer_type(role: str, axes: int) -> int:
    if role == "weight":
        return LAYER_TYPES.index("matrix" if axes == 2 else "convolution")
    kinds = {"norm weight": "norm", "norm bias": "norm", "norm statistic": "norm statistic"}
    return LAYER_TYPES.index(kinds.get(role, "other"))
