"""Images that networks are distilled on and evaluated on: whole data sets in memory, folders of files, or none at all.

What a step sees is a function of seed and step: a resumed run goes on with the same images, flips and crops. Labels are
for evaluation only.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from fastws.data import encoded
from fastws.data.images import SPLIT_SEED, read, spaced, white_of
from fastws.devices import to_device
from fastws.files.limits import read_bytes
from fastws.nern.augment import DRAWS, mix, randaugment
from fastws.random.integers import epoch_rows
from fastws.random.philox import philox_reference

# where the draws of each kind begin in the stream of random numbers; each adds the step
MIX, AUGMENT, ORDER, UNIFORM = 2**58, 2**59, 2**60, 2**61
UNIT = 2.0**-32
CPU = torch.device("cpu")
Augment = Literal["crop", "rand"]
PARTS = ("train", "val", "test")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; the published code uses them on CIFAR as well
MARGIN = 4  # pixels of black around CIFAR's images before they are cropped
CENTER = 0.875  # part of a file's shorter side that is evaluated
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the crops of files, relative to the image


class Pixels(NamedTuple):
    """One part of a data set in memory."""

    images: Tensor  # [n, C, H, W] uint8
    labels: Tensor  # [n] int64


class Files(NamedTuple):
    """One part of a data set of files."""

    paths: list[Path]
    labels: Tensor  # [n] int64


class ImageSet:
    """A data set with its parts for training, validation and testing; what ``open_images`` gives.

    Attributes:
        parts: ``Pixels`` or ``Files`` by name: "train", "val", "test"; a part that is not there is left out.
        shape: ``(C, H, W)`` of all images that come out.
        num_classes: Of the labels.
    """

    def __init__(
        self,
        parts: dict[str, Pixels | Files],
        shape: tuple[int, int, int],
        mean: tuple,
        std: tuple,
        augment: Augment = "crop",
        white: int = 255,
    ):
        self.parts, self.shape, self.augment = parts, shape, augment
        self.mean, self.std = (torch.tensor(values)[:, None, None] * white for values in (mean, std))
        self.scales: dict[torch.device, tuple[Tensor, Tensor]] = {}  # mean and std on each device
        self.num_classes = 1 + max(int(part.labels.max()) for part in parts.values())

    def batch(self, size: int, seed: int, step: int, device: torch.device = CPU) -> Tensor:
        """Training images of a step, flipped at random and cropped at random, normalised: ``[size, C, H, W]`` float32.

        With ``augment="rand"`` changed by RandAugment, and mixed with each other. Each epoch visits every image once,
        in an order of its own.
        """
        images = self.labelled_batch(size, seed, step, device)[0]
        if self.augment == "crop":
            return images
        return mix(images, int(philox_reference(seed, MIX + step, 1, CPU)))

    def labelled_batch(self, size: int, seed: int, step: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """The same images, not mixed, and their labels, ``[size]`` int64."""
        part = self.parts.get("train")
        if part is None:
            raise ValueError("nern images: data must have training images, got none; train without data instead")
        chosen = take(part, epoch_rows(len(part.labels), size, seed, ORDER, step))
        draws = 5 + (DRAWS if self.augment == "rand" else 0)
        words = philox_reference(seed, AUGMENT + step, draws * size, CPU).view(draws, size)
        if isinstance(chosen, Files):
            images = decode(chosen.paths, self.shape[1], words)
        else:
            images = flip_and_crop(chosen.images, words)
        return self.normalise(images, device), to_device(chosen.labels, device)

    def batches(self, part: str, size: int, device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``[<= size, C, H, W]`` of a part as they are, normalised, and their labels, in order."""
        for rows in torch.arange(len(self.parts[part].labels)).split(size):
            chosen = take(self.parts[part], rows)
            images = decode(chosen.paths, self.shape[1]) if isinstance(chosen, Files) else chosen.images
            yield self.normalise(images, device), to_device(chosen.labels, device)

    def normalise(self, images: Tensor, device: torch.device) -> Tensor:
        if device not in self.scales:
            self.scales[device] = to_device(self.mean, device), to_device(self.std, device)
        mean, std = self.scales[device]
        return (to_device(images, device).float() - mean) / std


def open_images(
    data: str | Path,
    *,
    size: int | None = None,
    validation: int = 5000,
    limit: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    augment: Augment = "crop",
) -> ImageSet:
    """Opens a data set.

    Args:
        data: What ``fastws.data.images.load`` takes: CIFAR-10 or CIFAR-100 as parquet, binary or folder, for one.
        size: Height and width of images that are read from files when they are wanted, for data sets that do not fit
            in memory: ``train/<class>/*.jpeg`` and ``val`` or ``test``, of which ``train`` may be absent. By default
            all images are read at once, and keep their size.
        validation: Training images to hold out, drawn with seed 42; where there are fewer than ten times as many, a
            tenth of them.
        limit: At most so many images of each part, evenly spaced.
        mean: Of pixels in [0, 1], of each channel; by default those of ImageNet's colours, or of their mean.
        std: Likewise.
        augment: How training images are changed: flipped and cropped, or, those of files, by RandAugment, mixup and
            cutmix as well, as published for ImageNet.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or a number out of range.
    """
    parts = read_files(Path(data), limit) if size else read_pixels(data, limit)
    if "train" in parts:
        train = parts.pop("train")
        kept, held_out = split(len(train.labels), min(validation, len(train.labels) // 10))
        parts = {"train": take(train, spaced(kept, limit)), "val": take(train, spaced(held_out, limit)), **parts}
        parts = {name: part for name, part in parts.items() if len(part.labels)}
    channels = len(MEAN) if size else parts["train"].images.shape[1]
    mean, std = mean or default(MEAN, channels), std or default(STD, channels)
    if not len(mean) == len(std) == channels:
        raise ValueError(f"nern images: mean and std must have {channels} entries, got {len(mean)} and {len(std)}")
    shape = (channels, size, size) if size else tuple(parts["train"].images.shape[1:])
    if augment == "rand" and not size:
        raise ValueError("nern images: augment must be 'crop' for images in memory, got 'rand'; give their size")
    return ImageSet(parts, shape, mean, std, augment, white_of(data))


def uniform_images(shape: tuple[int, int, int], size: int, seed: int, step: int, device: torch.device = CPU) -> Tensor:
    """Images of a step that need no data: ``[size, *shape]`` float32, uniform in [-2, 2) (arXiv 2212.13554, 4.4)."""
    low, high = philox_reference(seed, UNIFORM + step, 2, CPU).tolist()
    generator = torch.Generator().manual_seed(low << 31 ^ high)
    return to_device(torch.rand(size, *shape, generator=generator) * 4 - 2, device)


def default(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if channels == len(values) else (sum(values) / len(values),) * channels


# --- parts


def read_pixels(data: str | Path, limit: int | None) -> dict[str, Pixels]:
    train, test = read(data, None, limit)
    return {"train": Pixels(*train), "test": Pixels(*test)}


def read_files(folder: Path, limit: int | None) -> dict[str, Files]:
    places = {part: encoded.find_classes(folder, part) for part in ("train", "test")}
    if places["test"] is None:
        raise FileNotFoundError(f"{folder}: data must have a folder 'test' or 'val' with a folder per class, got none")
    classes = sorted(path.name for path in (places["train"] or places["test"]).iterdir() if path.is_dir())
    parts = {}
    for name, place in places.items():
        listed = encoded.list_images(place, classes) if place else []
        if listed:
            parts[name] = Files([path for path, _ in listed], torch.tensor([label for _, label in listed]))
    if "test" not in parts:
        raise ValueError(f"{places['test']}: folder must hold images in a folder for each class, got none")
    test = parts["test"]
    return parts | {"test": take(test, spaced(torch.arange(len(test.labels)), limit))}


def take(part: Pixels | Files, rows: Tensor) -> Pixels | Files:
    if isinstance(part, Files):
        return Files([part.paths[row] for row in rows.tolist()], part.labels[rows])
    return Pixels(part.images[rows], part.labels[rows])


def split(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[: count - held_out], order[count - held_out :]


# --- augmentation


def flip_and_crop(images: Tensor, words: Tensor) -> Tensor:
    """Flips half of the images and moves each by at most ``MARGIN`` pixels; what comes into view is black.

    Args:
        images: ``[B, C, H, W]``.
        words: Random words, at least ``[3, B]``: flip, row, column.
    """
    height, width = images.shape[2:]
    flipped = torch.where((words[0] >> 31 == 1)[:, None, None, None], images.flip(3), images)
    top, left = (words[i] * (2 * MARGIN + 1) >> 32 for i in (1, 2))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    batch, channel = torch.arange(len(images))[:, None, None, None], torch.arange(images.shape[1])[:, None, None]
    return pad(flipped, (MARGIN,) * 4)[batch, channel, rows, columns]


def decode(paths: list[Path], size: int, words: Tensor | None = None) -> Tensor:
    """Images ``[B, 3, size, size]`` uint8: the middle of each without ``words``, with ``[5, B]`` random parts.

    With ``[5 + DRAWS, B]`` also changed by RandAugment.
    """
    # in float32 the largest words would become 1
    draws = [None] * len(paths) if words is None else (words.double() * UNIT).T.tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(numpy.stack(list(pool.map(decode_one, paths, [size] * len(paths), draws))))


def decode_one(path: Path, size: int, draws: list[float] | None) -> numpy.ndarray:
    content = read_bytes(path)
    with encoded.opened(content, f"{path}: file") as opened:
        encoded.Budget(len(content)).spend(3 * opened.width * opened.height, f"{path}: file")
        encoded.check_depth(opened, f"{path}: file")
        image = opened.convert("RGB")
    box = middle(*image.size) if draws is None else random_part(*image.size, draws)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if draws is not None and draws[4] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draws is not None and len(draws) > 5:
        image = randaugment(image, draws[5:])
    return numpy.asarray(image).transpose(2, 0, 1)


def middle(width: int, height: int) -> tuple[float, float, float, float]:
    """The box that remains of an image that is resized and cropped in its middle."""
    side = CENTER * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_part(width: int, height: int, draws: list[float]) -> tuple[float, float, float, float]:
    """A box of ``AREA`` of the image and a width of ``RATIO`` times its height, made smaller where it does not fit."""
    area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * draws[0])
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** draws[1]
    wide, high = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = (width - wide) * draws[2], (height - high) * draws[3]
    return left, top, left + wide, top + high
