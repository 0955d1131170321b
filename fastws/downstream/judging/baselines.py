"""What sampled networks are measured against: networks that need no learned representation, or hardly any."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.downstream.sampling import flow as flows
from fastws.downstream.sampling import generators
from fastws.layout.layout import Layout
from fastws.layout.spread import weight_std

NOISE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # in units of each layer's std
COMPONENTS = (16, 32, 64, 96, 128, 192, 256, 0)  # 0: all
TEMPERATURES = (0.5, 0.7, 1.0, 1.2)
TOGETHER = (2, 4, 16, 0)  # 0: all


class Set(NamedTuple):
    """Networks of one method with one setting."""

    name: str
    group: str  # the curve that it is a point of
    flat: Tensor  # [S, P]
    components: int = 0  # of principal components
    temperature: float = 0.0


def baselines(
    training: Tensor, anchors: Tensor, held_out: Tensor, layout: Layout, count: int, flow: bool, seed: int
) -> Iterator[Set]:
    """Anchors with noise, averages of anchors, and what is drawn in the space of principal components.

    Args:
        training: Aligned states, ``[n, P]``.
        anchors: Those of them that noise is added to and that are averaged, ``[a, P]``.
        held_out: Aligned states of the validation split, which stop the flow.
        layout: Of the vectors.
        count: Networks of each set.
        flow: Also trains a flow for each number of components.
        seed: Of the draws.
    """
    generator = torch.Generator(training.device).manual_seed(seed)
    scale = weight_std(training, layout)
    for factor in NOISE:
        drawn = generators.noisy(anchors, count, factor * scale, generator)
        yield Set(f"noise of {factor:g} sd", "noise", drawn.points)
    for together in TOGETHER:
        drawn = generators.average(anchors, count, together or len(anchors), generator)
        yield Set(f"average of {together or 'all'}", "average", drawn.points)
    whole = generators.Components.of(training, 0)
    for components in COMPONENTS:
        if components >= len(whole.scale):
            continue
        space = whole.leading(components)
        trained = flows.train_flow(space, training, held_out, generator) if flow else None
        for temperature in TEMPERATURES:
            setting = f"PCA {components or 'all'} + {{}}, T = {temperature:g}", components, temperature
            drawn = generators.gaussian(space, count, temperature, generator)
            yield Set(setting[0].format("Gaussian"), "PCA + Gaussian", drawn.points, *setting[1:])
            if trained is not None:
                drawn = flows.follow(trained, count, temperature, generator)
                yield Set(setting[0].format("flow"), "PCA + flow", drawn.points, *setting[1:])
