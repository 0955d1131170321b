"""One network in the coordinates of another: other weights, the same function (Git Re-Basin, arXiv 2209.04836)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.matching.match import match
from fastws.matching.mean import match_to_mean
from fastws.signed import split
from fastws.symmetry.symmetry import Symmetry

State = Mapping[str, Tensor]


class Distance(NamedTuple):
    """How far two networks are apart, running statistics and what only one of them has left out."""

    relative: float  # norm of the difference over the geometric mean of both norms
    cosine: float


class Aligned(NamedTuple):
    """A network in the coordinates of another."""

    state: dict[str, Tensor]  # names, shapes and dtypes as they were
    raw: Distance
    permuted: Distance
    moved: float  # share of the units that have another place or sign
    unmatched: list[str]  # sentences about tensors that took no part, because they have other shapes in both
    exact: bool  # whether all numbers are those of before, in other places and of other signs


def aligned(base: State, other: State, symmetry: Symmetry, *, restarts: int = 1, signs: bool = True) -> Aligned:
    """Puts the units of a network into the order, with the signs, that brings its weights closest to another's.

    Args:
        base: Tensors of the network whose order of units is taken.
        other: Tensors of the network that is moved. Those that have another shape in ``base`` (another number of
            classes) take no part in the matching and move along, as long as the axes that move have one size.
        symmetry: Of the module of ``other``.
        restarts: Runs of the matching, which visit groups in other orders; the best is kept.
        signs: Whether units of odd activations may change their sign.

    Raises:
        ValueError: If the networks are of two architectures, or a weight is NaN or infinite.
    """
    known, goal, unmatched = comparable(base, other, symmetry)
    layout = Layout.from_checkpoint(known)
    flat, reference = layout.flatten(known), layout.flatten(goal)
    dtype = torch.promote_types(flat.dtype, reference.dtype)
    options = {"restarts": restarts, "flips": signs and any(symmetry.flips)}
    found = match(flat[None].to(dtype), reference.to(dtype), symmetry, layout, **options)[0]
    state = moved_by(symmetry, layout, found, other, flat)
    distances = (distance(base, x, unmatched) for x in (other, state))
    return Aligned(state, *distances, moved_share(symmetry, found), list(unmatched.values()), exact=True)


def aligned_to_mean(
    states: Sequence[State], symmetry: Symmetry, *, restarts: int = 1, signs: bool = True
) -> list[Aligned]:
    """Several networks, each in the coordinates that fit the mean of the others, to begin with those of the first.

    Generalised Procrustes analysis with the permutations and signs of ``match_to_mean``; the other arguments are those
    of ``aligned``. Distances are those from the mean of the others.

    Raises:
        ValueError: If the networks are not of one architecture and one number of classes.
    """
    held = [comparable(states[0], state, symmetry) for state in states]
    for _, _, unmatched in held:
        if unmatched:
            raise ValueError(
                f"align: networks must have the same shapes to have a mean, but {[*unmatched.values()][0]}"
            )
    layout = Layout.from_checkpoint(held[0][0])
    flats = torch.stack([layout.flatten(known).float() for known, _, _ in held])
    flips = torch.full((len(flats),), signs and any(symmetry.flips))
    together = match_to_mean(flats.__getitem__, len(flats), flats[0], symmetry, layout, flips=flips, restarts=restarts)
    # coordinates of the whole are those of the first network, which so stays as it is
    first = symmetry.inverse(together.permutations[0])
    rows = symmetry.compose(together.permutations, first.expand(len(flats), -1))
    moved = [moved_by(symmetry, layout, row, state, None) for row, state in zip(rows, states, strict=True)]
    results = []
    for number, (state, row) in enumerate(zip(states, rows, strict=True)):
        others = mean_of([other for place, other in enumerate(moved) if place != number])
        distances = (distance(others, x, {}) for x in (state, moved[number]))
        results.append(Aligned(moved[number], *distances, moved_share(symmetry, row), [], exact=True))
    return results


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


def moved_by(symmetry: Symmetry, layout: Layout, row: Tensor, state: State, flat: Tensor | None) -> dict[str, Tensor]:
    """A network with its units moved by a row of permutations; tensors that the symmetry does not know stay."""
    if flat is None:
        held = {entry.name for entry in layout.entries} | set(layout.aliases)
        flat = layout.flatten({name: tensor for name, tensor in state.items() if name in held})
    moved = layout.unflatten(symmetry.permute(flat, row, layout))
    return {name: moved[name].to(tensor.dtype) if name in moved else tensor for name, tensor in state.items()}


def moved_share(symmetry: Symmetry, row: Tensor) -> float:
    index, negative = split(row[: symmetry.starts[-1]])
    stays = (index == symmetry.identity()[0, : symmetry.starts[-1]]) & (negative == 0)
    return 1 - float(stays.double().mean()) if len(stays) else 0.0


def distance(base: State, other: State, left_out: Mapping[str, str]) -> Distance:
    """Of all floating tensors that both have, running statistics of norms left out."""
    inner = ours = theirs = apart = 0.0
    for name, tensor in other.items():
        statistic = name.endswith(("running_mean", "running_var"))
        if statistic or name in left_out or name not in base or not tensor.is_floating_point():
            continue
        x, y = base[name].double(), tensor.double()
        inner += float((x * y).sum())
        ours, theirs = ours + float(x.square().sum()), theirs + float(y.square().sum())
        apart += float((x - y).square().sum())
    scale = (ours * theirs) ** 0.5
    return Distance(apart**0.5 / scale**0.5 if scale else 0.0, inner / scale if scale else 1.0)
