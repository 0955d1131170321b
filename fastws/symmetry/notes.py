"""Notes: which axes stay, and why, in words of a user who knows the module and nothing of tracing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.symmetry.units import ALONE, NATURAL, Units

ORDERED = "other layers bring its units in another order or into other groups, so that each has a place of its own"
UNREACHED = "function kept only for inputs like these, for the example inputs do not reach it"
UNSEEN = "outputs do not depend on it for inputs like the examples, so that nothing can be checked"
UNORDERED = "its units do not lie in an order that a table can hold"
CROWDED = "a table holds one permuted axis beside the rows"


class Axis(NamedTuple):
    """The units along one axis of a parameter.

    ``family[i]`` is the number of the set of units that may change places with the unit of entry i, or -1 where the
    entry must stay; ``member[i]`` is the number of the unit in that set.
    """

    family: list[int]
    member: list[int]


class Note(NamedTuple):
    """Why entries of an axis stay: reasons, how many entries, and how many there are."""

    reasons: list[str]
    still: int
    size: int


class Dropped(NamedTuple):
    """Why the units of a family must stay, and the axis that is to blame, if it is one."""

    reason: str
    name: str = ""
    axis: int = -1

    def blames(self, name: str, axis: int) -> bool:
        return not self.name or (self.name, self.axis) == (name, axis)

    def elsewhere(self) -> str:
        """The reason as it is told of another axis of the same units."""
        return f"it goes with {self.name} axis {self.axis}: {self.reason}"


def note(units: Units, names: Tensor, axis: Axis, sizes: list[int]) -> Note | None:
    """Why entries of an axis stay that belong to units of some names; None if all of them move."""
    still = torch.tensor([family < 0 or sizes[family] < 2 for family in axis.family])
    if not still.any():
        return None
    reasons = units.why(names[still])
    if still.all() and not reasons and min(axis.family) >= 0:
        reasons = [ORDERED]
    elif any(family >= 0 and sizes[family] < 2 for family in axis.family):
        reasons.append(ALONE)
    return Note(reasons, int(still.sum()), len(still))


def sentences(
    axes: Mapping[str, tuple[Axis, ...]], notes: Mapping[tuple[str, int], Note], dropped: Mapping[int, Dropped]
) -> tuple[list[str], list[str]]:
    """What stays for a reason that a user may want to know; what stays by nature, or with something of the first."""
    unpermuted, fixed = [], []
    for name, found in axes.items():
        for k, axis in enumerate(found):
            reasons, still, size = notes.get((name, k), Note([], 0, len(axis.family)))
            found_here = {dropped[family] for family in axis.family if family in dropped}
            still += sum(family in dropped for family in axis.family)
            told = [reason for reason in reasons if reason not in NATURAL]
            told += sorted(found.reason for found in found_here if found.blames(name, k))
            others = reasons + sorted(found.elsewhere() for found in found_here)
            if still:
                part = "" if still == size else f"{still} of {size} entries: "
                sentence = f"{name} axis {k} stays: {part}{' and '.join(told or others)}"
                (unpermuted if told else fixed).append(sentence)
    return unpermuted, fixed


def by_reason(sentences: Iterable[str]) -> list[str]:
    """A line for each reason, with all that stays for it."""
    places = defaultdict(list)
    for sentence in sentences:
        place, _, reason = sentence.partition(" stays: ")
        places[reason].append(place)
    return [f"{', '.join(found)} stay: {reason}" for reason, found in places.items()]
