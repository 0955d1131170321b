"""Random networks of several architectures, in random orders of their units."""

import copy
from functools import cache

import architectures
import torch

from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.symmetry.verify import randomise

CASES = {
    "mlp": (architectures.mlp, {}),
    "CNN with flatten": (architectures.zoo_cnn, {}),
    "ResNet": (architectures.resnet, dict(blocks=(1, 1), width=8)),
    "ResNet, zeros padded": (architectures.cifar_resnet, dict(depth=8, width=4)),
    "ResNeXt": (architectures.resnet, dict(blocks=(1, 1), width=8, bottleneck=True, groups=4)),
    "DenseNet": (architectures.densenet, {}),
    "SqueezeNet": (architectures.squeezenet, dict(divide=8)),
    "GPT": (architectures.gpt, {}),
}


@cache
def traced(case):
    build, options = CASES[case] if isinstance(case, str) else (case, {})
    module, inputs = build(**options)
    return Symmetry.trace(module, inputs), module, inputs


def networks(case, count, mix=0.0):
    """A symmetry, a layout, a module, its input, and random networks; ``mix`` is the share that they have in common."""
    symmetry, module, inputs = traced(case)
    module, layout, rows = copy.deepcopy(module), Layout.from_checkpoint(module), []
    for seed in range(count):
        with torch.no_grad():
            randomise(module, seed)
        rows.append(layout.flatten(module).detach())
    flat = torch.stack(rows)
    flat = mix * flat[:1] + (1 - mix) * flat
    return symmetry, layout, module, inputs, symmetry.permute(flat, symmetry.random(count, seed=1), layout)
