"""Data sets of plain pixels, in the files that their authors publish and torchvision keeps.

Nothing is unpickled but arrays: the python batches of CIFAR go through a reader that knows no other class.
"""

import bz2
import codecs
import gzip
import io
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import scipy.io
import torch
from torch import Tensor

# what damaged files raise in the libraries that read them
DAMAGED = (pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, OSError)
DAMAGED += (zlib.error, NotImplementedError)
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
        except DAMAGED as error:
            raise ValueError(f"{place}: {part}ing images must be {files}, got {error}; download them again") from error
        if len(pixels) != len(labels) or len(labels) == 0:
            counts = f"{len(pixels)} images and {len(labels)} labels"
            raise ValueError(f"{place}: {part}ing images must have a label each, got {counts}; download them again")
        count = min(len(labels), limit or len(labels))
        rows = numpy.arange(count) * len(labels) // count
        return torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows].astype(numpy.int64))

    return Kind(files, lambda folder: find_place(folder, train) is not None, read_limited)


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
    data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    axes = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = numpy.frombuffer(data, ">i4", axes, 4)
    if axes == 0 or len(data) != 4 + 4 * axes + shape.prod():
        raise ValueError(f"{path.name} of {len(data)} bytes, which are not what its header says")
    return numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def read_mnist(folder: Path, part: str) -> Part:
    name = "train" if part == "train" else "t10k"
    return read_idx(folder / f"{name}-images-idx3-ubyte")[:, None], read_idx(folder / f"{name}-labels-idx1-ubyte")


# --- CIFAR-10 and CIFAR-100


class ArrayUnpickler(pickle.Unpickler):
    """Reads what numpy arrays, numbers, bytes, strings and containers are made of, and nothing else."""

    KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): numpy.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): numpy.ndarray,
        ("numpy", "dtype"): numpy.dtype,
        ("_codecs", "encode"): codecs.encode,  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str):
        try:
            return self.KNOWN[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"a {module}.{name}, which is not unpickled") from None


def read_cifar(files: dict[str, list[str]], labels: bytes) -> Callable[[Path, str], Part]:
    def read(folder: Path, part: str) -> Part:
        batches = []
        for name in files[part]:
            content = (folder / name).read_bytes()
            batches.append(ArrayUnpickler(io.BytesIO(content), encoding="bytes").load())
        pixels = numpy.concatenate([batch[b"data"] for batch in batches])
        return pixels.reshape(-1, 3, 32, 32), numpy.concatenate([batch[labels] for batch in batches])

    return read


CIFAR10 = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CIFAR100 = {"train": ["train"], "test": ["test"]}


# --- SVHN, STL-10, USPS


def read_svhn(folder: Path, part: str) -> Part:
    content = scipy.io.loadmat(folder / f"{part}_32x32.mat", variable_names=["X", "y"])
    return content["X"].transpose(3, 2, 0, 1), content["y"].reshape(-1) % 10  # the digit 0 has the label 10


def read_stl10(folder: Path, part: str) -> Part:
    pixels = numpy.fromfile(folder / f"{part}_X.bin", numpy.uint8).reshape(-1, 3, 96, 96)
    return pixels.transpose(0, 1, 3, 2), numpy.fromfile(folder / f"{part}_y.bin", numpy.uint8) - 1


def read_usps(folder: Path, part: str) -> Part:
    """Lines ``label 1:value 2:value ...`` with labels from 1 and values in [-1, 1], as torchvision rounds them."""
    lines = bz2.decompress((folder / ("usps.bz2" if part == "train" else "usps.t.bz2")).read_bytes()).split(b"\n")
    rows = [line.split() for line in lines if line.strip()]
    values = numpy.array([[word.partition(b":")[2] for word in row[1:]] for row in rows]).astype(numpy.float64)
    labels = numpy.array([row[0] for row in rows]).astype(numpy.float64)
    return ((values + 1) / 2 * 255).astype(numpy.uint8).reshape(-1, 1, 16, 16), labels - 1


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
