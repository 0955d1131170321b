"""The headers of safetensors files: what tensors they hold and where, without loading them."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from fastws.files import json
from fastws.files.kinds import find_kind
from fastws.files.limits import open_regular
from fastws.files.values import MAX_AXES
from fastws.terminal import shorten

DTYPES = {  # safetensors name: dtype
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
PACKED = ("F4", "F6_E2M3", "F6_E3M2")  # of less than a byte: torch has none of them, or cannot convert it
MAX_HEADER = 100_000_000  # bytes, the limit of the format


class Header(NamedTuple):
    """What a safetensors file says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int  # first byte, counted from the beginning of the file
    end: int


class Contents(NamedTuple):
    """What the header of a safetensors file tells."""

    headers: dict[str, Header]
    data: int  # byte at which the numbers begin
    size: int  # of the file, in bytes


def read_safetensors_header(path: str | Path) -> dict[str, Header]:
    """Name, shape, dtype and place of every tensor of a safetensors file; see ``read_contents``."""
    return read_contents(path).headers


def read_contents(path: str | Path) -> Contents:
    """Reads the header of a safetensors file, no more, and checks all of it.

    Raises:
        ValueError: If the file is truncated, or its header is not one, or names bytes that overlap, leave gaps or are
            not there.
    """
    path = Path(path)
    described, data, size = read_description(path)
    described.pop("__metadata__", None)
    headers = {name: parse_tensor(f"{path}: {shorten(name)!r}", entry, data) for name, entry in described.items()}
    check_places(path, headers, data, size)
    return Contents(headers, data, size)


def read_ties(path: Path) -> dict[str, str]:
    """What ``safetensors.torch.save_model`` notes of tied tensors: names that it left out, and those that it kept."""
    metadata = read_description(path)[0].get("__metadata__")
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return {name: kept for name, kept in pairs if isinstance(kept, str)}


def read_description(path: Path) -> tuple[dict, int, int]:
    """The header, where the numbers begin, and the size of the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            require_safetensors(path)
            raise ValueError(f"{path}: header must fit into the file, got {length} of {size} bytes; copy it again")
        text = file.read(length)
    if not text.startswith(b"{"):
        require_safetensors(path)
    described = json.parse(text, f"{path}: header")
    if not isinstance(described, dict):
        raise ValueError(f"{path}: header must be that of a safetensors file, got a {type(described).__name__}")
    return described, 8 + length, size


def require_safetensors(path: Path) -> None:
    """Raises ValueError if the first bytes say that a file is of another kind, which is named."""
    if kind := find_kind(path, "safetensors"):
        raise ValueError(f"{path}: file must be a safetensors file, got {kind}")


def parse_tensor(where: str, entry: object, data: int) -> Header:
    if not isinstance(entry, dict) or not {"shape", "dtype", "data_offsets"} <= entry.keys():
        raise ValueError(f"{where} must have shape, dtype and data_offsets in the header, got another thing")
    shape, places = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(places, list) or len(places) != 2 or len(shape) > MAX_AXES:
        raise ValueError(f"{where} must have lists for shape and data_offsets in the header, got others")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *places)):
        raise ValueError(f"{where} must have whole numbers from 0 for shape and data_offsets, got others")
    if entry["dtype"] in PACKED:
        fix = "dequantise it where it was made"
        raise ValueError(f"{where} must be of a dtype that torch converts, got {entry['dtype']}; {fix}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{where} must have a dtype of {', '.join(DTYPES)}, got {shorten(str(entry['dtype']))!r}")
    return Header(tuple(shape), DTYPES[entry["dtype"]], data + places[0], data + places[1])


def check_places(path: Path, headers: Mapping[str, Header], data: int, size: int) -> None:
    expected, before = data, "the header"
    for name, header in sorted(headers.items(), key=lambda item: (item[1].begin, item[1].end)):
        needed = math.prod(header.shape) * header.dtype.itemsize
        if header.end - header.begin != needed:
            raise ValueError(f"{path}: {shorten(name)!r} must take {needed} bytes, got {header.end - header.begin}")
        if header.begin != expected:
            what = "overlaps" if header.begin < expected else "leaves a gap after"
            raise ValueError(
                f"{path}: offsets must follow each other without gaps, but {shorten(name)!r} {what} {before}"
            )
        expected, before = header.end, repr(shorten(name))
    if expected != size:
        raise ValueError(f"{path}: file must have {expected} bytes, got {size}; it is truncated or damaged")


def open_tensors(path: str | Path) -> safe_open:
    """A safetensors file whose header is sound, as a context manager with ``get_tensor`` and ``metadata``.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is damaged.
    """
    read_safetensors_header(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: file must be readable as safetensors, got {shorten(str(error), 200)}") from error
