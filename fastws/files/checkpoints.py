"""Checkpoint files: what tensors they hold, without loading them, and their tensors, without unpickling anything."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from fastws.files import json
from fastws.files.kinds import find_folder_kind
from fastws.files.names import unwrap_names
from fastws.files.safetensors import Header, open_tensors, read_safetensors_header, read_ties
from fastws.files.state_dict import State, describe_value, find_state, holds_tensors
from fastws.files.torch_file import TorchFile
from fastws.files.values import Refused
from fastws.terminal import shorten

Entry = TypeVar("Entry")  # what a file holds under a name
FOLDER_FILES = (  # of transformers and diffusers, the preferred ones first
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name to file, of a ``*.index.json``."""
    content = json.read(path)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{path}: index must hold a weight_map of tensor names to files, got another thing")
    for name, file in names.items():
        # an index from strangers names no files elsewhere
        if Path(file).name != file or "\0" in file or file == "..":
            raise ValueError(f"{path}: file of {shorten(name)!r} must lie beside the index, got {shorten(file)!r}")
    return {name: path.parent / file for name, file in names.items()}


def read_headers(path: Path) -> tuple[dict[str, Header], dict[str, str]]:
    """The tensors of one safetensors file or of a sharded one, by its index; and names that are tied to them."""
    headers = read_shards(path, read_safetensors_header) if path.suffix == ".json" else read_safetensors_header(path)
    files = dict.fromkeys(read_index(path).values()) if path.suffix == ".json" else [path]
    ties = {name: kept for file in files for name, kept in read_ties(file).items()}
    return headers, {name: kept for name, kept in ties.items() if kept in headers and name not in headers}


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


def load_plain(path: str | Path) -> object:
    """What a torch file holds: tensors on the CPU in plain containers. Nothing is unpickled but these.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else, which is named, or is damaged.
    """
    return open_plain(path).load()


def open_plain(path: str | Path) -> TorchFile:
    try:
        return TorchFile(path)
    except Refused as error:
        raise ValueError(f"{error}; save the state_dict of the network alone") from None


def load_checkpoint(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU.

    safetensors files are memory-mapped. Everything else is read as a torch file, of which nothing is executed and only
    the tensors of the network are loaded. What DataParallel and torch.compile put into names is dropped, whatever the
    format. Tensors that are tied have all their names, also where a safetensors file keeps one of them in its metadata.
    An index (``*.index.json``) stands for the files it names.

    Args:
        path: The file, or a folder that ``save_pretrained`` of transformers or diffusers wrote.
        key: Under which a torch file holds the network, ``"ema.model"`` for a key in a key. By default the one network
            that it holds, or of several the one under ``state_dict``, ``model`` or the like, with a warning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds something else than tensors, or would have to be unpickled.
    """
    state = open_checkpoint(path, key)
    if key is None:
        tell_others(path, state)
    return state.tensors


def tell_others(where: str | Path, state: State) -> None:
    """Warns where a file or dictionary holds several networks."""
    if state.others:
        taken = f"that under {shorten(state.key)!r} was taken, not {', '.join(map(repr, map(shorten, state.others)))}"
        warnings.warn(f"{where}: checkpoint holds several networks; {taken}; key= and --key name another", stacklevel=4)


def open_checkpoint(path: str | Path, key: str | None = None) -> State:
    """The same with all else that the file holds under the names of the network."""
    path = find_checkpoint(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint must be a file, got nothing")
    if is_safetensors(path):
        if key is not None:
            raise ValueError(f"{path}: --key must be left out for a safetensors file, which has none, got {key!r}")
        return State(dict(unwrap_names(load_safetensors(path))), {})
    if path.name.endswith(".index.json"):
        # names of an index are whole, so prefixes are dropped after its files were put together
        return find_state(read_shards(path, load_part), str(path), key)
    file = open_plain(path)
    state = find_state(file.content, str(path), key)
    return state._replace(tensors=file.load(state.tensors))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    headers, ties = read_headers(path)
    places = read_index(path) if path.suffix == ".json" else dict.fromkeys(headers, path)
    opened = {file: open_tensors(file) for file in dict.fromkeys(places.values())}
    tensors = {name: opened[file].get_tensor(name) for name, file in places.items()}
    return tensors | {name: tensors[kept] for name, kept in ties.items()}


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint of a folder that transformers or diffusers wrote; what is no folder is returned as it is.

    Raises:
        FileNotFoundError: If the folder holds none under their names.
        ValueError: If it is that of another library, which is named.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        if kind := find_folder_kind(os.listdir(path)):
            raise ValueError(f"{path}: checkpoint must be a file, got {kind}")
        what = f"a file, or a folder with one of {', '.join(FOLDER_FILES)}"
        raise FileNotFoundError(f"{path}: checkpoint must be {what}, got a folder without")
    return found


def load_part(path: Path) -> Mapping[str, Tensor]:
    loaded = load_plain(path)
    if not holds_tensors(loaded):
        raise ValueError(f"{path}: part of a checkpoint must be a dictionary of tensors, got {describe_value(loaded)}")
    return loaded
