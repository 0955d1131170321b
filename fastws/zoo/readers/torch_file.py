"""Torch files without ``torch.load``: a restricted unpickler, and tensors that are read when they are wanted.

Published data sets are pickled objects of classes that the reader does not have, and raw zoos are tens of thousands of
small files, for which ``torch.load`` takes longer than the disk. Both need the same: the pickle that says which tensor
lies where, read by an unpickler that makes plain containers only, and the place of each storage in the file.
"""

import io
import mmap
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from fastws.files import DAMAGED

PICKLE, BYTE_ORDER = "data.pkl", "byteorder"  # records of a torch zip file
KEPT = (PICKLE, BYTE_ORDER)
ZIP = b"PK\x03\x04"
END, CENTRAL, LOCAL = struct.Struct("<4s6xHII"), struct.Struct("<4s6xH8xIIHHH8xI"), struct.Struct("<HH")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch files before 1.6, which are pickles and bytes one after the other
NOT_A_TORCH_FILE = (*DAMAGED, OverflowError, MemoryError, zipfile.BadZipFile)
PUBLISHED = ("checkpoints_to_datasets.", "ghrp.", "model_definitions.", "torch.utils.data.")  # classes read as Record


class Refused(ValueError):
    """A pickle wants something that is neither a tensor, a number, a string nor a container."""


class Storage(NamedTuple):
    """The numbers behind one or several tensors."""

    key: str
    dtype: torch.dtype


class StoredTensor(NamedTuple):
    """A tensor that is still in its file; offset and stride count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class TorchFile:
    """An open torch file: ``content`` as plain containers with ``StoredTensor`` for tensors, which ``tensor`` reads.

    Objects of the published data set classes are a ``Record`` each: a dictionary of their attributes.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens a file and reads its pickle, no tensors.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a torch file, is damaged, or wants anything to be imported or called.
        """
        self.path = Path(path)
        with open(self.path, "rb") as file:
            # private and writable: tensors can be views of it without a warning
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if os.path.getsize(path) else b""
        try:
            self.content, self.places = self._open()
        except Refused as error:
            raise ValueError(f"{self.path}: {error}") from error
        except NOT_A_TORCH_FILE as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.path}: file must be a whole torch file, got {first}") from error

    def _open(self) -> tuple[object, dict[str, tuple[int, int]]]:
        if self.buffer[:4] == ZIP:
            records, _ = find_records(self.buffer)
            begin, size = records[PICKLE]
            storages = {name.removeprefix("data/"): place for name, place in records.items()}
            return Unpickler(io.BytesIO(self.buffer[begin : begin + size])).load(), storages
        return read_legacy(self.buffer)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A view of the file; what is written into it stays private.

        Raises:
            ValueError: If the tensor does not fit into its storage.
        """
        begin, length = find_bytes(stored, self.places, self.path)
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=stored.storage.dtype)
        dtype = stored.storage.dtype
        flat = torch.frombuffer(self.buffer, dtype=dtype, count=length // dtype.itemsize, offset=begin)
        return flat.as_strided(stored.shape, stored.stride)


def find_bytes(stored: StoredTensor, places: Mapping[str, tuple[int, int]], path) -> tuple[int, int]:
    """First byte of a tensor and the number of bytes that it spans."""
    (key, dtype), offset, shape, stride = stored
    begin, size = places.get(key, (0, -1))
    span = 0 if 0 in shape else 1 + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))
    if offset < 0 or min((*shape, *stride), default=0) < 0 or (offset + span) * dtype.itemsize > size:
        raise ValueError(f"{path}: tensor must lie in its storage {key!r} of {size} bytes, got {stored}; copy it again")
    return begin + offset * dtype.itemsize, span * dtype.itemsize


# --- the two formats


def find_records(buffer: bytes | bytearray | mmap.mmap) -> tuple[dict[str, tuple[int, int]], list[slice]]:
    """First byte and length of every record of a torch zip file, by name without the folder that all are in.

    Checksums are not compared: torch does not either, and can be told not to write them.

    Returns:
        The records, and the bytes that say so: where these are the same, records lie the same. None in a large file.
    """
    end = buffer.rfind(b"PK\x05\x06", max(0, len(buffer) - 65_557))
    if end < 0:
        raise ValueError("a zip file without its end; copy it again")
    _, count, _, place = END.unpack_from(buffer, end)
    if count == 0xFFFF or place == 0xFFFFFFFF:
        return find_many_records(buffer), []
    records, structure = {}, [slice(end, len(buffer))]
    for _ in range(count):
        magic, method, size, full_size, name, extra, comment, header = CENTRAL.unpack_from(buffer, place)
        if magic != b"PK\x01\x02" or method != 0 or size != full_size:
            raise ValueError("a record that torch does not write")
        following = place + 46 + name + extra + comment
        structure += [slice(place, place + 16), slice(place + 20, following), slice(header + 26, header + 30)]
        add_record(records, buffer, buffer[place + 46 : place + 46 + name].decode(), header, size)
        place = following
    structure += [slice(begin, begin + size) for name in KEPT if name in records for begin, size in [records[name]]]
    return records, structure


def find_many_records(buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
    """The same for files of more than 65,534 records or 4 GiB."""
    records = {}
    with zipfile.ZipFile(buffer) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a record that torch does not write")
            add_record(records, buffer, info.filename, info.header_offset, info.file_size)
    return records


def add_record(records: dict, buffer, name: str, header: int, size: int) -> None:
    # names and padding may be longer before the data than in the directory
    before_name, padding = LOCAL.unpack_from(buffer, header + 26)
    begin = header + 30 + before_name + padding
    if begin + size > len(buffer):
        raise ValueError("a record beyond the end of the file; copy it again")
    if name.endswith("/" + BYTE_ORDER) and buffer[begin : begin + size] != b"little":
        raise ValueError("numbers in another byte order than little endian")
    records[name.partition("/")[2]] = begin, size


def read_legacy(buffer: mmap.mmap) -> tuple[object, dict[str, tuple[int, int]]]:
    """The format before torch 1.6: magic number, version, system, content, storage keys, then the storages."""
    buffer.seek(0)
    storages = {}
    magic, _, system = (Unpickler(buffer, storages).load() for _ in range(3))
    if magic != LEGACY_MAGIC or not system["little_endian"]:
        raise ValueError("a file of another kind")
    content, keys = Unpickler(buffer, storages).load(), Unpickler(buffer, storages).load()
    place, places = buffer.tell(), {}
    for key in keys:
        (count,) = struct.unpack_from("<q", buffer, place)
        size = count * storages[key].itemsize
        if count < 0 or place + 8 + size > len(buffer):
            raise ValueError("a storage beyond the end of the file; copy it again")
        places[key] = place + 8, size
        place += 8 + size
    return content, places


# --- the unpickler


class Record(dict):
    """The attributes of an object whose class is not needed."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


class Ordered(dict):
    """An OrderedDict; the versions that modules note in theirs are dropped."""

    def __setstate__(self, state):
        pass


class ArrayType:
    """A numpy dtype on its way out of a pickle."""

    __slots__ = ("code", "order")

    def __init__(self, code, *_):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        self.order = state[1]

    def resolve(self) -> numpy.dtype:
        if not isinstance(self.code, str) or self.code[:1] not in "biufcSU":
            raise Refused(f"arrays must hold numbers or strings, got numpy dtype {self.code!r}; it is refused")
        return numpy.dtype(self.code).newbyteorder(self.order)


class Array:
    """A numpy array on its way out of a pickle; ``value`` is the array."""

    __slots__ = ("value",)

    def __init__(self, *_):
        self.value = numpy.empty(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        flat = numpy.frombuffer(data, dtype.resolve())
        self.value = flat.reshape(shape, order="F" if fortran else "C")


class Call:
    """A function that a pickle may call, which has no attributes for it to set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "function", function)

    def __call__(self, *args):
        return self.function(*args)

    def __setattr__(self, name, value):
        raise Refused(f"attributes of functions must stay as they are, got a new {name}; it is refused")


def rebuild_tensor(storage, offset, shape, stride, *_) -> StoredTensor:
    if not isinstance(storage, Storage) or not all(isinstance(n, int) for n in (offset, *shape, *stride)):
        raise Refused("tensors must have a storage and whole numbers for shape and stride; it is refused")
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def read_scalar(dtype, data=b""):
    return numpy.frombuffer(data, dtype.resolve(), 1)[0].item()


STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
first_argument = Call(lambda value, *_: value)
join_path = Call(lambda *parts: str(PurePosixPath(*map(str, parts))))
ALLOWED = {
    "collections.OrderedDict": Ordered,
    "torch._utils._rebuild_tensor": Call(rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Call(rebuild_tensor),
    "torch._utils._rebuild_parameter": first_argument,
    "torch._utils._rebuild_parameter_with_state": first_argument,
    "torch.Size": tuple,
    "torch.device": first_argument,
    "numpy.ndarray": Array,
    "numpy.dtype": ArrayType,
    "_codecs.encode": Call(lambda text, _: str.encode(text, "latin1")),  # how protocol 2 keeps bytes
}
ALLOWED |= {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}
for python in ("builtins", "__builtin__"):
    ALLOWED |= {f"{python}.set": set, f"{python}.frozenset": frozenset, f"{python}.complex": complex}
for core in ("numpy.core", "numpy._core"):
    ALLOWED |= {f"{core}.multiarray._reconstruct": Array, f"{core}.multiarray.scalar": Call(read_scalar)}
for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
    ALLOWED |= {f"pathlib.{name}": join_path, f"pathlib._local.{name}": join_path}


class Unpickler(pickle.Unpickler):
    """Makes containers, numbers, strings, arrays and ``StoredTensor``; whatever else a pickle names is refused.

    Nothing is imported. What can be called is in ``ALLOWED`` and makes plain values only.
    """

    def __init__(self, file, storages: dict[str, torch.dtype] | None = None):
        super().__init__(file, encoding="latin1")
        self.storages = {} if storages is None else storages

    def find_class(self, module: str, name: str):
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if full.startswith(PUBLISHED):
            return Record
        raise Refused(f"file must hold tensors, numbers, strings and containers only, got {full}; it is refused")

    def persistent_load(self, saved):
        kind, dtype, key, _, _, *view = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
            raise Refused(f"persistent values must be plain storages, got {str(saved)[:80]}; it is refused")
        self.storages[key] = dtype
        return Storage(key, dtype)
