"""Checkpoint files: what tensors they hold, without loading them, and their tensors, without unpickling anything."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fastws.files import json
from fastws.files.names import check_names, unwrap_names
from fastws.files.safetensors import Header, open_tensors, read_safetensors_header
from fastws.files.torch_file import TorchFile
from fastws.files.values import OtherTensor, Refused
from fastws.terminal import shorten

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep the weights
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


def load_plain(path: str | Path) -> object:
    """What a torch file holds: tensors on the CPU in plain containers. Nothing is unpickled but these.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else, which is named, or is damaged.
    """
    try:
        return TorchFile(path).load()
    except Refused as error:
        raise ValueError(f"{error}; save the state_dict of the network alone") from None


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU.

    safetensors files are memory-mapped. Everything else is read as a torch file, of which nothing is executed; a
    dictionary that holds the weights under ``state_dict``, ``model`` or the like is unwrapped. What DataParallel and
    torch.compile put into names is dropped, whatever the format. An index (``*.index.json``) stands
    for the files it names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds something else than tensors, or would have to be unpickled.
    """
    path = find_checkpoint(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint must be a file, got nothing")
    if is_safetensors(path):
        headers = read_headers(path)
        places = read_index(path) if path.suffix == ".json" else dict.fromkeys(headers, path)
        opened = {file: open_tensors(file) for file in dict.fromkeys(places.values())}
        return dict(unwrap_names({name: opened[file].get_tensor(name) for name, file in places.items()}))
    # names of an index are whole, so prefixes are dropped after its files were put together
    return unwrap(read_shards(path, load_part) if path.name.endswith(".index.json") else load_plain(path), str(path))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint of a folder that transformers or diffusers wrote; what is no folder is returned as it is.

    Raises:
        FileNotFoundError: If the folder holds none under their names.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        what = f"a file, or a folder with one of {', '.join(FOLDER_FILES)}"
        raise FileNotFoundError(f"{path}: checkpoint must be {what}, got a folder without")
    return found


def load_part(path: Path) -> Mapping[str, Tensor]:
    loaded = load_plain(path)
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
    for name, value in loaded.items():
        if isinstance(value, OtherTensor) and value.kind != "quantised":
            raise ValueError(f"{where}: {shorten(str(name))!r} must be a dense tensor, got a {value.kind} one")
    loaded = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    check_tensors(where, loaded)
    return dict(unwrap_names(loaded))


def holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor | OtherTensor) for entry in value.values())


def check_tensors(where: str, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all names are strings and all tensors dense."""
    check_names(where, state)
    for name, tensor in state.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{where}: {name!r} must be a dense tensor, got {tensor.layout}")


def describe_value(value: object) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    return f"a dictionary of {', '.join(repr(shorten(str(key))) for key in list(value)[:5])}"
