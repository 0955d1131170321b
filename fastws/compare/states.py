"""Networks as dictionaries of tensors: what two of them have in common, and how far they are apart."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.symmetry.symmetry import Symmetry

State = Mapping[str, Tensor]


class Distance(NamedTuple):
    """How far two networks are apart, running statistics and what only one of them has left out."""

    relative: float  # norm of the difference over the geometric mean of both norms
    cosine: float


def mean_of(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of each floating tensor, in float64."""
    floating = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    return {name: sum(state[name].double() for state in states) / len(states) for name in floating}


def comparable(base: State, other: State, symmetry: Symmetry) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """What the symmetry knows of a network, the same of the base, zeros where the base has another shape, and these.

    Raises:
        ValueError: If a tensor is missing, or has another size along an axis that moves.
    """
    known = {name: tensor for name, tensor in other.items() if name in symmetry.shapes}
    goal, unmatched = {}, {}
    for name, tensor in known.items():
        theirs = base.get(name, base.get(symmetry.aliases.get(name, name)))
        if theirs is not None and theirs.shape == tensor.shape:
            goal[name] = theirs
            continue
        got = "nothing" if theirs is None else list(theirs.shape)
        moving = [axis for axis, segments in enumerate(symmetry.axes[name]) if segments]
        fits = theirs is not None and theirs.dim() == tensor.dim()
        if not fits or any(theirs.shape[axis] != tensor.shape[axis] for axis in moving):
            raise ValueError(
                f"align: networks must be of one architecture, but {name!r} is {list(tensor.shape)} in the one and "
                f"{got} in the base"
            )
        goal[name] = torch.zeros_like(tensor)
        unmatched[name] = f"{name!r} is {list(tensor.shape)} here and {got} in the base"
    extra = next((name for name, tensor in base.items() if name not in other and tensor.dim() > 1), None)
    if extra is not None and extra not in symmetry.aliases and extra not in symmetry.aliases.values():
        raise ValueError(f"align: networks must be of one architecture, but only the base has {extra!r}")
    return known, goal, unmatched


def distance(base: State, other: State, left_out: Mapping[str, str]) -> Distance:
    """Of all floating tensors that both have, running statistics of norms left out.

    Where all numbers of one are zero there is no unit of length: equal ones are 0 apart, others infinitely far.
    """
    inner = ours = theirs = apart = 0.0
    for name, tensor in other.items():
        statistic = name.endswith(("running_mean", "running_var"))
        if statistic or name in left_out or name not in base or not tensor.is_floating_point():
            continue
        x, y = base[name].detach().double(), tensor.detach().double()
        inner += float((x * y).sum())
        ours, theirs = ours + float(x.square().sum()), theirs + float(y.square().sum())
        apart += float((x - y).square().sum())
    scale = (ours * theirs) ** 0.5
    if not scale:
        return Distance(math.inf if apart else 0.0, float(not apart))
    return Distance(apart**0.5 / scale**0.5, inner / scale)
