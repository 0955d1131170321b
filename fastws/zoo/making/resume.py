"""What a run that trains networks keeps beside its zoo: where it goes on after a kill."""

from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from fastws.files.atomic import write_tensors
from fastws.files.safetensors import open_tensors
from fastws.zoo.making.training import Wave

RESUME = "resume.safetensors"


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
