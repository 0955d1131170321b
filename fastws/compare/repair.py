"""Statistics of merged networks: batch norms computed anew, and REPAIR (arXiv 2211.08403).

The mean of two networks has less variance in its units than either of them. Batch norms that see training images again
take care of that. Layers without one get what a batch norm would do fused into their weights, so that the network
keeps its architecture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastws.zoo.making.measuring import condition_batch_norm, in_batches, norms_of

EPS = 1e-5  # of the variance, as batch norms have it
Hook = Callable[[str, nn.Module, Tensor], Tensor | None]  # name, layer and output: another output, or None


class Moments(NamedTuple):
    """Of the outputs of a layer, one number for each channel."""

    mean: Tensor  # [C] float64
    std: Tensor  # [C] float64


@contextmanager
def hooked(module: nn.Module, names: Sequence[str], hook: Hook) -> Iterator[None]:
    """Calls a hook with each output of some layers while the block lasts."""

    def of(name: str):
        return lambda layer, inputs, output: hook(name, layer, output)

    with ExitStack() as stack:
        for name in names:
            stack.callback(module.get_submodule(name).register_forward_hook(of(name)).remove)
        yield


@torch.no_grad()
def layers_to_repair(module: nn.Module, x: Tensor) -> list[str]:
    """Convolutions and dense layers that run once, whose outputs are neither the network's nor a batch norm's input.

    Args:
        module: In eval mode.
        x: Inputs of a batch.
    """
    calls: list[tuple[str, Tensor]] = []  # outputs are kept, so that no other tensor gets their place
    normed: list[Tensor] = []
    found = [name for name, layer in module.named_modules() if isinstance(layer, _ConvNd | nn.Linear)]
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    with ExitStack() as stack, hooked(module, found, lambda name, _, output: calls.append((name, output))):
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0])).remove)
        module(x)
    names = [name for name, _ in calls]
    before_norms = {name for name, output in calls if any(output is one for one in normed)}
    return [name for name in names[:-1] if names.count(name) == 1 and name not in before_norms]


def channels(layer: nn.Module, output: Tensor) -> Tensor:
    """Outputs of a layer as ``[any, C]``."""
    if isinstance(layer, nn.Linear):
        return output.reshape(-1, output.shape[-1])
    return output.movedim(1, -1).reshape(-1, output.shape[1])


@torch.no_grad()
def moments_of(module: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Moments]:
    """Means and standard deviations of the outputs of layers over inputs ``[n, ..]``."""
    sums: dict[str, list[Tensor | int]] = {}

    def add(name: str, layer: nn.Module, output: Tensor) -> None:
        values = channels(layer, output).double()
        count, first, second = sums.get(name, (0, 0, 0))
        sums[name] = [count + len(values), first + values.sum(0), second + values.square().sum(0)]

    with hooked(module, names, add):
        for (part,) in in_batches(x):
            module(part)
    found = {}
    for name, (count, first, second) in sums.items():
        mean = first / count
        found[name] = Moments(mean, (second / count - mean.square()).clamp(min=0).sqrt())
    return found


def between(moments: Sequence[Mapping[str, Moments]], weights: Sequence[float]) -> dict[str, Moments]:
    """Weighted means of the moments of several networks, which those of their weighted mean should be."""
    pairs = {name: list(zip(weights, (one[name] for one in moments), strict=True)) for name in moments[0]}
    return {
        name: Moments(sum(w * one.mean for w, one in found), sum(w * one.std for w, one in found))
        for name, found in pairs.items()
    }


@torch.no_grad()
def repair(module: nn.Module, goals: Mapping[str, Moments], x: Tensor) -> None:
    """Gives layers the moments ``goals``, by a change of their weights and biases, and batch norms new statistics.

    Statistics are those of batches, on the way through a network whose earlier layers are repaired already; layers
    without a bias get the standard deviation alone.

    Args:
        module: In eval mode; it is changed.
        goals: Of the outputs of some layers.
        x: Training inputs ``[n, ..]``.
    """
    seen: dict[str, list[Tensor | int]] = {}

    def normalise(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        values, goal = channels(layer, output).double(), goals[name]
        var, mean = torch.var_mean(values, 0)
        count, vars_, means = seen.get(name, (0, 0, 0))
        seen[name] = [count + 1, vars_ + var, means + mean]
        scale, shift = change(layer, goal, var, mean)
        shape = [1, -1, *[1] * (output.dim() - 2)] if isinstance(layer, _ConvNd) else [-1]
        return output * scale.to(output.dtype).view(shape) + shift.to(output.dtype).view(shape)

    with hooked(module, [*goals], normalise):
        if norms_of(module):
            condition_batch_norm(module, x)
        else:
            for (part,) in in_batches(x):
                module(part)
    for name, (count, var, mean) in seen.items():
        layer = module.get_submodule(name)
        scale, shift = change(layer, goals[name], var / count, mean / count)
        axis = 1 if isinstance(layer, _ConvNd) and layer.transposed else 0
        shape = [-1 if k == axis else 1 for k in range(layer.weight.dim())]
        if axis == 1:  # groups take turns along the axis of outputs
            scale = scale.view(layer.groups, -1)
            weight = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])
            weight.mul_(scale.view(layer.groups, 1, -1, *[1] * (layer.weight.dim() - 2)).to(weight.dtype))
            scale = scale.flatten()
        else:
            layer.weight.mul_(scale.view(shape).to(layer.weight.dtype))
        if layer.bias is not None:
            layer.bias.copy_((layer.bias.double() * scale + shift).to(layer.bias.dtype))


def change(layer: nn.Module, goal: Moments, var: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of outputs with these moments, so that they get those of the goal."""
    scale = goal.std / (var + EPS).sqrt()
    return scale, goal.mean - mean * scale if layer.bias is not None else torch.zeros_like(scale)
