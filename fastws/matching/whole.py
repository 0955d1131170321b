"""Matching at the whole group: one network in the coordinates of another, its function unchanged.

Both go to their canonical form; then permutations, signs, phases, and rotations are matched by visits in turn
(``visits.py``), first outwards from the axes that no group moves, as pixels and tokens, where all information starts,
then wherever the inner product still gains; and at last the way of the reference to its canonical form is undone.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.group.group import Group
from fastws.group.lines import Element, Move
from fastws.layout.layout import Layout
from fastws.matching.match import match
from fastws.matching.visits import Units, Visitor, find_units

ROUNDS = 50  # of visits to all groups, at most
LEAST_GAIN = 1e-10  # of the sum of squares; a round that gains less is the last


class Closeness(NamedTuple):
    """How close two networks are: inner product, ``|a - b| / (|a| |b|)^(1/2)``, and cosine of their weights."""

    objective: float
    distance: float
    cosine: float


class Report(NamedTuple):
    """How close two networks are as they are, after permutations and signs, and at the whole group.

    Attributes:
        raw: As they stand in their files.
        permutations: As they stand in their files, after the best permutations and signs of whole units.
        whole: In canonical form, at the whole group.
        stored: As they stand in their files, at the whole group.
        rounds: Visits to all groups.
    """

    raw: Closeness
    permutations: Closeness
    whole: Closeness
    stored: Closeness
    rounds: int


def closeness(a: Mapping[str, Tensor], b: Mapping[str, Tensor], apart: Collection[str] = ()) -> Closeness:
    """How close two networks are, float64; the tensors ``apart``, as running statistics, do not count.

    Raises:
        ValueError: If one of them has a tensor that the other does not have, or of another shape.
    """
    strange = sorted(a.keys() ^ b.keys()) or [name for name in a if a[name].shape != b[name].shape]
    if strange:
        raise ValueError(f"match: networks must have the same tensors, got {strange[0]} of one alone or of two shapes")
    names = [name for name, tensor in a.items() if name not in apart and tensor.is_floating_point()]
    pairs = [(a[name].double(), b[name].double()) for name in names]
    inner, left, right, apart_by = (
        float(sum(term))
        for term in (
            [(x * y).sum() for x, y in pairs],
            [x.square().sum() for x, _ in pairs],
            [y.square().sum() for _, y in pairs],
            [(x - y).square().sum() for x, y in pairs],
        )
    )
    scale = max((left * right) ** 0.5, 1e-300)
    return Closeness(inner, (apart_by / scale) ** 0.5, inner / scale)


def match_whole(
    group: Group, a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, restarts: int = 1, seed: int = 0
) -> tuple[Element, Report]:
    """Finds the element of the whole group that brings network ``b`` closest to ``a``.

    Coordinate descent on the distance of the canonical forms, after Git Re-Basin (arXiv 2209.04836), with closed forms
    for what is continuous. It starts outwards from fixed axes and from the best permutations alone, and keeps the
    better end, so that it is never below what permutations alone reach; nothing is accepted that gains nothing.

    Args:
        group: Of the architecture of both.
        a: A state dict, the reference.
        b: A state dict, which is to be moved.
        restarts: Starts outwards from fixed axes; all but the first begin with random permutations and signs.
        seed: Of the restarts.

    Returns:
        An element, of which ``group.apply(element, b)`` is in the coordinates of ``a`` and has the function of ``b``,
        and how close both are before and after.

    Raises:
        ValueError: If a state does not fit the group, or holds numbers that are not finite.
    """
    if restarts < 1:
        raise ValueError(f"match: restarts must be at least 1, got {restarts}")
    stored_a, stored_b = (group.given(state) for state in (a, b))
    for which, state in (("a", stored_a), ("b", stored_b)):
        broken = [name for name, tensor in state.items() if not torch.isfinite(tensor.double()).all()]
        if broken:
            raise ValueError(f"match: weights of {which} must be finite, got others in {broken[0]}")
    permuting = match_permutations(group, stored_a, stored_b)
    permuted = group.act(permuting, stored_b)
    reference, to_reference = group.canonical(a)
    units = find_units(group)
    best = None
    for start in range(restarts + 1):
        if start == restarts:
            begin, state = permuting, permuted
        else:
            begin = group.discrete().random(seed + start) if start else ()
            state = group.act(begin, stored_b)
        canonical, to_canonical = group.canonical(state)
        visitor = Visitor(group, reference, canonical)
        rounds = climb(visitor, units, outwards=start < restarts)
        reached = visitor.objective()
        if best is None or reached > best[0]:  # of equals the first
            best = reached, (*begin, *to_canonical, *visitor.moves), visitor.state, rounds
    _, moves, state, rounds = best
    element = group.compose(moves, group.inverse(to_reference))
    apart = group.statistics
    report = Report(
        closeness(stored_a, stored_b, apart),
        closeness(stored_a, permuted, apart),
        closeness(reference, state, apart),
        closeness(stored_a, group.act(element, stored_b), apart),
        rounds,
    )
    return element, report


def match_permutations(group: Group, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Element:
    """The best permutations and signs of whole units alone."""
    if not group.permutes or not group.symmetry.sizes:
        return ()
    layout = Layout.from_checkpoint(dict(a))
    flat, reference = (layout.flatten({name: x.float() for name, x in state.items()}) for state in (b, a))
    flips = any(group.symmetry.flips)
    return (Move("P", match(flat[None], reference, group.symmetry, layout, flips=flips)[0]),)


def climb(visitor: Visitor, units: list[Units], outwards: bool) -> int:
    """Visits all groups until a round gains next to nothing; how many rounds it takes."""
    if outwards:
        start_outwards(visitor, units)
    weights = [x for name, x in visitor.reference.items() if name not in visitor.group.statistics]
    least = LEAST_GAIN * float(sum(x.square().sum() for x in weights))
    for number in range(ROUNDS):
        order = units if number % 2 == 0 else units[::-1]
        if sum(visitor.visit(one, None, least / max(1, len(units))) for one in order) <= least:
            return number + 1
    return ROUNDS


def start_outwards(visitor: Visitor, units: list[Units]) -> None:
    """Visits each group once, first that which most weights tie to axes that stay or to groups visited before.

    Only tensors whose other axes stay or have been visited are looked at.
    """
    axes = visitor.group.symmetry.axes
    moved = {
        name: {group for segments in found for group, *_ in segments or () if group is not None}
        for name, found in axes.items()
    }
    left, done = list(units), set()

    def known(one: Units) -> set[str]:
        return {name for name in one.names if moved[name] <= done | {one.group}}

    def share(one: Units) -> tuple[bool, float]:
        names, weights = known(one), visitor.reference
        total = sum(weights[name].numel() for name in one.names)
        return one.turning is not None, sum(weights[name].numel() for name in names) / max(1, total)

    while left:
        one = max(left, key=share)
        visitor.visit(one, known(one) or one.names, 0.0)
        left.remove(one)
        done.add(one.group)
