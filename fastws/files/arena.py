"""Many files as one memory-mapped vector of bytes, so that one call of an operator reads from any of them."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.files.limits import open_regular

FIXED, NO_RESERVE = 0x10, 0x4000  # of mmap(2) on Linux; Python has no names for them
RANDOM, WILL_NEED = 1, 3  # of madvise(2)
PAGE = mmap.PAGESIZE


class Arena(NamedTuple):
    """Files one behind the other, each from a page of its own; what lies between them is zeros."""

    bytes: Tensor  # uint8 [A], which must not be written to
    begins: Tensor  # int64 [files], where each begins
    end: int = 0  # where the last one ends, at the end of its page

    def prefetch(self, begin: Sequence[int], size: Sequence[int]) -> None:
        """Asks the system to read these bytes ahead; returns at once."""
        address = self.bytes.data_ptr()
        for first, count in zip(begin, size, strict=True):
            page = first // PAGE * PAGE
            C.madvise(address + page, first + count - page, WILL_NEED)


def library() -> ctypes.CDLL:
    c = ctypes.CDLL(None, use_errno=True)
    c.mmap.restype, c.munmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
    c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return c


C = library()


class Mapping:
    """A stretch of addresses that is given back when nobody uses it any more."""

    def __init__(self, size: int):
        self.size = size
        self.address = self.map(None, size, -1)

    def map(self, address: int | None, size: int, file: int) -> int:
        kind = mmap.MAP_PRIVATE | (mmap.MAP_ANONYMOUS | NO_RESERVE if file < 0 else 0) | (FIXED if address else 0)
        found = C.mmap(address, size, mmap.PROT_READ, kind, file, 0)
        if found == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, f"files: {size:,} bytes must fit into memory maps, got {os.strerror(number)}")
        return found

    def __del__(self):
        if getattr(self, "address", None):
            C.munmap(self.address, self.size)


def map_files(paths: Sequence[Path], zeros: int = 0) -> Arena:
    """Maps whole files, which must stay as they are meanwhile, and so many zeros behind them, which take no memory.

    Raises:
        OSError: If a file cannot be opened, or there are more than the system maps.
    """
    begins, end, opened = [], 0, []
    for path in paths:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        begins.append(end)
        opened.append(size)
        end += -(-size // PAGE) * PAGE
    mapping = Mapping(max(end + -(-zeros // PAGE) * PAGE, PAGE))
    for path, begin, size in zip(paths, begins, opened, strict=True):
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size < size:
                raise OSError(f"{path}: file must stay as it is while it is opened, got a shorter one")
            if size:
                mapping.map(mapping.address + begin, size, file.fileno())
                C.madvise(mapping.address + begin, size, RANDOM)  # only what is asked for is read
    return Arena(as_tensor(mapping), torch.tensor(begins, dtype=torch.int64), end)


def as_tensor(mapping: Mapping) -> Tensor:
    # the tensor holds the buffer, and the buffer the mapping
    buffer = (ctypes.c_uint8 * mapping.size).from_address(mapping.address)
    buffer.mapping = mapping
    return torch.frombuffer(buffer, dtype=torch.uint8)
