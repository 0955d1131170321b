"""Visits: one part of the whole group at a time gets its best value while all others stay.

Networks are in canonical form (``Group.canonical``), so that of what is continuous only orthogonal matrices, phases and
signs are left, each of which has a closed form; permutations are assignment problems. Units that hold positions of
their own, as heads do, are assigned by what each pairing is worth once the positions inside of it are matched: all
pairings are tried, a shift of the units at a time.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastws.group.group import Group
from fastws.group.lines import Inner, Linear, Matrices, Move, Pairs, Scales
from fastws.group.places import Place, across, find_pieces
from fastws.group.streams import Rotation
from fastws.signed import split

State = dict[str, Tensor]


class Units(NamedTuple):
    """What is visited at once: a group of the symmetry and all lines that act on it.

    Attributes:
        group: The group.
        places: Where its units lie, running statistics apart.
        negated: The places whose entries change their sign with their unit if the symmetry says so.
        turning: The line that rotates all units, if there is one; then nothing else moves them.
        signs: Lines of signs of whole units.
        inner: Lines of the positions inside the units.
    """

    group: int
    places: tuple[Place, ...]
    negated: frozenset[Place]
    turning: Rotation | Matrices | None
    signs: tuple[Scales, ...]
    inner: tuple[Linear, ...]

    @property
    def names(self) -> set[str]:
        return {place.name for place in self.places}


def find_units(group: Group) -> list[Units]:
    """All that is visited, in the order of the groups of the symmetry."""
    found = []
    for number, pieces in enumerate(find_pieces(group.symmetry)):
        if pieces is None:
            continue
        pieces = [piece for piece in pieces if piece.name not in group.statistics]
        held = [(across(group.symmetry, number, [piece]).places, piece.negated) for piece in pieces]
        mine = [line for line in group.lines if line.group == number]
        turning = [line for line in mine if isinstance(line, Rotation | Matrices) and line.units == 1]
        folded = {fold.line.key for line in turning if isinstance(line, Rotation) for fold in line.folds}
        signs = [line for line in mine if isinstance(line, Scales) and line.signed and line.units == 1]
        inner = tuple(line for line in mine if isinstance(line, Linear) and line.units > 1)
        flips = not inner and group.permutes
        found.append(
            Units(
                number,
                tuple(place for places, _ in held for place in places),
                frozenset(place for places, negated in held if negated and flips for place in places),
                turning[0] if turning else None,
                tuple(line for line in signs if line.key not in folded),
                inner,
            )
        )
    return found


def products(places, left: State, right: State, known: Collection[str] | None) -> Tensor | None:
    """``sum left[u, i, :] . right[u, j, :]`` over places, ``[U, n, n]``; None if none of them is known."""
    terms = [
        place.get(left[place.name]) @ place.get(right[place.name]).mT
        for place in places
        if known is None or place.name in known
    ]
    return torch.stack(terms).sum(0) if terms else None


def assign(similarity: Tensor) -> Tensor:
    """For each row the column, int64, so that the sum of the similarities is largest."""
    return torch.from_numpy(linear_sum_assignment(numpy.asarray(similarity), maximize=True)[1].astype(numpy.int64))


def fit(
    line: Linear, parts, reference: State, state: State, known: Collection[str] | None, signs: Sequence[Scales] = ()
) -> Tensor | None:
    """The element of a line that brings a state closest to the reference; None if no known tensor tells.

    Permutations count what ``signs``, lines of the same positions, may negate by its absolute value.
    """
    if isinstance(line, Scales):
        parts = [part for part in parts if part.power % 2]
    places = [part.place for part in parts]
    if isinstance(line, Pairs):
        terms = [
            (line.to_complex(p.get(reference[p.name])) * line.to_complex(p.get(state[p.name])).conj()).sum(-1)
            for p in places
            if known is None or p.name in known
        ]
        total = torch.stack(terms).sum(0) if terms else None
        return None if total is None else torch.where(total.abs() > 0, total / total.abs(), 1.0)
    inner = products(places, reference, state, known)
    if inner is None:
        return None
    if isinstance(line, Scales):
        return torch.where(inner.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).double()
    if isinstance(line, Inner):
        for sign in signs:
            odd = products([part.place for part in sign.parts if part.power % 2], reference, state, known)
            inner = inner if odd is None else inner - odd + odd.abs()
        return torch.stack([assign(one) for one in inner])
    left, _, right = torch.linalg.svd(inner)
    return left @ right


def row_of(group: Group, units: Units, chosen: Tensor) -> Tensor:
    """The row of permutations that moves the units of one group; signs count where the group has any."""
    symmetry = group.symmetry
    row, start = symmetry.identity()[0, : symmetry.starts[-1]].clone(), symmetry.starts[units.group]
    row[start : start + len(chosen)] = chosen if symmetry.flips[units.group] else split(chosen)[0]
    return symmetry.expand(row)


def signs_of(line: Linear, others: Sequence[Linear]) -> list[Scales]:
    """The lines of signs of the positions that a line permutes."""
    held = {(part.place.name, part.place.axis) for part in line.parts}
    return [
        other
        for other in others
        if isinstance(line, Inner) and isinstance(other, Scales) and other.signed
        if other.positions == line.positions and {(part.place.name, part.place.axis) for part in other.parts} <= held
    ]


class Visitor:
    """Moves one network towards another, a visit at a time.

    Attributes:
        reference: The canonical form of the network that stays.
        state: The canonical form of the other, as moved so far.
        moves: What has been done to it.
    """

    def __init__(self, group: Group, reference: State, state: State):
        self.group, self.reference, self.state = group, reference, dict(state)
        self.moves: list[Move] = []

    def objective(self) -> float:
        """The inner product of the weights of both."""
        return sum(self._product(name, tensor) for name, tensor in self.state.items())

    def squares(self, state: State) -> float:
        """The sum of squares of the weights of a network."""
        return sum(float(x.square().sum()) for name, x in state.items() if name not in self.group.statistics)

    def _product(self, name: str, tensor: Tensor) -> float:
        return 0.0 if name in self.group.statistics else float((self.reference[name] * tensor).sum())

    def visit(self, units: Units, known: Collection[str] | None, least: float) -> float:
        """Gives one group its best value; how much the objective gains.

        With ``known``, only these tensors are looked at, and what is best for them is taken whatever it costs; without,
        nothing changes unless the objective gains ``least``.
        """
        before, count = self.state, len(self.moves)
        self.state = dict(before)
        if units.turning is not None:
            self.move(units.turning.key, self._turn(units.turning, known))
        else:
            if self.group.permutes:
                row, identity = self._assignment(units, known), self.group.symmetry.identity()[0]
                self.move("P", None if torch.equal(row, identity) else row)
            for line, value in self._inside(units, self.state, known):
                self.move(line.key, value)
            for line in units.signs:
                self.move(line.key, fit(line, line.parts, self.reference, self.state, known))
        changed = [name for name, tensor in self.state.items() if tensor is not before[name]]
        gain = sum(self._product(name, self.state[name]) - self._product(name, before[name]) for name in changed)
        if known is None and gain <= least:
            self.state, self.moves = before, self.moves[:count]
            return 0.0
        return gain

    def move(self, key: str, value: Tensor | None) -> None:
        """Does one move; None does nothing."""
        if value is not None:
            move = Move(key, value)
            self.state = self.group.act((move,), self.state)
            self.moves.append(move)

    def _turn(self, line: Rotation | Matrices, known: Collection[str] | None) -> Tensor | None:
        """The orthogonal matrix on all units."""
        if isinstance(line, Matrices):
            return fit(line, line.parts, self.reference, self.state, known)
        inner = products(line.places, self.reference, self.state, known)
        if inner is None:
            return None
        left, _, right = torch.linalg.svd(line.basis.T @ inner[0] @ line.basis)
        return line.complete(left @ right)

    def _inside(self, units: Units, state: State, known: Collection[str] | None) -> list[tuple[Linear, Tensor]]:
        """What to do inside the units: permutations first get what does not depend on them."""
        permuting = [line for line in units.inner if isinstance(line, Inner)]
        others = [line for line in units.inner if not isinstance(line, Inner)]
        # canonical form has left no choice of positive scales
        others = [line for line in others if not isinstance(line, Scales) or line.signed]
        permuted = {part.place.name for line in permuting for part in line.parts}
        state, done = dict(state), []
        steps = [(line, [part for part in line.parts if part.place.name not in permuted]) for line in others]
        steps = [(line, parts) for line, parts in steps if permuted and parts]
        steps += [(line, line.parts) for line in (*permuting, *others)]
        for line, parts in steps:
            value = fit(line, parts, self.reference, state, known, signs_of(line, units.inner))
            if value is not None:
                state |= line.act(state, value)
                done.append((line, value))
        return done

    def _assignment(self, units: Units, known: Collection[str] | None) -> Tensor:
        """The row of permutations that gives each unit its best place."""
        seen = [place for place in units.places if known is None or place.name in known]
        if not seen:
            return self.group.symmetry.identity()[0]
        if units.inner:
            similarity, signs = self._by_shifts(units, seen, known), None
        else:
            similarity, signs = self.worth(units, seen)
            similarity = similarity if signs is None else similarity + signs.abs()
        best = assign(similarity)
        chosen = best.int()
        if signs is not None:
            chosen = torch.where(signs.gather(1, best[:, None])[:, 0] < 0, ~chosen, chosen)
        return row_of(self.group, units, chosen)

    def worth(self, units: Units, seen: list[Place]) -> tuple[Tensor, Tensor | None]:
        """What each unit of the other network is worth in each place ``[n, n]``, and beside it in either sign."""
        sets = [{part.place for part in line.parts if part.power % 2} for line in units.signs]
        sets = [some for n, some in enumerate(sets) if not any(some & other for other in sets[:n])]
        signed = frozenset().union(*sets) | units.negated
        nothing = torch.zeros(1, *[self.group.symmetry.sizes[units.group]] * 2, dtype=torch.float64)

        def total(places) -> Tensor:
            found = products([place for place in seen if place in places], self.reference, self.state, None)
            return (nothing if found is None else found)[0]

        similarity = total(set(seen) - signed)
        for some in sets:
            similarity = similarity + total(some).abs()
        if not units.negated:
            return similarity, None
        return similarity, total(units.negated - frozenset().union(*sets))

    def _by_shifts(self, units: Units, seen: list[Place], known: Collection[str] | None) -> Tensor:
        """What each pairing of units is worth once what is inside of them is matched: all units are shifted at once."""
        size = self.group.symmetry.sizes[units.group]
        state = {name: tensor for name, tensor in self.state.items() if name in units.names}
        similarity = torch.empty(size, size, dtype=torch.float64)
        everyone = torch.arange(size)
        for shift in range(size):
            paired = (everyone + shift) % size
            row = row_of(self.group, units, paired.int())
            moved = {name: self.group.symmetry.permute_tensor(name, tensor, row) for name, tensor in state.items()}
            for line, value in self._inside(units, moved, known):
                moved |= line.act(moved, value)
            worth = [
                (place.get(self.reference[place.name]) * place.get(moved[place.name])).sum((0, 2)) for place in seen
            ]
            similarity[everyone, paired] = torch.stack(worth).sum(0)
        return similarity
