"""Small CNNs as tables of rows, one for each layer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}  # in the order of their codes
CONVOLUTION, POOLING, ACTIVATION, DROPOUT = range(4)
BUDGET = 2**17  # weights and activations of one network and image, which a processor's cache must hold for 8 networks


class Row(NamedTuple):
    """One row of a table: an operation from ``[in_channels, in_height, in_width]`` to ``[out_channels, ...]``.

    A dense layer is a convolution of a 1 x 1 map; a flatten is no operation, because maps are contiguous.
    """

    kind: int  # CONVOLUTION, POOLING, ACTIVATION or DROPOUT
    in_channels: int
    in_height: int
    in_width: int
    out_channels: int
    kernel_height: int  # 1 unless a convolution or a pooling
    kernel_width: int
    stride_height: int
    stride_width: int
    weight_offset: int  # first weight in the flat vector, or -1
    bias_offset: int  # first bias in the flat vector, or -1
    first_unit: int  # units of all dropout layers before this one; else -1

    @property
    def in_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.in_height, self.in_width

    @property
    def out_shape(self) -> tuple[int, int, int]:
        height = (self.in_height - self.kernel_height) // self.stride_height + 1
        return self.out_channels, height, (self.in_width - self.kernel_width) // self.stride_width + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.in_channels, self.kernel_height, self.kernel_width


def layer_table(network: nn.Module, image_shape: Sequence[int]) -> Tensor:
    """The table by which ``fastws.small_cnn_step`` and its relatives run a network.

    Flat weights are in the order of ``network.parameters()``. Which activation and how much dropout a network has is
    not in the table: operators take them per network.

    Args:
        network: Its layers, in the order in which they are registered and run: convolutions without padding, groups
            or dilation; max-pooling whose stride is its kernel; Tanh, ReLU, Sigmoid and exact GELU; Dropout; Flatten;
            Linear, the last one giving the logits.
        image_shape: Channels, height and width.

    Returns:
        int64 ``[L, 12]``, one row per operation; columns are the fields of ``fastws.small_cnn.Row``.

    Raises:
        ValueError: If a layer is of another kind, does not fit its input, activations differ, or the network is too
            large for a cache.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(),
        ...                               torch.nn.Linear(8, 3))
        >>> layer_table(network, (1, 4, 4))[:, [0, 1, 4, 9, 10]]
        tensor([[ 0,  1,  2,  0, 18],
                [ 2,  2,  2, -1, -1],
                [ 0,  8,  3, 20, 44]])
    """
    kinds = {type(layer).__name__ for _, layer in layers_of(network) if isinstance(layer, tuple(ACTIVATIONS.values()))}
    if len(kinds) > 1:
        what = "be of one kind, for operators take one per network"
        raise ValueError(f"layer_table: activations must {what}, got {', '.join(sorted(kinds))}")
    offsets, num_weights = {}, 0
    for parameter in network.parameters():
        offsets[parameter] = num_weights
        num_weights += parameter.numel()
    shape, units, size, rows = tuple(image_shape), 0, 0, []
    for name, layer in layers_of(network):
        row = row_of(layer, shape, offsets)
        if row is None and not (isinstance(layer, nn.Flatten) and layer.start_dim == 1 and layer.end_dim == -1):
            expected = "one that the kernel runs on what comes before it, once"
            hint = "use torch.func or train one by one"
            raise ValueError(f"layer_table: layer {name!r} must be {expected} ({hint}), got {layer} on {list(shape)}")
        flat = row is None or len(shape) == 1
        if row is not None:
            if row.kind == DROPOUT:
                row, units = row._replace(first_unit=units), units + torch.Size(row.out_shape).numel()
            rows.append(row)
            shape = row.out_shape
        shape = (torch.Size(shape).numel(),) if flat else shape
        size += torch.Size(shape).numel()
    if offsets:
        raise ValueError("layer_table: all parameters must belong to layers of the table, got one that does not")
    if not rows or rows[-1].kind != CONVOLUTION or len(shape) != 1:
        raise ValueError(f"layer_table: the last layer must be Linear, got an output of shape {list(shape)}")
    if num_weights + size > BUDGET:
        got = f"{num_weights} and {size}: use torch.func or train one by one"
        raise ValueError(f"layer_table: weights and activations must together be at most {BUDGET} numbers, got {got}")
    return torch.tensor(rows, dtype=torch.int64)


def layers_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers in the order of registration, a layer that is used twice twice."""
    for name, module in network.named_modules(remove_duplicate=False):
        if not any(True for _ in module.children()):
            yield name, module


def row_of(layer: nn.Module, shape: tuple[int, ...], offsets: dict[nn.Parameter, int]) -> Row | None:
    """The row of a layer on an input of ``shape``, whose parameters leave ``offsets``; None if it has none."""
    maps = shape if len(shape) == 3 else (*shape, 1, 1)
    if isinstance(layer, nn.Conv2d | nn.Linear):
        if isinstance(layer, nn.Linear):
            fits, kernel, stride = shape == (layer.in_features,), (1, 1), (1, 1)
        else:
            kernel, stride = layer.kernel_size, layer.stride
            plain = layer.padding in ((0, 0), "valid") and layer.dilation == (1, 1) and layer.groups == 1
            fits = plain and len(shape) == 3 and shape[0] == layer.in_channels
        fits = fits and layer.weight in offsets and (layer.bias is None or layer.bias in offsets)
        if not fits or maps[1] < kernel[0] or maps[2] < kernel[1]:
            return None
        bias = -1 if layer.bias is None else offsets.pop(layer.bias)
        return Row(CONVOLUTION, *maps, len(layer.weight), *kernel, *stride, offsets.pop(layer.weight), bias, -1)
    if isinstance(layer, nn.MaxPool2d):
        kernel, stride, padding, dilation = (
            (x, x) if isinstance(x, int) else tuple(x)
            for x in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        plain = kernel == stride and padding == (0, 0) and dilation == (1, 1)
        fits = plain and not layer.ceil_mode and len(shape) == 3 and shape[1] >= kernel[0] and shape[2] >= kernel[1]
        return Row(POOLING, *maps, maps[0], *kernel, *kernel, -1, -1, -1) if fits else None
    known = isinstance(layer, tuple(ACTIVATIONS.values())) and getattr(layer, "approximate", "none") == "none"
    if known or isinstance(layer, nn.Dropout):
        kind = ACTIVATION if known else DROPOUT
        return Row(kind, *maps, maps[0], 1, 1, 1, 1, -1, -1, -1)
    return None


def rows_of(layers: Tensor) -> list[Row]:
    return [Row(*row) for row in layers.tolist()]


def is_sound(row: Row) -> bool:
    """Whether the numbers of a row belong together."""
    kernel, stride = (row.kernel_height, row.kernel_width), (row.stride_height, row.stride_width)
    if min(*row.in_shape, row.out_channels, *kernel, *stride) < 1 or min(row.out_shape) < 1:
        return False
    if row.kind == CONVOLUTION:
        return True
    tiles = kernel == stride and row.out_channels == row.in_channels
    return tiles and (row.kind == POOLING or (row.kind in (ACTIVATION, DROPOUT) and kernel == (1, 1)))


def check_layers(op: str, layers: Tensor, images: Tensor, num_weights: int) -> None:
    """Checks shape and dtype of a table; on the CPU, and outside of compilation, also that its rows fit together."""
    if layers.dim() != 2 or layers.shape[1] != len(Row._fields) or len(layers) == 0 or layers.dtype != torch.int64:
        raise ValueError(f"{op}: layers must be a table of fastws.layer_table, got {list(layers.shape)} {layers.dtype}")
    if torch.compiler.is_compiling() or layers.device.type != "cpu":
        return
    shape, used, units = tuple(images.shape[1:]), 0, 0
    for number, row in enumerate(rows_of(layers)):
        fits = row.in_shape in (shape, (torch.Size(shape).numel(), 1, 1)) and is_sound(row)
        if row.kind == CONVOLUTION:
            size = torch.Size(row.weight_shape).numel()
            fits = fits and 0 <= row.weight_offset <= num_weights - size
            fits = fits and row.bias_offset <= num_weights - row.out_channels
            used += size + (row.bias_offset >= 0) * row.out_channels
        elif row.kind == DROPOUT:
            fits = fits and row.first_unit == units
            units += torch.Size(row.out_shape).numel()
        if not fits:
            expected = f"fit an input of shape {list(shape)} and {num_weights} weights"
            raise ValueError(f"{op}: layers[{number}] must {expected}, got {row}")
        shape = row.out_shape
    if used != num_weights or row.kind != CONVOLUTION or shape[1:] != (1, 1):
        got = f"{used} of {num_weights}, and logits of shape {list(shape)}"
        raise ValueError(f"{op}: layers must use all weights and end in a dense layer, got {got}")
