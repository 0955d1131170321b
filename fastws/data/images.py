"""Image data sets in memory, as float tensors."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from fastws.data import digits, encoded, raw
from fastws.files.checkpoints import load_plain
from fastws.files.limits import DAMAGED

BUNDLED = ("digits", "digits28")  # data sets that need no folder
SPLIT_SEED = 42  # of the published split into training and validation
KINDS = [*raw.KINDS, *encoded.KINDS]  # the first whose files are there reads a folder


class Images(NamedTuple):
    """An image data set. Images are ``[n, C, H, W]`` float32, labels ``[n]`` int64 in ``[0, num_classes)``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    name: str
    val_x: Tensor | None = None  # images that were held out of the training images, if any
    val_y: Tensor | None = None
    black: Tensor | None = None  # [C], what a black pixel is; unknown for a data set that was saved normalised


class Transform(NamedTuple):
    """What is done to pixels, in this order; ``mean`` and ``std`` are those of pixels in [0, 1].

    With one entry ``mean`` and ``std`` are for all channels, with none they are those of the training images.
    """

    gray: bool = False
    crop: int = 0  # height and width of the middle that is kept; 0: all
    resize: int = 0  # height and width, by antialiased bilinear interpolation; 0: as they are
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


PLAIN = Transform()


def load(
    name: str | os.PathLike, limit: int | None = None, *, transform: Transform = PLAIN, validation: int = 0
) -> Images:
    """Loads an image data set; its kind is told from the files that are there.

    Args:
        name: ``"digits"``, the 1,797 images of 8 x 8 pixels that come with scikit-learn, of which a fixed fifth of each
            class is for testing; ``"digits28"``, the same in 28 x 28 pixels, for networks of MNIST's size; or a folder
            with one of

            - parquet files ``train*.parquet`` and ``test*.parquet``, there or in ``data/``, with columns ``image`` or
              ``img`` (PNG or JPEG) and ``label``, as the Hugging Face hub has them;
            - IDX files (MNIST, Fashion-MNIST), also gzipped, there or in ``raw/``;
            - what torchvision leaves of CIFAR-10, CIFAR-100, SVHN, STL-10 and USPS;
            - a folder ``train`` and one ``test`` or ``val`` with a folder of images for each class;

            or a ``dataset.pt`` that a published zoo brings, whose split and pixels stay as they are.
        limit: At most so many images of each part, evenly spaced, because files are often sorted by class.
        transform: What is done to the pixels.
        validation: Training images to hold out. Which ones, and the order of the others, is that of
            ``torch.utils.data.random_split`` with seed 42, as in the published zoos.

    Raises:
        FileNotFoundError: If a file is missing, or scikit-learn for the digits.
        ValueError: If a file is damaged or of another kind, an image has another size, or an argument is out of range.

    Example:
        >>> images = load("digits")
        >>> images.train_x.shape, images.test_x.shape, images.num_classes
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]), 10)
    """
    if limit is not None and limit < 1:
        raise ValueError(f"load: limit must be at least 1, got {limit}")
    if Path(name).suffix == ".pt":
        return read_dump(Path(name), limit)
    white = white_of(name)
    train, test = read(name, None if validation else limit, limit)
    if not 0 <= validation < len(train[1]):
        raise ValueError(f"{name}: validation must be less than {len(train[1])}, the images, got {validation}")
    val = None
    if validation:
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(SPLIT_SEED))
        kept, held_out = order.split([len(order) - validation, validation])
        train, val = ([tensor[spaced(rows, limit)] for tensor in train] for rows in (kept, held_out))
    parts = [change(part[0], transform, str(name)).float() / white for part in (train, test, val) if part]
    parts, black = normalise(parts, transform, str(name))
    num_classes = int(max(train[1].max(), test[1].max())) + 1
    held = (parts[2], val[1]) if val else (None, None)
    return Images(parts[0], train[1], parts[1], test[1], num_classes, str(name), *held, black)


def read(name: str | os.PathLike, train: int | None, test: int | None) -> list[tuple[Tensor, Tensor]]:
    """Pixels ``[n, C, H, W]`` uint8 and labels ``[n]`` of both parts, at most so many of each."""
    if name in BUNDLED:
        parts = [(x[:limit], y[:limit]) for (x, y), limit in zip(digits.read(), (train, test), strict=True)]
        return parts if name == "digits" else [(enlarge(x), y) for x, y in parts]
    folder = Path(name)
    kind = next((kind for kind in KINDS if kind.is_in(folder)), None)
    if kind is None:
        what = "none of these" if folder.is_dir() else "no such folder"
        known = ", ".join(dict.fromkeys(kind.files for kind in KINDS))
        raise FileNotFoundError(f"{folder}: data must be 'digits', 'digits28', or a folder with {known}, got {what}")
    parts = [kind.read(folder, part, limit) for part, limit in (("train", train), ("test", test))]
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        shapes = f"{list(parts[0][0].shape[1:])} and {list(parts[1][0].shape[1:])}"
        raise ValueError(f"{name}: images for training and testing must have one shape, got {shapes}")
    return parts


def white_of(name: str | os.PathLike) -> int:
    """The largest pixel that ``read`` gives."""
    return digits.WHITE if name == "digits" else 255


def enlarge(x: Tensor) -> Tensor:
    """The digits of 8 x 8 pixels in 28 x 28, white still the largest; interpolated in finer steps than theirs."""
    finer = (x.float() * (255 / digits.WHITE)).round().to(torch.uint8)
    return torch.stack([resize(image, 28) for image in finer])


def spaced(rows: Tensor, limit: int | None) -> Tensor:
    """At most ``limit`` of the rows, evenly spaced."""
    count = min(len(rows), limit or len(rows))
    return rows[torch.arange(count) * len(rows) // count]


# --- pixels


def change(x: Tensor, transform: Transform, where: str) -> Tensor:
    """Gray, crop and resize, on uint8 ``[n, C, H, W]``, with the arithmetic of PIL, which torchvision uses."""
    if transform.gray and x.shape[1] == 3:
        red, green, blue = x.int().unbind(1)
        x = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]
    if transform.crop:
        margins = [size - transform.crop for size in x.shape[2:]]
        if min(margins) < 0:
            raise ValueError(f"{where}: crop must be at most {min(x.shape[2:])}, got {transform.crop}")
        top, left = (round(margin / 2) for margin in margins)
        x = x[:, :, top : top + transform.crop, left : left + transform.crop]
    if transform.resize and tuple(x.shape[2:]) != (transform.resize, transform.resize):
        x = torch.stack([resize(image, transform.resize) for image in x])
    return x


def resize(image: Tensor, size: int) -> Tensor:
    """``[C, H, W]`` uint8, one channel at a time, which is the same as all at once."""
    channels = (Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BILINEAR) for channel in image)
    return torch.from_numpy(numpy.stack([numpy.asarray(channel) for channel in channels]))


def normalise(parts: list[Tensor], transform: Transform, where: str) -> tuple[list[Tensor], Tensor]:
    """Subtracts the mean and divides by the standard deviation of each channel; also gives the value of black."""
    std, mean = torch.std_mean(parts[0], (0, 2, 3), correction=0)
    given = []
    for name, of_images in (("mean", mean), ("std", std.clamp(min=1e-6))):
        values = torch.tensor(getattr(transform, name))
        if values.numel() not in (0, 1, len(mean)):
            raise ValueError(f"{where}: {name} must have 0, 1 or {len(mean)} entries, got {values.numel()}")
        given.append(values.expand(len(mean)) if values.numel() else of_images)
    if not (given[1] > 0).all():
        raise ValueError(f"{where}: std must be positive, got {transform.std}")
    mean, std = (value[:, None, None] for value in given)
    return [(x - mean) / std for x in parts], (-mean / std).flatten()


def check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64 or len(labels) == 0:
        raise ValueError(f"labels that are no integers [n] from 0 on, but {labels.dtype} {list(labels.shape)}")
    raw.check_labels(labels.numpy(), "labels")


def read_dump(path: Path, limit: int | None) -> Images:
    """The ``dataset.pt`` of a published zoo: tensor data sets that are split and normalised already."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: data must be a file, got none")
    try:
        saved = load_plain(path)
        parts = {}
        for name in ("train", "val", "test"):
            tensors = saved[f"{name}set"]["tensors"] if saved.get(f"{name}set") is not None else (None, None)
            parts[name] = [None if x is None else x[spaced(torch.arange(len(x)), limit)] for x in tensors]
            if tensors[1] is not None:
                check_labels(tensors[1])
        (train_x, train_y), (test_x, test_y) = parts["train"], parts["test"]
        num_classes = int(max(train_y.max(), test_y.max())) + 1
    except DAMAGED as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: file must hold a trainset and a testset of tensors, got {first}") from error
    return Images(train_x, train_y, test_x, test_y, num_classes, str(path), *parts["val"])
