"""Layers as parts of a flat vector, and how far the weights of each are spread over a population."""

import torch
from torch import Tensor

from fastws.layout.layout import Layout

SMALLEST_STD = 1e-4  # of a layer; a layer that does not vary is compared in units of this


def layer_offsets(layout: Layout) -> Tensor:
    """First weight and end of each layer, its bias included where it stands behind the weights: int64 ``[L, 2]``."""
    found = []
    for weight, bias, rows, length, *_ in layout.table.tolist():
        end = weight + rows * length
        found.append([weight, end + rows if bias == end else end])
        if bias >= 0 and bias != end:
            found.append([bias, bias + rows])
    return torch.tensor(sorted(found))


def layer_std(weights: Tensor, offsets: Tensor) -> Tensor:
    """The unbiased standard deviation of all weights of a layer over all networks, at least 1e-4: float32 ``[L]``."""
    stds = [
        weights[:, begin:end].double().std() if end > begin else weights.new_ones(()) for begin, end in offsets.tolist()
    ]
    return torch.stack([std.double().cpu() for std in stds]).nan_to_num(1.0).clamp(min=SMALLEST_STD).float()


def per_weight(values: Tensor, offsets: Tensor, size: int) -> Tensor:
    """For each weight the value of its layer, 1 outside of all layers: ``[P]``."""
    spread = torch.ones(size)
    for value, (begin, end) in zip(values, offsets.tolist(), strict=True):
        spread[begin:end] = value
    return spread
