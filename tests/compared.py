"""Networks for tests of comparisons: small, trained on digits for moments, moved by their symmetry."""

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from fastws.data.images import load
from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.making.architectures import build, initialize


def network(seed=0, classes=10, activation="relu"):
    module = build("digits-cnn", (1, 8, 8), num_classes=classes, activation=activation)
    initialize(module, "kaiming_uniform", seed)
    return module.eval()


def moved(module, seed=1, flips=False):
    """The state of the same function with its units in another order."""
    symmetry, layout = Symmetry.trace(module, torch.randn(1, 1, 8, 8)), Layout.from_checkpoint(module)
    flat = symmetry.permute(layout.flatten(module), symmetry.random(1, seed, flips=flips)[0], layout)
    return layout.unflatten(flat, like=module)


def save(state, path):
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)
    return str(path)


def train(module, steps=150, seed=0):
    images, random = load("digits"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    module.train()
    for _ in range(steps):
        rows = torch.randint(len(images.train_x), (64,), generator=random)
        optimizer.zero_grad()
        cross_entropy(module(images.train_x[rows]), images.train_y[rows]).backward()
        optimizer.step()
    return module.eval()


class NormCNN(nn.Module):
    """A residual network with batch norms for digits."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(x + self.bn2(self.conv2(x))).mean((2, 3)))


def norm_cnn():
    return NormCNN(), torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
