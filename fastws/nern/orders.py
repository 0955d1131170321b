"""Orders of the kernels of whole networks, in which NeRN's coordinates follow similar kernels (arXiv 2212.13554).

Weights never move. An order says which coordinate each kernel gets: ``crossfilter`` is one path over all kernels of a
layer; ``infilter`` one path over the channels of each filter, and one over the filters.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastws.checks import is_permutation
from fastws.files.checkpoints import load_plain
from fastws.files.json import read as read_json
from fastws.files.limits import DAMAGED
from fastws.ops.kernel_order import kernel_order, unit_rows

MODES = ("crossfilter", "infilter")
MANIFEST = "orders.json"  # beside the layers: which weights they belong to
VERSION = 1  # of what the orders of given weights are; part of their key


class Infilter(NamedTuple):
    """The order of one layer within its filters."""

    filters: Tensor  # [C_out], int64: position on the path to filter
    channels: Tensor  # [C_out, C_in], int64: of each filter, position on its path to channel


Order = Tensor | Infilter  # crossfilter: [C_out * C_in], int64, position on the path to kernel


def network_orders(
    weights: Sequence[Tensor],
    mode: str,
    *,
    improve: bool = False,
    cache: str | Path | None = None,
    progress: bool = False,
) -> list[Order]:
    """The orders of the kernels of layers, all cores busy: layers side by side, and filters within a layer.

    Similarities are those of ``fastws.kernel_order``. Between filters they are the sums over channels of the cosines of
    kernels, after the channels have been put in order. Within a filter of 1x1 kernels, where cosines say nothing,
    kernels follow one another by ``-(a - b)**2``, the first of equals; ``improve`` leaves those paths as they are.

    Args:
        weights: Of each layer, ``[C_out, C_in, ...]``, floating point, finite.
        mode: "crossfilter" or "infilter".
        improve: Whether greedy paths are improved, see ``fastws.kernel_order``.
        cache: A folder in which orders are kept by the content of the weights, and looked for first.
        progress: Whether to show a bar, in kernels.

    Returns:
        One order per layer.

    Raises:
        ValueError: If weights or mode do not fit, or a file of the cache is damaged.
    """
    check(weights, mode)
    if cache is not None:
        folder = Path(cache) / content_key(weights, mode, improve)
        if (folder / MANIFEST).exists():
            return load_orders(folder, weights, mode)
    total = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    with tqdm(total=total, unit=" kernels", desc=f"{mode} orders", disable=not progress) as bar:
        if mode == "crossfilter":
            orders = side_by_side(crossfilter, weights, improve, bar)
        else:
            channels = [channel_orders(weight, improve) for weight in weights]
            filters = side_by_side(filter_order, list(zip(weights, channels, strict=True)), improve, bar)
            orders = [Infilter(*order) for order in zip(filters, channels, strict=True)]
    if cache is not None:
        save_orders(folder, orders, weights, mode, improve=improve)
    return orders


def check(weights: Sequence[Tensor], mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"nern orders: mode must be one of {MODES}, got {mode!r}")
    for number, weight in enumerate(weights):
        if weight.dim() < 2 or weight.numel() == 0 or not weight.is_floating_point():
            got = f"{list(weight.shape)} {weight.dtype}"
            raise ValueError(f"nern orders: weights[{number}] must be [C_out, C_in, ...] floating point, got {got}")
        if not weight.isfinite().all():
            bad = (~weight.isfinite()).sum()
            raise ValueError(
                f"nern orders: weights[{number}] must be finite, got {bad} values that are NaN or infinite"
            )


def side_by_side(function, layers: Sequence, improve: bool, bar: tqdm) -> list[Tensor]:
    """``function(layer, improve)`` of all layers, on as many threads as torch has, those with most kernels first."""

    def run(layer):
        order = function(layer, improve)
        bar.update(kernels(layer))
        return order

    def kernels(layer) -> int:
        weight = layer if isinstance(layer, Tensor) else layer[0]
        return weight.shape[0] * weight.shape[1]

    by_size = sorted(range(len(layers)), key=lambda number: -kernels(layers[number]))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        futures = {number: pool.submit(run, layers[number]) for number in by_size}
        return [futures[number].result() for number in range(len(layers))]


def crossfilter(weight: Tensor, improve: bool) -> Tensor:
    return kernel_order(weight.detach().flatten(0, 1).reshape(weight.shape[0] * weight.shape[1], -1), improve=improve)


def channel_orders(weight: Tensor, improve: bool) -> Tensor:
    filters = weight.detach().flatten(2) if weight.dim() > 2 else weight.detach()[..., None]
    if filters.shape[2] == 1:
        return value_orders(filters[..., 0])
    rows = unit_rows(filters)
    return torch.ops.fastws.kernel_order(rows.cpu() if improve else rows, improve).to(weight.device)


def value_orders(values: Tensor) -> Tensor:
    """Greedy paths from column 0 of ``[F, C]`` to the nearest value, the first of equals."""
    values = values.double()
    order = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    taken = torch.zeros_like(order, dtype=torch.bool)
    for position in range(1, values.shape[1]):
        current = order[:, position - 1 : position]
        taken.scatter_(1, current, True)
        distance = (values - values.gather(1, current)).square().masked_fill_(taken, torch.inf)
        order[:, position] = distance.argmin(1)
    return order


def filter_order(layer: tuple[Tensor, Tensor], improve: bool) -> Tensor:
    weight, channels = layer
    rows = unit_rows(weight.detach().flatten(2) if weight.dim() > 2 else weight.detach()[..., None])
    rows = rows.gather(1, channels[..., None].expand(rows.shape)).flatten(1)[None]
    return torch.ops.fastws.kernel_order(rows.cpu() if improve else rows, improve)[0].to(weight.device)


def coordinates(order: Order | None, shape: Sequence[int]) -> Tensor:
    """The filter and channel coordinates that kernels get: their ranks on the paths.

    A kernel at rank r of a crossfilter path gets ``(r // C_in, r % C_in)``; a kernel (f, c) of an infilter order gets
    ``(rank of f, rank of c on the path of f)``; without an order it gets ``(f, c)``.

    Args:
        order: Of one layer; None leaves kernels where they are.
        shape: Of its weight, ``[C_out, C_in, ...]``.

    Returns:
        ``[C_out, C_in, 2]``, int64.
    """
    filters, channels = shape[:2]
    device = None if order is None else order[0].device
    rank = torch.arange(filters * channels, device=device).view(filters, channels)
    if isinstance(order, Infilter):
        of_filters = order.filters.argsort()[:, None].expand(filters, channels)
        return torch.stack([of_filters, order.channels.argsort(1)], -1)
    if order is not None:
        rank = order.argsort().view(filters, channels)
    return torch.stack([rank // channels, rank % channels], -1)


def content_key(weights: Sequence[Tensor], mode: str, improve: bool) -> str:
    """Names the orders of these weights: SHA-256 of mode, ``improve``, and dtypes, shapes and bytes of the layers."""
    digest = hashlib.sha256(f"{VERSION} {mode} {bool(improve)}".encode())
    for weight in weights:
        digest.update(f" {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_orders(
    folder: str | Path, orders: Sequence[Order], weights: Sequence[Tensor], mode: str, *, improve: bool = False
) -> None:
    """Writes ``layer_0.pt``, ... as the published code does, lists or tuples of lists, and the key of the weights.

    The folder appears when all files are on the disk; what was there before is replaced.

    Raises:
        OSError: If the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    manifest = {"key": content_key(weights, mode, improve), "mode": mode, "improve": bool(improve)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            whole = Path(temporary, "whole")
            whole.mkdir()
            write(whole, orders, manifest)
            if folder.exists():
                shutil.move(folder, Path(temporary, "old"))
            try:
                os.replace(whole, folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # else another process of the run was faster
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's archive writer, after a failed write
        raise OSError(f"nern orders: folder must be on a disk with room, got {str(folder)!r}: {error}") from error


def write(folder: Path, orders: Sequence[Order], manifest: dict[str, Any]) -> None:
    for number, order in enumerate(orders):
        plain = tuple(x.tolist() for x in order) if isinstance(order, Infilter) else order.tolist()
        with open(folder / f"layer_{number}.pt", "wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
    with open(folder / MANIFEST, "w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())


def load_orders(folder: str | Path, weights: Sequence[Tensor], mode: str) -> list[Order]:
    """Reads what ``save_orders`` or the published code wrote; nothing in the files is executed.

    Orders that carry a key are refused where it is not that of the weights. The published code wrote none: of its files
    only numbers and sizes are checked.

    Raises:
        ValueError: If orders are of other weights or another mode, a layer is missing, or a file is damaged.
    """
    check(weights, mode)
    folder = Path(folder)
    check_manifest(folder, weights, mode)
    orders = []
    for number, weight in enumerate(weights):
        path = folder / f"layer_{number}.pt"
        if not path.exists():
            raise ValueError(
                f"{folder}: folder must hold layer_0.pt to layer_{len(weights) - 1}.pt, got no {path.name}"
            )
        orders.append(parse(path, weight, mode))
    extra = folder / f"layer_{len(weights)}.pt"
    if extra.exists():
        raise ValueError(f"{folder}: folder must hold orders of {len(weights)} layers, got {extra.name} too")
    return orders


def check_manifest(folder: Path, weights: Sequence[Tensor], mode: str) -> None:
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        manifest = read_json(path)
        key, theirs, improve = manifest["key"], manifest["mode"], manifest["improve"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: file must hold key, mode and improve, got {error!r}; remove {folder}") from error
    if theirs != mode:
        raise ValueError(f"{folder}: orders must be {mode}, got {theirs}")
    ours = content_key(weights, mode, improve)
    if key != ours:
        what = f"{ours[:12]}, the key of these weights, got {str(key)[:12]}"
        raise ValueError(f"{folder}: key must be {what}; these are orders of other weights, so make them anew")


def parse(path: Path, weight: Tensor, mode: str) -> Order:
    try:
        plain = load_plain(path)
        if mode == "crossfilter":
            order = torch.tensor(plain, dtype=torch.int64)
            expected, lists = [weight.shape[:2].numel()], [order]
        else:
            order = Infilter(*(torch.tensor(x, dtype=torch.int64) for x in plain))
            expected, lists = [weight.shape[0], weight.shape[:2]], list(order)
    except DAMAGED as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: file must hold the {mode} order of a layer, got {first}") from error
    for found, size in zip(lists, expected, strict=True):
        size = torch.Size([size]) if isinstance(size, int) else size
        if found.shape != size or not is_permutation(found):
            shape = list(weight.shape)
            raise ValueError(f"{path}: order must hold each number below {size[-1]} once, for weights {shape}")
    order = Infilter(*(x.to(weight.device) for x in order)) if mode == "infilter" else order.to(weight.device)
    return order
