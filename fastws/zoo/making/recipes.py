"""What decides what the networks of a zoo become: a recipe for each, a plan and images for all."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastws.data.images import Images
from fastws.small_cnn.table import layer_table
from fastws.zoo.making.architectures import SMALL, Activation, Architecture, Init, build
from fastws.zoo.making.given import make_network

Optimizer = Literal["sgd", "momentum", "adam", "adamw"]
Schedule = Literal["constant", "one-cycle"]
Augment = Literal["none", "crop-flip", "flip-rotate"]
Order = Literal["seeded", "published"]
TrainMetrics = Literal["evaluated", "running"]


class Recipe(NamedTuple):
    """All that decides what a network becomes."""

    model: str
    seed: int
    activation: Activation
    dropout: float
    init: Init
    optimizer: Optimizer
    lr: float
    weight_decay: float


def kept_epochs(epochs: int, chosen: Sequence[int]) -> list[int]:
    """The epochs whose states a zoo holds: those that were chosen, or all."""
    return sorted(set(chosen)) or list(range(epochs + 1))


def check_choices(path: Path, name: str, values: Iterable[object], known: Collection[str]) -> None:
    """Raises ValueError unless all values of a property of the zoo at ``path`` are known: it may be anybody's."""
    for value in values:
        if value not in known:
            raise ValueError(f"{path}: {name} must be one of {', '.join(known)}, got {value!r}")


class Plan(NamedTuple):
    """What all networks of a zoo have in common."""

    architecture: Architecture
    image_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int
    epochs: int
    schedule: Schedule = "constant"
    augment: Augment = "none"
    order: Order = "seeded"
    train_metrics: TrainMetrics = "evaluated"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    def build(self, activation: Activation = "relu", dropout: float = 0.0) -> nn.Module:
        if ":" in self.architecture:  # a function of the user's, which fixes both
            return make_network(self.architecture, self.image_shape, self.num_classes)[0].eval()
        options = {"num_classes": self.num_classes, "activation": activation, "dropout": dropout}
        return build(self.architecture, self.image_shape, **options).eval()

    def layers(self) -> Tensor:
        """The table by which all networks run at once, with all dropout layers.

        Raises:
            ValueError: If they cannot; says why.
        """
        for name, plain in (("schedule", "constant"), ("augment", "none")):
            if getattr(self, name) != plain:
                raise ValueError(f"{name} {getattr(self, name)!r} changes from step to step")
        return layer_table(self.build(dropout=0.5 if self.architecture in SMALL else 0.0), self.image_shape)

    def num_steps(self, num_images: int) -> int:
        """Updates in an epoch; the last one has the images that are left."""
        return -(-num_images // self.batch_size)


class Part(NamedTuple):
    """Images ``[n, C, H, W]`` float32 and labels ``[n]`` int64."""

    x: Tensor
    y: Tensor


class TrainingData(NamedTuple):
    """The parts of an image data set."""

    train: Part
    val: Part | None
    test: Part
    black: Tensor  # [C], what a black pixel is

    @classmethod
    def of(cls, images: Images, device: str = "cpu") -> "TrainingData":
        pairs = (images[:2], (images.val_x, images.val_y), images[2:4])
        parts = [None if x is None else Part(x.to(device), y.to(device)) for x, y in pairs]
        black = torch.zeros(images.train_x.shape[1]) if images.black is None else images.black
        return cls(*parts, black.to(device))

    def evaluated(self) -> dict[str, Part]:
        """What networks are measured on after every epoch, beside the training images."""
        return {name: part for name, part in (("val", self.val), ("test", self.test)) if part is not None}
