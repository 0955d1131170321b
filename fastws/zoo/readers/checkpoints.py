"""Folders of checkpoints, and of repositories as the Hugging Face hub keeps them on disk."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from fastws.files import json
from fastws.files.checkpoints import unreadable
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.readers.collect import (
    Population,
    ReadOptions,
    check_new,
    collect,
    find_expected,
    name_models,
    printable,
    unique,
)
from fastws.zoo.readers.ray import flatten
from fastws.zoo.readers.states import Like, StateReader

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors")
INDEX, BIN_INDEX, BIN = ".safetensors.index.json", ".bin.index.json", "pytorch_model.bin"
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")
SNAPSHOT = re.compile(r"(?:.*/)?models--([^/]+)/snapshots/([^/]+)")  # of the hub's cache
NUMBER = re.compile(r"\d+")


def read_checkpoints(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    model: Literal["file", "folder"] = "file",
    like: Like | None = None,
    options: ReadOptions | None = None,
) -> Zoo:
    """Reads checkpoint files, torch or safetensors, into a zoo folder; the same call goes on where a killed one was.

    Args:
        paths: Files, and folders in which all checkpoint files are looked for, sorted.
        out: The zoo folder to write.
        model: What one network is: a file, or a folder whose files are its states; the last number in a file's name is
            then the epoch.
        like: A checkpoint of the architecture, or its layout; by default the first that can be read. Others are bad
            states.
        options: What all readers have in common.

    Raises:
        FileNotFoundError: If a path is not there.
        ValueError: If there is nothing to read, or as ``options`` say.
    """
    if model not in ("file", "folder"):
        raise ValueError(f"read_checkpoints: model must be 'file' or 'folder', got {model!r}")
    check_new(out)
    options = options or ReadOptions()
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = unique(file for path in paths for file in find_checkpoints(Path(path)))
    names = name_models([file.parent if model == "folder" else file for file in files])
    columns = {"model": names, "file": [printable(file.name) for file in files]}
    if model == "folder":
        numbers = [NUMBER.findall(file.stem) for file in files]
        columns["epoch"] = [int(number[-1]) if number else None for number in numbers]
    states = [str(file) for file in files]
    expected = find_expected(states, like, options.key)
    source = {"kind": "checkpoints", "paths": [str(path) for path in paths], "model": model}
    population = Population(states, columns, StateReader(expected, options.key), expected.layout, source)
    return collect(out, population, options)


def read_hub(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    like: Like | None = None,
    options: ReadOptions | None = None,
) -> Zoo:
    """Reads repositories of the Hugging Face hub from disk: folders with ``config.json`` and safetensors files.

    Older ones, which have ``pytorch_model.bin`` or its parts only, are read too.

    Each repository is a network, each revision in the hub's cache (``models--.../snapshots/...``) a state of it. The
    numbers and strings of ``config.json`` are properties. Only repositories of one architecture become a zoo.

    Args:
        paths: Folders, in which all repositories are looked for, sorted.
        out: The zoo folder to write.
        like: A checkpoint of the architecture, or its layout; by default the first that can be read. Others are bad
            states.
        options: What all readers have in common.

    Raises:
        FileNotFoundError: If a path is not there.
        ValueError: If there is nothing to read, or as ``options`` say.
    """
    check_new(out)
    options = options or ReadOptions()
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    folders = unique(folder for path in paths for folder in find_repositories(Path(path)))
    files = [(folder, file) for folder in folders for file in find_weights(folder)]
    names, configs = name_models(folders), [read_config(folder) for folder in folders]
    described = {
        folder: describe_repository(folder, name) | config
        for folder, name, config in zip(folders, names, configs, strict=True)
    }
    keys = dict.fromkeys(key for properties in described.values() for key in properties)
    columns = {key: [described[folder].get(key) for folder, _ in files] for key in keys}
    states = [str(file) for _, file in files]
    expected = find_expected(states, like, options.key)
    source = {"kind": "hub", "paths": [str(path) for path in paths]}
    parts = [part for folder in folders for part in sorted(folder.iterdir())]
    population = Population(states, columns, StateReader(expected, options.key), expected.layout, source, files=parts)
    return collect(out, population, options)


def walk(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the files in them, sorted; folders that begin with a dot are left out.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: source must be a folder or a file, got nothing")
    for folder, folders, files in os.walk(path, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), sorted(files)


def find_checkpoints(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [folder / file for folder, files in walk(path) for file in files if is_checkpoint(file)]
    return sorted(found)


def is_checkpoint(file: str) -> bool:
    """By name; parts of a checkpoint of several files are found through its index."""
    return file.endswith((INDEX, BIN_INDEX)) or (file.endswith(SUFFIXES) and not SHARD.fullmatch(file))


def find_repositories(path: Path) -> list[Path]:
    return [folder for folder, files in walk(path) if "config.json" in files and find_weights(folder)]


def find_weights(folder: Path) -> list[Path]:
    """The weights of a repository: by its index, or ``model.safetensors``, or the first by name, or torch's."""
    files = sorted(folder.glob("*.safetensors*"))
    indices = [file for file in files if file.name.endswith(INDEX)]
    whole = [file for file in files if file.suffix == ".safetensors" and not SHARD.fullmatch(file.name)]
    usual = [file for file in whole if file.name == "model.safetensors"]
    return (indices or usual or whole or sorted(folder.glob(f"*{BIN_INDEX}")) or list(folder.glob(BIN)))[:1]


def describe_repository(folder: Path, name: str) -> dict[str, str]:
    found = SNAPSHOT.fullmatch(folder.absolute().as_posix())
    if found:
        return {"model": found[1].replace("--", "/"), "revision": found[2]}
    return {"model": name}


def read_config(folder: Path) -> dict:
    try:
        config = json.read(folder / "config.json")
    except (OSError, ValueError):
        return {}
    properties = flatten(config) if isinstance(config, dict) else {}
    return {name: value for name, value in properties.items() if name not in ("model", "revision")}
