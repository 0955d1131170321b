"""Data sets of plain pixels, in the files that their authors publish and torchvision keeps.

Memory is bounded by the size of the files: what is packed says first what it unpacks to, and is believed up to a limit.
"""

import bz2
import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import scipy.io
import torch
from torch import Tensor

from fastws.files.limits import DAMAGED, open_regular, read_bytes, room, unpack
from fastws.files.unpickle import Unpickler
from fastws.files.values import Array

MAX_CLASSES = 2**16  # the last layer of a network has a row for each
USPS_PIXELS = 256
MATLAB = struct.Struct("<II")  # type and bytes of an element of a MATLAB file
HEADER, COMPRESSED = 128, 15
Part = tuple[numpy.ndarray, numpy.ndarray]


class Kind(NamedTuple):
    """A way in which an image data set lies in a folder."""

    files: str  # what it looks like, for messages
    is_in: Callable[[Path], bool]
    read: Callable[[Path, str, int | None], tuple[Tensor, Tensor]]  # folder, "train" or "test", limit


def plain(files: str, train: str, read: Callable[[Path, str], Part]) -> Kind:
    """A kind whose files are read whole.

    Args:
        files: What it looks like.
        train: A file that is there, as a pattern.
        read: Folder of that file, and part, to pixels uint8 ``[n, C, H, W]`` and labels ``[n]``.
    """

    def read_limited(folder: Path, part: str, limit: int | None) -> tuple[Tensor, Tensor]:
        place = find_place(folder, train)
        try:
            pixels, labels = read(place, part)
        except FileNotFoundError as error:
            what = f"{error.filename}: file must be there for the {part}ing images"
            raise FileNotFoundError(f"{what}, got none; download it again") from None
        except (*DAMAGED, OSError) as error:
            raise ValueError(f"{place}: {part}ing images must be {files}, got {error}; download them again") from error
        if len(pixels) != len(labels) or len(labels) == 0:
            counts = f"{len(pixels)} images and {len(labels)} labels"
            raise ValueError(f"{place}: {part}ing images must have a label each, got {counts}; download them again")
        labels = labels.astype(numpy.int64)
        check_labels(labels, f"{place}: labels of the {part}ing images")
        count = min(len(labels), limit or len(labels))
        rows = numpy.arange(count) * len(labels) // count
        return torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows])

    return Kind(files, lambda folder: find_place(folder, train) is not None, read_limited)


def check_labels(labels: numpy.ndarray, where: str) -> None:
    """Raises ValueError unless labels are whole numbers of as many classes as a network may have."""
    wrong = labels[(labels < 0) | (labels >= MAX_CLASSES)]
    if len(wrong):
        raise ValueError(f"{where} must be whole numbers from 0 below {MAX_CLASSES:,}, got {wrong[0]}")


def find_place(folder: Path, pattern: str) -> Path | None:
    """Where the files lie: in the folder, or where torchvision puts them below it."""
    found = [place for place in (folder, folder / "raw") if any(place.glob(pattern))]
    below = sorted({path.parent for depth in ("*", "*/raw") for path in folder.glob(f"{depth}/{pattern}")})
    if not found and len(below) > 1:
        raise ValueError(f"{folder}: data must be one data set, got {', '.join(map(str, below))}; name one of them")
    return next(iter([*found, *below]), None)


# --- IDX: MNIST, Fashion-MNIST


def read_idx(path: Path) -> numpy.ndarray:
    """An array of bytes: two zeros, the type 8, the number of axes, then each size, big-endian, and the data."""
    packed = path.with_name(path.name + ".gz")
    if path.exists():
        data = read_bytes(path)
    else:
        with open_regular(packed) as file:
            size = os.fstat(file.fileno()).st_size
            data = unpack(gzip.GzipFile(fileobj=file), room(size), str(packed))
    axes = data[3] if data[:3] == b"\0\0\x08" else 0
    if axes == 0 or len(data) < 4 + 4 * axes:
        raise ValueError(f"{path.name} of {len(data)} bytes, which does not begin as an IDX file of bytes does")
    shape = [int.from_bytes(data[place : place + 4], "big") for place in range(4, 4 + 4 * axes, 4)]
    if len(data) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{path.name} of {len(data)} bytes, which are not what its header says")
    return numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def read_mnist(folder: Path, part: str) -> Part:
    name = "train" if part == "train" else "t10k"
    return read_idx(folder / f"{name}-images-idx3-ubyte")[:, None], read_idx(folder / f"{name}-labels-idx1-ubyte")


# --- CIFAR-10 and CIFAR-100


def read_cifar(files: dict[str, list[str]], labels: bytes) -> Callable[[Path, str], Part]:
    def read(folder: Path, part: str) -> Part:
        batches = [read_batch(folder / name, labels) for name in files[part]]
        pixels, found = zip(*batches, strict=True)
        return numpy.concatenate(pixels), numpy.concatenate(found)

    return read


def read_batch(path: Path, labels: bytes) -> Part:
    """A pickled dictionary with an array of pixels and a list of labels, as Python 2 wrote it."""
    batch = Unpickler(read_bytes(path), text="bytes").load()
    pixels, numbers = (batch.get(name) if isinstance(batch, dict) else None for name in (b"data", labels))
    if not isinstance(pixels, Array) or pixels.value.dtype != numpy.uint8 or not isinstance(numbers, list):
        raise ValueError(f"{path.name} without an array of bytes 'data' and a list {labels.decode()!r}")
    if not all(type(number) is int and 0 <= number < MAX_CLASSES for number in numbers):
        raise ValueError(f"{path.name} with labels that are no whole numbers from 0 below {MAX_CLASSES:,}")
    return pixels.value.reshape(-1, 3, 32, 32), numpy.array(numbers, numpy.int64)


CIFAR10 = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CIFAR100 = {"train": ["train"], "test": ["test"]}


# --- SVHN, STL-10, USPS


def read_svhn(folder: Path, part: str) -> Part:
    content = read_bytes(folder / f"{part}_32x32.mat")
    check_unpacked(content)
    try:
        found = scipy.io.loadmat(io.BytesIO(content), variable_names=["X", "y"])
    except scipy.io.matlab.MatReadError as error:
        raise ValueError(str(error)) from error
    pixels, labels = (found.get(name) for name in ("X", "y"))
    if not isinstance(pixels, numpy.ndarray) or pixels.dtype != numpy.uint8 or pixels.ndim != 4:
        raise ValueError("X that is no array of bytes with four axes")
    if not isinstance(labels, numpy.ndarray) or labels.dtype.kind not in "iu":
        raise ValueError("y that is no array of whole numbers")
    return pixels.transpose(3, 2, 0, 1), labels.reshape(-1) % 10  # the digit 0 has the label 10


def check_unpacked(content: bytes) -> None:
    """Raises ValueError if the elements of a MATLAB file unpack to more than a file of its size has room for."""
    left, place = room(len(content)), HEADER
    while place + MATLAB.size <= len(content):
        kind, size = MATLAB.unpack_from(content, place)
        place += MATLAB.size
        if kind == COMPRESSED:
            machine, packed = zlib.decompressobj(), content[place : place + size]
            while packed and left > 0:
                left -= len(machine.decompress(packed, 1 << 20))
                packed = machine.unconsumed_tail
        place += size
    if left <= 0:
        raise ValueError("a MATLAB file that unpacks to many times its size")


def read_stl10(folder: Path, part: str) -> Part:
    pixels = numpy.frombuffer(read_bytes(folder / f"{part}_X.bin"), numpy.uint8).reshape(-1, 3, 96, 96)
    labels = numpy.frombuffer(read_bytes(folder / f"{part}_y.bin"), numpy.uint8)
    return pixels.transpose(0, 1, 3, 2), labels.astype(numpy.int64) - 1


def read_usps(folder: Path, part: str) -> Part:
    """Lines ``label 1:value 2:value ...`` with labels from 1 and values in [-1, 1], as torchvision rounds them."""
    path = folder / ("usps.bz2" if part == "train" else "usps.t.bz2")
    with open_regular(path) as file:
        text = unpack(bz2.BZ2File(file), room(os.fstat(file.fileno()).st_size), str(path))
    values, labels = [], []
    for line in io.BytesIO(text):
        label, *words = line.split(maxsplit=USPS_PIXELS) or [b""]
        if len(words) == USPS_PIXELS:
            row = numpy.array([word.partition(b":")[2] for word in words]).astype(numpy.float64)
            values.append(((row.clip(-1, 1) + 1) / 2 * 255).astype(numpy.uint8))
            labels.append(int(float(label)) - 1)
        elif line.strip():
            raise ValueError(f"{path.name} with a line of {len(words)} pixels in place of {USPS_PIXELS}")
    return numpy.array(values, numpy.uint8).reshape(-1, 1, 16, 16), numpy.array(labels, numpy.int64)


def holds_cifar100(folder: Path) -> bool:
    place = find_place(folder, "meta")
    return place is not None and (place / "train").is_file()  # elsewhere train is a folder


KINDS = [
    plain("train-images-idx3-ubyte[.gz]", "train-images-idx3-ubyte*", read_mnist),
    plain("data_batch_1", "data_batch_1", read_cifar(CIFAR10, b"labels")),
    plain("train_32x32.mat", "train_32x32.mat", read_svhn),
    plain("train_X.bin", "train_X.bin", read_stl10),
    plain("usps.bz2", "usps.bz2", read_usps),
    plain("cifar-100-python/train", "meta", read_cifar(CIFAR100, b"fine_labels"))._replace(is_in=holds_cifar100),
]
