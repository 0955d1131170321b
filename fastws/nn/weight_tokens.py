"""How whole small networks, flat vectors of weights, become tokens of one width, and tokens weights again.

A token is a single weight, a *neuron* (weights of one output unit and its bias), or a neuron and what leaves it: the
weights of the next layer that read it. Every layer has matrices of its own. Names of submodules are those of the
published hyper-representations (arXiv 2110.15288, 2209.14733), so that their checkpoints load.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastws.nn.perceptron import Hidden, perceptron

Encoding = Literal["vector", "weight", "neuron", "neuron_in_out"]


class Rows(NamedTuple):
    """Where the rows of one layer lie in a flat vector."""

    weight_offset: int  # the first weight
    bias_offset: int  # the first bias; -1: the layer has none
    rows: int  # output units
    row_length: int  # weights of a row, without the bias


def token_entries(layers: tuple[Rows, ...], outgoing: bool) -> list[list[list[int]]]:
    """For every layer and row the places of its weights in the flat vector: the row, its bias, and what leaves it.

    Raises:
        ValueError: If ``outgoing`` is asked for and the rows of a layer are not made of whole units of the one before.
    """
    found = []
    for number, layer in enumerate(layers):
        following = layers[number + 1] if outgoing and number + 1 < len(layers) else None
        if following and following.row_length % layer.rows:
            what = f"a multiple of the {layer.rows} units of layer {number}"
            raise ValueError(
                f"HyperRepresentation: rows of layer {number + 1} must be {what} for neuron_in_out, "
                f"got {following.row_length} weights"
            )
        found.append([])
        for row in range(layer.rows):
            first = layer.weight_offset + row * layer.row_length
            entries = list(range(first, first + layer.row_length))
            entries += [layer.bias_offset + row] if layer.bias_offset >= 0 else []
            if following:
                block = following.row_length // layer.rows
                for other in range(following.rows):
                    column = following.weight_offset + other * following.row_length + row * block
                    entries += range(column, column + block)
            found[-1].append(entries)
    return found


class NeuronEmbedder(nn.Module):
    """Flat vectors ``[B, P]`` to tokens ``[B, N, D]``: one gather, then one product for all rows of a layer."""

    def __init__(self, layers: tuple[Rows, ...], width: int, outgoing: bool):
        super().__init__()
        entries = token_entries(layers, outgoing)
        self.shapes = [(len(rows), len(rows[0])) for rows in entries]
        self.layer_lst = nn.ModuleList(nn.Linear(length, width) for _, length in self.shapes)
        index = torch.tensor([entry for rows in entries for row in rows for entry in row])
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        gathered = x.index_select(1, self.index).split([rows * length for rows, length in self.shapes], 1)
        parts = zip(gathered, self.shapes, self.layer_lst, strict=True)
        return torch.cat([linear(part.unflatten(1, shape)) for part, shape, linear in parts], 1)


class NeuronDebedder(nn.Module):
    """Tokens ``[B, N, D]`` to flat vectors ``[B, P]``.

    A weight that several tokens hold gets their average with ``outgoing``; without, that of the last of them, which
    only happens for tables of layers that overlap. Weights that no token holds are 0.
    """

    def __init__(self, layers: tuple[Rows, ...], width: int, size: int, outgoing: bool, depth: int, dropout: float):
        super().__init__()
        entries = token_entries(layers, outgoing)
        self.rows = [len(rows) for rows in entries]
        self.layer_lst = nn.ModuleList(debedder(width, len(rows[0]), depth, dropout) for rows in entries)
        places = [entry for rows in entries for row in rows for entry in row]
        # where each weight is among the values of all tokens; one behind the end is a zero
        last, first = ([len(places)] * size for _ in range(2))
        for number, place in enumerate(places):
            last[place] = number
            first[place] = min(first[place], number)
        self.register_buffer("last", torch.tensor(last), persistent=False)
        self.register_buffer("first", torch.tensor(first) if outgoing else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [linear(part) for part, linear in zip(x.split(self.rows, 1), self.layer_lst, strict=True)]
        values = torch.cat([part.flatten(1) for part in parts], 1)
        values = F.pad(values, (0, 1))
        y = values.index_select(1, self.last)
        return y if self.first is None else (y + values.index_select(1, self.first)) / 2


def debedder(width: int, outputs: int, depth: int, dropout: float) -> nn.Module:
    """One linear layer, or a perceptron of ``depth`` layers whose hidden ones are as wide as the tokens."""
    if depth == 1:
        return nn.Linear(width, outputs)
    return nn.Sequential(*perceptron([width] * depth + [outputs], Hidden("leakyrelu", dropout)))


class WeightEmbedder(nn.Module):
    """Every weight is a token: ``[B, P]`` to ``[B, P, D]`` by one linear layer of one input."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = nn.Linear(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x[..., None])


class WeightDebedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight_debedder = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight_debedder(x)[..., 0]


class AttentionEmbedder(nn.Module):
    """Each neuron by a small transformer over its weights, whose first token becomes the neuron's.

    A weight is repeated over ``inner`` entries and gets the code of its place in the row. Unlike in the published code
    the weights of one row attend to each other, not to the same weight of other networks of the batch.
    """

    def __init__(self, layers: tuple[Rows, ...], width: int, inner: int, heads: int, dropout: float):
        super().__init__()
        if width % inner or inner % heads:
            raise ValueError(
                f"HyperRepresentation: width must be a multiple of embedder_width={inner}, and that of "
                f"embedder_heads={heads}, got {width}"
            )
        entries = token_entries(layers, outgoing=False)
        self.shapes = [(len(rows), len(rows[0])) for rows in entries]
        self.repeats = width // inner
        layer = nn.TransformerEncoderLayer(inner, heads, int(1.5 * inner), dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.position_embeddings = nn.Embedding(max(length for _, length in self.shapes), inner)
        self.comp_token = nn.Parameter(torch.randn(1, 1, inner))
        index = torch.tensor([entry for rows in entries for row in rows for entry in row])
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        gathered = x.index_select(1, self.index).split([rows * length for rows, length in self.shapes], 1)
        tokens = []
        for part, (rows, length) in zip(gathered, self.shapes, strict=True):
            weights = part.reshape(-1, length, 1) + self.position_embeddings.weight[:length]
            sequence = torch.cat([self.comp_token.expand(len(weights), 1, -1), weights], 1)
            tokens.append(self.transformer(sequence)[:, 0].unflatten(0, (-1, rows)))
        return torch.cat(tokens, 1).repeat(1, 1, self.repeats)
