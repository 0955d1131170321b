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
    """Stores a network in a NeRN. What is left out is that of the preset, if one is given."""

    weights: str  # checkpoint of the network: safetensors or torch
    preset: str | None = None  # a published run, as cifar10-resnet20-180-crossfilter
    architecture: str | None = None  # of the network: cifar-resnet20-a, resnet18, torchvision:vgg16, timm:resnet10t
    images: str | None = None  # data set to distil on and to evaluate on: cifar10, or a folder
    data_free: bool = False  # distil on noise instead
    image_size: int | None = None  # of folders of large images, read as they are wanted, and of noise (by default 32)
    augment: Augment | None = None  # flips and crops alone, or, for such folders, RandAugment, mixup and cutmix as well

    hidden: int | None = None  # width of the NeRN
    order: Literal["none", "infilter", "crossfilter"] | None = None  # of kernels; by default crossfilter
    improve: bool = False  # greedy orders by 2-opt and Or-opt
    orders: str | None = None  # folder of orders, made before; by default they are made, and kept in out/orders/<key>
    blocks: int = 5  # linear layers
    activation: Literal["relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu"] = "relu"
    encoding: Literal["basic", "ffn"] = "basic"  # sines of each coordinate, or of random sums of all
    fusion: Literal["concat", "sum"] = "concat"  # of the encodings of layer, filter and channel
    levels: int = 40  # frequencies per coordinate
    base: float = 0.76  # ratio of one frequency to the one before
    init: str | None = None  # checkpoint of a NeRN to begin with, for instance a published one

    sizes: tuple[int, ...] | None = None  # of the kernels that are stored; by default all
    exclude: tuple[str, ...] = ()  # patterns of names of layers that are not stored
    linear: bool = False  # whether linear layers are stored, as 1x1 convolutions
    reduction: Reduction = "center"  # of predictions where kernels are smaller
    learn_classifier: bool = False  # train the last linear layer, or else convolution, of the student too, as it is

    steps: int | None = None  # in all, those before an interruption included
    batch_size: int | None = None  # images per step, over all processes
    kernel_batch: int | None = None  # kernels per step that gradients go into
    batching: Method = "random_weighted_batch"
    objective: Literal["joint", "phases"] = "joint"  # after the warm-up; phases: no longer the reconstruction
    warmup: int | None = None  # steps of reconstruction alone
    reconstruction: Literal["rmse", "mse"] = "rmse"
    features: Literal["image", "batch", "similarity"] = "image"
    distillation: Literal["stable_kl", "kl", "both_stable_kl", "temperature_kl"] = "stable_kl"
    reconstruction_weight: float = 1.0
    feature_weight: float | None = None  # 0: off
    distillation_weight: float | None = None  # 0: off
    maps: Literal["clean", "doubled", "doubled_after"] | None = None  # sums of blocks count twice; after activations

    optimizer: Name = "ranger"
    lr: float = 5e-3  # at the beginning
    schedule: Schedule = "cosine"  # down to 1e-6
    weight_decay: float = 1e-3
    centralize: bool = True  # gradients, in Ranger
    clip_each: float | None = None  # largest norm of the gradient of each parameter
    clip_value: float | None = None  # largest entry of the gradient

    eval_every: int | None = None  # steps
    greedy_window: int | None = None  # also evaluate when distillation is better than so many times before; 0: do not
    greedy_every: int | None = None  # steps between these times
    select: Literal["val", "test"] = "val"  # part of the images that the best weights are chosen on; published: test

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
