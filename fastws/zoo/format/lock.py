"""One writer per folder: a lock file with the owner's process id, which the system unlocks when that process ends."""

import os
from pathlib import Path
from typing import BinaryIO

from fastws.files.atomic import open_to_append
from fastws.terminal import shorten

try:
    import fcntl
except ImportError:  # Windows has no flock; there a second writer goes unnoticed
    fcntl = None

LOCK = "writer.lock"


def take_lock(path: Path) -> BinaryIO:
    """Makes a folder, if need be, and locks it.

    Raises:
        OSError: If the folder cannot be written.
        BlockingIOError: If another writer has the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        while True:
            lock = open_to_append(path / LOCK)  # it stays open as long as the writer
            if fcntl is None:
                return lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = shorten(lock.read(20).decode(errors="replace").strip()) or "unknown"
                lock.close()
                raise BlockingIOError(
                    f"{path}: zoo must have one writer, process {owner} has it open; wait for it"
                ) from None
            if (path / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), (path / LOCK).stat()):
                lock.truncate(0)
                lock.write(str(os.getpid()).encode())
                lock.flush()
                return lock
            lock.close()  # its last owner has removed it meanwhile
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{path}: folder must be writable, got {error.strerror}") from error


def release_lock(path: Path, lock: BinaryIO) -> None:
    if fcntl is not None:  # Windows removes no open file
        (path / LOCK).unlink(missing_ok=True)
    lock.close()
