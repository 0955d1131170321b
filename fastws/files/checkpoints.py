"""Checkpoint files: what tensors they hold, without loading them, and their tensors, without unpickling anything."""

import errno
import json
import math
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
MAX_HEADER = 100_000_000  # bytes, the limit of the format
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep the weights
# what torch.load raises for a file that is not one of its own: it reads pickle codes until one makes no sense
DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
DAMAGED += (AssertionError, OverflowError, struct.error)
REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # in torch's messages
Entry = TypeVar("Entry")  # what a file holds under a name
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile


class Header(NamedTuple):
    """What a safetensors file says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int  # first byte, counted from the beginning of the file
    end: int


def read_safetensors_header(path: str | Path) -> dict[str, Header]:
    """Name, shape, dtype and place of every tensor of a safetensors file; reads the header only and checks all of it.

    Raises:
        ValueError: If the file is truncated, or its header is not one, or names bytes that overlap, leave gaps or are
            not there.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: header must fit into the file, got {length} of {size} bytes; copy it again")
        text = file.read(length)
    try:
        described = json.loads(text)
        described.pop("__metadata__", None)
        headers = {name: parse_tensor(entry, 8 + length) for name, entry in described.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: header must be that of a safetensors file, got {error!r}") from error
    check_places(path, headers, 8 + length, size)
    return headers


def parse_tensor(entry: Mapping, data: int) -> Header:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape and data_offsets must be integers from 0, got {entry}")
    return Header(shape, DTYPES[entry["dtype"]], data + begin, data + end)


def check_places(path: Path, headers: Mapping[str, Header], data: int, size: int) -> None:
    expected, before = data, "the header"
    for name, header in sorted(headers.items(), key=lambda item: (item[1].begin, item[1].end)):
        needed = math.prod(header.shape) * header.dtype.itemsize
        if header.end - header.begin != needed:
            raise ValueError(f"{path}: {name!r} must take {needed} bytes, got {header.end - header.begin}")
        if header.begin != expected:
            what = "overlaps" if header.begin < expected else "leaves a gap after"
            raise ValueError(f"{path}: offsets must follow each other without gaps, but {name!r} {what} {before}")
        expected, before = header.end, repr(name)
    if expected != size:
        raise ValueError(f"{path}: file must have {expected} bytes, got {size}; it is truncated or damaged")


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name to file, of a ``*.index.json``."""
    try:
        names = json.loads(path.read_text())["weight_map"]
        places = {name: path.parent / file for name, file in names.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: index must hold a weight_map of tensor names to files, got {error!r}") from error
    for name, file in names.items():
        if Path(file).name != file:  # an index from strangers names no files elsewhere
            raise ValueError(f"{path}: file of {name!r} must lie beside the index, got {file!r}")
    return places


def read_headers(path: Path) -> dict[str, Header]:
    """The tensors of one safetensors file or of a sharded one, by its index."""
    return read_shards(path, read_safetensors_header) if path.suffix == ".json" else read_safetensors_header(path)


def read_shards(path: Path, read: Callable[[Path], Mapping[str, Entry]]) -> dict[str, Entry]:
    """What ``read`` finds in the files of an index, each entry in the file where it belongs."""
    places = read_index(path)
    shards = {file: read(file) for file in dict.fromkeys(places.values())}
    missing = [name for name, file in places.items() if name not in shards[file]]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} must be in {places[missing[0]].name}, which does not hold it")
    return {name: shards[file][name] for name, file in places.items()}


def unreadable(error: OSError) -> None:
    """For ``os.walk``, which leaves out folders that it may not read unless ``onerror`` raises."""
    raise OSError(error.errno, f"{error.filename}: folder must be readable, got {error.strerror}") from error


def is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")


def load_plain(path: str | Path, **options: object) -> object:
    """``torch.load`` of tensors and plain containers.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else, which is named, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # from looking for an end that is missing
            raise
        # nobody is shown torch's message, which advises to run what the file says
        raise ValueError(explain(str(error))) from None


def explain(message: str) -> str:
    """What ``torch.load`` got, by its message."""
    if refused := REFUSED.search(message):
        return f"{refused[1]}, which is refused"
    if "TorchScript" in message:
        return "a TorchScript program, which is refused"
    return "no whole torch file or pickle of protocol 2"


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU.

    safetensors files are memory-mapped. Everything else is read by ``torch.load`` with ``weights_only=True``, which
    executes nothing; a dictionary that holds the weights under ``state_dict``, ``model`` or the like is unwrapped, and
    prefixes that DataParallel and torch.compile put before every name are dropped. An index (``*.index.json``) stands
    for the files it names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds something else than tensors, or would have to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint must be a file, got {'a folder' if path.is_dir() else 'nothing'}")
    if is_safetensors(path):
        headers = read_headers(path)
        places = read_index(path) if path.suffix == ".json" else dict.fromkeys(headers, path)
        try:
            opened = {file: safe_open(file, framework="pt") for file in dict.fromkeys(places.values())}
            return {name: opened[file].get_tensor(name) for name, file in places.items()}
        except SafetensorError as error:
            raise ValueError(f"{path}: file must be readable as safetensors, got {error}") from error
    # names of an index are whole, so prefixes are dropped after its files were put together
    return unwrap(read_shards(path, load_part) if path.name.endswith(".index.json") else load_torch(path), str(path))


def load_torch(path: Path) -> object:
    try:
        return load_plain(path)
    except ValueError as error:
        what = f"tensors and plain containers only, got {error}; save the state_dict of the network alone"
        raise ValueError(f"{path}: file must hold {what}") from None


def load_part(path: Path) -> Mapping[str, Tensor]:
    loaded = load_torch(path)
    if not holds_tensors(loaded):
        raise ValueError(f"{path}: part of a checkpoint must be a dictionary of tensors, got {describe_value(loaded)}")
    return loaded


def unwrap(loaded: object, where: str) -> dict[str, Tensor]:
    """The state dict in what a training script saved."""
    if isinstance(loaded, Mapping):
        loaded = next((loaded[key] for key in WRAPPERS if holds_tensors(loaded.get(key))), loaded)
    if not holds_tensors(loaded):
        raise ValueError(f"{where}: checkpoint must hold a dictionary of tensors, got {describe_value(loaded)}")
    nested = next((name for name, value in loaded.items() if holds_tensors(value)), None)
    if nested is not None:
        raise ValueError(f"{where}: {nested!r} must be a tensor, got a dictionary of tensors; save that one alone")
    loaded = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    check_tensors(where, loaded)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in loaded):
            loaded = {name.removeprefix(prefix): value for name, value in loaded.items()}
    return loaded


def holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def check_tensors(where: str, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all names are strings and all tensors dense."""
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}: names of tensors must be strings, got {name!r}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{where}: {name!r} must be a dense tensor, got {tensor.layout}")


def describe_value(value: object) -> str:
    return f"a dictionary of {list(value)[:5]}" if isinstance(value, Mapping) else type(value).__name__
