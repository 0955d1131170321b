"""One state at a time: a checkpoint file, checked against a layout, into a row of a zoo."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from fastws.files.checkpoints import load_checkpoint, unwrap
from fastws.files.limits import open_regular
from fastws.files.torch_file import (
    NOT_A_TORCH_FILE,
    PICKLE,
    ZIP,
    Place,
    find_bytes,
    find_records,
    is_whole,
    read_record,
    replace_tensors,
)
from fastws.files.unpickle import Unpickler
from fastws.files.values import StoredTensor
from fastws.layout.entries import Entry, flat_dtype
from fastws.layout.layout import Layout
from fastws.layout.roles import infer_roles

VARIATIONAL = "log_sigma"  # how names of the variances of sparsified twins begin; no part of the network
Like = str | os.PathLike | Layout  # a checkpoint of the architecture, or what is known of it without one
FORMS = 1000  # that are remembered


class BadState(ValueError):
    """A state that cannot be used; ``reason`` is one of a few words to count by."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason


class Form(NamedTuple):
    """Files of one size in which everything lies alike, so that only bytes have to be copied."""

    structure: numpy.ndarray  # places of the bytes that say what lies where
    expected: numpy.ndarray  # those bytes
    copies: list[tuple[slice, slice]]  # bytes of a row, bytes of a file
    sums: list[tuple[int, int, int]]  # first byte and size of each storage, and where its checksum stands


class StateReader:
    """Reads checkpoint files of one architecture into rows.

    What torch writes for the states of a population differs in the weights alone. So the directory and the pickle of
    such a file are compared with those of one that is understood, and the rest is to copy its storages. Files of other
    forms go through ``load_checkpoint``.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.forms: dict[int, Form | None] = {}  # by size of the file

    def __call__(self, path: str, row: Tensor) -> None:
        """Fills a row ``[P]`` in the dtype of the layout.

        Raises:
            BadState: If there is no such file, it is damaged, or holds another architecture.
        """
        try:
            buffer = read_file(path) if not path.endswith((".safetensors", ".json")) else b""
            if buffer[:4] != ZIP or not self.copy(buffer, row):
                fill(row, self.layout, load_checkpoint(path))
        except FileNotFoundError as error:
            raise BadState("missing", "no such file") from error
        except BadState:
            raise
        except (OSError, *NOT_A_TORCH_FILE) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadState("unreadable", first.removeprefix(f"{path}: ")) from error

    def copy(self, buffer: bytearray, row: Tensor) -> bool:
        """Whether the file is one whose bytes only have to be copied."""
        content = numpy.frombuffer(buffer, numpy.uint8)
        form = self.forms.get(len(buffer))
        if form is None or not numpy.array_equal(content[form.structure], form.expected):
            form = self.find_form(buffer)
            if form is None:
                return False
            if len(self.forms) < FORMS:
                self.forms[len(buffer)] = form
        for begin, size, noted in form.sums:
            if not is_whole(buffer, Place(begin, size, int.from_bytes(buffer[noted : noted + 4], "little"))):
                raise BadState("unreadable", "the checksum of a storage is another; copy it again")
        target = row.view(torch.uint8).numpy()
        for here, there in form.copies:
            target[here] = content[there]
        return True

    def find_form(self, buffer: bytearray) -> Form | None:
        """None if there is more to do than to copy, or the file is damaged."""
        try:
            records, structure = find_records(buffer)
            stored = unwrap_stored(Unpickler(read_record(buffer, records[PICKLE]), size=len(buffer)).load())
            if stored is None or not structure:
                return None
            names = match(self.layout, {name: (tensor.shape, tensor.storage.dtype) for name, tensor in stored.items()})
            places = {name.removeprefix("data/"): place for name, place in records.items()}
            # three places of each record say where it lies; its checksum stands behind the first
            noted = {name: structure[1 + 3 * number].stop for number, name in enumerate(records)}
            copies, sums, place = [], {}, 0
            for tensor in map(stored.get, names):
                if tensor.storage.dtype != self.layout.dtype or not tensor.is_contiguous:
                    return None
                begin, size = find_bytes(tensor, places, "checkpoint")
                copies.append((slice(place, place + size), slice(begin, begin + size)))
                place += size
                key = tensor.storage.key
                sums[key] = (*places[key][:2], noted[f"data/{key}"])
        except BadState:
            raise
        except NOT_A_TORCH_FILE:
            return None  # torch reads more, or says what is wrong
        index = numpy.concatenate([numpy.arange(part.start, part.stop) for part in structure])
        return Form(index, numpy.frombuffer(buffer, numpy.uint8)[index], copies, list(sums.values()))


def read_file(path: str) -> bytearray:
    with open_regular(path) as file:
        buffer = bytearray(os.fstat(file.fileno()).st_size)
        if file.readinto(buffer) != len(buffer):
            raise BadState("unreadable", "its end is missing")
    return buffer


def unwrap_stored(content: object) -> dict[str, StoredTensor] | None:
    """The state dict in what a training script saved; None if it holds anything but tensors."""
    stored: dict[int, StoredTensor] = {}

    def stand_in(value: StoredTensor) -> Tensor:
        tensor = torch.empty(0, dtype=value.storage.dtype)
        stored[id(tensor)] = value
        return tensor

    state = unwrap(replace_tensors(content, stand_in, "checkpoint"), "checkpoint")
    if not all(id(tensor) in stored for tensor in state.values()):
        return None
    return {name: stored[id(tensor)] for name, tensor in state.items()}


def is_weight(name: str) -> bool:
    return not name.rpartition(".")[2].startswith(VARIATIONAL)


def match(layout: Layout, described: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
    """Names of the tensors that make up a row of ``layout``, in its order.

    Raises:
        BadState: If a tensor is missing, has numbers that the layout cannot hold, or the architecture is another one.
    """
    names = match_names(layout, described)
    for name, entry in zip(names, flat_entries(layout), strict=True):
        check_dtype(repr(name), described[name][1], entry.dtype)
    return names


def check_dtype(what: str, dtype: torch.dtype, held: torch.dtype) -> None:
    """Raises BadState unless ``held`` holds all numbers of ``dtype``: a cast that may change one is not made."""
    if dtype != held and flat_dtype((dtype, held)) != held:
        raise BadState("other dtype", f"{what} is {dtype}, the zoo {held}; say like=<a checkpoint of wider dtypes>")


def flat_entries(layout: Layout) -> list[Entry]:
    return [entry for entry in layout.entries if entry.offset >= 0]


def match_names(layout: Layout, described: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
    """The names by shapes and roles.

    Tensors with the names of the layout are taken by name. Else they are taken in their own order, if shapes and roles
    are the same: dropout layers shift the numbers that modules are named by.

    Raises:
        BadState: If a tensor is missing, or the architecture is another one.
    """
    shapes = {name: tuple(shape) for name, (shape, dtype) in described.items() if dtype.is_floating_point}
    shapes = {name: shape for name, shape in shapes.items() if is_weight(name) and name not in layout.aliases}
    entries = flat_entries(layout)
    expected = {entry.name: entry.shape for entry in entries}
    if shapes == expected:
        return list(expected)
    roles = infer_roles({name: tuple(shape) for name, (shape, _) in described.items()})
    ours = [(entry.shape, entry.role) for entry in entries]
    if [(shape, roles[name]) for name, shape in shapes.items()] == ours:
        return list(shapes)
    if shapes.items() < expected.items():
        missing = next(name for name in expected if name not in shapes)
        raise BadState("tensors missing", f"{missing!r} {list(expected[missing])}")
    theirs = next((item for item in shapes.items() if expected.get(item[0]) != item[1]), None)
    what = f"{theirs[0]!r} {list(theirs[1])}" if theirs else f"{len(shapes)} tensors"
    raise BadState("other architecture", f"it has {what}")


def fill(row: Tensor, layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Copies the tensors of a checkpoint into a row ``[P]``."""
    place = 0
    for name in match(layout, {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}):
        tensor = state[name]
        row[place : place + tensor.numel()] = tensor.reshape(-1)
        place += tensor.numel()


def read_layout(like: Like) -> Layout:
    """The layout of a population from the file of one of its checkpoints."""
    if isinstance(like, Layout):
        return like
    state = load_checkpoint(like)
    try:
        return make_layout(state)
    except ValueError as error:
        raise ValueError(f"{like}: {error}") from error


def make_layout(state: Mapping[str, Tensor]) -> Layout:
    """The layout of a population from one of its checkpoints."""
    return Layout.from_checkpoint({name: tensor for name, tensor in state.items() if is_weight(name)})
