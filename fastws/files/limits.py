"""What bytes from outside may cost: memory by the size of the file, and regular files only."""

import errno
import os
import stat
import struct
import zlib
from typing import BinaryIO

FACTOR, SPARE = 10, 100_000_000  # a reader takes at most this many times the bytes of its file, and these on top
# what the bytes of a damaged file raise on their way through those who read them
DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError)
DAMAGED += (struct.error, zlib.error)
PIECE = 1 << 20  # bytes that are unpacked in one go


def room(size: int) -> int:
    """Bytes of memory that the reader of a file of ``size`` bytes may take."""
    return FACTOR * size + SPARE


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading, unbuffered.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it is a pipe, a socket, a device or a folder: reading these may wait or go on forever.
    """
    # without O_NONBLOCK the open itself would wait for somebody to write into a pipe
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(errno.EINVAL, f"{path}: file must be a regular one, got {what}")
    return open(descriptor, "rb", buffering=0)


def read_bytes(path: str | os.PathLike) -> bytes:
    """All bytes of a regular file."""
    with open_regular(path) as file:
        return file.readall()


def read_text(path: str | os.PathLike) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: If it is in another encoding.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: file must be text in UTF-8, got {error.reason} at byte {error.start}") from None


def unpack(file: BinaryIO, size: int, where: str) -> bytes:
    """What an opened gzip or bzip2 file unpacks to, of which at most ``size`` bytes are allowed.

    Raises:
        ValueError: If it is damaged or unpacks to more.
    """
    pieces, total = [], 0
    try:
        while piece := file.read(PIECE):
            total += len(piece)
            if total > size:
                raise ValueError(f"{where}: file must unpack to {size:,} bytes at most, got more; download it again")
            pieces.append(piece)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{where}: file must be unpacked whole, got {error}; download it again") from error
    return b"".join(pieces)
