"""Device code of CUDA on the CPU, where threads are fibers; see cuda_on_host.h."""

import ctypes
import fcntl
import functools
import shutil
import subprocess
from pathlib import Path
from zlib import crc32

import pytest
import torch

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
FOLDERS = Path(torch.__file__).parent / "include", SOURCES, TESTS


@functools.cache
def compile_for_host(op: str) -> ctypes.CDLL:
    """``tests/<op>_on_host.cpp`` as a library. It is kept in build/ for processes that test side by side."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = TESTS / f"{op}_on_host.cpp"
    inputs = [source, TESTS / "cuda_on_host.h", *sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("cuda/*.h"))]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", *(f"-I{folder}" for folder in FOLDERS), source]
    digest = crc32(repr(command).encode() + b"".join(path.read_bytes() for path in inputs))
    library = TESTS.parent / f"build/on_host/{op}-{digest:08x}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            subprocess.run([*command, "-o", library.with_suffix(".part")], check=True)
            library.with_suffix(".part").rename(library)
    return ctypes.CDLL(library)


def numbers(*values: int) -> ctypes.Array:
    """An argument ``const int64_t*``."""
    return (ctypes.c_int64 * len(values))(*values)


def pointers(*tensors: torch.Tensor) -> ctypes.Array:
    """An argument ``void* const*``."""
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
