"""Data sets of encoded images: parquet files of the Hugging Face hub, and folders of one class each."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pyarrow.parquet
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastws.data.raw import MAX_CLASSES, Kind
from fastws.files.checkpoints import unreadable
from fastws.files.limits import DAMAGED, FACTOR, read_bytes, read_text, room
from fastws.files.parquet import batches_of, open_parquet
from fastws.terminal import shorten

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")  # others run programs, or are for printers
ANNOTATIONS = "val_annotations.txt"  # classes of Tiny-ImageNet's images for validation, which lie in one folder


class Budget:
    """Memory for all images of a set, by the bytes that they are read from."""

    def __init__(self, size: int = 0):
        self.left = room(size)

    def spend(self, count: int, where: str) -> None:
        self.left -= count
        if self.left < 0:  # a few bytes may stand for any number of equal pixels
            raise ValueError(f"{where} must not unpack to many times the size of its file, got {count:,} bytes more")


def decode(encoded: bytes, where: str, budget: Budget) -> numpy.ndarray:
    """``[C, H, W]`` uint8: one channel for grey images, three for all others."""
    with opened(encoded, where) as image:
        budget.spend(image.width * image.height * (1 if image.mode == "L" else 3), where)
        check_depth(image, where)
        pixels = numpy.asarray(image if image.mode == "L" else image.convert("RGB"))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@contextmanager
def opened(encoded: bytes, where: str) -> Iterator[Image.Image]:
    """An image whose pixels are read in the block; raises ValueError if it is damaged or of another kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are compared with a budget
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        with image:
            yield image
    except (UnidentifiedImageError, Image.DecompressionBombError, *DAMAGED, OSError, SyntaxError) as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        got = "bytes of another kind" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where} must be a readable PNG or JPEG, got {got}") from error  # SyntaxError: a bad PNG


def check_depth(image: Image.Image, where: str) -> None:
    """Refuses grey images of more than 8 bits, of which a conversion would make most pixels white."""
    if image.mode[0] in "IF":
        raise ValueError(f"{where} must have 8 bits per channel, got mode {image.mode}; convert it first")


def stack(images: list[numpy.ndarray], places: list[str]) -> Tensor:
    for image, place in zip(images, places, strict=True):
        if image.shape != images[0].shape:
            shapes = f"{list(image.shape)} after {list(images[0].shape)}"
            raise ValueError(f"{place} must have the shape of the others, got {shapes}; resize the images first")
    return torch.from_numpy(numpy.stack(images))


def choose(total: int, limit: int | None) -> numpy.ndarray:
    """At most ``limit`` of ``total`` places, evenly spaced."""
    count = min(total, limit or total)
    return numpy.arange(count) * total // max(count, 1)


# --- parquet


def find_parquet(folder: Path, part: str) -> list[Path]:
    for place in (folder, folder / "data"):
        files = sorted(place.glob(f"{part}*.parquet"))
        if files:
            return files
    return []


def read_parquet(folder: Path, part: str, limit: int | None) -> tuple[Tensor, Tensor]:
    files = find_parquet(folder, part)
    if not files:
        raise FileNotFoundError(f"{folder}: data must have {part}*.parquet beside the other files, got none")
    opened = [open_parquet(file) for file in files]
    total = sum(parquet.metadata.num_rows for parquet in opened)
    if total == 0:
        raise ValueError(f"{files[0]}: file must hold images, got none")
    wanted, budget = choose(total, limit), Budget(sum(file.stat().st_size for file in files))
    images, labels, places, first = [], [], [], 0
    for file, parquet in zip(files, opened, strict=True):
        here = wanted[(wanted >= first) & (wanted < first + parquet.metadata.num_rows)] - first
        for row, image, label in read_rows(file, parquet, here, budget):
            images.append(image)
            labels.append(label)
            places.append(f"{file}: image in row {row}")
        first += parquet.metadata.num_rows
    return stack(images, places), torch.tensor(labels, dtype=torch.int64)


def read_rows(
    file: Path, parquet: pyarrow.parquet.ParquetFile, wanted: numpy.ndarray, budget: Budget
) -> Iterator[tuple[int, numpy.ndarray, int]]:
    """Row number, pixels and label of the wanted rows, which ascend."""
    names = parquet.schema_arrow.names
    image, label = (find_column(file, names, known) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
    first = 0
    for batch in batches_of(parquet, file, [image, label]):
        here = wanted[(wanted >= first) & (wanted < first + len(batch))]
        chosen = batch.take(pyarrow.array(here - first))
        for row, entry, number in zip(here, chosen[image].to_pylist(), chosen[label].to_pylist(), strict=True):
            encoded = entry.get("bytes") if isinstance(entry, dict) else entry
            where = f"{file}: image in row {row}"
            if not isinstance(encoded, bytes):
                raise ValueError(f"{where} must be the bytes of a PNG or JPEG, got {type(encoded).__name__}")
            if not isinstance(number, int) or not 0 <= number < MAX_CLASSES:
                what = f"a whole number from 0 below {MAX_CLASSES:,}"
                raise ValueError(f"{file}: label in row {row} must be {what}, got {shorten(repr(number))}")
            yield int(row), decode(encoded, where, budget), number
        first += len(batch)


def find_column(file: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{file}: columns must include {' or '.join(map(repr, wanted))}, got {', '.join(names)}")


# --- folders


def find_classes(folder: Path, part: str) -> Path | None:
    names = ("train",) if part == "train" else ("test", "val")
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def list_images(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Files and labels, which are the places of the classes in alphabetical order."""
    annotations = folder / ANNOTATIONS
    if annotations.exists():
        lines = [line.split("\t") for line in read_text(annotations).splitlines()]
        if any(len(words) < 2 or Path(words[0]).name != words[0] for words in lines):
            raise ValueError(f"{annotations}: lines must be a file in the folder images and a class, got others")
        found = [(folder / "images" / words[0], words[1]) for words in lines]
    else:
        images = [path for path in sorted(walk(folder)) if path.suffix.lower() in SUFFIXES]
        found = [(path, path.relative_to(folder).parts[0]) for path in images]
    for path, name in found:
        if name not in classes:
            raise ValueError(f"{path}: image must be in a folder of a class of the training images, got {name!r}")
    return [(path, classes.index(name)) for path, name in found]


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder; one that cannot be read is an error."""
    for place, _, files in os.walk(folder, onerror=unreadable):
        yield from (Path(place, file) for file in files)


def read_classes(folder: Path, part: str, limit: int | None) -> tuple[Tensor, Tensor]:
    place = find_classes(folder, part)
    if place is None:
        raise FileNotFoundError(f"{folder}: data must have a folder 'test' or 'val' beside 'train', got none")
    classes = sorted(path.name for path in find_classes(folder, "train").iterdir() if path.is_dir())
    listed = list_images(place, classes)
    if not listed:
        raise ValueError(f"{place}: folder must hold images in a folder for each class, got none")
    chosen = [listed[row] for row in choose(len(listed), limit)]
    images, budget = [], Budget()
    for path, _ in chosen:
        encoded = read_bytes(path)
        budget.left += FACTOR * len(encoded)
        images.append(decode(encoded, f"{path}: file", budget))
    return stack(images, [f"{path}: image" for path, _ in chosen]), torch.tensor([label for _, label in chosen])


KINDS = [
    Kind("train*.parquet", lambda folder: bool(find_parquet(folder, "train")), read_parquet),
    Kind("train/<class>/*.png", lambda folder: find_classes(folder, "train") is not None, read_classes),
]
