"""The small AlexNet of the published CIFAR-10 zoos, with the names of its checkpoints."""

import torch
from torch import Tensor, nn


class MiniAlexNet(nn.Module):
    """Two convolutions with pooling and batch norm, and three dense layers; gives logits ``[B, num_classes]``.

    Args:
        image_shape: Channels, height and width; the published one is for images [3, 32, 32].
        num_classes: Logits.

    Raises:
        ValueError: If the images are too small.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        # a convolution takes two pixels of each side; poolings keep a third, then a half
        height, width = (((size - 2) // 3 - 2) // 2 for size in image_shape[1:])
        if min(height, width) < 1:
            raise ValueError(f"mini-alexnet: images must be at least 14 x 14, got {list(image_shape)}")
        self.conv1, self.batchnorm1 = nn.Conv2d(image_shape[0], 96, 3), nn.BatchNorm2d(96)
        self.maxpool1, self.maxpool2 = nn.MaxPool2d(3), nn.MaxPool2d(2)
        self.conv2, self.batchnorm2 = nn.Conv2d(96, 256, 3), nn.BatchNorm2d(256)
        self.fc1, self.fc2 = nn.Linear(256 * height * width, 384), nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool1(self.batchnorm1(torch.relu(self.conv1(x))))
        x = self.maxpool2(self.batchnorm2(torch.relu(self.conv2(x)))).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
