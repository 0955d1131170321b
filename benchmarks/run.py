"""Runs benchmarks: ``bench_<name>.py`` has ``cases(options)`` or, where no cases race, ``rows(options)``."""

import json
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from fastws.benchmarks.harness import Options, machine, race

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
HIDDEN = ("torch", "commit", "date")  # not printed with every row


def run(names: Sequence[str], options: Options) -> None:
    """Prints a row for everything that is timed, and adds it to ``options.out``/<machine>.jsonl.

    Raises:
        ValueError: If there is no benchmark of a name.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"bench: names must be of {', '.join(NAMES)}, got {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    about = machine()
    for name in names or NAMES:
        for row in rows(load(name), options):
            row = row | {"load": os.getloadavg()[0]}
            rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
            print(*(f"{key}={value}" for key, value in (rounded | about).items() if key not in HIDDEN), flush=True)
            if options.out is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                with open(options.out / f"{about['device'].replace(' ', '-').lower()}.jsonl", "a") as file:
                    file.write(json.dumps(rounded | about) + "\n")


def load(name: str) -> ModuleType:
    return import_module(f"fastws.benchmarks.bench_{name}")


def rows(module: ModuleType, options: Options) -> Iterator[dict]:
    if hasattr(module, "cases"):
        for case in module.cases(options):
            yield from race(case, options)
    if hasattr(module, "rows"):
        yield from module.rows(options)
