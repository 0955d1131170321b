"""Files that appear whole or not at all: whoever dies while writing leaves what was there before."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
from torch import Tensor


@contextmanager
def write_atomically(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """A file that appears under ``path`` when the block ends without error, complete and on disk; else nothing does.

    Args:
        path: Where it appears, replacing what is there; folders that lack are made.
        size: Bytes needed, for the message if the disk is full.

    Raises:
        OSError: If the folder cannot be written, or the disk is full; says what to do.
    """
    # nobody can foresee the name and put a link there, and what is there already is not opened
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = "more" if size is None else f"{size:,} bytes of"
            raise OSError(error.errno, f"{path}: writing it needs {needed} free disk space; make room") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
            raise OSError(error.errno, f"{path}: folder must be writable, got {error.strerror}") from error
        if error.errno == errno.EISDIR:
            raise OSError(error.errno, f"{path}: name must be that of a file, got a folder") from error
        raise
    finally:
        remove(temporary)


def open_to_append(path: Path) -> BinaryIO:
    """Opens a file to read it and to add to it, or makes it.

    Raises:
        OSError: If it is a link, which would lead elsewhere, or no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path}: file must be a regular one, got a pipe or a device; remove it")
    return open(descriptor, "a+b")


def remove(path: Path) -> None:
    if path.parent.is_dir():
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Makes renames in a folder survive a power cut, where the system offers that."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_file(path: Path, content: bytes) -> None:
    with write_atomically(path, len(content)) as file:
        file.write(content)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of contiguous tensors."""
    write_file(path, safetensors.torch.save(tensors, metadata))


def write_json(path: Path, content: Mapping) -> None:
    # a line for each key: indentation would take ten times as long, and a zoo is written to at every step of its making
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_file(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
