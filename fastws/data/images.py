"""Image data sets in memory, as float tensors."""

import gzip
import io
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy
import pyarrow.parquet
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

TEST_SHARE = 0.2  # of the digits
SPLIT_SEED = 42
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")


class Images(NamedTuple):
    """An image data set. Images are ``[n, C, H, W]`` float32, labels ``[n]`` int64 in ``[0, num_classes)``.

    Images are normalised per channel with the mean and the standard deviation of the training images, which so have
    mean 0 and standard deviation 1.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    name: str


def load(name: str | os.PathLike, limit: int | None = None) -> Images:
    """Loads an image data set.

    Args:
        name: ``"digits"``, the 1,797 images of 8 x 8 pixels that come with scikit-learn, of which a fixed fifth of each
            class is for testing; or a folder in the layout of the Hugging Face hub: parquet files ``train*.parquet``
            and ``test*.parquet``, there or in ``data/``, with columns ``image`` or ``img`` (PNG or JPEG) and ``label``.
        limit: At most so many images of each part, evenly spaced, because files are often sorted by class.

    Raises:
        FileNotFoundError: If a file is missing, or scikit-learn for the digits.
        ValueError: If a column is missing, an image cannot be decoded or has another size, or ``limit`` is below 1.

    Example:
        >>> images = load("digits")
        >>> images.train_x.shape, images.test_x.shape, images.num_classes
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]), 10)
    """
    if limit is not None and limit < 1:
        raise ValueError(f"load: limit must be at least 1, got {limit}")
    if name == "digits":
        train, test = read_digits(limit)
    else:
        train, test = (read_parquet(find_parquet(Path(name), part), limit) for part in ("train", "test"))
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{list(train[0].shape[1:])} and {list(test[0].shape[1:])}"
        raise ValueError(f"{name}: images for training and testing must have one shape, got {shapes}")
    (train_x, train_y), (test_x, test_y) = train, test
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    std, mean = torch.std_mean(train_x.float(), (0, 2, 3), correction=0, keepdim=True)
    train_x, test_x = ((x.float() - mean) / std.clamp(min=1e-6) for x in (train_x, test_x))
    return Images(train_x, train_y, test_x, test_y, num_classes, str(name))


def read_digits(limit: int | None) -> list[tuple[Tensor, Tensor]]:
    """The digits of scikit-learn, read without importing it, split by class."""
    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("digits: scikit-learn must be installed, it brings them; pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file must come with scikit-learn, got none; pip install -U scikit-learn")
    with gzip.open(path) as file:
        table = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.float32))
    images, labels = table[:, :-1].view(-1, 1, 8, 8), table[:, -1].long()
    random = numpy.random.default_rng(SPLIT_SEED)
    testing = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        testing[members[random.permutation(len(members))[: round(TEST_SHARE * len(members))]]] = True
    rows = [part.nonzero().flatten()[:limit] for part in (~testing, testing)]  # in random order of the classes
    return [(images[part], labels[part]) for part in rows]


def find_parquet(folder: Path, part: str) -> list[Path]:
    for place in (folder, folder / "data"):
        files = sorted(place.glob(f"{part}*.parquet"))
        if files:
            return files
    what = "none there" if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"{folder}: data must be 'digits' or a folder with {part}*.parquet, got {what}")


def read_parquet(files: list[Path], limit: int | None) -> tuple[Tensor, Tensor]:
    """Images ``[n, C, H, W]`` uint8 and labels ``[n]`` int64, of all rows or of ``limit`` evenly spaced ones."""
    opened = [open_parquet(file) for file in files]
    total = sum(parquet.metadata.num_rows for parquet in opened)
    if total == 0:
        raise ValueError(f"{files[0]}: file must hold images, got none")
    wanted = numpy.arange(min(total, limit or total)) * total // min(total, limit or total)
    images, labels, first = [], [], 0
    for file, parquet in zip(files, opened, strict=True):
        here = wanted[(wanted >= first) & (wanted < first + parquet.metadata.num_rows)] - first
        for row, image, label in read_rows(file, parquet, here):
            if images and image.shape != images[0].shape:
                shapes = f"{list(image.shape)} after {list(images[0].shape)}"
                raise ValueError(f"{file}: images must have one shape, got {shapes} in row {row}")
            images.append(image)
            labels.append(label)
        first += parquet.metadata.num_rows
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def open_parquet(file: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: file must be parquet, got {error}; download it again") from error


def read_rows(
    file: Path, parquet: pyarrow.parquet.ParquetFile, wanted: numpy.ndarray
) -> Iterator[tuple[int, numpy.ndarray, int]]:
    """Row number, pixels and label of the wanted rows, which ascend."""
    names = parquet.schema_arrow.names
    image, label = (find_column(file, names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    first = 0
    for batch in parquet.iter_batches(batch_size=256, columns=[image, label]):
        here = wanted[(wanted >= first) & (wanted < first + len(batch))]
        chosen = batch.take(pyarrow.array(here - first))
        for row, entry, number in zip(here, chosen[image].to_pylist(), chosen[label].to_pylist(), strict=True):
            yield int(row), decode(entry, f"{file}: image in row {row}"), number
        first += len(batch)


def find_column(file: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{file}: columns must include {' or '.join(map(repr, wanted))}, got {', '.join(names)}")


def decode(entry: object, where: str) -> numpy.ndarray:
    """``[H, W, C]`` uint8: one channel for grey images, three for all others."""
    encoded = entry.get("bytes") if isinstance(entry, dict) else entry
    if not isinstance(encoded, bytes):
        raise ValueError(f"{where} must be the bytes of a PNG or JPEG, got {type(encoded).__name__}")
    try:
        image = Image.open(io.BytesIO(encoded))
        pixels = numpy.asarray(image if image.mode == "L" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where} must be a readable PNG or JPEG, got {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels
