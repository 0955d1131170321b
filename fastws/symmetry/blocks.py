"""The symmetry of a deep network of equal blocks, from that of the same network with two of them."""

import re
from collections.abc import Mapping

from fastws.symmetry.segments import Segments, group_names
from fastws.symmetry.symmetry import Symmetry

NUMBER = re.compile(r"\.(\d+)\.")


def find_blocks(names: Mapping[str, object], count: int) -> str:
    """What names of blocks begin with, ``"model.layers"`` of ``model.layers.0.mlp.weight``, where there are ``count``.

    Raises:
        ValueError: If not one beginning has numbers from 0 to ``count - 1`` behind it.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        for match in NUMBER.finditer(name):
            found.setdefault(name[: match.start()], set()).add(int(match[1]))
    fitting = [prefix for prefix, numbers in found.items() if numbers == set(range(count))]
    if len(fitting) != 1:
        raise ValueError(f"symmetry: names must count {count} blocks in one place, got {len(fitting)} such places")
    return fitting[0]


def extend(symmetry: Symmetry, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Symmetry:
    """The symmetry of a network with more blocks, each of which is like the second of two.

    Units that only the second block knows are units of their own in each block behind it; those that both know, as
    those of a residual stream, or that are known outside of the blocks, are the same units everywhere. That a network
    is made so is taken for granted here; see ``is_extended``.

    Args:
        symmetry: Of the network with two blocks.
        shapes: Of all tensors of the deep network.
        prefix: What the names of its blocks begin with; see ``find_blocks``.

    Raises:
        ValueError: If a tensor is not in the block that it is like, or has another shape there.
    """
    places: dict[int, set[int | None]] = {}  # of each group the blocks that know it
    for name, axes in symmetry.axes.items():
        for group in groups_of(axes):
            places.setdefault(group, set()).add(block_of(name, prefix))
    repeated = {group for group, known in places.items() if known == {1}}
    numbers = {(group, None): group for group in range(len(symmetry.sizes))}
    sizes, axes = list(symmetry.sizes), {}

    def number(group: int | None, block: int | None) -> int | None:
        if group not in repeated or block in (None, 0, 1):
            return group
        if (group, block) not in numbers:
            numbers[group, block] = len(sizes)
            sizes.append(symmetry.sizes[group])
        return numbers[group, block]

    tied = {name: symmetry.shapes[name] for name in symmetry.aliases if block_of(name, prefix) is None}
    shapes = dict(shapes) | tied
    for name, shape in shapes.items():
        block = block_of(name, prefix)
        like = name if block in (None, 0) else f"{prefix}.1.{name[len(prefix) + 1 :].partition('.')[2]}"
        if symmetry.shapes.get(like) != shape:
            got = f"no {like}" if like not in symmetry.shapes else f"{like} {list(symmetry.shapes[like])}"
            raise ValueError(f"symmetry: {name} {list(shape)} must be like a tensor of two blocks, got {got}")
        axes[name] = tuple(
            part and tuple((number(segment[0], block), *segment[1:]) for segment in part)
            for part in symmetry.axes[like]
        )
    aliases = {name: kept for name, kept in symmetry.aliases.items() if name in tied and kept in axes}
    return Symmetry(tuple(sizes), group_names(axes, len(sizes)), shapes, aliases, axes, symmetry.unpermuted)


def is_extended(deep: Symmetry, two: Symmetry, prefix: str) -> bool:
    """Whether a symmetry that was traced is the one that ``extend`` makes of that with two blocks."""
    own = {name: shape for name, shape in deep.shapes.items() if name not in deep.aliases}
    extended = extend(two, own, prefix)
    return extended.shapes == deep.shapes and plain(extended) == plain(deep)


def plain(symmetry: Symmetry) -> dict[str, tuple]:
    """Axes with groups counted in the order in which names come upon them, and their sizes."""
    seen: dict[int, int] = {}

    def again(part: Segments | None):
        return part and tuple(
            (None if segment[0] is None else (seen.setdefault(segment[0], len(seen)), symmetry.sizes[segment[0]]),)
            + tuple(segment[1:])
            for segment in part
        )

    return {name: tuple(map(again, symmetry.axes[name])) for name in sorted(symmetry.axes)}


def groups_of(axes: tuple[Segments | None, ...]) -> set[int]:
    return {segment[0] for part in axes for segment in part or () if segment[0] is not None}


def block_of(name: str, prefix: str) -> int | None:
    """The block that a tensor is of; None outside of blocks."""
    if not name.startswith(f"{prefix}."):
        return None
    first = name[len(prefix) + 1 :].partition(".")[0]
    return int(first) if first.isdecimal() else None
