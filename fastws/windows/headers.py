"""The files of a hub: what their headers tell of the networks in them, and why some are left out."""

from collections.abc import Iterator, Mapping, Sequence
from json import dumps as dump
from pathlib import Path
from typing import NamedTuple

import torch

from fastws.files import json
from fastws.files.arena import PAGE
from fastws.files.checkpoints import is_safetensors, read_index
from fastws.files.limits import DAMAGED
from fastws.files.names import plain_names
from fastws.files.safetensors import Contents, Header, read_contents
from fastws.files.state_dict import is_quantised
from fastws.layout.entries import NATIVE
from fastws.terminal import shorten
from fastws.zoo.readers.checkpoints import OTHER_WEIGHTS, find_checkpoints, walk
from fastws.zoo.readers.collect import printable

SAYS_NOTHING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # of a network, in its config


class File(NamedTuple):
    """Where the numbers of a file of a network are."""

    path: Path
    data: int  # byte at which they begin
    size: int  # of the file


class Model(NamedTuple):
    """A network, as the headers of its files tell of it."""

    name: str  # path in the folder
    files: tuple[File, ...]
    config: str  # the config.json beside them, where it is asked for
    begin: int  # byte of the first file, a multiple of 8, from which places are counted
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    places: tuple[int, ...]  # first byte of each tensor; each file begins at a page behind the one before


def read_models(root: Path, with_configs: bool = False) -> tuple[list[Model], dict[str, str]]:
    """The networks of a folder by the headers of their files, sorted by name, and what cannot be read, and why."""
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing"
        raise FileNotFoundError(f"{root}: hub must be a folder of safetensors files, got {got}")
    search = find_checkpoints(root)
    skipped = ((name_in(root, Path(skip.path)), skip.reason) for skip in search.skipped)
    left_out = {name: reason for name, reason in skipped if name != "."}  # many a file is no checkpoint at all
    files = (folder / file for folder, names in walk(root) for file in names)
    models, others = [], [name_in(root, file) for file in files if file.name.endswith(OTHER_WEIGHTS)]
    for path in search.files:
        name = name_in(root, path)
        if not is_safetensors(path):
            others.append(name)
            continue
        try:
            models.append(read_model(name, path, read_config(path.parent) if with_configs else ""))
        except (OSError, *DAMAGED) as error:
            left_out[name] = " ".join(str(error).removeprefix(f"{path}: ").split()) or "damaged"
    what = "must be a safetensors file; fastws.load_checkpoint and safetensors.torch.save_file make one of it"
    return models, left_out | {name: what for name in others}


def name_in(root: Path, path: Path) -> str:
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix())


def read_config(folder: Path) -> str:
    """The config of a folder without what says nothing of the network; "" where there is none."""
    try:
        content = json.read(folder / "config.json")
    except (OSError, ValueError):
        return ""
    if not isinstance(content, dict):
        return ""
    return dump({name: value for name, value in content.items() if name not in SAYS_NOTHING}, sort_keys=True)


def read_model(name: str, path: Path, config: str = "") -> Model:
    """Raises ValueError, or OSError, if files are damaged or hold what has no tokens."""
    index = read_index(path) if path.suffix == ".json" else None
    paths = [path] if index is None else list(dict.fromkeys(index.values()))
    contents = {file: read_contents(file) for file in paths}
    files, begins, end = [], {}, 0
    for file, one in contents.items():
        files.append(File(file, one.data, one.size))
        begins[file] = end
        end += -(-one.size // PAGE) * PAGE
    begin = files[0].data & -8 if files else 0
    tensors, places = [], []
    for (old, header, file), plain in zip(found := list(list_tensors(contents, index)), plain_of(found), strict=True):
        check_tensor(old, header)
        if header.dtype in NATIVE:
            tensors.append((plain, header.shape, header.dtype))
            places.append(begins[file] + header.begin - begin)
    return Model(name, tuple(files), config, begin, tuple(tensors), tuple(places))


def list_tensors(
    contents: Mapping[Path, Contents], index: Mapping[str, Path] | None
) -> Iterator[tuple[str, Header, Path]]:
    if index is None:
        ((file, one),) = contents.items()
        yield from ((name, header, file) for name, header in one.headers.items())
        return
    for name, file in index.items():
        if name not in contents[file].headers:
            raise ValueError(f"{shorten(name)!r} must be in {file.name}, which does not hold it")
        yield name, contents[file].headers[name], file


def plain_of(found: Sequence[tuple[str, Header, Path]]) -> list[str]:
    plain = plain_names(name for name, _, _ in found)
    return [plain[name] for name, _, _ in found]


def check_tensor(name: str, header: Header) -> None:
    """Raises ValueError if numbers are no weights as they stand, or lie where they cannot be read in place."""
    dtype, floating = header.dtype, header.dtype.is_floating_point
    if is_quantised(name, dtype, len(header.shape)) or (floating and dtype not in NATIVE):
        got = f"{shorten(name)!r} of {dtype}; dequantise it where it was made"
        raise ValueError(f"weights must not be quantised, got {got}")
    if dtype.is_complex:
        raise ValueError(f"weights must be real numbers, got {shorten(name)!r} of {dtype}")
    if dtype in NATIVE and header.begin % dtype.itemsize and header.end > header.begin:
        what = f"at a multiple of {dtype.itemsize} bytes, got byte {header.begin}; save it with safetensors again"
        raise ValueError(f"numbers of {shorten(name)!r} must begin {what}")
