"""What a run that trains networks keeps beside its zoo: where it goes on after a kill, and a line for each epoch."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from fastws.files.atomic import open_to_append, write_tensors
from fastws.files.safetensors import open_tensors
from fastws.zoo.making.training import Wave

RESUME, LOG = "resume.safetensors", "log.jsonl"


def write_resume(path: Path, first: int, wave: Wave) -> None:
    """Where a killed run goes on: the first network of the wave, its epoch, weights, moments and random numbers."""
    tensors = {"state": wave.state, "orders": wave.orders.state}
    write_tensors(path / RESUME, tensors, {"first": str(first), "epoch": str(wave.epoch)})


def read_resume(path: Path) -> tuple[int, int, dict[str, Tensor]]:
    if not (path / RESUME).exists():
        return 0, -1, {}
    try:
        with open_tensors(path / RESUME) as file:
            place = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in ("state", "orders")}
            return int(place["first"]), int(place["epoch"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / RESUME}: file must be readable, got {error!r}; take another folder") from error


def log(path: Path, line: Mapping) -> None:
    with open_to_append(path / LOG) as file:
        file.write((json.dumps({"time": round(time.time(), 3)} | line) + "\n").encode())
