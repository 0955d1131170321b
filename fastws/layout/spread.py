"""Layers as parts of a flat vector, and how far the weights of each are spread over a population."""

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.table import table_rows

SMALLEST_STD = 1e-4  # of a layer; a layer that does not vary is compared in units of this


def layer_offsets(layout: Layout) -> Tensor:
    """First weight and end of each layer, its bias included where it stands behind the weights: int64 ``[L, 2]``."""
    found = []
    for row in table_rows(layout.table):
        end, bias = row.weight_offset + row.rows * row.row_length, row.bias_offset
        found.append([row.weight_offset, end + row.rows if bias == end else end])
        if bias >= 0 and bias != end:
            found.append([bias, bias + row.rows])
    return torch.tensor(sorted(found))


def weight_std(weights: Tensor, layout: Layout) -> Tensor:
    """Of each weight the standard deviation of its layer over networks ``[n, P]``: ``[P]``, on their device."""
    offsets = layer_offsets(layout)
    return per_weight(layer_std(weights, offsets), offsets, layout.num_weights).to(weights.device)


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
