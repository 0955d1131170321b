"""ResNets with the names of their published checkpoints: those of the zoos (3 x 3 stem), of ImageNet and of CIFAR."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (arXiv 1512.03385, figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut (figure 5 right); the 3 x 3 one has the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A ResNet for images ``[B, 3, H, W]``; gives logits ``[B, num_classes]``.

    Args:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        num_classes: Width of the output.
        stem: ``"cifar"`` is a 3 x 3 convolution without pooling, as in the model zoos; ``"imagenet"`` is 7 x 7 with
            stride 2 and max pooling.
        channels: Of the images.

    Raises:
        ValueError: If there is no ResNet of this depth.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, stem: Literal["cifar", "imagenet"] = "cifar", *, channels: int = 3
    ):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"resnet: depth must be one of {list(BLOCKS)}, got {depth}")
        block = BasicBlock if depth < 50 else Bottleneck
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, 64, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        inputs = 64
        for stage, count in enumerate(BLOCKS[depth]):
            width, stride = 64 * 2**stage, 1 if stage == 0 else 2
            blocks = []
            for i in range(count):
                blocks.append(block(inputs, width, stride if i == 0 else 1))
                inputs = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class CIFARBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, option: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, 1 if inputs == width else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        self.padding = (width - inputs) // 2  # channels of zeros before and behind those of the input
        if option == "b" and self.padding:
            self.padding = 0
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + self.shortcut(x))


class CIFARResNet(nn.Module):
    """The ResNets for images ``[B, 3, 32, 32]`` (arXiv 1512.03385, section 4.2); gives logits ``[B, num_classes]``.

    Args:
        depth: 20, 32, 44, 56 or 110 as published; 8 and 14 are smaller ones of the same family.
        option: Of the shortcuts where the width changes: ``"a"`` takes every other pixel and pads channels with zeros;
            ``"b"`` is a 1 x 1 convolution.
        num_classes: Width of the output.
        width: Channels of the first stage, doubled by the second and the third.
        channels: Of the images.

    Raises:
        ValueError: If depth or option are not one of these, or a width is not positive.
    """

    def __init__(
        self, depth: int, option: Literal["a", "b"] = "a", num_classes: int = 10, *, width: int = 16, channels: int = 3
    ):
        super().__init__()
        if width < 1 or channels < 1:
            raise ValueError(f"resnet: width and channels must be at least 1, got {width} and {channels}")
        if depth not in CIFAR_DEPTHS or option not in ("a", "b"):
            raise ValueError(
                f"resnet: depth must be one of {CIFAR_DEPTHS} and option a or b, got {depth} and {option!r}"
            )
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage, outputs in enumerate((width, 2 * width, 4 * width)):
            widths = [inputs] + [outputs] * ((depth - 2) // 6)
            blocks = [CIFARBlock(before, outputs, option) for before in widths[:-1]]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))
