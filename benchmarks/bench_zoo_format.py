"""A zoo of a million states: written, opened, read at random; and what a state of a CNN-s zoo takes on disk.

Predicted: a million states of 97 weights are 388 MB, which are written twice, once as they come and once merged: at
300 MB/s 2.6 s, and 5 us a state in Python to check and convert its properties, 5 s; 100 appends wait for six fsyncs
each, 10 ms each, 6 s. To open it is to read zoo.json, which lists 20,000 names of models, 10 ms; the memory for them,
5 MB, does not depend on the number of states. 256 random rows are 100 kB, 20 us; it turned out to be a millisecond,
because each is the first in its page: a page fault of 4 to 5 us. A state of a CNN-s is 9,856 bytes; five random float32
properties 20 bytes and repeated ones nearly none, 0.2 %.

Run: fastws bench zoo_format
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fastws.benchmarks.harness import Options
from fastws.layout.layout import Layout
from fastws.zoo import Zoo, ZooWriter

EPOCHS, APPEND, ROWS = 50, 10_000, 256
CNN_S = 2464  # weights
OPEN = """
import json, resource, sys, time, torch
from fastws.zoo import Zoo
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
zoo = Zoo.open(sys.argv[1])
us = (time.perf_counter() - begin) * 1e6
print(json.dumps({"us": us, "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3}))
"""


def layout_of(weights: int) -> Layout:
    return Layout.from_checkpoint(nn.Linear(weights - 1, 1))


def write(path: Path, weights: int, states: int) -> float:
    """Seconds."""
    begin = time.perf_counter()
    with ZooWriter(path, layout_of(weights)) as zoo:
        for first in range(0, states, APPEND):
            count = min(APPEND, states - first)
            number = torch.arange(first, first + count)
            names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "generalisation_gap")
            columns = {"model": [f"net_{model}" for model in (number // EPOCHS).tolist()], "epoch": number % EPOCHS}
            zoo.append(torch.randn(count, weights), columns | {name: torch.rand(count) for name in names})
    return time.perf_counter() - begin


def bytes_per_weight_byte(path: Path, weights: int, states: int) -> float:
    return sum(file.stat().st_size for file in path.iterdir()) / (4 * weights * states)


def opened(path: Path, repeats: int) -> dict:
    """Medians of processes of their own."""
    runs = [subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True) for _ in range(repeats)]
    answers = [json.loads(run.stdout) for run in runs]
    return {key: statistics.median(answer[key] for answer in answers) for key in ("us", "mb")}


def rows(options: Options) -> Iterator[dict]:
    states = 5000 if options.small else 100_000 if options.quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path, about = Path(folder) / "zoo", {"op": "zoo", "case": f"{states:,} states of 97 weights"}
        yield about | {"implementation": "write", "us": write(path, 97, states) * 1e6}
        yield about | {"implementation": "open"} | opened(path, 1 if options.small else 5)
        zoo, times = Zoo.open(path), []
        for seed in range(20):
            numbers = torch.randint(states, (ROWS,), generator=torch.Generator().manual_seed(seed))
            begin = time.perf_counter()
            zoo.rows(numbers)
            times.append((time.perf_counter() - begin) * 1e6)
        yield about | {"implementation": f"{ROWS} random rows", "us": statistics.median(times)}
    with tempfile.TemporaryDirectory() as folder:
        path, states = Path(folder) / "zoo", states // 50
        us = write(path, CNN_S, states) * 1e6
        about = {"op": "zoo", "implementation": "write", "case": f"{states:,} states of CNN-s", "us": us}
        yield about | {"bytes_of_weights": bytes_per_weight_byte(path, CNN_S, states)}
