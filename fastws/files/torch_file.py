"""Torch files without ``torch.load``: a restricted unpickler, and tensors that are read when they are wanted.

Published data sets are pickled objects of classes that the reader does not have, and raw zoos are tens of thousands of
small files, for which ``torch.load`` takes longer than the disk. Both need the same: the pickle that says which tensor
lies where, read by an unpickler that makes plain containers only, and the place of each storage in the file.
"""

import math
import mmap
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastws.files.kinds import find_kind
from fastws.files.limits import DAMAGED, open_regular, room
from fastws.files.torch_records import PICKLE, ZIP, Place, find_records, is_whole, read_legacy, read_record
from fastws.files.unpickle import Unpickler
from fastws.files.values import Refused, StoredTensor
from fastws.terminal import shorten

DEEPEST = 200  # containers in containers
NOT_A_TORCH_FILE = (*DAMAGED, zipfile.BadZipFile)


class TorchFile:
    """An open torch file: ``content`` as plain containers with ``StoredTensor`` for tensors, which ``tensor`` reads.

    Objects of the published data set classes are a ``Record`` each: a dictionary of their attributes.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens a file and reads its pickle, no tensors.

        Raises:
            FileNotFoundError: If there is no such file.
            OSError: If it is no regular file.
            ValueError: If it is not a torch file, is damaged, or wants anything to be imported or called.
        """
        self.path = Path(path)
        if self.path.is_dir() or not self.path.exists():
            got = "a folder" if self.path.is_dir() else "nothing"
            raise FileNotFoundError(f"{path}: source must be a torch file, got {got}")
        with open_regular(self.path) as file:
            # private and writable: tensors can be views of it without a warning
            size = os.fstat(file.fileno()).st_size
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
        self.compared: set[str] = set()  # storages whose checksums have been compared
        try:
            self.content, self.places = self._open()
        except Refused as error:
            raise Refused(f"{self.path}: {error}", error.published) from error
        except NOT_A_TORCH_FILE as error:
            got = find_kind(self.path, "torch") or in_words(error)
            raise ValueError(f"{self.path}: file must be a whole torch file, got {got}") from error

    def _open(self) -> tuple[object, dict[str, Place]]:
        if self.buffer[:4] == ZIP:
            records, _ = find_records(self.buffer)
            if PICKLE not in records:
                program = any(name.startswith("code/") for name in records)
                raise ValueError("a TorchScript program, which is refused" if program else f"a zip without {PICKLE}")
            storages = {name.removeprefix("data/"): place for name, place in records.items()}
            pickled = read_record(self.buffer, records[PICKLE])
            return Unpickler(pickled, size=len(self.buffer)).load(), storages
        return read_legacy(self.buffer)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A view of the file; what is written into it stays private.

        Raises:
            ValueError: If the tensor does not fit into its storage or claims to be larger, or the storage is damaged.
        """
        begin, length = find_bytes(stored, self.places, self.path)
        if math.prod(stored.shape) * stored.storage.dtype.itemsize > length:  # a stride of 0 claims any shape
            what = f"{self.path}: tensor must not be larger than its storage"
            raise ValueError(f"{what}, got {list(stored.shape)} in {length:,} bytes; save it contiguous")
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=stored.storage.dtype)
        self.storage(stored.storage.key)
        dtype = stored.storage.dtype
        flat = torch.frombuffer(self.buffer, dtype=dtype, count=length // dtype.itemsize, offset=begin)
        return flat.as_strided(stored.shape, stored.stride)

    def storage(self, key: str) -> Tensor:
        """The bytes of a storage, uint8, as a view of the file.

        Raises:
            ValueError: If they are not those of which the file has the checksum.
        """
        place = self.places[key]
        if key not in self.compared:
            if not is_whole(self.buffer, place):
                where = f"{self.path}: storage {shorten(key)!r}"
                raise ValueError(f"{where} must have the checksum that the file says, got another; copy it again")
            self.compared.add(key)
        return torch.frombuffer(self.buffer, dtype=torch.uint8, count=place.size, offset=place.begin)

    def load(self, part: object = None) -> object:
        """The content, or a part of it, with tensors in memory; those that share a storage in the file share it again.

        Raises:
            ValueError: If containers are nested too deep, a tensor does not fit into its storage, or all together claim
                to be much larger than the file.
        """
        try:
            return replace_tensors(self.content if part is None else part, Loader(self).tensor, self.path)
        except (RuntimeError, TypeError, OverflowError) as error:  # torch's words for a shape or dtype that it has not
            raise ValueError(f"{self.path}: tensors must be of a kind that torch has, got {in_words(error)}") from error


class Loader:
    """Puts the tensors of a file into memory, storage by storage."""

    def __init__(self, file: TorchFile):
        self.file, self.left = file, room(len(file.buffer))
        self.storages: dict[str, Tensor] = {}

    def tensor(self, stored: StoredTensor) -> Tensor:
        dtype, key = stored.storage.dtype, stored.storage.key
        find_bytes(stored, self.file.places, self.file.path)
        self.left -= math.prod(stored.shape) * dtype.itemsize
        if self.left < 0:  # a stride of 0 says that all entries lie in one place
            what = f"{self.file.path}: tensors must not claim to be many times larger than the file"
            raise ValueError(f"{what}, got one of {list(stored.shape)}; save them contiguous")
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=dtype)
        if key not in self.storages:
            self.storages[key] = self.file.storage(key).clone()
        # some bytes at the end may be those of no whole number
        content = self.storages[key]
        content = content[: len(content) // dtype.itemsize * dtype.itemsize].view(dtype)
        return content.as_strided(stored.shape, stored.stride, stored.offset)


def replace_tensors(content: object, replace: Callable[[StoredTensor], object], where: object) -> object:
    """Plain containers with what ``replace`` makes of each tensor in them; containers that are shared stay shared.

    Raises:
        ValueError: If they are nested too deep.
    """
    done: dict[int, object] = {}  # containers by id: what each is referred to from many places is copied once

    def copied(value: object, depth: int) -> object:
        if type(value) is StoredTensor:
            return replace(value)
        if not isinstance(value, dict | list) and type(value) is not tuple:
            return value
        if depth > DEEPEST:
            what = f"{where}: containers must be nested at most {DEEPEST} deep"
            raise ValueError(f"{what}, got more; save the state_dict of the network alone")
        if id(value) not in done:
            done[id(value)] = filled(value, depth + 1)
        return done[id(value)]

    def filled(value: dict | list | tuple, depth: int) -> object:
        if type(value) is tuple:
            return tuple(copied(entry, depth) for entry in value)
        made = done[id(value)] = type(value)()  # before its entries, which may hold it
        if isinstance(value, dict):
            for key, entry in value.items():
                made[key] = copied(entry, depth)
        else:
            made.extend(copied(entry, depth) for entry in value)
        return made

    return copied(content, 0)


def find_bytes(stored: StoredTensor, places: Mapping[str, Place], path) -> tuple[int, int]:
    """First byte of a tensor and the number of bytes that it spans."""
    (key, dtype), offset, shape, stride = stored
    itemsize = dtype.itemsize
    begin, size, _ = places.get(key, Place(0, -1))
    span = 0 if 0 in shape else 1 + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    if offset < 0 or min((*shape, *stride), default=0) < 0 or (offset + span) * itemsize > size:
        where = f"{path}: tensor must lie in its storage {shorten(key)!r} of {size} bytes"
        raise ValueError(f"{where}, got {list(shape)} {dtype} from {offset} on; copy it again")
    if math.prod(max(1, count) for count in (*shape, itemsize)) >= 2**63 or max(stride, default=0) >= 2**63:
        raise ValueError(f"{path}: tensor must have a shape and stride of 64 bits, got more; copy it again")
    return begin + offset * itemsize, span * itemsize


def in_words(error: Exception) -> str:
    """The first line of what a library says of a damaged file."""
    first = shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200)
    return first if isinstance(error, ValueError) else f"a damaged one ({type(error).__name__}: {first})"
