"""What a user waits for first: ``import fastws``, and the layout of a checkpoint of 1 GB from its header.

Predicted: the header of 300 tensors is 30 kB of JSON, a millisecond to read and check, and the table as much to make;
nothing of the gigabyte is touched. Each runs in a process of its own, several times.

Run: fastws bench layout
"""

import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastws.benchmarks.harness import Options

IMPORT = """
import time, torch
begin = time.perf_counter()
import fastws
print((time.perf_counter() - begin) * 1e6)
"""
REGISTER = IMPORT.replace("import fastws", "import fastws.ops; fastws.ops.register_all()")
LAYOUT = """
import resource, sys, time, torch, fastws
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
layout = fastws.Layout.from_checkpoint(sys.argv[1], token_size=1024)
us = (time.perf_counter() - begin) * 1e6
assert layout.num_weights > 2.6e8
print(us, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def write_large(path: Path) -> None:
    """A safetensors file of 1.07 GB, its data a hole in the file."""
    header, end = {}, 0
    for i in range(16):
        for j in range(16):
            for name, shape in ((f"layer{i}.block{j}.weight", [1024, 1024]), (f"layer{i}.block{j}.bias", [1024])):
                size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
                end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def measure(repeats: int, code: str, *args: str) -> list[list[float]]:
    command = [sys.executable, "-c", code, *args]
    # an installed package comes with its bytecode
    with_bytecode = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    options = {"env": with_bytecode, "capture_output": True, "text": True, "check": True}
    outputs = [subprocess.run(command, **options).stdout for _ in range(repeats)]
    return [list(map(float, column)) for column in zip(*(output.split() for output in outputs), strict=True)]


def rows(options: Options) -> Iterator[dict]:
    repeats = 1 if options.small else 9
    for case, code in (("names", IMPORT), ("and all operators, which are registered at first use", REGISTER)):
        (us,) = measure(repeats, code)
        yield {"op": "import fastws", "implementation": "beyond torch", "case": case, "us": statistics.median(us)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.safetensors")
        write_large(path)
        us, kilobytes = measure(repeats, LAYOUT, str(path))
    about = {"op": "layout", "implementation": "header only", "case": "1.07 GB safetensors"}
    yield about | {"us": statistics.median(us), "mb": statistics.median(kilobytes) / 1e3}
