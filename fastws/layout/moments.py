"""What the weights of each layer are within networks, as tokens are scaled by: mean and spread, range, or length."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.table import table_rows

SMALLEST_STD = 1e-8
Statistic = Literal["std", "minmax", "l2"]


def layer_scales(networks: Iterable[Tensor], layout: Layout, statistic: Statistic) -> tuple[Tensor, Tensor]:
    """What is subtracted from each layer and what is divided by, over networks ``[P]``: two ``[L]`` float32.

    ``"std"``: see ``layer_moments``. ``"minmax"``: so that all weights of a layer, over all networks, lie in [-1, 1].
    ``"l2"``: nothing, and the root of the mean over networks of the layer's squared length. Where that would be a
    division by 0, by 1.
    """
    if statistic == "std":
        return layer_moments(networks, layout)
    lowest, highest, squares, count = torch.inf, -torch.inf, 0, 0
    for flat in networks:
        layers = list(split_layers(flat, layout))
        lowest = torch.stack([layer.min() for layer in layers]).clamp(max=lowest)
        highest = torch.stack([layer.max() for layer in layers]).clamp(min=highest)
        squares, count = squares + torch.stack([layer.square().sum() for layer in layers]), count + 1
    if statistic == "minmax":
        middle, half = (lowest + highest) / 2, (highest - lowest) / 2
    else:
        middle, half = torch.zeros_like(squares), (squares / count).sqrt()
    return middle.float(), half.where(half > SMALLEST_STD, 1).float()


def split_layers(flat: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Weights and biases of each layer of a network ``[P]`` as a vector in float64."""
    for row in table_rows(layout.table):
        own = flat[row.weight_offset : row.weight_offset + row.rows * row.row_length]
        biases = flat[row.bias_offset : row.bias_offset + row.rows] if row.bias_offset >= 0 else flat[:0]
        yield torch.cat([own, biases]).double()


def layer_moments(networks: Iterable[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and std of each layer over networks ``[P]``: two ``[L]`` float32.

    The mean over networks of the mean over the layer's weights and biases, and the root of the mean over networks of
    their unbiased variance. Layers that do not vary within networks, single weights for one, get std 1.
    """
    means, variances, count = 0, 0, 0
    for flat in networks:
        layers = list(split_layers(flat, layout))
        means += torch.stack([layer.mean() for layer in layers])
        variances += torch.stack([layer.var(correction=min(1, len(layer) - 1)) for layer in layers])
        count += 1
    std = (variances / count).sqrt()
    return (means / count).float(), std.where(std > SMALLEST_STD, 1).float()
