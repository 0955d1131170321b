"""A zoo made by several processes, as torchrun starts them: each writes a part, and the first joins them.

    <zoo>/parts-of-<world>/<rank>/    a zoo of every world-th network, which is resumed like any other
    <zoo>/zoo.json                    written when all parts are done; once the parts are gone it is whole

The processes know of each other by these files only.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastws.files.atomic import write_file
from fastws.runs.log import LOG
from fastws.zoo.format.manifest import MANIFEST
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.resume import RESUME

DONE = "done"  # marks a part that is whole
JOINED = "joined"  # parts that are in the zoo, while they are removed
ROWS = 8192  # of one append
POLL = 0.1  # seconds


class Place(NamedTuple):
    """Which of the processes this is."""

    rank: int
    world: int


def place() -> Place:
    return Place(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def device(kind: str) -> str:
    """The GPU of this process, which it shares where there are more processes than GPUs, or the processor."""
    return kind if kind == "cpu" else f"{kind}:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def folder(path: Path, place: Place) -> Path:
    return path / f"parts-of-{place.world}" / str(place.rank)


def check(path: Path, place: Place, states: int) -> None:
    """A zoo is gone on with by as many processes as began it.

    Raises:
        ValueError: If it was begun by another number.
    """
    begun = [int(parts.name.removeprefix("parts-of-")) for parts in path.glob("parts-of-*")]
    if (path / RESUME).exists() or (not begun and is_short(path, states)):
        begun.append(1)
    for world in begun:
        if world != place.world:
            what = f"{world}, the number of processes that began {path}, got {place.world}"
            raise ValueError(f"zoo make: WORLD_SIZE must be {what}; start as many, or take another folder")


def is_short(path: Path, states: int) -> bool:
    """Whether there is a zoo of fewer states."""
    if not (path / MANIFEST).exists():
        return False
    zoo = Zoo.open(path)
    return len(zoo) + zoo.dropped < states


def begun_parts(path: Path) -> list[Path]:
    """Zoos that processes write or have written."""
    return sorted(path.glob("parts-of-*/*/"))


def finished(path: Path, place: Place) -> bool:
    return (path / MANIFEST).exists() and not folder(path, place).parent.exists()


def remove_joined(path: Path, place: Place) -> None:
    """Removes what a process that was killed at the very end left."""
    if place.rank == 0:
        shutil.rmtree(path / JOINED, ignore_errors=True)


def join(path: Path, place: Place, open_writer: Callable[[], ZooWriter], check: Callable[[Path], None]) -> None:
    """Waits until all parts are done; the first process checks them and writes the zoo, the others wait for it."""
    parts = folder(path, place).parent
    write_file(folder(path, place) / DONE, b"")
    if place.rank > 0:
        while parts.exists():
            time.sleep(POLL)
        return
    folders = [parts / str(rank) for rank in range(place.world)]
    while not all((part / DONE).exists() for part in folders):
        time.sleep(POLL)
    for part in folders:
        check(part)
    with open_writer() as writer:
        for states, properties in read_parts(folders, writer.submitted):
            writer.append(states, properties)
    logs = b"".join((part / LOG).read_bytes() for part in folders if (part / LOG).exists())  # none without networks
    write_file(path / LOG, logs)
    shutil.rmtree(path / JOINED, ignore_errors=True)
    parts.rename(path / JOINED)
    shutil.rmtree(path / JOINED)


def read_parts(folders: list[Path], done: int):
    """States and properties of the parts, in pieces, without the first ``done`` states, which end with a piece.

    States that a part has left out because they were not finite come as NaN, so that they are counted again.
    """
    for zoo in map(Zoo.open, folders):
        properties = {name: zoo.properties[name].to_numpy() for name in zoo.properties.column_names}
        for begin in range(0, len(zoo) + zoo.dropped, ROWS):
            rows = torch.arange(begin, min(begin + ROWS, len(zoo) + zoo.dropped))
            done -= len(rows)
            if done >= 0:
                continue
            there = rows < len(zoo)
            rows = rows.where(there, 0)
            states = zoo.rows(rows)
            states[~there] = torch.nan
            yield states, {name: column[rows.numpy()] for name, column in properties.items()}
