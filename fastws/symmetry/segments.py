"""Segments: axes as stretches of units, and where their permutations lie in a row of permutations."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import Any

import torch
from torch import Tensor

from fastws.symmetry.notes import CROWDED, UNORDERED, Axis, Dropped
from fastws.symmetry.signs import Negated

# group or None, count, block, negated: count * block consecutive entries of an axis, which change their sign with their
# units or do not
Segment = tuple[int | None, int, int, bool]
Segments = tuple[Segment, ...]
FORMAT = 2  # of descriptions; in 1, which did not say so, segments had no signs


def runs(axis: Axis) -> list[tuple[int, int, int]]:
    """Family, member and length of every run of entries that belong to one unit."""
    return [(*unit, len(list(run))) for unit, run in groupby(zip(axis.family, axis.member, strict=True))]


def unordered(axis: Axis, sizes: list[int]) -> set[int]:
    """Families that do not lie along an axis as segments: in order, again and again, in blocks of equal size."""
    found = defaultdict(list)
    for family, member, length in runs(axis):
        found[family].append((member, length))
    bad = set()
    found.pop(-1, None)
    for family, units in found.items():
        size = sizes[family]
        whole = [(i % size, units[i // size * size][1]) for i in range(len(units))]
        if units != whole or len(units) % size:
            bad.add(family)
    return bad


def unstorable(axes: Mapping[str, tuple[Axis, ...]], sizes: list[int], negated: Negated) -> dict[int, Dropped]:
    """Families that must stay because tables cannot say how they move."""
    dropped: dict[int, Dropped] = {}
    small = {family for family, size in enumerate(sizes) if size < 2 and family not in negated}
    for name, found in axes.items():
        for k, axis in enumerate(found):
            for family in unordered(axis, sizes) - dropped.keys() - small:
                dropped[family] = Dropped(UNORDERED, name, k)
    for name, found in axes.items():
        live = {k: set(axis.family) - dropped.keys() - small - {-1} for k, axis in enumerate(found) if k > 0}
        freedom = {k: sum(math.lgamma(sizes[family] + 1) for family in kept) for k, kept in live.items() if kept}
        for k in sorted(freedom, key=freedom.get)[:-1]:
            dropped |= {family: Dropped(CROWDED, name, k) for family in live[k]}
    return dropped


def segments_of(axis: Axis, numbers: Mapping[int, int], negated: Mapping[int, set[int]]) -> Segments | None:
    """The segments of an axis.

    Args:
        axis: Of a tensor.
        numbers: The groups of the families that move.
        negated: Of a family, which of the entries of each unit along the axis change their sign with it.
    """
    segments: list[list] = []
    last, seen = -1, Counter()
    for family, member, length in runs(axis):
        group, sign = numbers.get(family), seen[family, member] in negated.get(family, ())
        seen[family, member] += length
        if segments and group is None and segments[-1][0] is None:
            segments[-1][1] += length
        elif segments and segments[-1][0] == group and segments[-1][2:] == [length, sign] and member == last + 1:
            segments[-1][1] += 1
        else:
            segments.append([None, length, 1, False] if group is None else [group, 1, length, sign])
        last = member
    return tuple(map(tuple, segments)) if any(group is not None for group, *_ in segments) else None


def arrange(
    axes: Mapping[str, tuple[Axis, ...]], sizes: list[int], dropped: Collection[int], negated: Negated
) -> tuple[list[int], dict[str, tuple[Segments | None, ...]]]:
    """The families that groups are made of, in order, and the segments of every axis."""
    kept = [f for f, size in enumerate(sizes) if f not in dropped and (size > 1 or f in negated)]
    numbers = {family: group for group, family in enumerate(kept)}
    ranks: dict[tuple[str, int], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for family, places in negated.items():
        for name, axis, rank in places:
            ranks[name, axis][family].add(rank)
    segments = {
        name: tuple(segments_of(axis, numbers, ranks[name, k]) for k, axis in enumerate(found))
        for name, found in axes.items()
    }
    return kept, segments


def parse(fields: Mapping) -> dict[str, Any]:
    """The arguments of a Symmetry from what ``to_dict`` and JSON made of one, which may come from anybody.

    Raises:
        ValueError: If the tables that are made of them could point outside a tensor, or be no permutations.
    """
    try:
        if fields.get("format", 1) not in (1, FORMAT):
            raise ValueError(f"format {fields['format']!r}, of a newer version of fastws")
        axes = {
            name: tuple(segments if segments is None else tuple(map(with_sign, segments)) for segments in found)
            for name, found in fields["axes"].items()
        }
        shapes = {name: tuple(shape) for name, shape in fields["shapes"].items()}
        parsed = {"axes": axes, "shapes": shapes, "aliases": dict(fields["aliases"])}
        parsed |= {key: tuple(fields[key]) for key in ("sizes", "names")}
        parsed |= {"unpermuted": list(fields["unpermuted"]), "fixed": list(fields.get("fixed", ()))}
        check(**parsed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"symmetry: description must be one that to_dict made, got {error!r}") from error
    return parsed


def with_sign(segment: Sequence) -> tuple:
    """A segment, of which descriptions before signs have three entries."""
    return (*segment, False) if len(segment) == 3 else tuple(segment)


def check(sizes, names, shapes, aliases, axes, unpermuted, fixed) -> None:
    bad = [size for size in chain(sizes, *shapes.values()) if type(size) is not int or size < 0]
    if bad or sum(sizes) >= 2**31:
        raise ValueError(f"sizes that are {bad[0]!r}" if bad else f"{sum(sizes)} units")
    if len(names) != len(sizes) or not all(isinstance(text, str) for text in (*names, *unpermuted, *fixed)):
        raise ValueError(f"{len(sizes)} groups with {len(names)} names, or names that are no strings")
    strange = axes.keys() ^ shapes.keys()
    if strange:
        raise ValueError(f"axes or a shape alone of {min(strange)!r}")
    for name, tied in aliases.items():
        if (shapes[name], axes[name]) != (shapes[tied], axes[tied]):
            raise ValueError(f"{name!r} with other axes than {tied!r}, to which it is tied")
    for name, found in axes.items():
        if len(found) != len(shapes[name]) or sum(segments is not None for segments in found[1:]) > 1:
            raise ValueError(f"{name!r} of shape {shapes[name]} with other axes, or two that move beside the rows")
        for segments, length in zip(found, shapes[name], strict=True):
            if segments is not None and not is_whole(segments, length, sizes):
                raise ValueError(f"{name!r} with an axis of {length} entries and segments {str(segments)[:80]}")
    moved = {group for found in axes.values() for segments in found for group, *_ in segments or ()}
    still = set(range(len(sizes))) - moved
    if still:
        raise ValueError(f"a group {min(still)} that moves nothing")


def is_whole(segments: Segments, length: int, sizes: Sequence[int]) -> bool:
    """Whether segments fill an axis, and the parts of each group that follow each other make all of it."""
    filled, begun = 0, {}  # of each group: how many of its units the last parts hold, in blocks of what size
    for group, count, block, negated in segments:
        if type(negated) is not bool or (group is None and negated):
            return False
        if not all(type(number) is int and number > 0 for number in (count, block)):
            return False
        filled += count * block
        if group is None:
            continue
        if type(group) is not int or not 0 <= group < len(sizes):
            return False
        held, width = begun.get(group, (0, 0))
        if (held and width != block) or held + count > sizes[group]:
            return False
        begun[group] = (held + count) % sizes[group], block
    return filled == length and not any(held for held, _ in begun.values())


def group_names(axes: Mapping[str, tuple[Segments | None, ...]], count: int) -> tuple[str, ...]:
    """The first weight whose rows a group moves, else the first tensor that it moves."""
    rows: dict[int, str] = {}
    any_axis: dict[int, str] = {}
    for name, found in axes.items():
        for axis, segments in enumerate(found):
            for group, *_ in segments or ():
                any_axis.setdefault(group, name)
                if axis == 0 and len(found) > 1:
                    rows.setdefault(group, name)
    return tuple(rows.get(group, any_axis.get(group, "")) for group in range(count))


def unit_size(segments: Segments) -> int:
    """The largest number of consecutive entries that always move together."""
    return math.gcd(*(count if group is None else block for group, count, block, _ in segments))


@dataclass(frozen=True)
class Composites:
    """Permutations of axes that consist of several groups, or of blocks of one, as functions of the groups.

    ``composite[s] = lookup[base[s] + groups[source[s]]]``, where ``source`` may point to a zero behind the groups. The
    index of a unit is looked up; its sign is that of the unit where ``signed`` is -1, and plus where it is 0.
    """

    source: Tensor  # int64 [S - sum(sizes)]
    base: Tensor  # int32 [S - sum(sizes)]
    lookup: Tensor  # int32
    signed: Tensor  # int32 [S - sum(sizes)]
    first: dict[tuple[Segments, int], int]  # segments and entries per unit: where the permutation begins


def locate(segments: Segments, block: int, sizes: tuple[int, ...]) -> tuple[list, dict]:
    """For each unit of an axis its group, member, rank and sign; and where those of equal group and rank are.

    The rank is how often the unit was seen before; the sign, whether the entries are negated with it.
    """
    units: list[tuple[int, int, int, bool] | None] = []
    begun, seen = Counter(), Counter()
    for group, count, width, negated in segments:
        if group is None:
            units += [None] * (count * width // block)
            continue
        for _ in range(count):
            member = begun[group] % sizes[group]
            begun[group] += 1
            for _ in range(width // block):
                units.append((group, member, seen[group, member], negated))
                seen[group, member] += 1
    places = defaultdict(dict)
    for place, unit in enumerate(units):
        if unit is not None:
            group, member, rank, _ = unit
            places[group, rank][member] = place
    return units, {key: tuple(found[m] for m in range(sizes[key[0]])) for key, found in places.items()}


def plan(wanted: Iterable[tuple[Segments, int]], sizes: tuple[int, ...]) -> Composites:
    """Places a permutation for every axis: that of its group, the beginning of a longer one, or one of its own.

    Args:
        wanted: Segments of axes, and how many consecutive entries the permutation takes for one unit.
        sizes: Of the groups.
    """
    wanted, starts = list(dict.fromkeys(wanted)), [0, *accumulate(sizes)]
    flips = {group for segments, _ in wanted for group, _, _, negated in segments if negated}
    cycles = {(group, tuple(range(size))): group for group, size in enumerate(sizes)}  # its places: a number
    keys: dict[tuple[Segments, int], list[tuple[int, int, bool]]] = {}
    for axis in wanted:
        units, places = locate(*axis, sizes)
        keys[axis] = []
        for place, unit in enumerate(units):
            group, member, rank, negated = unit or (-1, place, 0, False)
            cycle = -1 if unit is None else cycles.setdefault((group, places[group, rank]), len(cycles))
            keys[axis].append((cycle, member, negated))
    groups = list(cycles)
    longest = max(map(len, keys.values()), default=0)
    lookup_of = [longest, *accumulate((len(places) for _, places in groups), initial=longest)][1:]
    first, stored, source, base, signed = {}, [], [], [], []
    for axis, units in sorted(keys.items(), key=lambda item: -len(item[1])):
        group = units[0][0]
        own = [(group, member, group in flips) for member in range(sizes[group])] if 0 <= group < len(sizes) else None
        if units == own:
            first[axis] = starts[group]
            continue
        place = next((place for place, longer in stored if longer[: len(units)] == units), None)
        if place is None:
            place = starts[-1] + len(source)
            stored.append((place, units))
            source += [starts[-1] if cycle < 0 else starts[groups[cycle][0]] + member for cycle, member, _ in units]
            base += [member if cycle < 0 else lookup_of[cycle] for cycle, member, _ in units]
            signed += [-1 if negated else 0 for *_, negated in units]
        first[axis] = place
    lookup = [*range(longest), *(place for _, places in groups for place in places)]
    return Composites(torch.tensor(source, dtype=torch.int64), int32(base), int32(lookup), int32(signed), first)


def int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
