"""Lines that add numbers: directions in which weights may move freely.

Softmax over keys does not see what is added to all of them, a norm takes off the mean of what it is given, and what is
added to values comes out of attention as it is, because its shares sum to 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from fastws.group.finding import EXACT, NULL, TINY, tried
from fastws.group.function import SPARE, Function, SizedAction
from fastws.group.lines import Linear, Matrices
from fastws.group.places import Place, Space
from fastws.layout.roles import bias_name


@dataclass(frozen=True)
class Shift(ABC):
    """A line that adds numbers.

    Attributes:
        id: The kind of line.
        name: The first tensor that it changes.
        group: The group of the symmetry that it belongs to.
        places: What it changes.
    """

    id: str
    name: str
    group: int
    places: tuple[Place, ...]
    said: ClassVar[str]  # what it is, in words

    @property
    def key(self) -> str:
        return f"{self.id}:{self.name}"

    @property
    def tensors(self) -> list[str]:
        return list(dict.fromkeys(place.name for place in self.places))

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of what is added."""

    @abstractmethod
    def act(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        """The tensors that change, float64."""

    @abstractmethod
    def to_zero(self, state: Mapping[str, Tensor]) -> Tensor:
        """The value that takes a state to the one place that all its shifts share."""

    def random(self, generator: Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)

    def invert(self, value: Tensor) -> Tensor:
        return -value

    def discrete(self) -> None:
        return None

    def describe(self) -> str:
        return f"{self.said} ({self.id}): {', '.join(self.tensors)}"


@dataclass(frozen=True)
class Free(Shift):
    """The same numbers, ``[U, n, m]``, are added to all places."""

    said: ClassVar[str] = "free to move"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places[0].extent

    def act(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        return {
            p.name: p.put(state[p.name], p.get(state[p.name]) + value.to(state[p.name].device)) for p in self.places
        }

    def to_zero(self, state: Mapping[str, Tensor]) -> Tensor:
        """The value that makes the numbers in the first place 0."""
        return -self.places[0].get(state[self.places[0].name])


@dataclass(frozen=True)
class Ones(Shift):
    """All units of a stream get the same: a number for each of the others of every writer, in turn, ``[sum of m]``."""

    said: ClassVar[str] = "free along all units at once"

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(place.numbers for place in self.places),)

    def act(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for place, amounts in zip(self.places, value.split([place.numbers for place in self.places]), strict=True):
            tensor = changed.get(place.name, state[place.name])
            changed[place.name] = place.put(tensor, place.get(tensor) + amounts.to(tensor.device))
        return changed

    def to_zero(self, state: Mapping[str, Tensor]) -> Tensor:
        """The value that makes the means over the units 0."""
        return torch.cat([-place.get(state[place.name]).mean((0, 1)) for place in self.places])


@dataclass(frozen=True)
class Carried(Shift):
    """Added to a bias, ``[U, n]``, and taken off, through the weights that read it, from the bias behind them."""

    readers: tuple[Place, ...] = ()
    target: str = ""
    said: ClassVar[str] = "free, and carried on"

    @property
    def tensors(self) -> list[str]:
        return [*super().tensors, self.target]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places[0].extent[:2]

    def act(self, state: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        (place,) = self.places
        tensor, target = state[place.name], state[self.target].double()
        value = value.to(tensor.device)
        for reader in self.readers:
            target = target - torch.einsum("unm,un->m", reader.get(state[reader.name]), value)
        return {place.name: place.put(tensor, place.get(tensor) + value[..., None]), self.target: target}

    def to_zero(self, state: Mapping[str, Tensor]) -> Tensor:
        """The value that makes the bias 0."""
        return -self.places[0].get(state[self.places[0].name])[..., 0]


def slopes_of(function: Function, lines: Sequence[Shift]) -> Tensor:
    """The derivatives of outputs by the size of a random value of each line, the same for lines of one shape."""

    def growing(line: Shift) -> SizedAction:
        value = line.random(Generator().manual_seed(1))
        return lambda state, by: line.act(state, value * by)

    # whether a change does nothing few sums tell
    return function.slopes([growing(line) for line in lines], 2, SPARE)


def least_seen(lengths: Tensor) -> Tensor:
    """The largest derivative that may be none."""
    return (NULL * lengths.max()).clamp(min=TINY * 100)


def find_free(function: Function, space: Space, shapes: Mapping[str, tuple[int, ...]]) -> list[Shift]:
    """Biases of a group that may have any value, alone or together with a running mean."""
    flat = [place for place in space.places if len(shapes[place.name]) == 1]
    if not flat:
        return []
    slopes = slopes_of(function, [Free("A8", place.name, space.group, (place,)) for place in flat])
    lengths = slopes.norm(dim=0)
    means = [n for n, place in enumerate(flat) if place.name.endswith("running_mean")]
    lines: list[Shift] = []
    for number, place in enumerate(flat):
        if number in means:
            continue
        if lengths[number] <= least_seen(lengths):
            sets = [Free("A8", place.name, space.group, (place,))]
        else:
            pairs = [n for n in means if flat[n].extent == place.extent]
            pairs = [n for n in pairs if (slopes[:, number] + slopes[:, n]).norm() <= NULL * lengths[number]]
            sets = [Free("B2", place.name, space.group, (place, flat[n])) for n in pairs]
        lines += [line for line in sets if tried(function, line) < EXACT][:1]
    return lines


def find_carried(function: Function, line: Linear, shapes: Mapping[str, tuple[int, ...]]) -> list[Shift]:
    """The biases among what a line of values and outputs changes."""
    if not isinstance(line, Matrices) or line.id != "A2":
        return []
    readers = tuple(part.place for part in line.parts if part.power < 0)
    targets = {bias_name(reader.name) for reader in readers} - {reader.name for reader in readers}
    found: list[Shift] = []
    for place in (part.place for part in line.parts if part.power > 0 and len(shapes[part.place.name]) == 1):
        if len(targets) != 1 or shapes.get(min(targets)) != (readers[0].numbers,):
            continue
        carried = Carried("A9", place.name, line.group, (place,), readers, min(targets))
        if tried(function, carried) < EXACT:
            found.append(carried)
    return found


def find_ones(function: Function, space: Space, places: Sequence[Place]) -> Ones | None:
    """The places of a stream in which the same may be added to all units."""
    lengths = slopes_of(function, [Ones("N5", place.name, space.group, (place,)) for place in places]).norm(dim=0)
    likely = [place for place, length in zip(places, lengths, strict=True) if length <= least_seen(lengths)]
    if not likely:
        return None
    ones = Ones("N5", likely[0].name, space.group, tuple(likely))
    if tried(function, ones) < EXACT:
        return ones
    lines = [Ones("N5", place.name, space.group, (place,)) for place in likely]
    writers = tuple(line.places[0] for line in lines if tried(function, line) < EXACT)
    return Ones("N5", writers[0].name, space.group, writers) if writers else None
