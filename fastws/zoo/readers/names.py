"""Which tensor of a checkpoint is which of an architecture: by names, never by the order of a file.

A safetensors file is sorted by name and a module is not, so tensors of one shape would change places if they were taken
as they come.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.files.state_dict import is_quantised, name_few
from fastws.layout.entries import Entry, flat_dtype
from fastws.layout.layout import Layout
from fastws.layout.roles import storage_key
from fastws.terminal import shorten
from fastws.zoo.readers.reasons import BadState

MAX_DOTS = 500_000  # in names that are compared part by part, which takes memory
VARIANCE = "log_sigma"  # how names of the variances of sparsified twins begin; no part of the network
Keys = dict[str, str]  # what names are compared by: the name that it stands for


class Held(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: object  # equal for tensors that are one


class Expected(NamedTuple):
    """The architecture of a zoo, and the file that set it."""

    layout: Layout
    source: str


class Matched(NamedTuple):
    """The tensors of a row, in order, and what else is to be done with a checkpoint."""

    names: list[str]
    ties: list[tuple[str, str]]  # pairs of tensors of which one is kept, so that they must be equal
    notes: list[str]  # what is left out of the row


def describe(state: Mapping[str, Tensor]) -> dict[str, Held]:
    return {name: Held(tuple(x.shape), x.dtype, storage_key(name, x)) for name, x in state.items()}


def match(expected: Expected, held: Mapping[str, Held]) -> Matched:
    """Finds the tensors of a row.

    They are those of the same names; else of names that are the same without the prefix that all of a file share; else
    of names that are the same when the numbers of modules are counted anew: dropout layers shift them.

    Raises:
        BadState: If a tensor is missing, has numbers that the layout cannot hold, or the architecture is another one.
    """
    layout, source = expected
    numbers = {name: x for name, x in held.items() if x.dtype.is_floating_point or x.dtype.is_complex}
    variances = find_variances({name: tensor.shape for name, tensor in numbers.items()})
    theirs = {name: tensor for name, tensor in numbers.items() if name not in variances}
    entries = {entry.name: entry for entry in layout.entries if entry.offset >= 0}
    found = find_names(entries, layout.aliases, theirs)
    if found is None:
        raise explain(entries, layout.aliases, theirs, source)
    names, ties = [], []
    for entry in entries.values():
        first, *others = found[entry.name]
        check_dtype(quoted(first), theirs[first].dtype, entry.dtype, source)
        names.append(first)
        ties += [(other, first) for other in others if theirs[other].place != theirs[first].place]
    notes = [f"{len(variances)} tensors named {VARIANCE}* beside a weight of their shape"] if variances else []
    quantised = [name for name, tensor in held.items() if is_quantised(name, tensor.dtype, len(tensor.shape))]
    if quantised:
        count = sum(math.prod(held[name].shape) for name in quantised)
        notes.append(f"{count:,} quantised numbers in {name_few(quantised)}")
    return Matched(names, ties, notes)


def find_variances(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of variances: those beside a weight of their shape, and those of biases beside such."""
    found = set()
    for name, shape in shapes.items():
        head, dot, last = name.rpartition(".")
        if last.startswith(VARIANCE) and shapes.get(f"{head}{dot}weight") == shape:
            found.add(name)
    return found | {name for name in shapes if name.endswith("_bias") and name.removesuffix("_bias") in found}


# --- names


def find_names(
    entries: Mapping[str, Entry], aliases: Mapping[str, str], theirs: Mapping[str, Held]
) -> dict[str, list[str]] | None:
    """The tensors that stand for each entry, several if they are tied; None if names do not say it."""
    distinct = {tensor.place: name for name, tensor in reversed(theirs.items())}  # first names of tied tensors
    for keys in (same, without_prefix, counted):
        for ours in ([*entries, *aliases], [*entries]):
            for names in ([*theirs], [name for name in theirs if distinct[theirs[name].place] == name]):
                found = pair(keys(ours), keys(names), entries, aliases, theirs)
                if found is not None:
                    return found
    return None


def pair(
    ours: Keys, names: Keys, entries: Mapping[str, Entry], aliases: Mapping[str, str], theirs: Mapping[str, Held]
) -> dict[str, list[str]] | None:
    found: dict[str, list[str]] = {}
    for key, name in names.items():
        our = ours.get(key)
        if our is not None:
            found.setdefault(aliases.get(our, our), []).append(name)
    if found.keys() != entries.keys():
        return None
    if any(theirs[name].shape != entries[entry].shape for entry, group in found.items() for name in group):
        return None
    # what has no place in the layout must be a second name of something that has
    places = {theirs[name].place for group in found.values() for name in group}
    return found if all(tensor.place in places for tensor in theirs.values()) else None


def same(names: Iterable[str]) -> Keys:
    return {name: name for name in names}


def without_prefix(names: Iterable[str]) -> Keys:
    """Names without the modules that all are in."""
    names = [*names]
    if sum(name.count(".") for name in names) > MAX_DOTS:
        return same(names)
    split = [name.split(".") for name in names]
    shared = len(os.path.commonprefix([parts[:-1] for parts in split]))
    return {".".join(parts[shared:]): name for parts, name in zip(split, names, strict=True)}


def counted(names: Iterable[str]) -> Keys:
    """Names with the ranks of numbers among those that stand in one place, without the modules that all are in."""
    split = {name: key.split(".") for key, name in without_prefix(names).items()}
    if sum(map(len, split.values())) > MAX_DOTS:
        return same(split)
    places: dict[tuple[int, str], int] = {}  # the number of a place is that of the one around it and a part
    numbers: dict[int, set[int]] = {}
    for parts in split.values():
        place = 0
        for part in parts:
            if is_number(part):
                numbers.setdefault(place, set()).add(int(part))
            place = places.setdefault((place, part), len(places) + 1)
    ranks = {place: {number: rank for rank, number in enumerate(sorted(found))} for place, found in numbers.items()}

    def ranked(parts: Iterable[str]) -> Iterator[str]:
        place = 0
        for part in parts:
            yield str(ranks[place][int(part)]) if is_number(part) else part
            place = places[place, part]

    return {".".join(ranked(parts)): name for name, parts in split.items()}


def is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10


# --- what is wrong


def explain(
    entries: Mapping[str, Entry], aliases: Mapping[str, str], theirs: Mapping[str, Held], source: str
) -> BadState:
    """Why the tensors of a file are not those of the layout: the first that differs, and the file that says so."""
    ours, names = nearest(entries, aliases, theirs)
    for key, name in names.items():
        our = ours.get(key)
        if our is not None and theirs[name].shape != entries[aliases.get(our, our)].shape:
            expected, got = (list(x.shape) for x in (entries[aliases.get(our, our)], theirs[name]))
            return BadState("other architecture", f"{quoted(name)} must be {expected} as in {source}, got {got}")
    extra = next((name for key, name in names.items() if key not in ours), None)
    missing = next((name for key, name in ours.items() if key not in names and name in entries), None)
    if missing is None and extra is None:
        return BadState("other names", f"names must be those in {source}, got some that are the same without numbers")
    if extra is None:
        shape = list(entries[missing].shape)
        return BadState("tensors missing", f"{quoted(missing)} must be {shape} as in {source}, got nothing")
    if missing is None:
        got = list(theirs[extra].shape)
        return BadState("other architecture", f"{quoted(extra)} must not be there, as in {source}, got {got}")
    if sorted(tensor.shape for tensor in theirs.values()) == sorted(entry.shape for entry in entries.values()):
        what = f"{quoted(extra)} must have the name that it has in {source}, perhaps {quoted(missing)}"
        return BadState("other names", what)
    return BadState("other architecture", f"{quoted(missing)} must be there as in {source}, got {quoted(extra)}")


def quoted(name: str) -> str:
    return repr(shorten(name))


def nearest(entries: Mapping[str, Entry], aliases: Mapping[str, str], theirs: Mapping[str, Held]) -> tuple[Keys, Keys]:
    """Both sets of names, compared in the way in which most are the same."""
    ways: list[Callable[[Iterable[str]], Keys]] = [same, without_prefix, counted]
    tried = [(keys([*entries, *aliases]), keys(theirs)) for keys in ways]
    return max(tried, key=lambda two: len(two[0].keys() & two[1].keys()))


def check_dtype(what: str, dtype: torch.dtype, held: torch.dtype, source: str) -> None:
    """Raises BadState unless ``held`` holds all numbers of ``dtype``: a cast that may change one is not made."""
    if dtype.is_complex:
        raise BadState("other architecture", f"{what} must be of real numbers as in {source}, got {dtype}")
    if dtype != held and flat_dtype((dtype, held)) != held:
        fix = "; say --like <a checkpoint of wider dtypes>"
        raise BadState("other dtype", f"{what} must be {held} or narrower as in {source}, got {dtype}{fix}")
