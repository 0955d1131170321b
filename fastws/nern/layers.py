"""The layers of a network whose kernels a NeRN stores: which they are, and predictions put in their place.

Kernels are counted layer by layer, in the order of the state dict, filter by filter and channel by channel. A linear
layer counts as a convolution with 1x1 kernels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastws.nern.orders import Order, coordinates

Reduction = Literal["center", "average", "max"]


class StoredLayer(NamedTuple):
    """A stored tensor."""

    name: str  # in the state dict
    shape: tuple[int, ...]  # [C_out, C_in, height, width], or [out, in]

    @property
    def kernel(self) -> tuple[int, int]:
        return tuple(self.shape[2:]) or (1, 1)

    @property
    def kernels(self) -> int:
        return self.shape[0] * self.shape[1]


def find_layers(
    network: nn.Module, *, sizes: Sequence[int] = (), exclude: Sequence[str] = (), linear: bool = False
) -> list[StoredLayer]:
    """The convolutions of a network, in the order of its state dict; of convolutions that share weights the first.

    Args:
        network: With its weights.
        sizes: Heights and widths of the kernels that are stored; all by default.
        exclude: Patterns of names of modules that are not, as ``"classifier*"``.
        linear: Whether linear layers are stored too.

    Raises:
        ValueError: If nothing is left to store, a layer is empty, or weights are not finite or no parameters.
    """
    kinds = (nn.Conv2d, nn.Linear) if linear else (nn.Conv2d,)
    modules = [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
    if not modules:
        raise ValueError("nern: network must have 2-d convolutions, got none; linear layers are stored if you ask")
    layers, seen = [], set()
    for name, module in modules:
        if "weight" not in module._parameters:
            got = "one that is computed; see torch.nn.utils.parametrize.remove_parametrizations"
            raise ValueError(f"nern: weight of {name or 'the network'} must be a parameter, got {got}")
        layer = StoredLayer(f"{name}.weight".lstrip("."), tuple(module.weight.shape))
        wanted = not sizes or all(size in sizes for size in layer.kernel)
        if wanted and id(module.weight) not in seen and not any(fnmatchcase(name, pattern) for pattern in exclude):
            check(layer, module.weight)
            layers.append(layer)
            seen.add(id(module.weight))
    if not layers:
        raise ValueError(f"nern: sizes and exclude must leave a layer to store, got none of {len(modules)}")
    return layers


def check(layer: StoredLayer, weight: Tensor) -> None:
    if 0 in layer.shape:
        raise ValueError(f"nern: {layer.name} must have kernels, got shape {list(layer.shape)}")
    if not weight.isfinite().all():
        bad = (~weight.isfinite()).sum()
        raise ValueError(f"nern: {layer.name} must be finite, got {bad} values that are NaN or infinite")


@dataclass(frozen=True)
class StoredLayers:
    """How the weights of a network come from the predictions of a NeRN.

    Args:
        layers: From ``find_layers``.
        kernel: Height and width of predictions, at least those of all kernels.
        reduction: What becomes of predictions where kernels are smaller: their center, or what an average or maximum
            pooling of stride 1 leaves.
        rows: The row in the grid of the NeRN that each kernel is predicted from, ``[N]`` int64; see ``rows_of``.

    Raises:
        ValueError: If a kernel is larger than predictions are, or there is no such reduction.
    """

    layers: tuple[StoredLayer, ...]
    kernel: int
    reduction: Reduction
    rows: Tensor

    def __post_init__(self):
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"nern: reduction must be one of {get_args(Reduction)}, got {self.reduction!r}")
        for layer in self.layers:
            if max(layer.kernel) > self.kernel:
                size = max(layer.kernel)
                raise ValueError(f"nern: kernel must be at least {size}, that of {layer.name}, got {self.kernel}")

    @property
    def grid(self) -> list[tuple[int, int]]:
        """Filters and channels of each layer."""
        return [layer.shape[:2] for layer in self.layers]

    @property
    def num_weights(self) -> int:
        return sum(layer.kernels * layer.kernel[0] * layer.kernel[1] for layer in self.layers)

    def weights(self, predictions: Tensor) -> dict[str, Tensor]:
        """Tensors by name from predictions ``[N, kernel**2]`` of all kernels; views, where nothing is reduced."""
        parts = predictions.split([layer.kernels for layer in self.layers])
        return {layer.name: self.reduce(part, layer) for layer, part in zip(self.layers, parts, strict=True)}

    def reduce(self, predictions: Tensor, layer: StoredLayer) -> Tensor:
        height, width = layer.kernel
        if height == width == self.kernel:
            return predictions.view(layer.shape)
        square = predictions.unflatten(1, (1, self.kernel, self.kernel))
        window = self.kernel - height + 1, self.kernel - width + 1
        if self.reduction == "average":
            square = F.avg_pool2d(square, window, 1)
        elif self.reduction == "max":
            square = F.max_pool2d(square, window, 1)
        else:
            top, left = ((size - 1) // 2 for size in window)
            square = square[:, :, top : top + height, left : left + width]
        return square.reshape(layer.shape)

    def originals(self, network: nn.Module) -> dict[str, Tensor]:
        """The tensors of a network that are stored, by name."""
        return {layer.name: network.get_parameter(layer.name).detach() for layer in self.layers}

    def norms(self, network: nn.Module) -> Tensor:
        """The norm of each kernel of a network, ``[N]`` float64."""
        tensors = self.originals(network).values()
        return torch.cat([x.double().flatten(0, 1).reshape(x.shape[:2].numel(), -1).norm(dim=1) for x in tensors])

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, from which with the rows ``from_dict`` makes it again."""
        plain = asdict(self) | {"layers": [[layer.name, list(layer.shape)] for layer in self.layers]}
        del plain["rows"]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any], rows: Tensor) -> "StoredLayers":
        layers = tuple(StoredLayer(name, tuple(shape)) for name, shape in plain["layers"])
        for name, shape in layers:
            whole = all(type(size) is int and size > 0 for size in (*shape, plain["kernel"]))
            if not isinstance(name, str) or len(shape) not in (2, 4) or not whole:
                raise ValueError(f"nern: layers must have names and shapes of whole numbers, got {name!r} {shape}")
        return cls(layers, plain["kernel"], plain["reduction"], rows)


def rows_of(layers: Sequence[StoredLayer], orders: Sequence[Order] | None) -> Tensor:
    """The grid row of each kernel, ``[N]`` int64: its own number, or where its order puts it within its layer."""
    rows, first = [], 0
    for number, layer in enumerate(layers):
        places = coordinates(orders[number] if orders else None, layer.shape).cpu()
        rows.append((first + places[..., 0] * layer.shape[1] + places[..., 1]).flatten())
        first += layer.kernels
    return torch.cat(rows)
