"""Rotations of a residual stream: orthogonal matrices on all its units, although norms have a gain for each unit.

Gains are folded into what reads the norm, the stream is rotated, and the gains are put back: a root mean square is the
same in all rotated coordinates. LayerNorm also takes off the mean, so only rotations that keep the vector of ones are
left; what they leave out is all that LayerNorm does not see. The module stays what it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from fastws.group.finding import EXACT, tried
from fastws.group.function import Function
from fastws.group.lines import Linear, Scales
from fastws.group.places import Place, Space
from fastws.group.shifts import find_ones


class Fold(NamedTuple):
    """A gain, and the scales that move it into the weights beside it."""

    line: Scales
    gain: Place
    power: int

    def value(self, state: Mapping[str, Tensor]) -> Tensor:
        """The scales that make the gain 1, ``[1, n]``.

        Raises ValueError where the gain is 0.
        """
        gain = self.gain.get(state[self.gain.name])[..., 0]
        if not gain.all():
            where = int((gain == 0).flatten().int().argmax())
            raise ValueError(f"group: {self.gain.name} must not be 0 where a stream is rotated, got 0 at {where}")
        return gain**-self.power


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix on the units of a stream, ``[n, n]``; if ``ones``, one that keeps the vector of ones.

    Attributes:
        id: ``"N2"`` or, if ``ones``, ``"N3"``.
        name: The first tensor that it changes.
        group: The group of the symmetry whose units are rotated.
        positions: How many units, ``n``.
        places: All that is rotated.
        folds: The gains that are folded before and put back afterwards.
        ones: Whether the vector of ones stays, because norms take off the mean.
    """

    id: str
    name: str
    group: int
    positions: int
    places: tuple[Place, ...]
    folds: tuple[Fold, ...]
    ones: bool = False
    units: ClassVar[int] = 1

    @property
    def key(self) -> str:
        return f"{self.id}:{self.name}"

    @property
    def tensors(self) -> list[str]:
        folded = [name for fold in self.folds for name in fold.line.tensors]
        return list(dict.fromkeys([*(place.name for place in self.places), *folded]))

    def act(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        """The tensors that change, float64. Gains stay what they are."""
        now, names = dict(state), self.tensors
        scales = []
        for fold in self.folds:
            scales.append(fold.value(now))
            now |= fold.line.act(now, scales[-1])
        for place in self.places:
            now[place.name] = place.put(now[place.name], value.to(now[place.name].device) @ place.get(now[place.name]))
        for fold, scale in zip(self.folds, scales, strict=True):
            now |= fold.line.act(now, 1 / scale)
        return {name: now[name] for name in names}

    def random(self, generator: Generator) -> Tensor:
        n = self.positions - self.ones
        orthogonal, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        return self.complete(orthogonal)

    @property
    def basis(self) -> Tensor:
        """Orthonormal columns that span what may be rotated: all, or the complement of the ones, ``[n, n - 1]``."""
        if not self.ones:
            return torch.eye(self.positions, dtype=torch.float64)
        # of the Householder reflection that takes the first axis to the ones, all columns but the first
        first = torch.full((self.positions,), self.positions**-0.5, dtype=torch.float64)
        normal = first.clone()
        normal[0] -= 1
        reflection = torch.eye(self.positions, dtype=torch.float64)
        if normal.any():
            reflection -= 2 * torch.outer(normal, normal) / (normal @ normal)
        return reflection[:, 1:]

    def complete(self, orthogonal: Tensor) -> Tensor:
        """The matrix on all units, from one in the basis."""
        if not self.ones:
            return orthogonal
        basis = self.basis
        return basis @ orthogonal @ basis.T + 1 / self.positions

    def invert(self, value: Tensor) -> Tensor:
        return value.T

    def discrete(self) -> None:
        return None

    def describe(self) -> str:
        kept = ", which keep the vector of ones" if self.ones else ""
        names = dict.fromkeys(place.name for place in self.places)
        return f"rotations ({self.id}) of a stream of {self.positions} units{kept}: {', '.join(names)}"


def find_rotation(function: Function, space: Space, lines: Sequence[Linear]) -> tuple[list, list[str]]:
    """The rotation of a group, with the centring that belongs to it, and why there is none."""
    folds = [fold for fold in map(fold_of, lines) if fold is not None]
    gains = {fold.gain for fold in folds}
    places = tuple(place for place in space.places if place not in gains)
    if len(places) < 2 or space.positions < 2:
        return [], []
    fields = (places[0].name, space.group, space.positions, places, tuple(folds))
    rotation = Rotation("N2", *fields)
    if tried(function, rotation) < EXACT:
        return [rotation], []
    if space.positions > 2 and folds:
        ones = find_ones(function, space, places)
        if ones is not None:
            rotation = Rotation("N3", *fields, ones=True)
            if tried(function, rotation) < EXACT:
                return [ones, rotation], []
            return [ones], [f"rotations of {places[0].name}: outputs changed, as where a gain or a tied head stays"]
        return [], [f"rotations of {places[0].name}: outputs changed, as where a gain or a tied head stays"]
    return [], []


def fold_of(line: Linear) -> Fold | None:
    """The gain of a line of scales: its first vector that is no bias."""
    if not isinstance(line, Scales) or line.id not in ("N1", "LS") or line.units > 1:
        return None
    gains = [part for part in line.parts if part.place.numbers == 1 and abs(part.power) == 1]
    gains = [part for part in gains if not part.place.name.endswith(("bias", "running_mean"))]
    return Fold(line, gains[0].place, gains[0].power) if len(gains) == 1 else None
