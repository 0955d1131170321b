"""What is known of networks before a probe sees them: embeddings, statistics of their layers, their weights."""

import torch
from torch import Tensor
from torch.nn.functional import pad

import fastws
from fastws.table import table_rows

WEIGHTS_AT_ONCE = 2**24


def layers_of(flat: Tensor, layout: fastws.Layout, *, apart: bool = False) -> list[Tensor]:
    """``[B, n]`` each: the weights of each layer with its biases or, apart, the biases behind its weights."""
    layers = []
    for row in table_rows(layout.table):
        parts = [flat[:, row.weight_offset : row.weight_offset + row.rows * row.row_length]]
        parts += [flat[:, row.bias_offset : row.bias_offset + row.rows]] if row.bias_offset >= 0 else []
        layers += parts if apart else [torch.cat(parts, 1)]
    return layers


def layer_statistics(flat: Tensor, layout: fastws.Layout, *, padded: bool = False, apart: bool = False) -> Tensor:
    """Mean, population variance and the 1, 25, 50, 75, 99 % quantiles of the weights of each layer.

    The features s(W) of Unterthiner et al. (arXiv 2002.11448), as in SANE. Quantiles interpolate linearly.

    Args:
        flat: Checkpoints, ``[B, P]``.
        layout: Says which weights make a layer; a bias belongs to its weight.
        padded: Count the zeros that fill up tokens among the weights, as the published code does.
        apart: Statistics of weights and of biases, as in the model zoo data set (arXiv 2209.14764).

    Returns:
        ``[B, 7 L]`` float64, layer by layer; apart, one more for each bias, behind its weight.
    """
    layers = layers_of(flat, layout, apart=apart)
    if padded:
        size = layout.token_size
        filled = [(row.end_token(size) - row.first_token) * size for row in table_rows(layout.table)]
        layers = [pad(layer, (0, size - layer.shape[1])) for layer, size in zip(layers, filled, strict=True)]
    sizes = torch.tensor([layer.shape[1] for layer in layers])
    ends = sizes.cumsum(0)
    return fastws.layer_statistics(torch.cat(layers, 1), torch.stack([ends - sizes, ends], 1)).flatten(1)
