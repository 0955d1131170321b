"""Matching a part of a network at a time, for networks that do not fit into memory.

A part is a block, or all that is in none. What lies in one part alone, as heads and units, is matched whenever the part
is at hand; what parts share, as a residual stream, once a round, by what all parts say of it together. Parts are read,
brought into canonical form and moved anew in each round; only what was found is kept.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.group.group import Group
from fastws.group.lines import Element, Move
from fastws.group.shifts import Ones
from fastws.group.streams import Rotation
from fastws.matching.visits import State, Units, Visitor, assign, find_units, fit, products, row_of
from fastws.signed import split
from fastws.symmetry.symmetry import Symmetry

ROUNDS = 8  # through all parts, at most
SWEEPS = 4  # of a part whose gains have signs, at most
LEAST_GAIN = 1e-5  # of the cosine; a round that gains less is the last

Load = Callable[[int], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]  # both networks' tensors of a part


class Part(NamedTuple):
    """A part of a network, and what may be done to it.

    Attributes:
        group: Of its tensors alone.
        shared: The groups of units that other parts have too: by their number in the whole, how they lie here.
        own: The other groups of units.
    """

    group: Group
    shared: dict[int, Units]
    own: list[Units]


class Matched(NamedTuple):
    """What brings a network closest to another.

    Attributes:
        own: Of each part what is done to what no other part has, in canonical form.
        shared: Of each shared group, by its number, an orthogonal matrix ``[n, n]`` or signed places int32 ``[n]``.
        cosine: Of both networks in canonical form, moved.
        rounds: Through all parts.
    """

    own: list[Element]
    shared: dict[int, Tensor]
    cosine: float
    rounds: int


def restrict(group: Group, names: Collection[str]) -> tuple[Group, dict[int, int]]:
    """What of a group lies in some tensors, and for each of its groups of units the number in the whole.

    Lines that change other tensors too are left out, other than those that act on each tensor for itself.
    """
    symmetry = group.symmetry
    axes = {name: found for name, found in symmetry.axes.items() if name in names}
    held = sorted({g for found in axes.values() for part in found for g, *_ in part or () if g is not None})
    number = {old: new for new, old in enumerate(held)}
    axes = {
        name: tuple(part and tuple((number.get(g), *rest) for g, *rest in part) for part in found)
        for name, found in axes.items()
    }
    small = Symmetry(
        tuple(symmetry.sizes[old] for old in held),
        tuple(symmetry.names[old] for old in held),
        {name: symmetry.shapes[name] for name in axes},
        {name: tied for name, tied in symmetry.aliases.items() if name in axes and tied in axes},
        axes,
        [],
    )
    lines = []
    for line in group.lines:
        if isinstance(line, Rotation | Ones):
            places = tuple(place for place in line.places if place.name in names)
            changed = {"places": places, "group": number.get(line.group, -1)}
            if isinstance(line, Rotation):
                changed["folds"] = tuple(fold for fold in line.folds if set(fold.line.tensors) <= set(names))
            if places:
                lines.append(replace(line, **changed))
        elif set(line.tensors) <= set(names):
            lines.append(replace(line, group=number[line.group]))
    return Group(small, lines, [], group.permutes), dict(enumerate(held))


def find_parts(group: Group, names: Iterable[Collection[str]]) -> list[Part]:
    """The parts of a group, by the names of their tensors."""
    cut = [restrict(group, set(some)) for some in names]
    counts = [sum(old in held.values() for _, held in cut) for old in range(len(group.symmetry.sizes))]
    found = []
    for small, held in cut:
        units = find_units(small)
        shared = {held[one.group]: one for one in units if counts[held[one.group]] > 1}
        found.append(Part(small, shared, [one for one in units if counts[held[one.group]] == 1]))
    return found


def element_of(part: Part, matched: Matched, number: int, a: State, b: State) -> Element:
    """The element that moves a part of a network, as it is stored, into the coordinates of the other one."""
    _, to_canonical = part.group.canonical(b)
    _, to_reference = part.group.canonical(a)
    moves = [
        move for old, value in matched.shared.items() if old in part.shared for move in shared_moves(part, old, value)
    ]
    return (*to_canonical, *moves, *matched.own[number], *part.group.inverse(to_reference))


def shared_moves(part: Part, old: int, value: Tensor) -> list[Move]:
    units = part.shared[old]
    if units.turning is not None:
        return [Move(units.turning.key, value)]
    return [Move("P", row_of(part.group, units, value))] if part.group.permutes else []


def match_parts(parts: Sequence[Part], load: Load, first: int, tell: Callable[[int], Iterable[int]] = range) -> Matched:
    """Finds what brings network b closest to network a, a part at a time.

    Coordinate descent as in ``match_whole``, which begins with what is shared, as the part ``first`` alone tells of it:
    that with the axes that never move. What parts hold alone is then the best for what is shared, and so on in turn.

    Args:
        parts: Of the architecture of both.
        load: Gives the tensors of a part of network a, and of network b.
        first: The part that tells first.
        tell: Gives the numbers below a count, and shows how far they are.

    Raises:
        ValueError: If a state does not fit, or holds numbers that are not finite.
    """
    shared: dict[int, Tensor] = {}
    gather(parts, load, [first], shared, inside=False)
    best = None
    for number in range(ROUNDS):
        before = dict(shared)
        own, cosine = gather(parts, load, tell(len(parts)), shared, inside=True)
        gained = best is None or cosine > best.cosine
        done = best is not None and cosine <= best.cosine + LEAST_GAIN
        best = Matched(own, before, cosine, number + 1) if gained else best
        if done or not shared:
            break
    return best


def gather(
    parts: Sequence[Part], load: Load, numbers: Iterable[int], shared: dict[int, Tensor], inside: bool
) -> tuple[list[Element], float]:
    """One way through some parts, after which ``shared`` is the best for them; what was done inside, and the cosine."""
    totals: dict[int, list[Tensor | None]] = {}
    own: list[Element] = []
    inner = ours = theirs = 0.0
    for number in numbers:
        part = parts[number]
        (reference, _), (canonical, _) = (part.group.canonical(state) for state in load(number))
        visitor = Visitor(part.group, reference, canonical)
        for old in shared.keys() & part.shared.keys():
            for move in shared_moves(part, old, shared[old]):
                visitor.move(*move)
        before = len(visitor.moves)
        if inside:
            visit_own(visitor, part)
        own.append(tuple(visitor.moves[before:]))
        inner += visitor.objective()
        ours, theirs = (x + visitor.squares(y) for x, y in ((ours, reference), (theirs, canonical)))
        for old, units in part.shared.items():
            found = worth(visitor, units)
            kept = totals.setdefault(old, [None] * len(found))
            totals[old] = [y if x is None else x if y is None else x + y for x, y in zip(kept, found, strict=True)]
    for old, (similarity, flipped) in totals.items():
        holder = next(part for part in parts if old in part.shared)
        shared[old] = improved(holder, holder.shared[old], similarity, flipped, shared.get(old))
    return own, inner / max((ours * theirs) ** 0.5, 1e-300)


def visit_own(visitor: Visitor, part: Part) -> None:
    """Gives all that no other part has its best value, for what is shared as it is.

    Signs of gains are told by the gains alone at first, for their readers are not in order yet.
    """
    signs = [line for units in part.shared.values() if units.turning is None for line in units.signs]
    for line in signs:
        flat = [one for one in line.parts if one.place.numbers == 1]
        visitor.move(line.key, fit(line, flat, visitor.reference, visitor.state, None))
    reached = visitor.objective()
    for _ in range(SWEEPS if signs else 1):
        for units in part.own:
            visitor.visit(units, None, 0.0)
        for line in signs:
            visitor.move(line.key, fit(line, line.parts, visitor.reference, visitor.state, None))
        before, reached = reached, visitor.objective()
        if reached <= before + LEAST_GAIN * abs(before):
            break


def worth(visitor: Visitor, units: Units) -> tuple[Tensor | None, Tensor | None]:
    """What a part says of shared units: ``[n, n]``, what each is worth in each place; of some, of either sign."""
    if units.turning is None:
        return visitor.worth(units, list(units.places))
    line = units.turning
    places = line.places if isinstance(line, Rotation) else [part.place for part in line.parts]
    found = products(places, visitor.reference, visitor.state, None)
    return (None if found is None else found[0]), None


def improved(part: Part, units: Units, similarity: Tensor, flipped: Tensor | None, before: Tensor | None) -> Tensor:
    """The best value for what is shared, after another one that was done before."""
    if units.turning is None:
        best = assign(similarity if flipped is None else similarity + flipped.abs())
        chosen = best.int()
        if flipped is not None:
            chosen = torch.where(flipped.gather(1, best[:, None])[:, 0] < 0, ~chosen, chosen)
        if before is None:
            return chosen
        index, negative = split(chosen)
        return before[index] ^ negative
    basis = units.turning.basis if isinstance(units.turning, Rotation) else torch.eye(len(similarity)).double()
    left, _, right = torch.linalg.svd(basis.T @ similarity @ basis)
    turned = left @ right
    value = units.turning.complete(turned) if isinstance(units.turning, Rotation) else turned
    return value if before is None else value @ before
