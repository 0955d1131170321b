"""Where the pickle and the storages lie in a torch file: a zip archive, or what torch wrote before 1.6."""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import torch

from fastws.files.unpickle import Unpickler

PICKLE, BYTE_ORDER = "data.pkl", "byteorder"  # records of a torch zip file
KEPT = (PICKLE, BYTE_ORDER)
ZIP = b"PK\x03\x04"
END, CENTRAL, LOCAL = struct.Struct("<4s6xHII"), struct.Struct("<4s6xH4xIIIHHH8xI"), struct.Struct("<HH")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch files before 1.6, which are pickles and bytes one after the other


class Place(NamedTuple):
    """Where the bytes of a record or storage lie in its file."""

    begin: int
    size: int
    checksum: int = 0  # CRC-32; 0 if there is none


def is_whole(buffer, place: Place) -> bool:
    """Whether bytes are those that the checksum was made of, where there is one."""
    begin, size, checksum = place
    return checksum == 0 or zlib.crc32(memoryview(buffer)[begin : begin + size]) == checksum


def read_record(buffer, place: Place) -> bytes:
    if not is_whole(buffer, place):
        raise ValueError("a record whose checksum is another; copy it again")
    return bytes(buffer[place.begin : place.begin + place.size])


def find_records(buffer: bytes | bytearray | mmap.mmap) -> tuple[dict[str, Place], list[slice]]:
    """The place of every record of a torch zip file, by name without the folder that all are in.

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
        magic, method, checksum, size, full_size, name, extra, comment, header = CENTRAL.unpack_from(buffer, place)
        if magic != b"PK\x01\x02" or method != 0 or size != full_size:
            program = b"/code/" in bytes(buffer[place + 46 : place + 46 + name])
            raise ValueError(
                "a TorchScript program, which is refused" if program else "a record that torch does not write"
            )
        following = place + 46 + name + extra + comment
        structure += [slice(place, place + 16), slice(place + 20, following), slice(header + 26, header + 30)]
        add_record(records, buffer, bytes(buffer[place + 46 : place + 46 + name]).decode(), header, size, checksum)
        place = following
    check_total(records, buffer)
    structure += [slice(records[name].begin, sum(records[name][:2])) for name in KEPT if name in records]
    return records, structure


def find_many_records(buffer: mmap.mmap) -> dict[str, Place]:
    """The same for files of more than 65,534 records or 4 GiB."""
    records = {}
    with zipfile.ZipFile(buffer) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a record that torch does not write")
            add_record(records, buffer, info.filename, info.header_offset, info.file_size, info.CRC)
    check_total(records, buffer)
    return records


def add_record(records: dict, buffer, name: str, header: int, size: int, checksum: int) -> None:
    # names and padding may be longer before the data than in the directory
    before_name, padding = LOCAL.unpack_from(buffer, header + 26)
    begin = header + 30 + before_name + padding
    if begin + size > len(buffer):
        raise ValueError("a record beyond the end of the file; copy it again")
    if name.endswith("/" + BYTE_ORDER) and buffer[begin : begin + size] != b"little":
        raise ValueError("numbers in another byte order than little endian")
    name = name.partition("/")[2]
    if name in records:
        raise ValueError("two records of one name; copy it again")
    records[name] = Place(begin, size, checksum)


def check_total(records: Mapping[str, Place], buffer) -> None:
    if sum(place.size for place in records.values()) > len(buffer):
        raise ValueError("records that overlap; copy it again")


def read_legacy(buffer: mmap.mmap) -> tuple[object, dict[str, Place]]:
    """The format before torch 1.6: magic number, version, system, content, storage keys, then the storages."""
    storages: dict[str, torch.dtype] = {}
    machine = Unpickler(buffer, storages=storages)
    if machine.load() != LEGACY_MAGIC:
        raise ValueError("a pickle that torch did not write")
    _, system = machine.load(), machine.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("numbers in another byte order than little endian")
    content, keys = machine.load(), machine.load()
    if not isinstance(keys, list) or set(map(type, keys)) > {str} or len(set(keys)) != len(keys):
        raise ValueError("storages without names; copy it again")
    if storages.keys() != set(keys):
        raise ValueError("tensors without their storages; copy it again")
    place, places = machine.place, {}
    for key in keys:
        (count,) = struct.unpack_from("<q", buffer, place)
        size = count * storages[key].itemsize
        if count < 0 or place + 8 + size > len(buffer):
            raise ValueError("a storage beyond the end of the file; copy it again")
        places[key] = Place(place + 8, size)
        place += 8 + size
    return content, places
