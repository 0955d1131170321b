"""A zoo of small perceptrons, with properties that can be read off their weights."""

import torch
from torch import nn

from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo

MODELS = 36


def make_small_zoo(path, symmetry: bool = True, widths=(6, 8, 5, 3), activation: str | None = None) -> Zoo:
    """36 models with 2 states each: a template times a gain, plus noise. Accuracy grows with the gain.

    With the activation "tanh" every other model has it and the rest "relu", and the symmetry is that of tanh.
    """
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in zip(widths, widths[1:], strict=False)]
    module = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh() if activation else nn.ReLU())][:-1])
    layout = Layout.from_checkpoint(module)
    model, epoch = torch.arange(MODELS).repeat_interleave(2), torch.arange(2 * MODELS) % 2 + 1
    gain = (0.5 + torch.rand(MODELS, generator=generator))[model] * (0.9 + 0.1 * epoch)
    template = torch.randn(layout.num_weights, generator=generator)
    noise = torch.randn(2 * MODELS, layout.num_weights, generator=generator)
    accuracy = 0.3 + 0.4 * gain
    properties = {
        "model": [f"m{number}" for number in model.tolist()],
        "epoch": epoch,
        "train_accuracy": accuracy + 0.05,
        "test_accuracy": accuracy,
        "generalisation_gap": torch.full_like(accuracy, 0.05),
    }
    if activation:
        properties["activation"] = [(activation, "relu")[number % 2] for number in model.tolist()]
    parts = {"train": (0, 1, 2, 3), "val": (4,), "test": (5,)}
    splits = {name: [f"m{m}" for m in range(MODELS) if m % 6 in part] for name, part in parts.items()}
    traced = Symmetry.trace(module, torch.zeros(2, widths[0])) if symmetry else None
    with ZooWriter(path, layout, traced, splits=splits) as writer:
        writer.append(gain[:, None] * (template + 0.3 * noise), properties)
    return Zoo.open(path)
