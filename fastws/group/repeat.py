"""Blocks that are alike: what was found in a network of few blocks, said of one that has more of the same.

A line or a group of units that lies in one block is copied for every block of that kind. What several blocks share, as
a residual stream, grows: where it lies in one block, it lies in all of that kind.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from fastws.group.group import Group
from fastws.group.lines import Part
from fastws.group.places import Place
from fastws.group.streams import Fold
from fastws.symmetry.segments import group_names
from fastws.symmetry.symmetry import Symmetry

Block = tuple[str, int]  # the name of the list with a dot behind it, and the number in it


@dataclass(frozen=True)
class Blocks:
    """Which block of the small network each block of the large one is like.

    Attributes:
        like: For each list of blocks, by its name with a dot behind it, of each block of the large network the number
            of the first of its kind; that one is in the small network too.
        shapes: Of all floating tensors of the large network, in its order.
        aliases: Tensors of the large network that are tied, and to which.
        few: How many of its first blocks the small network has, for each list.
    """

    like: Mapping[str, Sequence[int]]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    few: Mapping[str, int]

    def block(self, name: str) -> Block | None:
        """The block that a tensor is in."""
        for begin in self.like:
            if name.startswith(begin):
                number, dot, _ = name.removeprefix(begin).partition(".")
                if dot and number.isdecimal():
                    return begin, int(number)
        return None

    def renamed(self, name: str, block: Block | None, number: int) -> str:
        """A name of the small network, in another block of the same kind."""
        if block is None or self.block(name) != block:
            return name
        begin, old = block
        return f"{begin}{number}{name.removeprefix(f'{begin}{old}')}"

    def home(self, name: str) -> str:
        """The tensor of the small network that a tensor of the large one is like."""
        block = self.block(name)
        return name if block is None else self.renamed(name, block, self.like[block[0]][block[1]])

    def copies(self, block: Block | None) -> list[int]:
        """The numbers of the blocks that are like one; of what is in none, or is not the first of its kind, others."""
        if block is None:
            return [-1]
        return [number for number, first in enumerate(self.like[block[0]]) if first == block[1]]

    @cached_property
    def order(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.shapes)}

    def only(self, names: Iterable[str]) -> Block | None:
        """The block in which all names are; None if some are in another or in none."""
        found = {self.block(name) for name in names}
        return found.pop() if len(found) == 1 else None


def repeat(group: Group, blocks: Blocks) -> Group:
    """The group of a network, from that of one with fewer blocks of the same kinds.

    Args:
        group: Traced on the small network, which has each kind of block at least twice, if the large one has.
        blocks: What is like what.

    Raises:
        ValueError: If the blocks of the small network are not alike, or a shape that is cut moves.
    """
    few = {begin: found[: blocks.few[begin]] for begin, found in blocks.like.items()}
    if any(found[-1] != few[begin][-1] for begin, found in blocks.like.items()):
        raise ValueError("group: the last block must be of the kind of that which was traced, got another")
    small = replace(blocks, like=few, shapes=group.symmetry.shapes, aliases=group.symmetry.aliases)
    same = repeated(group, small)
    # which of several sets of signs is found is chance, while permutations are not
    alike = same.symmetry.unsigned() == group.symmetry.unsigned() and same.symmetry.flips == group.symmetry.flips
    complete = all(same_tensors(one) for one in (small, blocks))
    if not (alike and complete) or by_key(same) != by_key(group):
        raise ValueError("group: blocks must be alike to be traced once, got some with other lines; trace all of them")
    return repeated(group, blocks)


def same_tensors(blocks: Blocks) -> bool:
    """Whether each block has the tensors of the one that it is like."""
    held: dict[Block, set[str]] = {}
    for name in blocks.shapes:
        if block := blocks.block(name):
            held.setdefault(block, set()).add(blocks.home(name))
    return all(names == held[begin, blocks.like[begin][number]] for (begin, number), names in held.items())


def by_key(group: Group) -> dict[str, Any]:
    return {line.key: line for line in group.lines}


def repeated(group: Group, blocks: Blocks) -> Group:
    symmetry = group.symmetry
    holders = [blocks.only(names_of(symmetry, number)) for number in range(len(symmetry.sizes))]
    numbers = numbered(holders, blocks)
    axes, shapes = {}, {}
    for name, shape in blocks.shapes.items():
        home, block = blocks.home(name), blocks.block(name)
        if home not in symmetry.axes:
            raise ValueError(f"group: {name} must be in the network that was traced, got none like it")
        for size, before, segments in zip(shape, symmetry.shapes[home], symmetry.axes[home], strict=True):
            if size != before and segments is not None:
                raise ValueError(
                    f"group: {name} must be {list(symmetry.shapes[home])} where it moves, got {list(shape)}"
                )
        number = -1 if block is None else block[1]
        axes[name] = tuple(
            segments and tuple((group_number(numbers, g, holders, number), *rest) for g, *rest in segments)
            for segments in symmetry.axes[home]
        )
        shapes[name] = tuple(shape)
    sizes = tuple(symmetry.sizes[old] for old, _ in numbers)
    whole = Symmetry(
        sizes,
        group_names(axes, len(sizes)),
        shapes,
        dict(blocks.aliases),
        axes,
        symmetry.unpermuted,
        symmetry.fixed,
    )
    lines = []
    for old, number in numbers:
        mine = [line for line in group.lines if line.group == old]
        new = numbers[old, number]
        if holders[old] is not None:
            lines += [moved(line, blocks, holders[old], number, new) for line in mine]
            continue
        done = set()
        for line in mine:
            block = blocks.only(line.tensors)
            if block is None:
                lines.append(grown(line, blocks, new))
            elif block[0] not in done:
                done.add(block[0])
                lines += copies(mine, blocks, block[0], new)
    return Group(whole, lines, group.failed, group.permutes)


def names_of(symmetry: Symmetry, number: int) -> set[str]:
    return {
        name
        for name, axes in symmetry.axes.items()
        for segments in axes
        if any(group == number for group, *_ in segments or ())
    }


def numbered(holders: Sequence[Block | None], blocks: Blocks) -> dict[tuple[int, int], int]:
    """The new number of each group: by its old one, and the number of the block that it is in."""
    found: list[tuple[int, int]] = []
    done = set()
    for old, block in enumerate(holders):
        if block is None:
            found.append((old, -1))
        elif block[0] not in done:
            done.add(block[0])
            for number, first in enumerate(blocks.like[block[0]]):
                found += [(other, number) for other, holder in enumerate(holders) if holder == (block[0], first)]
    return {key: number for number, key in enumerate(found)}


def group_number(numbers, old: int | None, holders: Sequence[Block | None], number: int) -> int | None:
    return None if old is None else numbers[old, -1 if holders[old] is None else number]


def copies(lines: Sequence[Any], blocks: Blocks, begin: str, new: int) -> list[Any]:
    """Lines of a group that blocks share, each of which lies in one block of a list, for all of its blocks."""
    found = []
    for number, first in enumerate(blocks.like[begin]):
        mine = [line for line in lines if blocks.only(line.tensors) == (begin, first)]
        found += [moved(line, blocks, (begin, first), number, new) for line in mine]
    return found


def moved(line: Any, blocks: Blocks, block: Block, number: int, new: int) -> Any:
    """A line of one block in another block of its kind."""

    def change(value: Any) -> Any:
        if isinstance(value, Place):
            return placed(value, blocks, blocks.renamed(value.name, block, number))
        if isinstance(value, Part | Fold):
            return type(value)(*map(change, value))
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return moved(value, blocks, block, number, new) if is_dataclass(value) else value

    changed = {field.name: change(getattr(line, field.name)) for field in fields(line)}
    changed |= {"name": blocks.renamed(line.name, block, number), "group": new}
    if isinstance(changed.get("target"), str):
        changed["target"] = blocks.renamed(line.target, block, number)
    return type(line)(**changed)


def placed(place: Place, blocks: Blocks, name: str) -> Place:
    """A place in a tensor of another name, and maybe of another size along axes that do not move."""
    if name not in blocks.shapes:
        raise ValueError(f"group: {name} must be in both networks, got it in one")
    shape = blocks.shapes[name]
    if math.prod(shape) == math.prod(place.shape):
        return place._replace(name=name)
    if len(shape) != len(place.shape):
        raise ValueError(f"group: {name} must have the shape that was traced where heads are cut, got {list(shape)}")
    ends = zip(place.stop, place.shape, shape, strict=True)
    stop = tuple(new if end == size else end for end, size, new in ends)
    return place._replace(name=name, shape=shape, stop=stop)


def grown(line: Any, blocks: Blocks, new: int) -> Any:
    """A line that several blocks share, in all of them; or that the first or the last shares with what is beside it."""
    touched = {blocks.block(name) for name in line.tensors} - {None}
    if len(touched) == 1 and len(line.tensors) > 1:
        ((begin, number),) = touched
        if blocks.few[begin] > 1 and number in (0, blocks.few[begin] - 1):
            return moved(line, blocks, (begin, number), number and len(blocks.like[begin]) - 1, new)

    def change(value: Any) -> Any:
        if isinstance(value, tuple) and value and isinstance(value[0], Place | Part | Fold) and not is_named(value):
            return grow(value)
        return value

    def grow(values: tuple) -> tuple:
        found = []
        for value in values:
            block = blocks.only(tensors_of(value))
            for number in blocks.copies(block):
                if isinstance(value, Fold):
                    scales = moved(value.line, blocks, block, number, new) if block else grown(value.line, blocks, new)
                    name = blocks.renamed(value.gain.name, block, number)
                    found.append(Fold(scales, placed(value.gain, blocks, name), value.power))
                else:
                    place = value if isinstance(value, Place) else value.place
                    place = placed(place, blocks, blocks.renamed(place.name, block, number))
                    found.append(place if isinstance(value, Place) else value._replace(place=place))
        return tuple(sorted(found, key=lambda value: blocks.order[first_of(value)]))

    changed = {field.name: change(getattr(line, field.name)) for field in fields(line)}
    return replace(line, **changed | {"group": new})


def is_named(value: Any) -> bool:
    return isinstance(value, Place | Part | Fold)


def tensors_of(value: Any) -> list[str]:
    return value.line.tensors if isinstance(value, Fold) else [first_of(value)]


def first_of(value: Any) -> str:
    return value.name if isinstance(value, Place) else value.place.name if isinstance(value, Part) else value.gain.name
