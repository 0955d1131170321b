"""Mean and spread of the weights of each layer within networks, as tokens are standardised by."""

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.table import table_rows

SMALLEST_STD = 1e-8


def layer_moments(weights: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and std of each layer over networks ``[m, P]``: two ``[L]`` float32.

    The mean over networks of the mean over the layer's weights and biases, and the root of the mean over networks of
    their unbiased variance. Layers that do not vary within networks, single weights for one, get std 1.
    """
    means, variances = 0, 0
    for flat in weights:
        layers = []
        for row in table_rows(layout.table):
            own = flat[row.weight_offset : row.weight_offset + row.rows * row.row_length]
            biases = flat[row.bias_offset : row.bias_offset + row.rows] if row.bias_offset >= 0 else flat[:0]
            layers.append(torch.cat([own, biases]).double())
        means += torch.stack([layer.mean() for layer in layers])
        variances += torch.stack([layer.var(correction=min(1, len(layer) - 1)) for layer in layers])
    std = (variances / len(weights)).sqrt()
    return (means / len(weights)).float(), std.where(std > SMALLEST_STD, 1).float()
