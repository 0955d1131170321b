"""The network that a NeRN stores, as an ordinary checkpoint; and how small and how good it is."""

import os
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastws.devices import find_device
from fastws.files.atomic import write_json, write_tensors
from fastws.files.checkpoints import load_plain
from fastws.nern.checkpoint import load_nern
from fastws.nern.images import ImageSet, open_images
from fastws.nern.layers import StoredLayers
from fastws.nern.orders import content_key
from fastws.nern.teachers import check_network, load_teacher
from fastws.nn.nern import NeRN

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS = ("fp32", "fp16", "int8")
LARGEST = 127  # of int8
SMALLEST = 1e-30  # scale of a row of zeros


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the network that a NeRN stores as an ordinary checkpoint, and says how small and how good it is.

    fastws nern export --model runs/nern/best.pt --out stored.safetensors
    """

    model: str  # best.pt or checkpoint.pt of fastws train nern
    out: str  # file to write, a safetensors file with the names of the original network; a report goes to <out>.json

    weights: str | None = None  # checkpoint of the original network; by default the one that was stored
    key: str | None = None  # under which that torch file holds the network; by default the only or the usual one
    images: str | None = None  # data set whose test images compare the original and the stored network
    precision: Precision = "fp32"  # of the predictor whose kernels are written; the report has all precisions
    image_size: int | None = None  # height and width of images from folders of large ones; by default those of training
    batch_size: int = 256  # images per forward pass
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if Path(self.out).suffix != ".safetensors":
            raise ValueError(f"nern export: out must end in .safetensors, got {self.out!r}")
        for name in ("batch_size", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"nern export: {name} must be at least 1, got {value}")


class Size(NamedTuple):
    """Bytes of what has to be kept of a NeRN."""

    predictor: int
    order: int  # which coordinate each kernel has
    original: int  # of the weights that are stored, in float32

    @property
    def share(self) -> float:
        return (self.predictor + self.order) / self.original


def run(config: Config) -> None:
    device = find_device(config.device)
    nern, stored, learned = load_nern(config.model)
    training, key = read_training(config.model)
    weights = config.weights or training["weights"]
    if os.path.realpath(config.out) == os.path.realpath(weights):
        raise ValueError(f"nern export: out must not be the original network, got {config.out!r}; give another file")
    place = config.key or (None if config.weights else training["key"])
    original = load_teacher(training["architecture"], weights, key=place)
    layers = list(stored.originals(original).values())
    if content_key(layers, training["order"], training["improve"]) != key:
        raise ValueError(f"nern export: weights must be those that {config.model} stores, got others in {weights}")
    images = None
    if config.images is not None:
        images = open_images(config.images, size=config.image_size or training["image_size"])
        check_network(original, images.shape, images.num_classes, maps=False)
        batches = show(images, config.batch_size, "original", device)
        theirs, labels = answers(deepcopy(original).to(device), batches), images.parts["test"].labels
    report = {"model": config.model, "layers": len(stored.layers), "kernels": len(stored.rows)}
    report |= {"weights": stored.num_weights, "precisions": {}}
    for precision in PRECISIONS if fits_half(nern.state_dict()) else (config.precision,):
        network = reconstruct(nern, stored, original, precision, learned)
        size = measure(nern, stored, precision)
        row = size._asdict() | {"share": size.share, "relative_error": relative_error(network, original, stored)}
        if images is not None:
            batches = show(images, config.batch_size, precision, device)
            row |= compare(answers(network.to(device), batches), theirs, labels)
        report["precisions"][precision] = row
        if precision == config.precision:
            chosen = network.cpu()
    beside = Path(f"{config.out}.json")
    write(Path(config.out), chosen)
    write_json(beside, report)
    print_report(report)
    print(f"network: {config.out}, report: {beside}")


def read_training(path: str) -> tuple[dict[str, Any], str]:
    """The config of a run, whose checkpoint ``load_nern`` has read before, and the key of the weights it stores."""
    content = load_plain(path)
    config = content.get("config")
    config = {"key": None, **config} if isinstance(config, dict) else {}
    for name in ("architecture", "weights", "image_size", "order", "improve"):
        if name not in config:
            raise ValueError(f"{path}: config must be that of fastws train nern, got no {name}")
    return config, content["extra"].get("key", "")


def show(images: ImageSet, size: int, precision: str, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    total = -(-len(images.parts["test"].labels) // size)
    return tqdm(images.batches("test", size, device), total=total, desc=precision, unit=" batches")


def write(path: Path, network: nn.Module) -> None:
    tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in network.state_dict().items()}
    try:
        write_tensors(path, tensors)
    except OSError as error:
        raise OSError(f"nern export: out must be a file that can be written, got {str(path)!r}: {error}") from error


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['kernels']:,} kernels, {report['weights']:,} weights in {report['layers']} layers")
    columns = {"predictor": "predictor, bytes", "order": "order, bytes", "share": "of fp32", "relative_error": "error"}
    columns |= {"accuracy": "accuracy", "original_accuracy": "original", "agreement": "agreement"}
    first = next(iter(report["precisions"].values()))
    shown = {name: title for name, title in columns.items() if name in first}
    print(" " * 6 + "".join(f"{title:>18}" for title in shown.values()))
    for precision, row in report["precisions"].items():
        cells = (f"{row[name]:>18,}" if isinstance(row[name], int) else f"{row[name]:>18.4f}" for name in shown)
        print(f"{precision:6}" + "".join(cells))


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
        if not fits_half({name: tensor}):
            raise ValueError(f"nern export: {name} must be below 65,504 for {precision}, got {tensor.abs().max():g}")
        if precision == "int8" and tensor.dim() == 2:
            scale = tensor.abs().amax(1).clamp(min=SMALLEST).float() / LARGEST
            kept[name] = (tensor / scale[:, None]).round().to(torch.int8)
            kept[f"{name}.scale"] = scale
        else:
            kept[name] = tensor.half()
    return kept


def fits_half(state: dict[str, Tensor]) -> bool:
    return all(tensor.abs().max() <= torch.finfo(torch.float16).max for tensor in state.values())


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
def reconstruct(
    nern: NeRN,
    stored: StoredLayers,
    network: nn.Module,
    precision: Precision = "fp32",
    learned: dict[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of a network with the kernels that a NeRN predicts in the place of its own.

    Args:
        nern: The predictor.
        stored: Which layers it stores; the others remain.
        network: The original.
        precision: That the predictor is kept in.
        learned: Tensors that were trained beside it, by name.

    Raises:
        ValueError: If the network has not the stored layers.
    """
    expected, learned = network.state_dict(), learned or {}
    shapes = [(layer.name, layer.shape) for layer in stored.layers] + [(name, x.shape) for name, x in learned.items()]
    for name, shape in shapes:
        found = list(expected[name].shape) if name in expected else "nothing"
        if found != list(shape):
            must = f"{list(shape)}, as the NeRN stores it"
            raise ValueError(f"nern export: {name} of the original must be {must}, got {found}")
    kept = deepcopy(nern)
    kept.load_state_dict(decompress(compress(nern.state_dict(), precision)))
    predictions = kept()[stored.rows.to(kept.grid.device)]
    copy = deepcopy(network)
    # nothing else is loaded: another name of a tied weight would bring back the original
    copy.load_state_dict(stored.weights(predictions) | learned, strict=False)
    return copy


@torch.no_grad()
def answers(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The class that a network sees in each image, ``[n]``, on the CPU."""
    return torch.cat([network(images).argmax(1).cpu() for images, _ in batches])


def compare(ours: Tensor, theirs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of the answers of two networks, and the share of images of which both say the same."""
    shares = {"accuracy": ours == labels, "original_accuracy": theirs == labels, "agreement": ours == theirs}
    return {name: right.double().mean().item() for name, right in shares.items()}


def relative_error(network: nn.Module, original: nn.Module, stored: StoredLayers) -> float:
    """The norm of the differences of the stored weights over the norm of the original ones."""
    ours, theirs = (list(stored.originals(one).values()) for one in (network, original))
    error = sum((x.double() - y.double()).square().sum() for x, y in zip(ours, theirs, strict=True))
    return float((error / sum(y.double().square().sum() for y in theirs)).sqrt())
