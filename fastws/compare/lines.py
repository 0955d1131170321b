"""Networks on the straight line between two, and the barrier that stands there (arXiv 2209.04836, section 2)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastws.compare.evaluating import Load, Precision, Scores, measure
from fastws.compare.modules import Network
from fastws.compare.repair import between, layers_to_repair, moments_of, repair
from fastws.compare.running import load_state
from fastws.compare.states import State
from fastws.zoo.making.measuring import condition_batch_norm, norms_of
from fastws.zoo.making.recipes import Part

Statistics = Literal["stored", "reset", "repaired"]


class Barrier(NamedTuple):
    """How much worse networks on a line are than the line between its ends."""

    loss: float  # largest loss above it, in nats
    midpoint_loss: float  # the same at the midpoint, or the point before it
    accuracy: float  # largest accuracy below it, in [0, 1]
    midpoint_accuracy: float


def barrier_of(scores: Sequence[Scores]) -> Barrier:
    """The barrier of networks at equally spaced points of a line, both ends included."""
    last = len(scores) - 1
    first, end = scores[0], scores[-1]
    places = [k / last for k in range(len(scores))]
    losses = [one.loss - (1 - t) * first.loss - t * end.loss for t, one in zip(places, scores, strict=True)]
    lost = [(1 - t) * first.accuracy + t * end.accuracy - one.accuracy for t, one in zip(places, scores, strict=True)]
    return Barrier(max(losses), losses[last // 2], max(lost), lost[last // 2])


def mixed(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of networks, in float32 or wider; what is no floating tensor is that of the first."""
    result = {}
    for name, tensor in states[0].items():
        result[name] = tensor
        if tensor.is_floating_point():
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            result[name] = sum(weight * state[name].to(dtype) for weight, state in zip(weights, states, strict=True))
    return result


def statistics_of(network: Network, x: Tensor) -> list[Statistics]:
    """What can be done about the statistics of merged networks: norms reset, or layers without a norm repaired."""
    found: list[Statistics] = ["stored"]
    found += ["reset"] if norms_of(network.module) else []
    return found + (["repaired"] if layers_to_repair(network.module, x[:1]) else [])


class Mixer:
    """Weighted means of some networks, with statistics as they are, reset or repaired.

    Args:
        network: Their module.
        states: The networks, in coordinates that fit each other.
        x: Training inputs on which statistics are computed.
    """

    def __init__(self, network: Network, states: Sequence[State], x: Tensor):
        self.network, self.states, self.x = network, states, x
        self.moments: list[Mapping[str, Any]] = []

    def load(self, module: nn.Module, weights: Sequence[float], statistics: Statistics) -> None:
        """Puts a weighted mean into a module in eval mode."""
        load_state(module, mixed(self.states, weights))
        if statistics == "reset":
            condition_batch_norm(module, self.x)
        if statistics == "repaired":
            repair(module, between(self.moments, weights), self.x)

    def prepare(self) -> None:
        """Computes what ``repaired`` needs of the networks themselves."""
        module = deepcopy(self.network.module)
        names = layers_to_repair(module, self.x[:1])
        for state in self.states:
            self.moments.append(moments_of(load_state(module, state), names, self.x))


def line(
    mixer: Mixer, points: int, statistics: Statistics, part: Part, precision: Precision, name: str
) -> list[Scores]:
    """Loss and accuracy at equally spaced points of the line between two networks, both ends included.

    Args:
        mixer: Of the two.
        points: At least 3.
        statistics: As they are in the mean, or computed anew; at the ends too.
        part: Inputs and targets.
        precision: As in ``measure``.
        name: Of the progress bar.
    """
    if statistics == "repaired" and not mixer.moments:
        mixer.prepare()
    places = [k / (points - 1) for k in range(points)]
    loads: list[Load] = [partial(mixer.load, weights=(1 - t, t), statistics=statistics) for t in places]
    return measure(mixer.network, loads, part, precision=precision, name=name)
