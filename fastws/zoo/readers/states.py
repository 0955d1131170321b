"""One state at a time: a checkpoint file, checked against a layout, into a row of a zoo."""

import io
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.files import load_checkpoint, unwrap
from fastws.layout import Layout
from fastws.roles import infer_roles
from fastws.zoo.readers.torch_file import (
    NOT_A_TORCH_FILE,
    PICKLE,
    ZIP,
    StoredTensor,
    Unpickler,
    find_bytes,
    find_records,
)

VARIATIONAL = "log_sigma"  # how names of the variances of sparsified twins begin; no part of the network
PLANS = 1000  # kinds of files that are remembered


class BadState(ValueError):
    """A state that cannot be used; ``reason`` is one of a few words to count by."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason


class Piece(NamedTuple):
    """Bytes of a record that are bytes of a row."""

    record: str
    begin: int  # in the record
    place: int  # in the row
    size: int


class StateReader:
    """Reads checkpoint files of one architecture into rows.

    Files that torch writes are copied storage by storage: their pickle, the same for all states of a population, is
    read once, and what is left per file are its directory and its bytes. All others go through ``load_checkpoint``.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.plans: dict[bytes, list[Piece] | None] = {}

    def __call__(self, path: str, row: Tensor) -> None:
        """Fills a row ``[P]`` in the dtype of the layout.

        Raises:
            BadState: If there is no such file, it is damaged, or holds another architecture.
        """
        try:
            buffer = read_file(path) if not path.endswith((".safetensors", ".json")) else b""
            if buffer[:4] != ZIP or not self.copy_pieces(buffer, row):
                fill(row, self.layout, load_checkpoint(path))
        except FileNotFoundError as error:
            raise BadState("missing", "no such file") from error
        except BadState:
            raise
        except (OSError, *NOT_A_TORCH_FILE) as error:
            raise BadState("unreadable", (str(error).strip() or type(error).__name__).splitlines()[0]) from error

    def copy_pieces(self, buffer: bytearray, row: Tensor) -> bool:
        """Whether the file is one whose bytes only have to be copied."""
        try:
            records = find_records(buffer)
            begin, size = records[PICKLE]
            pickled = bytes(buffer[begin : begin + size])
            if pickled not in self.plans:
                if len(self.plans) >= PLANS:
                    self.plans.clear()
                self.plans[pickled] = self.plan(pickled)
            plan = self.plans[pickled]
        except BadState:
            raise
        except NOT_A_TORCH_FILE:
            return False  # torch reads more, or says what is wrong
        if plan is None:
            return False
        source, target = memoryview(buffer), memoryview(row.view(torch.uint8).numpy())
        for record, offset, place, length in plan:
            begin, size = records[record]
            if offset + length > size:
                raise BadState("unreadable", f"storage {record} is too short")
            target[place : place + length] = source[begin + offset : begin + offset + length]
        return True

    def plan(self, pickled: bytes) -> list[Piece] | None:
        """Where the bytes of a row lie in the records; None if there is more to do than to copy them."""
        stored = unwrap_stored(Unpickler(io.BytesIO(pickled)).load())
        if stored is None:
            return None
        names = match(self.layout, {name: (tensor.shape, tensor.storage.dtype) for name, tensor in stored.items()})
        pieces, place = [], 0
        for name in names:
            tensor = stored[name]
            if tensor.storage.dtype != self.layout.dtype or not tensor.is_contiguous:
                return None
            whole = {tensor.storage.key: (0, 2**63)}  # how long the storage is, each file says
            begin, length = find_bytes(tensor, whole, "checkpoint")
            pieces.append(Piece(f"data/{tensor.storage.key}", begin, place, length))
            place += length
        return pieces


def read_file(path: str) -> bytearray:
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(os.fstat(file.fileno()).st_size)
        if file.readinto(buffer) != len(buffer):
            raise BadState("unreadable", "its end is missing")
    return buffer


def unwrap_stored(content: object) -> dict[str, StoredTensor] | None:
    """The state dict in what a training script saved; None if it holds anything but tensors."""
    stored: dict[int, StoredTensor] = {}

    def stand_in(value):
        if isinstance(value, StoredTensor):
            tensor = torch.empty(0, dtype=value.storage.dtype)
            stored[id(tensor)] = value
            return tensor
        return {key: stand_in(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    state = unwrap(stand_in(content), "checkpoint")
    if not all(id(tensor) in stored for tensor in state.values()):
        return None
    return {name: stored[id(tensor)] for name, tensor in state.items()}


def is_weight(name: str) -> bool:
    return not name.rpartition(".")[2].startswith(VARIATIONAL)


def match(layout: Layout, described: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
    """Names of the tensors that make up a row of ``layout``, in its order.

    Tensors with the names of the layout are taken by name. Else they are taken in their own order, if shapes and roles
    are the same: dropout layers shift the numbers that modules are named by.

    Raises:
        BadState: If a tensor is missing, or the architecture is another one.
    """
    shapes = {name: tuple(shape) for name, (shape, dtype) in described.items() if dtype.is_floating_point}
    shapes = {name: shape for name, shape in shapes.items() if is_weight(name) and name not in layout.aliases}
    entries = [entry for entry in layout.entries if entry.offset >= 0]
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


def make_layout(state: Mapping[str, Tensor]) -> Layout:
    """The layout of a population from one of its checkpoints."""
    return Layout.from_checkpoint({name: tensor for name, tensor in state.items() if is_weight(name)})
