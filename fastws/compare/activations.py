"""Activation matching: units in the order in which their activations correlate with those of another network.

Git Re-Basin (arXiv 2209.04836, section 3.1), by correlations as its code and REPAIR (arXiv 2211.08403) take them.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastws.compare.running import load_state
from fastws.matching.places import units
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.making.measuring import in_batches

EPS = 1e-4  # of the product of two standard deviations, so that dead units correlate with nothing
WITH_OUTPUTS = (_ConvNd, nn.Linear, nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class Tap(NamedTuple):
    """Where the activations of a group are seen: what goes into a module, or comes out of it."""

    module: str
    group: int
    negated: bool  # whether they change their sign with their unit
    index: Tensor  # channels, all those of a unit together
    inputs: bool
    last: bool  # whether channels are the last axis, else the second
    width: int  # channels of a unit


class Moments:
    """Streamed sums of the activations of the same units of two networks, float64."""

    def __init__(self, size: int):
        self.count, self.first = 0, torch.zeros(2, size, dtype=torch.float64)
        self.second, self.product = torch.zeros_like(self.first), torch.zeros(size, size, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Activations ``[n, size]`` of both networks on the same inputs."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.first += torch.stack([x.sum(0), y.sum(0)])
        self.second += torch.stack([x.square().sum(0), y.square().sum(0)])
        self.product += x.T @ y

    def correlation(self) -> Tensor:
        """``[size, size]``, units of the first network by units of the second."""
        mean = self.first / self.count
        std = (self.second / self.count - mean.square()).clamp(min=0).sqrt()
        return (self.product / self.count - torch.outer(*mean)) / (torch.outer(*std) + EPS)


def match_activations(
    module: nn.Module,
    base: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    x: Tensor,
    symmetry: Symmetry,
    *,
    signs: bool = True,
) -> Tensor:
    """Permutations, and signs of odd units, under which the activations of a network correlate most with another's.

    Given the data, groups do not depend on each other: one pass of both networks, and one assignment for each group.
    Positions of maps and sequences are samples. Groups that lie in several layers sum their correlations.

    Args:
        module: Of both networks, in eval mode; it is not changed.
        base: Tensors of the network whose order of units is taken.
        other: Tensors of the network that is moved.
        x: Inputs ``[n, ..]``.
        symmetry: Of the module.
        signs: Whether units of odd activations may change their sign.

    Returns:
        int32 ``[S]``; a group that no layer shows stays.
    """
    taps = [*find_taps(module, symmetry)]
    sums = collect([load_state(deepcopy(module), state) for state in (base, other)], taps, x, symmetry)
    row = symmetry.identity()[0]
    for group, (first, size) in enumerate(zip(symmetry.starts, symmetry.sizes, strict=False)):
        kept, changed = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
        for tap, moments in zip(taps, sums, strict=True):
            if tap.group == group and moments.count:
                (changed if tap.negated else kept).add_(moments.correlation())
        if not (kept.any() or changed.any()):
            continue
        flips = signs and symmetry.flips[group]
        score = kept + (changed.abs() if flips else changed)
        best = torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])
        negative = flips & (changed.gather(1, best[:, None])[:, 0] < 0)
        row[first : first + size] = best.int() ^ -negative.int()
    return symmetry.expand(row[: symmetry.starts[-1]])


def find_taps(module: nn.Module, symmetry: Symmetry) -> Iterator[Tap]:
    """What convolutions and dense layers read, behind all activations; for groups that none reads, what layers give."""
    read = set()
    layers = {name: layer for name, layer in module.named_modules() if f"{name}.weight".lstrip(".") in symmetry.axes}
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and layer.groups == 1):
            axis = 0 if isinstance(layer, _ConvNd) and layer.transposed else 1
            for tap in taps_of(name, layer, axis, symmetry, inputs=True):
                read.add(tap.group)
                yield tap
    for name, layer in layers.items():
        if isinstance(layer, WITH_OUTPUTS) and not (isinstance(layer, _ConvNd) and layer.transposed):
            yield from (tap for tap in taps_of(name, layer, 0, symmetry, inputs=False) if tap.group not in read)


def taps_of(name: str, layer: nn.Module, axis: int, symmetry: Symmetry, inputs: bool) -> Iterator[Tap]:
    weight = f"{name}.weight".lstrip(".")
    last = isinstance(layer, nn.Linear | nn.LayerNorm)
    for (group, negated), index in units(symmetry.axes[weight][axis] or (), symmetry.sizes).items():
        yield Tap(name, group, negated, torch.tensor(index), inputs, last, len(index) // symmetry.sizes[group])


@torch.no_grad()
def collect(modules: list[nn.Module], taps: list[Tap], x: Tensor, symmetry: Symmetry) -> list[Moments]:
    """Moments of the activations of two networks at each tap."""
    sums = [Moments(symmetry.sizes[tap.group]) for tap in taps]
    waiting: list[list[Tensor]] = [
        [] for _ in taps
    ]  # activations of the first network, until the second one has its own

    def hook(network: int, number: int):
        def keep(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            tap = taps[number]
            values = inputs[0] if tap.inputs else output
            values = values if tap.last else values.movedim(1, -1)
            values = values[..., tap.index].reshape(-1, symmetry.sizes[tap.group], tap.width)
            values = values.movedim(2, 1).flatten(0, 1)
            if network == 0:
                waiting[number].append(values)
            else:
                sums[number].add(waiting[number].pop(0), values)

        return keep

    with ExitStack() as stack:
        for network, module in enumerate(modules):
            for number, tap in enumerate(taps):
                layer = module.get_submodule(tap.module)
                stack.callback(layer.register_forward_hook(hook(network, number)).remove)
        for (part,) in in_batches(x):
            for module in modules:
                module(part)
    return sums
