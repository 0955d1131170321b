"""Data sets of encoded images: parquet files of the Hugging Face hub, and folders of one class each."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow.parquet
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastws.data.raw import Kind
from fastws.files.checkpoints import unreadable

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
ANNOTATIONS = "val_annotations.txt"  # classes of Tiny-ImageNet's images for validation, which lie in one folder


def decode(encoded: bytes | Path, where: str) -> numpy.ndarray:
    """``[C, H, W]`` uint8: one channel for grey images, three for all others."""
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            check_depth(image, where)
            pixels = numpy.asarray(image if image.mode == "L" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # SyntaxError: a damaged PNG
        raise ValueError(f"{where} must be a readable PNG or JPEG, got {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


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
    wanted = choose(total, limit)
    images, labels, places, first = [], [], [], 0
    for file, parquet in zip(files, opened, strict=True):
        here = wanted[(wanted >= first) & (wanted < first + parquet.metadata.num_rows)] - first
        for row, image, label in read_rows(file, parquet, here):
            images.append(image)
            labels.append(label)
            places.append(f"{file}: image in row {row}")
        first += parquet.metadata.num_rows
    return stack(images, places), torch.tensor(labels)


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
            encoded = entry.get("bytes") if isinstance(entry, dict) else entry
            where = f"{file}: image in row {row}"
            if not isinstance(encoded, bytes):
                raise ValueError(f"{where} must be the bytes of a PNG or JPEG, got {type(encoded).__name__}")
            if not isinstance(number, int):
                raise ValueError(f"{file}: label in row {row} must be a whole number, got {number!r}")
            yield int(row), decode(encoded, where), number
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
        lines = (line.split("\t") for line in annotations.read_text().splitlines())
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
    images = [decode(path, f"{path}: file") for path, _ in chosen]
    return stack(images, [f"{path}: image" for path, _ in chosen]), torch.tensor([label for _, label in chosen])


KINDS = [
    Kind("train*.parquet", lambda folder: bool(find_parquet(folder, "train")), read_parquet),
    Kind("train/<class>/*.png", lambda folder: find_classes(folder, "train") is not None, read_classes),
]
