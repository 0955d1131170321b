"""Lines: what may be done to weights, one kind of action each, without changing the function of the network.

A line acts on the places of one space. Of a place of power 1 the entries ``x[u, i]`` become ``(M x)[u, i]``, of a place
of power -1 ``(M^-T x)[u, i]``, where M is diagonal (``Scales``), any matrix (``Matrices``), one complex number per pair
of positions (``Pairs``) or a permutation (``Inner``). Products of the two, which the network computes with, stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from fastws.group.places import Place


class Move(NamedTuple):
    """One action: the key of its line, and what it acts with."""

    line: str
    value: Tensor


Element = tuple[Move, ...]


class Part(NamedTuple):
    """A place, and the power with which a line acts on it; ``offset``: is added before and taken off afterwards."""

    place: Place
    power: int
    offset: float = 0.0


@dataclass(frozen=True)
class Linear(ABC):
    """A line of a space ``[units, positions]``.

    Attributes:
        id: The kind of line (docs/design.md).
        name: Where it is: the first tensor that it changes.
        group: The group of the symmetry whose units, or the positions inside of them, it acts on.
        units: How many units act independently.
        positions: Of each unit.
        parts: What it changes.
        approximate: Whether a small constant in a norm keeps it from being exact.
    """

    id: str
    name: str
    group: int
    units: int
    positions: int
    parts: tuple[Part, ...]
    approximate: bool = False
    said: ClassVar[str]  # what it is, in words

    @property
    def key(self) -> str:
        return f"{self.id}:{self.name}"

    @property
    def tensors(self) -> list[str]:
        return list(dict.fromkeys(part.place.name for part in self.parts))

    def act(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        """The tensors that change, float64."""
        changed: dict[str, Tensor] = {}
        for place, power, offset in self.parts:
            tensor = changed.get(place.name, state[place.name])
            entries = place.get(tensor)
            moved = self.moved(entries + offset, value.to(entries.device), power) - offset
            changed[place.name] = place.put(tensor, moved)
        return changed

    @abstractmethod
    def moved(self, entries: Tensor, value: Tensor, power: int) -> Tensor:
        """Entries ``[U, n, m]`` of a place of some power, moved."""

    @abstractmethod
    def random(self, generator: Generator) -> Tensor:
        """A random value, well conditioned."""

    @abstractmethod
    def invert(self, value: Tensor) -> Tensor:
        """The value that undoes another."""

    def discrete(self) -> "Linear | None":
        """What of the line rounds nothing in half precision."""
        return None

    def describe(self) -> str:
        count = f"{self.units} x {self.positions}" if self.units > 1 else f"{self.positions}"
        sides = [list(dict.fromkeys(p.place.name for p in self.parts if (p.power > 0) == up)) for up in (True, False)]
        text = f"{self.said} ({self.id}) of {count} units: {', '.join(sides[0])}"
        text += f" against {', '.join(sides[1])}" if sides[1] else ""
        return text + (", but for a small constant in a norm" if self.approximate else "")


@dataclass(frozen=True)
class Scales(Linear):
    """A number per position, ``[U, n]``: not 0 if ``signed``, above 0 if not, 1 or -1 if ``unit``."""

    signed: bool = False
    unit: bool = False

    @property
    def said(self) -> str:
        return "signs" if self.unit else "scales" if self.signed else "positive scales"

    def discrete(self) -> "Scales | None":
        return replace(self, unit=True) if self.signed else None

    def moved(self, entries: Tensor, value: Tensor, power: int) -> Tensor:
        return entries * (value**power)[..., None]

    def random(self, generator: Generator) -> Tensor:
        shape = self.units, self.positions
        values = torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.5).exp()
        signs = 1 - 2.0 * torch.randint(2, shape, generator=generator)
        values = torch.ones_like(values) if self.unit else values
        return values * signs if self.signed or self.unit else values

    def invert(self, value: Tensor) -> Tensor:
        return 1 / value


@dataclass(frozen=True)
class Matrices(Linear):
    """An invertible matrix per unit, ``[U, n, n]``."""

    said: ClassVar[str] = "matrices"

    def moved(self, entries: Tensor, value: Tensor, power: int) -> Tensor:
        return value @ entries if power > 0 else torch.linalg.solve(value.mT, entries)

    def random(self, generator: Generator) -> Tensor:
        shape = self.units, self.positions, self.positions
        left, right = (torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0] for _ in "ab")
        stretch = torch.rand(shape[:2], generator=generator, dtype=torch.float64) * 1.5 + 0.5
        return left * stretch[:, None] @ right

    def invert(self, value: Tensor) -> Tensor:
        return torch.linalg.inv(value)


@dataclass(frozen=True)
class Pairs(Linear):
    """A complex number per pair of positions, ``[U, n / 2]`` complex128: what commutes with rotary position codes.

    Pairs are positions ``(f, f + n / 2)`` in layout ``"halves"``, ``(2f, 2f + 1)`` in ``"interleaved"``.
    """

    layout: Literal["halves", "interleaved"] = "halves"
    said: ClassVar[str] = "complex numbers"

    def to_complex(self, entries: Tensor) -> Tensor:
        """``[U, n, m]`` -> ``[U, n / 2, m]`` complex."""
        if self.layout == "halves":
            return torch.complex(*entries.chunk(2, 1))
        return torch.complex(entries[:, 0::2], entries[:, 1::2])

    def moved(self, entries: Tensor, value: Tensor, power: int) -> Tensor:
        turned = self.to_complex(entries) * (value if power > 0 else 1 / value.conj())[..., None]
        if self.layout == "halves":
            return torch.cat([turned.real, turned.imag], 1)
        return torch.stack([turned.real, turned.imag], 2).flatten(1, 2)

    def random(self, generator: Generator) -> Tensor:
        shape = self.units, self.positions // 2
        lengths, angles = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in "ab")
        return torch.polar(lengths * 1.5 + 0.5, angles * 2 * torch.pi)

    def invert(self, value: Tensor) -> Tensor:
        return 1 / value


@dataclass(frozen=True)
class Inner(Linear):
    """A permutation of the positions of each unit, int64 ``[U, n]``: ``new[u, i] = old[u, value[u, i]]``."""

    said: ClassVar[str] = "permutations"

    def discrete(self) -> "Inner":
        return self

    def moved(self, entries: Tensor, value: Tensor, power: int) -> Tensor:
        return entries.gather(1, value[..., None].expand_as(entries))

    def random(self, generator: Generator) -> Tensor:
        return torch.stack([torch.randperm(self.positions, generator=generator) for _ in range(self.units)])

    def invert(self, value: Tensor) -> Tensor:
        return value.argsort(1)
