"""Symmetries in the words of other libraries: axes_to_perm of Git Re-Basin, perm_spec of universal neural functionals.

Both name a permutation for each axis of each tensor. What they cannot say (heads, groups of channels, concatenations,
axes on which a unit has several entries) leaves a group out: all of its axes stay, and a note says so. Signs are left
out too.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from fastws.layout.roles import bias_name
from fastws.symmetry.segments import Segments, group_names
from fastws.symmetry.symmetry import Symmetry

Places = Mapping[str, tuple[object, ...]]  # tensor: for each axis a permutation, None for those that stay
SIGNS = "signs of units are left out"


class Exported(NamedTuple):
    """A symmetry in the words of another library."""

    spec: dict[str, Any]
    notes: list[str]  # sentences about what it does not say


def to_axes_to_perm(symmetry: Symmetry, *, flattened: bool = False) -> Exported:
    """The ``axes_to_perm`` of Git Re-Basin (arXiv 2209.04836, ``samuela/git-re-basin`` and its ports).

    Args:
        symmetry: Any.
        flattened: Also names permutations of axes on which each unit has several entries, one behind the other, as a
            dense layer behind a flattened map has. The published code raises at them.

    Returns:
        Tensor to a tuple with a name or None for each axis; ``new = old.index_select(axis, perm[name])``. Tied tensors
        have all their names. Axes are those of PyTorch; kernels of JAX have theirs in another order.
    """
    left, notes = unsaid(symmetry, flattened)
    names: dict[int, str] = {}
    for group, name in enumerate(symmetry.names):
        plain = f"P_{name.removesuffix('.weight')}"
        names[group] = f"{plain}_{group}" if plain in names.values() else plain
    spec = {
        tensor: tuple(names.get(group) if group not in left else None for group in map(group_of, axes))
        for tensor, axes in symmetry.axes.items()
    }
    return Exported(spec, notes)


def from_axes_to_perm(spec: Mapping[str, Sequence[str | None]], shapes: Mapping[str, Sequence[int]]) -> Symmetry:
    """The symmetry of an ``axes_to_perm``; what it claims is not checked here, but by ``symmetry.verify``.

    Args:
        spec: Tensor to a name or None for each axis.
        shapes: Of all floating tensors; those that ``spec`` does not name stay. Of a name that lies on axes of several
            sizes the smallest is that of the group, and larger ones are multiples of it, flattened.

    Raises:
        ValueError: If a tensor is not there, has another number of axes, or sizes do not fit.
    """
    return symmetry_of(spec, shapes)


def to_perm_spec(symmetry: Symmetry) -> Exported:
    """The ``perm_spec`` of universal neural functionals (arXiv 2402.05232).

    It numbers every axis and knows none that stay: those get numbers of their own, so that a network over such a
    specification is equivariant to more than the symmetry. Values of tensors have an axis of channels behind these.

    Returns:
        The nesting of the parameters, by the dots of their names, with a tuple of integers for each tensor.
    """
    left, notes = unsaid(symmetry, False)
    numbers = count(len(symmetry.sizes))
    rows = {}  # of weights the number of their rows, which their biases share
    spec: dict[str, Any] = {}
    fixed = 0
    for tensor, axes in symmetry.axes.items():
        found = []
        for axis, segments in enumerate(axes):
            group = group_of(segments)
            if group is not None and group not in left:
                found.append(group)
                continue
            fixed += 1
            found.append(rows.get(tensor) if axis == 0 and tensor in rows else next(numbers))
        if len(found) > 1:
            rows[bias_name(tensor)] = found[0]
        *folders, last = tensor.split(".")
        place = spec
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = tuple(found)
    notes += [f"{fixed} axes that stay (inputs, outputs, kernels) have numbers of their own"] if fixed else []
    return Exported(spec, notes)


def from_perm_spec(
    spec: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], fixed: Collection[int] = ()
) -> Symmetry:
    """The symmetry of a ``perm_spec``.

    Args:
        spec: Nested by names, with a tuple of integers for each tensor.
        shapes: Of all floating tensors, by names with dots.
        fixed: Numbers of axes that stay, which the specification itself does not tell: inputs, outputs, kernels.

    Raises:
        ValueError: As ``from_axes_to_perm`` does.
    """
    flat = dict(flattened_names(spec))
    return symmetry_of({n: [None if x in fixed else x for x in axes] for n, axes in flat.items()}, shapes)


# --- both


def group_of(segments: Segments | None) -> int | None:
    """The group of an axis; of one that is made of several parts that of the first."""
    return next((group for group, *_ in segments or () if group is not None), None)


def unsaid(symmetry: Symmetry, flattened: bool) -> tuple[set[int], list[str]]:
    """Groups that cannot be said, and why; a group that shares an axis with one of them cannot be said either."""
    left: dict[int, str] = {}
    for tensor, axes in symmetry.axes.items():
        for axis, segments in enumerate(axes):
            groups = {group for group, *_ in segments or ()} - {None}
            whole = len(segments or ()) == 1 and segments[0][1] == symmetry.sizes[group_of(segments)]
            if not groups or (whole and (segments[0][2] == 1 or flattened)):
                continue
            why = "has several entries for each unit" if whole else "is made of several parts"
            left |= {group: f"{tensor} axis {axis} {why}" for group in groups - left.keys()}
    notes = [f"group {symmetry.names[group]} stays, for {why}" for group, why in sorted(left.items())]
    return set(left), notes + ([SIGNS] if any(symmetry.flips) else [])


def symmetry_of(places: Places, shapes: Mapping[str, Sequence[int]]) -> Symmetry:
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    sizes: dict[object, int] = {}
    for name, axes in places.items():
        if name not in shapes or len(shapes[name]) != len(axes):
            got = list(shapes[name]) if name in shapes else "no such tensor"
            raise ValueError(
                f"symmetry: tensor {name!r} must have the {len(axes)} axes of the specification, got {got}"
            )
        for key, size in zip(axes, shapes[name], strict=True):
            if key is not None:
                sizes[key] = min(size, sizes.get(key, size))
    numbers = {key: number for number, key in enumerate(sizes)}
    axes = {name: tuple(None for _ in shape) for name, shape in shapes.items()}
    for name, keys in places.items():
        found = []
        for axis, (key, length) in enumerate(zip(keys, shapes[name], strict=True)):
            if key is not None and length % sizes[key]:
                must = f"a multiple of {sizes[key]}, the size of {key!r}"
                raise ValueError(f"symmetry: axis {axis} of {name!r} must be {must}, got {length}")
            segment = None if key is None else (numbers[key], sizes[key], length // sizes[key], False)
            found.append(segment and (segment,))
        axes[name] = tuple(found)
    check_axes(axes)
    return Symmetry(tuple(sizes.values()), group_names(axes, len(sizes)), shapes, {}, axes, [])


def check_axes(axes: Mapping[str, tuple[Segments | None, ...]]) -> None:
    """Raises ValueError if a tensor moves along two axes behind the first, which tables cannot say."""
    for name, found in axes.items():
        if sum(segments is not None for segments in found[1:]) > 1:
            raise ValueError(f"symmetry: {name!r} must move along one axis behind the first, got several")


def flattened_names(spec: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, tuple[int, ...]]]:
    for name, value in spec.items():
        if isinstance(value, Mapping):
            yield from flattened_names(value, f"{above}{name}.")
        elif isinstance(value, list | tuple) and all(type(number) is int for number in value):
            yield f"{above}{name}", tuple(value)
        else:
            raise ValueError(f"symmetry: {above}{name} must have a tuple of whole numbers, got {value!r}")
