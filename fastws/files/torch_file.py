"""Torch files without ``torch.load``: a restricted unpickler, and tensors that are read when they are wanted.

Published data sets are pickled objects of classes that the reader does not have, and raw zoos are tens of thousands of
small files, for which ``torch.load`` takes longer than the disk. Both need the same: the pickle that says which tensor
lies where, read by an unpickler that makes plain containers only, and the place of each storage in the file.
"""

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastws.files.checkpoints import DAMAGED
from fastws.files.unpickle import Refused, StoredTensor, Unpickler

PICKLE, BYTE_ORDER = "data.pkl", "byteorder"  # records of a torch zip file
KEPT = (PICKLE, BYTE_ORDER)
ZIP = b"PK\x03\x04"
END, CENTRAL, LOCAL = struct.Struct("<4s6xHII"), struct.Struct("<4s6xH8xIIHHH8xI"), struct.Struct("<HH")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch files before 1.6, which are pickles and bytes one after the other
NOT_A_TORCH_FILE = (*DAMAGED, OverflowError, MemoryError, zipfile.BadZipFile)


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
        if not self.path.is_file():
            got = "a folder" if self.path.is_dir() else "nothing"
            raise FileNotFoundError(f"{path}: source must be a torch file, got {got}")
        with open(self.path, "rb") as file:
            # private and writable: tensors can be views of it without a warning
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if os.path.getsize(path) else b""
        try:
            self.content, self.places = self._open()
        except Refused as error:
            raise Refused(f"{self.path}: {error}", error.published) from error
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
