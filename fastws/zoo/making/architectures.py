"""The small networks that published model zoos are made of, and one for 8 x 8 digits.

Weights have the published names, ``module_list.<n>.weight``. The published code shifts ``n`` where a network has
dropout; here dropout is part of the activation's entry, so that all networks of an architecture share their names.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastws.nn.mini_alexnet import MiniAlexNet
from fastws.nn.resnet import CIFARResNet, ResNet
from fastws.zoo.making.transfer import TRANSFER

SMALL = ("digits-cnn", "cnn-s", "cnn2", "cnn-l", "mlp", "mlp-30-15")
LARGE: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {  # of images and number of classes; all have ReLU
    "cifar-resnet8-b-half": lambda shape, classes: CIFARResNet(8, "b", classes, width=8, channels=shape[0]),
    "cifar-resnet8-b": lambda shape, classes: CIFARResNet(8, "b", classes, channels=shape[0]),
    "cifar-resnet20-b": lambda shape, classes: CIFARResNet(20, "b", classes, channels=shape[0]),
    "resnet18": lambda shape, classes: ResNet(18, classes, channels=shape[0]),
    "resnet34": lambda shape, classes: ResNet(34, classes, channels=shape[0]),
    "resnet50": lambda shape, classes: ResNet(50, classes, channels=shape[0]),
    "mini-alexnet": MiniAlexNet,
}
Architecture = Literal[*SMALL, *TRANSFER, *LARGE]
Activation = Literal["tanh", "relu", "sigmoid", "gelu"]
Init = Literal["uniform", "normal", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}
INITS: dict[str, Callable[..., Tensor]] = {
    "uniform": nn.init.uniform_,  # U(0, 1)
    "normal": nn.init.normal_,  # N(0, 1)
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
}
WIDTHS = {"digits-cnn": (16,), "mlp": (20, 20), "mlp-30-15": (30, 15)}  # of hidden dense layers, where not one of 20
BIAS = 0.01  # every bias at the start (arXiv 2209.14764)


class Chain(nn.Module):
    """Layers one after the other, images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.module_list = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.module_list:
            x = layer(x)
        return x


class FlatChain(Chain):
    """A chain of dense layers, of which the first sees all pixels; its names do not count the flattening."""

    def __init__(self, layers: list[nn.Module]):
        nn.Module.__init__(self)
        self.flatten = nn.Flatten()  # registered first, for tables are made in this order
        self.module_list = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.flatten(x))


def build(
    name: Architecture,
    image_shape: tuple[int, int, int],
    *,
    num_classes: int = 10,
    activation: Activation = "tanh",
    dropout: float = 0.0,
) -> nn.Module:
    """Builds a network.

    ``cnn-s`` is the published CNN of 2,464 weights for images [1, 28, 28], ``cnn2`` its wider sibling, ``cnn-l`` the
    CNN of 10,853 weights for images [3, 32, 32]; ``digits-cnn`` has 1,486 weights for [1, 8, 8]. All of them, ``mlp``
    (two hidden layers of 20) and ``mlp-30-15`` (the published MLP) take other image sizes too: the first dense layer
    follows. ``res-cnn``, ``cnn-deep``, ``cnn-skip`` and ``cnn-deep-skip`` are what arXiv 2209.14733 transfers ``cnn-s``
    to, see ``fastws.zoo.making.transfer``; they know no dropout. Those of ``LARGE`` have ReLU and no dropout:
    ``resnet18`` is that of the published ResNet zoos, ``mini-alexnet`` the published small AlexNet, and the
    ``cifar-resnet`` are those of arXiv 1512.03385 with 1 x 1 shortcuts, also of half the width.

    Args:
        name: The architecture.
        image_shape: Channels, height and width.
        num_classes: Logits.
        activation: After every hidden layer, behind the pooling.
        dropout: Probability behind every activation but that of the last convolution of ``cnn-s`` and ``cnn2``.

    Raises:
        ValueError: If an argument is out of range, or the images are too small for the architecture.
    """
    if name not in get_args(Architecture):
        raise ValueError(f"build: architecture must be one of {', '.join(get_args(Architecture))}, got {name!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"build: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"build: dropout must be in [0, 1), got {dropout}")
    if name in LARGE:
        if (activation, dropout) != ("relu", 0.0):
            raise ValueError(f"build: {name} must have relu and no dropout, got {activation} and dropout {dropout}")
        return LARGE[name](image_shape, num_classes)
    if name in TRANSFER:
        if dropout:
            raise ValueError(f"build: {name} must have no dropout, got {dropout}")
        return TRANSFER[name](image_shape, num_classes, ACTIVATIONS[activation])
    hidden = hidden_layers(name, image_shape, activation, dropout)
    features, dense = count_features(name, hidden, image_shape), []
    for width in WIDTHS.get(name, (20,)):
        dense += [nn.Linear(features, width), *activate(name, activation, dropout)]
        features = width
    dense.append(nn.Linear(features, num_classes))
    return FlatChain(dense) if name == "mlp-30-15" else Chain([*hidden, nn.Flatten(), *dense])


def hidden_layers(name: str, image_shape: tuple[int, int, int], activation: str, dropout: float) -> list[nn.Module]:
    channels = image_shape[0]
    if name == "digits-cnn":
        first, second = nn.Conv2d(channels, 8, 4, stride=2), nn.Conv2d(8, 12, 2)
        return [first, *activate(name, activation, dropout), second, *activate(name, activation, dropout)]
    if name == "cnn-l":
        sizes, kernels, pooled = [channels, 16, 32, 15], [3, 3, 3], 3
    elif name.startswith("mlp"):
        sizes, kernels, pooled = [], [], 0
    else:
        sizes, kernels, pooled = [channels, *((8, 6, 4) if name == "cnn-s" else (6, 9, 6))], [5, 5, 2], 2
    layers = []
    for i, kernel in enumerate(kernels):
        layers.append(nn.Conv2d(sizes[i], sizes[i + 1], kernel))
        if i < pooled:
            layers += [nn.MaxPool2d(2), *activate(name, activation, dropout)]
        else:
            layers += activate(name, activation, 0.0)
    return layers


def activate(name: str, activation: str, dropout: float) -> list[nn.Module]:
    """An activation with its dropout: one entry of the list, but two in ``cnn-l``, as published."""
    function = ACTIVATIONS[activation]()
    if name == "cnn-l":
        return [function, nn.Dropout(dropout)]
    return [nn.Sequential(function, nn.Dropout(dropout)) if dropout else function]


def count_features(name: str, layers: list[nn.Module], image_shape: tuple[int, int, int]) -> int:
    height, width = image_shape[1:]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            height = (height - layer.kernel_size[0]) // layer.stride[0] + 1
            width = (width - layer.kernel_size[1]) // layer.stride[1] + 1
        elif isinstance(layer, nn.MaxPool2d):
            height, width = height // 2, width // 2
    if height < 1 or width < 1:
        raise ValueError(f"build: images must be larger for {name!r}, got {list(image_shape)}")
    channels = [image_shape[0], *(layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d))][-1]
    return channels * height * width


@torch.no_grad()
def initialize(network: nn.Module, init: Init, seed: int | torch.Generator) -> None:
    """Draws the weights of all convolutions and dense layers with one scheme and sets their biases to 0.01.

    So do the published zoos. Other layers stay as they are.

    Args:
        network: Its layers are drawn in the order in which they are registered.
        init: ``uniform`` is U(0, 1), ``normal`` N(0, 1), the others those of ``torch.nn.init`` with their defaults.
        seed: Of the random numbers, or where they come from; the same seed gives the same weights.

    Raises:
        ValueError: If ``init`` is unknown.
    """
    if init not in INITS:
        raise ValueError(f"initialize: init must be one of {', '.join(INITS)}, got {init!r}")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            INITS[init](layer.weight, generator=generator)
            if layer.bias is not None:
                layer.bias.fill_(BIAS)
