"""The small networks that published model zoos are made of, and one for 8 x 8 digits.

Weights have the published names, ``module_list.<n>.weight``. The published code shifts ``n`` where a network has
dropout; here dropout is part of the activation's entry, so that all networks of an architecture share their names.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastws.nn.resnet import ResNet
from fastws.zoo.making.transfer import TRANSFER

Architecture = Literal[
    "digits-cnn", "cnn-s", "cnn2", "cnn-l", "mlp", "res-cnn", "cnn-deep", "cnn-skip", "cnn-deep-skip", "resnet18"
]
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
    CNN of 10,853 weights for images [3, 32, 32]; ``digits-cnn`` has 1,486 weights for [1, 8, 8]. All of them, and
    ``mlp`` (two hidden layers of 20), take other image sizes too: the first dense layer follows. ``resnet18`` is that
    of the published ResNet zoos, with ReLU and without dropout. ``res-cnn``, ``cnn-deep``, ``cnn-skip`` and
    ``cnn-deep-skip`` are what arXiv 2209.14733 transfers ``cnn-s`` to, see ``fastws.zoo.making.transfer``; they know no
    dropout.

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
    if name == "resnet18":
        if (activation, dropout, image_shape[0]) != ("relu", 0.0, 3):
            got = f"{activation}, dropout {dropout} and {image_shape[0]} channels"
            raise ValueError(f"build: resnet18 must have relu, no dropout and images of 3 channels, got {got}")
        return ResNet(18, num_classes)
    if name in TRANSFER:
        if dropout:
            raise ValueError(f"build: {name} must have no dropout, got {dropout}")
        return TRANSFER[name](image_shape, num_classes, ACTIVATIONS[activation])
    layers = [*hidden_layers(name, image_shape, activation, dropout), nn.Flatten()]
    features = count_features(name, layers, image_shape)
    for _ in range(2 if name == "mlp" else 1):
        width = 16 if name == "digits-cnn" else 20
        layers += [nn.Linear(features, width), *activate(name, activation, dropout)]
        features = width
    return Chain([*layers, nn.Linear(features, num_classes)])


def hidden_layers(name: str, image_shape: tuple[int, int, int], activation: str, dropout: float) -> list[nn.Module]:
    channels = image_shape[0]
    if name == "digits-cnn":
        first, second = nn.Conv2d(channels, 8, 4, stride=2), nn.Conv2d(8, 12, 2)
        return [first, *activate(name, activation, dropout), second, *activate(name, activation, dropout)]
    if name == "cnn-l":
        sizes, kernels, pooled = [channels, 16, 32, 15], [3, 3, 3], 3
    elif name == "mlp":
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
