"""NeRN: a small network that predicts the kernels of another from their coordinates (ICLR 2023, arXiv 2212.13554).

Names of parameters are those of the published predictor, so that its checkpoints load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isqrt, pi
from typing import Literal, Self, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastws.ops.coordinate_mlp import coordinate_mlp

AXES = 3  # layer, filter, channel


@dataclass(frozen=True, kw_only=True)
class NeRNConfig:
    """The size of a NeRN, and what it is told of a coordinate."""

    hidden: int  # width of all layers but the last
    kernel: int = 3  # predictions are kernel x kernel
    blocks: int = 5  # linear layers
    activation: Literal["relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu"] = "relu"
    encoding: Literal["basic", "ffn"] = "basic"  # sines of each coordinate, or of random sums of all (2006.10739)
    fusion: Literal["concat", "sum"] = "concat"  # of the encodings of layer, filter and channel
    levels: int = 40  # frequencies per coordinate
    base: float = 0.76  # ratio of one frequency to the one before; below 1 they fall
    gauss_scale: tuple[float, float, float] = (1.0, 0.1, 0.1)  # std of ffn's frequencies of layer, filter and channel

    def __post_init__(self):
        for name in ("hidden", "kernel", "levels", "base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"NeRN: {name} must be positive, got {getattr(self, name)}")
        for field in fields(self):
            known, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in known:
                raise ValueError(f"NeRN: {field.name} must be {' or '.join(known)}, got {value!r}")
        if self.blocks < 2:
            raise ValueError(f"NeRN: blocks must be at least 2, got {self.blocks}")
        if self.encoding == "ffn" and self.fusion == "sum":
            raise ValueError("NeRN: fusion must be concat with the encoding ffn, got sum")

    @property
    def inputs(self) -> int:
        """Entries of the encoding of a coordinate."""
        return 2 * self.levels * (AXES if self.fusion == "concat" else 1)


class NeRN(nn.Module):
    """Predicts kernels from their coordinates (layer, filter, channel).

    Sines and cosines of the coordinate, then linear layers with an activation between them. The first layer is a sum of
    three tables, one per axis, which is exact; so no encoding of a whole coordinate is ever made, but with ``ffn``.

    Rows are numbers of kernels in the grid that the layers form: layer by layer, filter by filter, channel by channel.
    Predictions are computed in float32, or under autocast in its dtype, with sums in float32.

    Args:
        config: Sizes.
        grid: Filters and channels of each layer of the network to be stored.

    Raises:
        ValueError: If the grid is empty or has an empty layer.

    Example:
        >>> nern = NeRN(NeRNConfig(hidden=32), grid=[(16, 3), (16, 16)])
        >>> nern().shape, nern(torch.tensor([303, 7])).shape
        (torch.Size([304, 9]), torch.Size([2, 9]))
    """

    def __init__(self, config: NeRNConfig, grid: Sequence[tuple[int, int]]):
        super().__init__()
        if len(grid) == 0 or min(map(min, grid)) < 1:
            raise ValueError(f"NeRN: grid must hold filters and channels of layers, at least 1, got {list(grid)}")
        self.config = config
        self.num_kernels = sum(filters * channels for filters, channels in grid)
        widths = [config.inputs] + [config.hidden] * (config.blocks - 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.final_linear_layer = nn.Linear(config.hidden, config.kernel**2)
        self.sizes = len(grid), max(filters for filters, _ in grid), max(channels for _, channels in grid)
        self.register_buffer("grid", torch.tensor(grid), persistent=False)
        constants = frequencies(config) if config.encoding == "ffn" else encode_axis(config, max(self.sizes))
        self.register_buffer("constants", constants, persistent=False)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Predicts the kernels of rows ``[n]`` int64, by default all: ``[n, kernel**2]``, float32 or wider."""
        rows = torch.arange(self.num_kernels, device=self.grid.device) if rows is None else rows
        tables, grid, rows = self.tables(rows)
        dtype = tables[0].dtype
        device = tables[0].device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        later = [*self.layers[1:], self.final_linear_layer]
        predictions = coordinate_mlp(
            [table.to(dtype) for table in tables],
            grid,
            rows,
            [layer.weight.to(dtype) for layer in later],
            [layer.bias.to(dtype) for layer in later],
            activation=self.config.activation,
        )
        return predictions if predictions.dtype == torch.float64 else predictions.float()

    def tables(self, rows: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """What each coordinate adds to the first layer, and grid and rows that read it."""
        weight, bias = self.layers[0].weight, self.layers[0].bias
        with torch.autocast(weight.device.type, enabled=False):
            if self.config.encoding == "ffn":  # no sum of three axes: each row is a filter of one channel
                first = F.linear(encode_rows(self.constants, self.grid, rows).to(weight.dtype), weight, bias)
                nothing = first.new_zeros(1, first.shape[1])
                grid = rows.new_ones(1, 2)
                grid[:, 0].fill_(len(rows))
                return [nothing, first, nothing], grid, torch.arange(len(rows), device=rows.device)
            parts = weight.split(2 * self.config.levels, 1) if self.config.fusion == "concat" else [weight] * AXES
            encodings = [self.constants[:size].to(weight.dtype) for size in self.sizes]
            layer, filters, channels = (F.linear(x, part) for x, part in zip(encodings, parts, strict=True))
            return [layer + bias, filters, channels], self.grid, rows

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], grid: Sequence[tuple[int, int]], config: NeRNConfig) -> Self:
        """A NeRN with the weights of a state dict, for instance of a published checkpoint.

        Width, number of layers and size of the kernels are those of the state dict; the rest, which is not in it, is of
        ``config``.

        Raises:
            ValueError: If names are not those of a NeRN, or sizes do not fit the encoding.
        """
        if "final_linear_layer.weight" not in state:
            raise ValueError(f"NeRN: state must have the names of a NeRN, got {list(state)[:3]}")
        outputs, hidden = state["final_linear_layer.weight"].shape
        blocks = 1 + sum(name.startswith("layers.") and name.endswith(".weight") for name in state)
        nern = cls(replace(config, hidden=hidden, blocks=blocks, kernel=isqrt(outputs)), grid)
        load(nern, state)
        return nern


def load(nern: NeRN, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict; raises ValueError that names the first tensor of another size, or a layer too many."""
    expected = nern.state_dict()
    for name in state:
        if name.startswith("layers.") and name not in expected:
            raise ValueError(
                f"NeRN: {name} must not be there, got more than {len(nern.layers) + 1} blocks; of another preset?"
            )
    for name, tensor in expected.items():
        found = list(state[name].shape) if name in state else None
        if found != list(tensor.shape):
            raise ValueError(f"NeRN: {name} must be {list(tensor.shape)}, got {found}; was it of another preset?")
    nern.load_state_dict({name: state[name] for name in expected})


def encode_axis(config: NeRNConfig, count: int) -> Tensor:
    """``[sin(pi b**0 p), cos(pi b**0 p), sin(pi b**1 p), ...]`` of positions p below count: ``[count, 2 * levels]``.

    Multiplied in the order of the published code, with which it agrees bit for bit.
    """
    angles = torch.arange(count)[:, None] * (config.base ** torch.arange(config.levels)) * pi
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


def frequencies(config: NeRNConfig) -> Tensor:
    """The published random frequencies, of torch's generator with seed 0: ``[3 * levels, 3]``."""
    drawn = torch.randn(AXES * config.levels, AXES, generator=torch.Generator().manual_seed(0))
    return drawn * torch.tensor(config.gauss_scale)


def encode_rows(frequency: Tensor, grid: Tensor, rows: Tensor) -> Tensor:
    """Sines and cosines, in turn, of ``2 pi frequency @ (layer, filter, channel)``: ``[n, 6 * levels]``."""
    sizes = grid.prod(1)
    ends = sizes.cumsum(0)
    layer = torch.searchsorted(ends, rows, right=True)
    within, channels = rows - (ends - sizes)[layer], grid[layer, 1]
    coordinates = torch.stack([layer, within // channels, within % channels], 1)
    angles = (coordinates * 2 * pi) @ frequency.T
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
