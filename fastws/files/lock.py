"""One writer at a time: a lock file with the owner's process id, which the system unlocks when that process ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastws.files.atomic import open_to_append
from fastws.terminal import shorten

try:
    import fcntl
except ImportError:  # Windows has no flock; there a second writer goes unnoticed
    fcntl = None

LOCK = "writer.lock"


def take_lock(path: Path, name: str = LOCK) -> BinaryIO:
    """Makes a folder, if need be, and locks what the file ``name`` in it stands for: by default all of it.

    Raises:
        OSError: If the folder cannot be written.
        BlockingIOError: If another writer has the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        while True:
            lock = open_to_append(path / name)  # it stays open as long as the writer
            if fcntl is None:
                return lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = shorten(lock.read(20).decode(errors="replace").strip()) or "unknown"
                lock.close()
                what = path if name == LOCK else path / name.removesuffix(".lock")
                raise BlockingIOError(
                    f"{what}: one process at a time may write it, process {owner} does; wait for it"
                ) from None
            if (path / name).exists() and os.path.samestat(os.fstat(lock.fileno()), (path / name).stat()):
                lock.truncate(0)
                lock.write(str(os.getpid()).encode())
                lock.flush()
                return lock
            lock.close()  # its last owner has removed it meanwhile
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{path}: folder must be writable, got {error.strerror}") from error


def release_lock(path: Path, lock: BinaryIO, name: str = LOCK) -> None:
    if fcntl is not None:  # Windows removes no open file
        (path / name).unlink(missing_ok=True)
    lock.close()


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Lets this process alone write a file, which need not be there, while the block lasts; see ``take_lock``."""
    folder, name = path.parent, f"{path.name}.lock"
    made = not folder.exists()
    lock = take_lock(folder, name)
    try:
        yield
    finally:
        release_lock(folder, lock, name)
        if made:
            with suppress(OSError):  # unless something was written into it
                folder.rmdir()
