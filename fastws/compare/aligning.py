"""One network in the coordinates of another: other weights, the same function (Git Re-Basin, arXiv 2209.04836)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastws.compare.activations import match_activations
from fastws.compare.modules import Network
from fastws.compare.running import Checked, same_function
from fastws.compare.states import Distance, State, comparable, distance, mean_of
from fastws.compare.tracing import trace_group, trace_symmetry
from fastws.layout.layout import Layout
from fastws.matching.match import match
from fastws.matching.mean import match_to_mean
from fastws.matching.whole import match_whole
from fastws.signed import split
from fastws.symmetry.symmetry import Symmetry

MOST_ROUNDS = 10  # of matching each network to the mean of the others at the whole group
LEAST_GAIN = 1e-6  # of the mean cosine


@dataclass(frozen=True, kw_only=True)
class Matching:
    """What a user says of how networks are matched; commands that match inherit these options."""

    by: Literal["weights", "activations"] = "weights"  # what is brought closest: weights, or what units do on --data
    signs: bool = True  # units of odd activations may change their sign too
    restarts: int = 1  # runs of the matching by weights, which visit groups in other orders; the best is kept
    continuous: bool = False  # scales, matrices and rotations as well, which round; to find them may take minutes


class Aligned(NamedTuple):
    """A network in the coordinates of another."""

    state: dict[str, Tensor]  # names, shapes and dtypes as they were
    raw: Distance  # before
    aligned: Distance
    moved: float  # share of the units that have another place or sign
    unmatched: list[str]  # sentences about tensors that took no part, because they have other shapes in both
    exact: bool  # whether all numbers are those of before, in other places and of other signs
    canonical: Distance | None = None  # at the whole group, in canonical form, where that was asked for


class Aligner:
    """What aligns networks of one module; the module is traced once.

    Args:
        network: The module and example inputs.
        how: By weights or activations.
        x: Inputs ``[n, ..]`` whose activations are matched, where they are.
    """

    def __init__(self, network: Network, how: Matching, x: Tensor | None = None):
        if how.restarts < 1:
            raise ValueError(f"align: restarts must be at least 1, got {how.restarts}")
        if how.by == "activations" and x is None:
            raise ValueError("align: --data must be given to match by activations, got none")
        if how.continuous and how.by == "activations":
            raise ValueError("align: --continuous must be left out with --by activations, got both")
        self.network, self.how, self.x = network, how, x
        self.group = trace_group(network) if how.continuous else None
        self.symmetry = self.group.symmetry if self.group else trace_symmetry(network)

    def pair(self, base: State, other: State) -> Aligned:
        """Gives the units of a network the order, and the signs, that bring it closest to another one.

        Args:
            base: Tensors of the network whose order of units is taken.
            other: Tensors of the network that is moved, one of the module. Those that have another shape in ``base``
                (another number of classes) take no part in the matching and move along, as long as the axes that move
                have one size.

        Raises:
            ValueError: If the networks are of two architectures, or a weight is NaN or infinite.
        """
        known, goal, unmatched = comparable(base, other, self.symmetry)
        if self.group is not None:
            if unmatched:
                different = next(iter(unmatched.values()))
                raise ValueError(f"align: --continuous must be left out where shapes differ, but {different}")
            return self._whole(base, other, goal)
        if self.how.by == "activations":
            row = match_activations(self.network.module, goal, known, self.x, self.symmetry, signs=self.how.signs)
        else:
            layout = Layout.from_checkpoint(known)
            flat, reference = layout.flatten(known), layout.flatten(goal)
            dtype = torch.promote_types(flat.dtype, reference.dtype)
            options = {"restarts": self.how.restarts, "flips": self.how.signs and any(self.symmetry.flips)}
            row = match(flat[None].to(dtype), reference.to(dtype), self.symmetry, layout, **options)[0]
        return self._moved(base, other, row, unmatched)

    def together(self, states: Sequence[State]) -> list[Aligned]:
        """Several networks, each in the coordinates that fit the mean of the others, beginning with those of the first.

        By weights it is generalised Procrustes analysis (``match_to_mean``); by activations all are matched to the
        first. Distances are those from the mean of the others. The first network stays as it is.

        Raises:
            ValueError: If the networks are not of one architecture and one number of classes.
        """
        held = [comparable(states[0], state, self.symmetry) for state in states]
        for different in (sentence for _, _, unmatched in held for sentence in unmatched.values()):
            raise ValueError(f"align: networks must have the same shapes to have a mean, but {different}")
        if self.group is not None:
            return self._whole_together(states)
        rows = self._rows_by_activations(states) if self.how.by == "activations" else self._rows(held)
        moved = [moved_by(self.symmetry, row, state) for row, state in zip(rows, states, strict=True)]
        results = []
        for number, row in enumerate(rows):
            others = mean_of([other for place, other in enumerate(moved) if place != number])
            results.append(self._moved(others, states[number], row, {}))
        return results

    def _rows(self, held: Sequence[tuple]) -> Tensor:
        layout = Layout.from_checkpoint(held[0][0])
        flats = torch.stack([layout.flatten(known).float() for known, *_ in held])
        flips = torch.full((len(flats),), self.how.signs and any(self.symmetry.flips))
        options = {"flips": flips, "restarts": self.how.restarts}
        together = match_to_mean(flats.__getitem__, len(flats), flats[0], self.symmetry, layout, **options)
        # coordinates of the whole are those of the first network, which so stays as it is
        first = self.symmetry.inverse(together.permutations[0])
        return self.symmetry.compose(together.permutations, first.expand(len(flats), -1))

    def _rows_by_activations(self, states: Sequence[State]) -> Tensor:
        module, options = self.network.module, {"signs": self.how.signs}
        found = [match_activations(module, states[0], state, self.x, self.symmetry, **options) for state in states[1:]]
        return torch.stack([self.symmetry.identity()[0], *found])

    def _whole(self, base: State, state: State, goal: State) -> Aligned:
        """At the whole group; ``goal`` are the tensors of the base that the symmetry knows."""
        known = {name: tensor for name, tensor in state.items() if name in self.symmetry.shapes}
        element, report = match_whole(self.group, goal, known, restarts=self.how.restarts)
        moved = {**state, **self.group.apply(element, known)}
        row = reduce(
            self.symmetry.compose, [move.value for move in element if move.line == "P"], self.symmetry.identity()[0]
        )
        canonical = Distance(report.whole.distance, report.whole.cosine)
        distances = (distance(base, one, {}) for one in (state, moved))
        return Aligned(moved, *distances, moved_share(self.symmetry, row), [], exact=False, canonical=canonical)

    def _whole_together(self, states: Sequence[State]) -> list[Aligned]:
        """Generalised Procrustes analysis at the whole group; a round that does not gain is not kept."""
        first = unmoved(states[0])
        best = [first, *(self.pair(states[0], state) for state in states[1:])]
        for _ in range(MOST_ROUNDS):
            found = [first]
            for number in range(1, len(states)):
                others = [one.state for place, one in enumerate(best) if place != number]
                goal = {name: x for name, x in mean_of(others).items() if name in self.symmetry.shapes}
                found.append(self._whole(goal, states[number], goal))
            if not closeness_of(found) > closeness_of(best) + LEAST_GAIN:
                break
            best = found
        return best

    def _moved(self, base: State, state: State, row: Tensor, unmatched: dict[str, str]) -> Aligned:
        moved = moved_by(self.symmetry, row, state)
        distances = (distance(base, one, unmatched) for one in (state, moved))
        return Aligned(moved, *distances, moved_share(self.symmetry, row), [*unmatched.values()], exact=True)


def require_function(where: str, network: Network, state: State, found: Aligned) -> Checked:
    """Compares the outputs of a network before and after alignment.

    Raises:
        ValueError: If they differ by more than rounding explains.
    """
    checked = same_function(network, state, found.state)
    if not checked.holds(found.exact):
        got = f"relative error {checked.error:.1e} of {network.name} after alignment"
        raise ValueError(f"{where}: outputs must stay what they are, got {got}; nothing was written")
    return checked


def unmoved(state: State) -> Aligned:
    """The network in whose coordinates others are."""
    return Aligned(dict(state), Distance(0.0, 1.0), Distance(0.0, 1.0), 0.0, [], exact=True)


def closeness_of(found: Sequence[Aligned]) -> float:
    """The mean cosine of each network with the mean of the others."""
    cosines = []
    for number, one in enumerate(found):
        others = mean_of([other.state for place, other in enumerate(found) if place != number])
        cosines.append(distance(others, one.state, {}).cosine)
    return sum(cosines) / len(cosines)


def moved_by(symmetry: Symmetry, row: Tensor, state: State) -> dict[str, Tensor]:
    """A network with its units moved by a row of permutations; tensors that the symmetry does not know stay."""
    known = {name: tensor for name, tensor in state.items() if name in symmetry.shapes}
    layout = Layout.from_checkpoint(known)  # with dtypes of its own, so that no number is rounded
    moved = layout.unflatten(symmetry.permute(layout.flatten(known), row, layout))
    return {name: moved.get(name, tensor) for name, tensor in state.items()}


def moved_share(symmetry: Symmetry, row: Tensor) -> float:
    index, negative = split(row[: symmetry.starts[-1]])
    stays = (index == symmetry.identity()[0, : symmetry.starts[-1]]) & (negative == 0)
    return 1 - float(stays.double().mean()) if len(stays) else 0.0
