"""A checkpoint written again with other numbers: files, names, shapes and dtypes stay, and so does what lies beside."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastws.files.atomic import sync_folder, write_atomically
from fastws.files.checkpoints import find_checkpoint, is_safetensors, open_plain, read_headers, read_index
from fastws.files.lock import one_writer
from fastws.files.names import plain_names
from fastws.files.safetensors import read_description, read_safetensors_header

# what holds weights, also for other libraries: of old weights there must be none beside the new ones
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


# state: tensors by plain name, of the shapes and dtypes of the checkpoint; each is asked for when it is written


def rewrite_file(source: Path, target: Path, state: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint file again with the numbers of ``state``: whole, or not at all.

    A safetensors file keeps its header byte by byte. Of a torch file only the network is written, a plain dictionary.

    Raises:
        ValueError: If a tensor has another shape or dtype than in a safetensors file.
        OSError: If the file cannot be written.
    """
    with one_writer(target):
        write_like(source, target, plain_of(source), state)


@contextmanager
def rewritten_folder(source: Path, target: Path, state: Mapping[str, Tensor]) -> Iterator[tuple[Path, list[str]]]:
    """Writes a folder of ``save_pretrained`` again with the numbers of ``state``: whole, or not at all.

    Shards keep their tensors and headers, and all other files are copied but those that hold weights of before.

    Args:
        source: The folder.
        target: A folder that is not there, or is empty; it appears when the block ends without error.
        state: As in ``rewrite_file``.

    Yields:
        The folder as long as it is not complete, for the caller to add to, and names of what was left out.

    Raises:
        ValueError: If a tensor has another shape or dtype than in a safetensors file.
        OSError: If the target cannot be written, or something is in it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: folder must be empty or new to be written as a whole, got another one")
    path = find_checkpoint(source)
    files = [*dict.fromkeys(read_index(path).values())] if path.name.endswith(".index.json") else [path]
    with one_writer(target), new_folder(target) as folder:
        left, names = copy_others(source, folder, {file.name for file in files} | {path.name}), plain_of(path)
        for file in files:
            write_like(file, folder / file.name, names, state)
        if path not in files:
            shutil.copyfile(path, folder / path.name)
        yield folder, left


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears as ``target`` when the block ends without error."""
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def copy_others(source: Path, target: Path, written: Collection[str] = ()) -> list[str]:
    """Copies what holds no weights, in folders too; returns the names of the rest."""
    left = []
    for path in sorted(source.iterdir()):
        if path.name in written or path.name.startswith(".") or path.name.endswith((".lock", ".partial")):
            continue
        if path.name.endswith(WEIGHTS):
            left.append(path.name)
        elif path.is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and not path.is_symlink():
            left += [f"{path.name}/{name}" for name in copy_others(path, target / path.name)]
    return left


def plain_of(path: Path) -> dict[str, str]:
    """The names of a checkpoint, and what they are without wrappers."""
    if is_safetensors(path):
        headers, ties = read_headers(path)
        return plain_names([*headers, *ties])
    return plain_names(read_index(path)) if path.name.endswith(".index.json") else {}


def write_like(path: Path, target: Path, names: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Writes one file as ``path`` is, with other numbers."""
    if is_safetensors(path):
        write_safetensors_like(path, target, names, state)
        return
    # a shard is a plain dictionary, where a file alone may hold the network under a key
    held = {name: name for name in state}
    if names:
        held = {name: names[name] for name in open_plain(path).content if name in names}
    # clones: a view would bring all of what it is a view of
    tensors = {name: state[plain].clone(memory_format=torch.contiguous_format) for name, plain in held.items()}
    with write_atomically(target) as file:
        torch.save(tensors, file)


def write_safetensors_like(path: Path, target: Path, names: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    headers, (_, begin, size) = read_safetensors_header(path), read_description(path)
    with open(path, "rb") as old, write_atomically(target, size) as file:
        file.write(old.read(begin))
        for name, header in sorted(headers.items(), key=lambda item: item[1].begin):
            if name not in names:
                raise ValueError(
                    f"{path}: {name!r} must be in the index beside it, got a tensor that is not; remove it"
                )
            tensor = state[names[name]]
            if tuple(tensor.shape) != header.shape or tensor.dtype != header.dtype:
                got = f"{list(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{path}: {name!r} must be {list(header.shape)} {header.dtype}, got {got}")
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
