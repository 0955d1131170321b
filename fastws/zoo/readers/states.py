"""One state at a time: a checkpoint file, checked against a layout, into a row of a zoo."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from fastws.files.checkpoints import find_checkpoint, is_safetensors, open_checkpoint
from fastws.files.limits import open_regular
from fastws.files.state_dict import find_state
from fastws.files.torch_file import NOT_A_TORCH_FILE, find_bytes
from fastws.files.torch_records import PICKLE, ZIP, Place, find_records, is_whole, read_record
from fastws.files.unpickle import Unpickler
from fastws.layout.layout import Layout
from fastws.zoo.readers.names import Expected, Held, describe, find_variances, match, quoted
from fastws.zoo.readers.reasons import BadState

# a checkpoint of the architecture, or what is known of it without one
Like = str | os.PathLike | Layout | Expected
FORMS = 1000  # that are remembered


class Form(NamedTuple):
    """Files of one size in which everything lies alike, so that only bytes have to be copied."""

    structure: numpy.ndarray  # places of the bytes that say what lies where
    expected: numpy.ndarray  # those bytes
    copies: list[tuple[slice, slice]]  # bytes of a row, bytes of a file
    sums: list[tuple[int, int, int]]  # first byte and size of each storage, and where its checksum stands
    notes: list[str]  # what is in no row


class StateReader:
    """Reads checkpoint files of one architecture into rows.

    What torch writes for the states of a population differs in the weights alone. So the directory and the pickle of
    such a file are compared with those of one that is understood, and the rest is to copy its storages. Files of other
    forms go through ``load_checkpoint``.
    """

    def __init__(self, expected: Expected, key: str | None = None):
        self.expected, self.key = expected, key
        self.forms: dict[int, Form | None] = {}  # by size of the file

    def __call__(self, path: str, row: Tensor) -> list[str]:
        """Fills a row ``[P]`` in the dtype of the layout, and says what of the file is not in it.

        Raises:
            BadState: If there is no such file, it is damaged, or holds another architecture.
        """
        try:
            buffer = read_file(path) if not path.endswith((".safetensors", ".json")) else b""
            form = self.copy(buffer, row) if buffer[:4] == ZIP else None
            if form:
                return form.notes
            state = open_checkpoint(path, key_in(path, self.key))
            return fill(row, self.expected, state.tensors) + state.told()
        except FileNotFoundError as error:
            raise BadState("missing", "no such file") from error
        except BadState:
            raise
        except (OSError, *NOT_A_TORCH_FILE) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadState("unreadable", first.removeprefix(f"{path}: ")) from error

    def copy(self, buffer: bytearray, row: Tensor) -> Form | None:
        """Fills a row if the bytes of the file only have to be copied."""
        content = numpy.frombuffer(buffer, numpy.uint8)
        form = self.forms.get(len(buffer))
        if form is None or not numpy.array_equal(content[form.structure], form.expected):
            form = self.find_form(buffer)
            if form is None:
                return None
            if len(self.forms) < FORMS:
                self.forms[len(buffer)] = form
        for begin, size, noted in form.sums:
            if not is_whole(buffer, Place(begin, size, int.from_bytes(buffer[noted : noted + 4], "little"))):
                raise BadState("unreadable", "the checksum of a storage is another; copy it again")
        target = row.view(torch.uint8).numpy()
        for here, there in form.copies:
            target[here] = content[there]
        return form

    def find_form(self, buffer: bytearray) -> Form | None:
        """None if there is more to do than to copy, or the file is damaged."""
        try:
            records, structure = find_records(buffer)
            content = Unpickler(read_record(buffer, records[PICKLE]), size=len(buffer)).load()
            state = find_state(content, "checkpoint", self.key)
            stored = state.tensors
            if not structure:
                return None
            held = {name: Held(tensor.shape, tensor.storage.dtype, tensor) for name, tensor in stored.items()}
            matched = match(self.expected, held)
            if matched.ties:  # which are compared, number by number
                return None
            places = {name.removeprefix("data/"): place for name, place in records.items()}
            # three places of each record say where it lies; its checksum stands behind the first
            noted = {name: structure[1 + 3 * number].stop for number, name in enumerate(records)}
            copies, sums, place = [], {}, 0
            for tensor in map(stored.get, matched.names):
                if tensor.storage.dtype != self.expected.layout.dtype or not tensor.is_contiguous:
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
        index, notes = numpy.concatenate([numpy.arange(part.start, part.stop) for part in structure]), state.told()
        expected = numpy.frombuffer(buffer, numpy.uint8)[index]
        return Form(index, expected, copies, list(sums.values()), matched.notes + notes)


def read_file(path: str) -> bytearray:
    with open_regular(path) as file:
        buffer = bytearray(os.fstat(file.fileno()).st_size)
        if file.readinto(buffer) != len(buffer):
            raise BadState("unreadable", "its end is missing")
    return buffer


def fill(row: Tensor, expected: Expected, state: Mapping[str, Tensor]) -> list[str]:
    """Copies the tensors of a checkpoint into a row ``[P]``, and says what of it is not in the row."""
    matched, place = match(expected, describe(state)), 0
    for one, other in matched.ties:
        if not torch.equal(state[one], state[other]):
            fix = "say --like <a checkpoint in which they are two>"
            what = f"{quoted(one)} must be equal to {quoted(other)} as in {expected.source}, got other numbers; {fix}"
            raise BadState("ties differ", what)
    for name in matched.names:
        tensor = state[name]
        row[place : place + tensor.numel()] = tensor.reshape(-1)
        place += tensor.numel()
    return matched.notes


def read_expected(like: Like, key: str | None = None) -> Expected:
    """The layout of a population from the file of one of its checkpoints, in which the network is under ``key``."""
    if isinstance(like, Expected):
        return like
    if isinstance(like, Layout):
        return Expected(like, "the layout that is given")
    state = open_checkpoint(like, key_in(like, key)).tensors
    try:
        return Expected(make_layout(state), str(like))
    except ValueError as error:
        raise ValueError(f"{like}: {error}") from error


def key_in(path: str | os.PathLike, key: str | None) -> str | None:
    """The key of a torch file; files without keys may lie beside such."""
    return None if is_safetensors(find_checkpoint(path)) else key


def make_layout(state: Mapping[str, Tensor]) -> Layout:
    """The layout of a population from one of its checkpoints."""
    variances = find_variances({name: tuple(tensor.shape) for name, tensor in state.items()})
    return Layout.from_checkpoint({name: tensor for name, tensor in state.items() if name not in variances})
