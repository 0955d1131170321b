"""The network that a NeRN stores, as an ordinary checkpoint; and how small and how good it is."""

from collections.abc import Iterable
from copy import deepcopy
from math import ceil, log2
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastws.nern.layers import StoredLayers
from fastws.nn.nern import NeRN

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS = ("fp32", "fp16", "int8")
LARGEST = 127  # of int8
SMALLEST = 1e-30  # scale of a row of zeros


class Size(NamedTuple):
    """Bytes of what has to be kept of a NeRN."""

    predictor: int
    order: int  # which coordinate each kernel has
    original: int  # of the weights that are stored, in float32

    @property
    def share(self) -> float:
        return (self.predictor + self.order) / self.original


# --- precision of the predictor


def compress(state: dict[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """The tensors of a predictor as they are kept.

    "fp16" casts all. "int8" keeps ``round(w / scale)`` of matrices, with a scale of each row that takes its largest
    entry to 127, under the name with ``.scale`` behind it; and vectors in fp16.

    Raises:
        ValueError: If there is no such precision, or a number is too large for it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"nern export: precision must be one of {PRECISIONS}, got {precision!r}")
    if precision == "fp32":
        return {name: tensor.float() for name, tensor in state.items()}
    kept = {}
    for name, tensor in state.items():
        if tensor.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"nern export: {name} must be below 65,504 for {precision}, got {tensor.abs().max():g}")
        if precision == "int8" and tensor.dim() == 2:
            scale = tensor.abs().amax(1).clamp(min=SMALLEST).float() / LARGEST
            kept[name] = (tensor / scale[:, None]).round().to(torch.int8)
            kept[f"{name}.scale"] = scale
        else:
            kept[name] = tensor.half()
    return kept


def decompress(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``compress`` kept, in float32."""
    scales = {name: tensor for name, tensor in kept.items() if name.endswith(".scale")}
    state = {name: tensor.float() for name, tensor in kept.items() if name not in scales}
    return {name: x * scales[f"{name}.scale"][:, None] if f"{name}.scale" in scales else x for name, x in state.items()}


def order_bytes(stored: StoredLayers) -> int:
    """Bytes of the orders of all layers, with as many bits for a number as the largest needs.

    A path over the kernels of a layer is that many numbers; one within filters is a path over channels for each, and
    one over the filters; kernels in their own order need nothing.
    """
    bits, first = 0, 0
    for layer in stored.layers:
        filters, channels = layer.shape[:2]
        places = (stored.rows[first : first + layer.kernels] - first).view(filters, channels)
        first += layer.kernels
        if (places.flatten().diff() == 1).all():
            continue
        if (places // channels == places[:, :1] // channels).all():
            bits += layer.kernels * index_bits(channels) + filters * index_bits(filters)
        else:
            bits += layer.kernels * index_bits(layer.kernels)
    return ceil(bits / 8)


def index_bits(count: int) -> int:
    return ceil(log2(count))


def measure(nern: NeRN, stored: StoredLayers, precision: Precision) -> Size:
    kept = compress(nern.state_dict(), precision)
    return Size(sum(tensor.nbytes for tensor in kept.values()), order_bytes(stored), 4 * stored.num_weights)


# --- the network


@torch.no_grad()
def reconstruct(nern: NeRN, stored: StoredLayers, network: nn.Module, precision: Precision = "fp32") -> nn.Module:
    """A copy of a network with the kernels that a NeRN predicts in the place of its own."""
    kept = deepcopy(nern)
    kept.load_state_dict(decompress(compress(nern.state_dict(), precision)))
    weights = stored.weights(kept()[stored.rows.to(kept.grid.device)])
    copy = deepcopy(network)
    copy.load_state_dict(weights, strict=False)
    return copy


@torch.no_grad()
def compare(network: nn.Module, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy of both on labelled images, and the share of images that both say the same of."""
    right = torch.zeros(3, dtype=torch.float64)
    count = 0
    for images, labels in batches:
        ours, theirs = network(images).argmax(1), teacher(images).argmax(1)
        right += torch.tensor([(x == y).sum() for x, y in ((ours, labels), (theirs, labels), (ours, theirs))])
        count += len(labels)
    return dict(zip(("accuracy", "original_accuracy", "agreement"), (right / count).tolist(), strict=True))


def relative_rmse(network: nn.Module, original: nn.Module, stored: StoredLayers) -> float:
    """Root mean squared error of the stored weights over their root mean square."""
    pairs = list(zip(*(list(stored.originals(one).values()) for one in (network, original)), strict=True))
    error, whole = (
        sum(float(x.double().square().sum()) for x in tensors)
        for tensors in ([x - y for x, y in pairs], [y for _, y in pairs])
    )
    return (error / whole) ** 0.5
