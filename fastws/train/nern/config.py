"""What a run of ``fastws train nern`` is told."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from fastws.nern.batching import Method
from fastws.nern.images import Augment
from fastws.nern.layers import Reduction
from fastws.nern.optimizer import Name, Schedule
from fastws.nern.presets import fields_of
from fastws.nn.nern import NeRNConfig
from fastws.train import loop


@dataclass(frozen=True, kw_only=True)
class Config(loop.Config):
    """Stores a network in a NeRN. A preset gives a value to every option that is None.

    fastws train nern --weights r20.pt --architecture cifar-resnet20-a --images cifar10 --hidden 180 --out runs/nern
    fastws train nern --weights resnet18.pth --data-free --preset imagenet-resnet18-1256-crossfilter --out runs/free
    """

    weights: str  # checkpoint of the network: safetensors or torch
    key: str | None = None  # under which a torch file holds the network; by default the only or the usual one
    preset: str | None = None  # a published run, as cifar10-resnet20-180-crossfilter
    architecture: str | None = None  # of the network: cifar-resnet20-a, resnet18, torchvision:vgg16, timm:resnet10t
    images: str | None = None  # data set to distil on and to evaluate on: cifar10, or a folder
    data_free: bool = False  # distil on noise instead of images
    image_size: int | None = None  # height and width of images from folders of large ones, and of noise; by default 32
    augment: Augment | None = None  # flips and crops alone; or, for folders, RandAugment, mixup and cutmix as well

    hidden: int | None = None  # width of the NeRN
    order: Literal["none", "infilter", "crossfilter"] | None = None  # order of the kernels; by default crossfilter
    improve: bool = False  # shorten the orders further, by 2-opt and Or-opt moves
    orders: str | None = None  # folder with orders made before; by default they are made, and kept in OUT/orders
    blocks: int = 5  # linear layers of the NeRN
    activation: Literal["relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu"] = "relu"  # of the hidden layers
    encoding: Literal["basic", "ffn"] = "basic"  # sines of each coordinate, or of random sums of all coordinates
    fusion: Literal["concat", "sum"] = "concat"  # how the encodings of layer, filter and channel become one
    levels: int = 40  # frequencies per coordinate
    base: float = 0.76  # ratio of a frequency to the one before it
    init: str | None = None  # checkpoint of a NeRN to begin with, for instance a published one

    sizes: tuple[int, ...] | None = None  # heights of the kernels that are stored, as 3; by default all
    exclude: tuple[str, ...] = ()  # patterns of names of layers that are not stored
    linear: bool = False  # store linear layers as well, as 1x1 convolutions
    reduction: Reduction = "center"  # how a prediction becomes a smaller kernel
    learn_classifier: bool = False  # also train the student's last linear layer, or else its last convolution

    steps: int | None = None  # of training, those before an interruption included; by default those of the preset
    batch_size: int | None = None  # images per step, over all processes
    kernel_batch: int | None = None  # kernels per step that get gradients
    batching: Method = "random_weighted_batch"  # how the kernels of a step are chosen
    objective: Literal["joint", "phases"] = "joint"  # phases: without the reconstruction after the warm-up
    warmup: int | None = None  # steps at the beginning that reconstruct weights alone
    reconstruction: Literal["rmse", "mse"] = "rmse"  # loss of the weights
    features: Literal["image", "batch", "similarity"] = "image"  # loss of the feature maps
    distillation: Literal["stable_kl", "kl", "both_stable_kl", "temperature_kl"] = "stable_kl"  # loss of the logits
    reconstruction_weight: float = 1.0  # factor of the loss of the weights
    feature_weight: float | None = None  # factor of the loss of the feature maps; 0: off
    distillation_weight: float | None = None  # factor of the loss of the logits; 0: off
    maps: Literal["clean", "doubled", "doubled_after"] | None = None  # doubled: sums of blocks twice; after activations

    optimizer: Name = "ranger"  # which updates the NeRN
    lr: float = 5e-3  # learning rate at the beginning
    schedule: Schedule = "cosine"  # how the learning rate falls to 1e-6
    weight_decay: float = 1e-3  # as the optimizer understands it
    centralize: bool = True  # subtract the mean of gradients, in Ranger
    clip_each: float | None = None  # largest norm of the gradient of each parameter
    clip_value: float | None = None  # largest entry of the gradient

    eval_every: int | None = None  # steps between evaluations
    greedy_window: int | None = None  # evaluate also where the loss is the least of so many measurements; 0: do not
    greedy_every: int | None = None  # steps between the measurements of greedy_window
    select: Literal["val", "test"] = "val"  # part of the images that chooses the best weights; test: as published

    def __post_init__(self):
        for name, value in fields_of(self.preset).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("architecture", "hidden"):
            if getattr(self, name) is None:
                raise ValueError(f"train nern: {name} must be given, or a preset, got neither")
        super().__post_init__()
        for name in ("hidden", "kernel_batch", "greedy_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train nern: {name} must be at least 1, got {getattr(self, name)}")
        weights = "reconstruction_weight", "feature_weight", "distillation_weight"
        for name in (*weights, "weight_decay", "warmup", "greedy_window"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"train nern: {name} must be at least 0, got {getattr(self, name)}")
        for name in ("image_size", "clip_each", "clip_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train nern: {name} must be positive, or left out, got {value}")
        size_of(self, kernel=1)
        distilling = distils(self)
        if distilling and self.images is None and not self.data_free:
            raise ValueError("train nern: images must be given to distil on, or --data-free, or both weights 0")
        for step in (0, self.steps - 1):  # of either phase
            if not any(loss_weights(self, step)):
                raise ValueError(f"train nern: a loss must be on in each step, got weights that are 0 in step {step}")
        if self.orders is not None and self.improve:
            raise ValueError("train nern: improve must be off with orders that were made before, got both")
        if self.orders is not None and self.order == "none":
            raise ValueError(f"train nern: orders must be left out with the order none, got {self.orders!r}")


def distils(config: Config) -> bool:
    return config.warmup < config.steps and bool(config.feature_weight or config.distillation_weight)


def loss_weights(config: Config, step: int) -> tuple[float, float, float]:
    if step < config.warmup:
        return config.reconstruction_weight, 0.0, 0.0
    reconstruction = config.reconstruction_weight if config.objective == "joint" else 0.0
    return reconstruction, config.feature_weight, config.distillation_weight


def size_of(config: Config, kernel: int) -> NeRNConfig:
    names = ("hidden", "blocks", "activation", "encoding", "fusion", "levels", "base")
    return NeRNConfig(kernel=kernel, **{name: getattr(config, name) for name in names})
