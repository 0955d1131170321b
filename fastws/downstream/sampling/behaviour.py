"""A Gaussian of networks that learns to work: its mean and its components are trained through its samples.

Principal components of weights say where networks lie, not what they compute: a sample is a mixture of solutions, and
no solution. Here samples are drawn, classify training images, and their gradients move the mean and the components,
while every weight keeps the spread that it has among the components' samples. No sample is trained by itself.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm import trange

from fastws.downstream.sampling.generators import Components, normals
from fastws.ops.small_cnn_step import small_cnn_step
from fastws.small_cnn.table import ACTIVATIONS
from fastws.zoo.making.recipes import Part, Plan

NETWORKS = 32  # samples of a step
IMAGES = 128  # that each of them sees in a step
RATE = 1e-3  # of Adam
MOMENTUM = 1  # the optimizer of small_cnn_step whose first moments are, after one step, gradients
LEAST = 1e-12  # of a weight's spread


def teach(
    space: Components, gradient: Callable[[Tensor], tuple[Tensor, Tensor]], steps: int, generator: torch.Generator
) -> Components:
    """Trains mean and components of a Gaussian so that the mean loss of its samples falls.

    With samples ``x = mean + z B``, z normal, a step of Adam follows ``d loss / d mean`` and ``d loss / d B``; then
    each column of B is brought back to the norm that it had, which is the standard deviation of that weight.

    Args:
        space: Where to begin.
        gradient: Losses ``[S]`` of networks ``[S, P]`` and their gradients ``[S, P]``.
        steps: To make.
        generator: Of the samples.

    Returns:
        The same kind of space; its axes are not orthonormal any more.
    """
    mean = space.mean.clone().requires_grad_()
    directions = (space.scale[:, None] * space.axes).requires_grad_()
    spread = directions.detach().norm(dim=0)
    optimizer = torch.optim.Adam([mean, directions], lr=RATE)
    with trange(steps, desc="behaviour", unit=" steps") as bar:
        for _ in bar:
            z = normals((NETWORKS, len(directions)), space.mean, generator)
            samples = mean + z @ directions
            losses, slopes = gradient(samples.detach())
            optimizer.zero_grad()
            samples.backward(slopes / len(samples))
            optimizer.step()
            with torch.no_grad():
                directions.mul_(spread / directions.norm(dim=0).clamp(min=LEAST))
            bar.set_postfix(loss=f"{losses.mean().item():.4f}", refresh=False)
    return Components(mean.detach(), directions.detach() / space.scale[:, None], space.scale)


def classification(plan: Plan, part: Part, activation: str, generator: torch.Generator) -> Callable:
    """``gradient`` for ``teach``: the cross-entropy of small networks on images that are drawn anew in each call.

    Raises:
        ValueError: If the networks are none that ``small_cnn_step`` knows.
    """
    return partial(classify, plan.layers().to(part.x.device), part, list(ACTIVATIONS).index(activation), generator)


def classify(
    layers: Tensor, part: Part, activation: int, generator: torch.Generator, flat: Tensor
) -> tuple[Tensor, Tensor]:
    count, device = len(flat), flat.device
    batches = torch.randint(len(part.y), (count, 1, IMAGES), generator=generator, device=generator.device)
    zeros = torch.zeros(count, dtype=torch.float64, device=device)
    whole = torch.zeros(count, dtype=torch.int32, device=device)
    moments = torch.zeros_like(flat), torch.zeros_like(flat)
    _, slopes, _, losses, _ = small_cnn_step(
        flat,
        *moments,
        part.x,
        part.y,
        batches.to(device),
        layers,
        activation=whole + activation,
        dropout=zeros,
        optimizer=whole + MOMENTUM,
        lr=zeros,
        weight_decay=zeros,
        seed=whole.long(),
    )
    return losses[:, 0], slopes
