"""Influence: which groups of units the outputs of a module depend on.

Where nothing depends on a group, a check of its permutations says nothing. Gradients with respect to its smallest
tensors find most of those that count in one pass. Others are tried: their weights change, all at once and then by
halves. Several sets of weights are drawn, because all units of a small layer may be silent by chance.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastws.layout.roles import load_state
from fastws.symmetry.copies import FAILURES
from fastws.symmetry.verify import Check

DRAWS = 6  # sets of weights that are tried before a group is said to count for nothing
CLEAR = 3  # times the tolerance of a check: what other weights must change to be seen by it


class Place(NamedTuple):
    """Entries of a tensor that a group moves."""

    name: str
    axis: int
    index: Tensor  # int64, along the axis


Groups = Mapping[int, Sequence[Place]]


def without_influence(checks: Sequence[Check], groups: Groups) -> list[int]:
    """The groups whose weights change the outputs of no check by more than it would overlook."""
    left = dict(groups)
    for number in range(DRAWS):
        for check in checks:
            if left:
                found = sensitivities(check, number, left)
                left = {group: places for group, places in left.items() if not found[group] > CLEAR * check.tolerance}
    return unseen(checks, left)


def unseen(checks: Sequence[Check], groups: Groups) -> list[int]:
    """The groups that count for nothing when their weights are changed."""
    places = [place for found in groups.values() for place in found]
    if not any(moves(check, number, places) for number in range(DRAWS) for check in checks if groups):
        return list(groups)
    names, middle = list(groups), len(groups) // 2
    halves = names[:middle], names[middle:]
    return [] if len(groups) == 1 else [g for half in halves for g in unseen(checks, {n: groups[n] for n in half})]


def moves(check: Check, number: int, places: Sequence[Place]) -> bool:
    """Whether outputs move when each weight of some places is multiplied by another random number."""
    generator = torch.Generator().manual_seed(number)

    def change(module: nn.Module) -> None:
        state = load_state(module)
        for name, axis, index in places:
            index = index.to(state[name].device)
            part = state[name].index_select(axis, index)
            factors = torch.empty(part.shape, dtype=torch.float64).uniform_(0.25, 1.75, generator=generator)
            state[name].index_copy_(axis, index, part * factors.to(part))

    return check.error(number, change) > CLEAR * check.tolerance


def sensitivities(check: Check, number: int, groups: Groups) -> dict[int, float]:
    """To first order, how far outputs move when weights of each group change by as much as they are; 0 if unknown."""
    module = check.weighted(number).requires_grad_(False)
    state = load_state(module)
    chosen = {group: smallest(state, places) for group, places in groups.items()}
    wanted = {place.name: state[place.name].requires_grad_(True) for places in chosen.values() for place in places}
    try:
        with torch.enable_grad():
            total = sum(weighted_sum(x, scale) for x, scale in zip(check.run(module), check.scales, strict=True))
        gradients = dict(zip(wanted, torch.autograd.grad(total, [*wanted.values()], allow_unused=True), strict=True))
    except FAILURES:  # modules that compute without gradients, or change weights in place
        return dict.fromkeys(groups, 0.0)
    changes = {name: gradient * state[name] for name, gradient in gradients.items() if gradient is not None}
    return {
        group: max((size(changes[place.name], place) for place in places if place.name in changes), default=0.0)
        for group, places in chosen.items()
    }


def smallest(state: Mapping[str, Tensor], places: Sequence[Place]) -> list[Place]:
    """The places in learned vectors, which cost least; where there is none, that in the smallest tensor."""
    # batch norms have no gradient of their moments, and one that is asked for costs those of all
    learned = [place for place in places if isinstance(state[place.name], nn.Parameter)] or places
    vectors = [place for place in learned if state[place.name].dim() == 1]
    return vectors or [min(learned, key=lambda place: state[place.name].numel())]


def weighted_sum(x: Tensor, scale: Tensor) -> Tensor:
    """A sum of the entries of an output in units of their scales, with random signs; those that do not vary are 0."""
    x, scale = (torch.view_as_real(x), scale[..., None]) if x.is_complex() else (x, scale)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    counts = (scale > 0) & x.isfinite()
    return torch.where(counts, x * signs / torch.where(counts, scale, 1), 0).sum() / x.numel() ** 0.5


def size(change: Tensor, place: Place) -> float:
    return float(change.detach().index_select(place.axis, place.index.to(change.device)).norm())
