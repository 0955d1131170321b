"""Folders of checkpoints, and of repositories as the Hugging Face hub keeps them on disk."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fastws.files import json
from fastws.files.checkpoints import unreadable
from fastws.files.kinds import STATES, find_folder_kind, find_kind
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.readers.collect import Population, ReadOptions, collect, find_expected, name_models, printable, unique
from fastws.zoo.readers.ray import flatten
from fastws.zoo.readers.record import Skipped, check_new
from fastws.zoo.readers.states import Like, StateReader

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors")
INDEX, BIN_INDEX, BIN = ".safetensors.index.json", ".bin.index.json", "pytorch_model.bin"
OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".tflite", ".ot", ".keras")  # that no reader takes
TEXT = ("a web page", "an XML", "a JSON file", "nothing")  # that lies beside checkpoints everywhere
MAX_OPENED, MAX_SUFFIXES = 100, 5  # files without a suffix of checkpoints that are looked at; suffixes that are told
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
        raise ValueError(f"zoo read: --model must be 'file' or 'folder', got {model!r}")
    check_new(out)
    options = options or ReadOptions()
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    searches = [find_checkpoints(Path(path)) for path in paths]
    files = unique(file for search in searches for file in search.files)
    skipped = [skip for search in searches for skip in search.skipped]
    if not files and skipped:
        raise ValueError(f"zoo read: source must hold checkpoints, got none; {skipped[0].path}: {skipped[0].reason}")
    names = name_models([file.parent if model == "folder" else file for file in files])
    columns = {"model": names, "file": [printable(file.name) for file in files]}
    if model == "folder":
        numbers = [NUMBER.findall(file.stem) for file in files]
        columns["epoch"] = [int(number[-1]) if number else None for number in numbers]
    states = [str(file) for file in files]
    expected = find_expected(states, like, options.key)
    source = {"kind": "checkpoints", "paths": [str(path) for path in paths], "model": model}
    reader = StateReader(expected, options.key)
    return collect(out, Population(states, columns, reader, expected.layout, source, skipped=skipped), options)


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
    skipped = [skip for path in paths for skip in skipped_repositories(Path(path))]
    parts = [part for folder in folders for part in sorted(folder.iterdir())]
    reader = StateReader(expected, options.key)
    population = Population(states, columns, reader, expected.layout, source, files=parts, skipped=skipped)
    return collect(out, population, options)


class Search(NamedTuple):
    """What a folder holds."""

    files: list[Path]  # checkpoints
    skipped: list[Skipped]


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


def find_checkpoints(path: Path) -> Search:
    """A file itself, or the checkpoints in a folder by their names, sorted, with what is skipped."""
    if path.is_file():
        return Search([path], [])
    found, skipped, unnamed = [], [], []
    for folder, files in walk(path):
        own = [folder / file for file in files if is_checkpoint(file)]
        found += own
        kind = find_folder_kind(files)
        if kind and not own:
            skipped.append(Skipped(printable(str(folder)), f"folder must hold checkpoints, got {kind}"))
            continue
        if not any(file.endswith((INDEX, BIN_INDEX)) for file in files):
            parts = [file for file in files if SHARD.fullmatch(file) and file.endswith(SUFFIXES)]
            what = "part of a checkpoint must lie beside its index (*.index.json), got none"
            skipped += [Skipped(printable(str(folder / file)), what) for file in parts]
        unnamed += [folder / file for file in files if not file.endswith((*SUFFIXES, ".index.json"))]
    if unnamed:
        skipped.append(Skipped(printable(str(path)), describe_unnamed(unnamed)))
    return Search(sorted(found), skipped)


def describe_unnamed(files: Sequence[Path]) -> str:
    """How many files have no suffix of checkpoints, and what the first of them is that is known to hold weights."""
    counts = Counter(printable(file.suffix) or "without" for file in files)
    told = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(MAX_SUFFIXES))
    told += ", ..." if len(counts) > MAX_SUFFIXES else ""
    what = f"files must have one of the suffixes {', '.join(SUFFIXES)}, got {len(files):,} with others ({told})"
    for file in files[:MAX_OPENED]:
        kind = look(file)
        if kind and not kind.startswith(TEXT):
            return f"{what}; {printable(file.name)} is {kind}"
    return what


def look(file: Path) -> str:
    try:
        return find_kind(file, "torch")
    except OSError:
        return ""  # nobody has asked for it


def is_checkpoint(file: str) -> bool:
    """By name; parts of a checkpoint of several files are found through its index."""
    named = file.endswith(SUFFIXES) and not SHARD.fullmatch(file) and not STATES.fullmatch(file)
    return named or file.endswith((INDEX, BIN_INDEX))


def skipped_repositories(path: Path) -> list[Skipped]:
    """Folders that are no repositories though they have weights, or are some without weights that are read."""
    skipped = []
    for folder, files in walk(path):
        weights = [file for file in files if file.endswith((*SUFFIXES, *OTHER_WEIGHTS))]
        got, reason = ", ".join(map(printable, weights[:3])) or "no weights", None
        if "config.json" in files and not find_weights(folder):
            reason = f"repository must hold safetensors files or {BIN}, got {got}"
        elif "config.json" not in files and weights:
            reason = f"repository must hold config.json, got {got} without it"
        skipped += [Skipped(printable(str(folder)), reason)] if reason else []
    return skipped


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
