"""Perceptrons over whole vectors, as the published hyper-representations build and name them (arXiv 2110.15288)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy
from torch import Tensor, nn

ACTIVATIONS = {
    "elu": nn.ELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "leakyrelu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class Hidden(NamedTuple):
    """What stands behind each hidden layer."""

    activation: str
    dropout: float = 0.0
    layer_norm: bool = False  # before the activation

    def modules(self, width: int) -> list[nn.Module]:
        norm = [nn.LayerNorm(width)] if self.layer_norm else []
        return [*norm, ACTIVATIONS[self.activation](), *([nn.Dropout(self.dropout)] if self.dropout > 0 else [])]


def perceptron(widths: Sequence[int], hidden: Hidden) -> nn.ModuleList:
    """Linear layers of these widths and what stands between them, in the order of the published module list."""
    modules = nn.ModuleList()
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        modules.append(linear(inputs, outputs))
        modules.extend(hidden.modules(outputs) if number < len(widths) - 2 else [])
    return modules


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.constant_(layer.bias, 0.01)
    return layer


def linear_widths(inputs: int, outputs: int, hidden: int) -> list[int]:
    """Widths that change from inputs to outputs by equal steps, as the published perceptrons have them."""
    return numpy.linspace(inputs, outputs, hidden + 2).astype(int).tolist()


class ResidualBlock(nn.Module):
    def __init__(self, width: int, depth: int, hidden: Hidden):
        super().__init__()
        self.resblockList = nn.ModuleList()
        for number in range(depth):
            self.resblockList.append(linear(width, width))
            self.resblockList.extend(hidden.modules(width) if number < depth - 1 else [])
        # the published block ends in ReLU whatever its activation, unless that is the sigmoid
        self.nonlin_out = nn.Sigmoid() if hidden.activation == "sigmoid" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for module in self.resblockList:
            y = module(y)
        return self.nonlin_out(x + y)


class VectorEncoder(nn.Module):
    """Residual blocks at the width of the vector, if there are any, then a perceptron, bounded by a tanh or not."""

    def __init__(self, widths: Sequence[int], hidden: Hidden, bounded: bool, blocks: int = 0, block_depth: int = 0):
        super().__init__()
        depths = [block_depth] * blocks if block_depth else []
        self.resEncoder = nn.ModuleList(ResidualBlock(widths[0], depth, hidden) for depth in depths)
        self.encoder = perceptron(widths, hidden)
        self.encoder.extend([nn.Tanh()] if bounded else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in [*self.resEncoder, *self.encoder]:
            x = module(x)
        return x


class VectorDecoder(nn.Module):
    """The mirror image of ``VectorEncoder``, without a bound."""

    def __init__(self, widths: Sequence[int], hidden: Hidden, blocks: int = 0, block_depth: int = 0):
        super().__init__()
        self.decoder = perceptron(widths, hidden)
        depths = [block_depth] * blocks if block_depth else []
        self.resDecoder = nn.ModuleList(ResidualBlock(widths[-1], depth, hidden) for depth in depths)

    def forward(self, z: Tensor) -> Tensor:
        for module in [*self.decoder, *self.resDecoder]:
            z = module(z)
        return z
