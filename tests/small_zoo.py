"""A zoo of small perceptrons in memory, with properties that can be read off their weights."""

from functools import cached_property
from pathlib import Path

import pyarrow
import torch
from torch import Tensor, nn

from fastws.layout import Layout
from fastws.symmetry import Symmetry


class SmallZoo:
    """36 models with 2 states each: a template times a gain, plus noise. Accuracy grows with the gain."""

    path = Path("small")

    def __init__(self, symmetry: bool = True, models: int = 36):
        generator = torch.Generator().manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
        self.layout = Layout.from_checkpoint(module)
        self.symmetry = Symmetry.trace(module, torch.zeros(2, 6)) if symmetry else None
        self.model = torch.arange(models).repeat_interleave(2)
        epoch = torch.arange(2 * models) % 2 + 1
        gain = (0.5 + torch.rand(models, generator=generator))[self.model] * (0.9 + 0.1 * epoch)
        template = torch.randn(self.layout.num_weights, generator=generator)
        noise = torch.randn(2 * models, self.layout.num_weights, generator=generator)
        self.weights = gain[:, None] * (template + 0.3 * noise)
        accuracy = 0.3 + 0.4 * gain
        self.columns = {
            "model": [f"m{number}" for number in self.model.tolist()],
            "epoch": epoch.numpy(),
            "train_accuracy": (accuracy + 0.05).numpy(),
            "test_accuracy": accuracy.numpy(),
            "generalisation_gap": torch.full_like(accuracy, 0.05).numpy(),
        }

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def properties(self) -> pyarrow.Table:
        return pyarrow.table(self.columns)

    def rows(self, indices: Tensor) -> Tensor:
        return self.weights[indices]

    def split(self, name: str) -> Tensor:
        part = {"train": self.model % 6 < 4, "val": self.model % 6 == 4, "test": self.model % 6 == 5}[name]
        return part.nonzero().flatten()
