"""log.jsonl, the lines that a run writes while it goes on; TensorBoard gets the numbers too where it is installed."""

import json
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastws.files.atomic import open_to_append, write_file
from fastws.files.json import parse
from fastws.files.limits import read_bytes

if find_spec("tensorboard"):
    from torch.utils.tensorboard import SummaryWriter
else:
    SummaryWriter = None

LOG = "log.jsonl"


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one line with the time to the log of a folder."""
    with open_to_append(folder / LOG) as file:
        file.write((json.dumps({"time": round(time.time(), 3)} | record) + "\n").encode())


def is_record(line: bytes, done: int) -> bool:
    """Whether a line of a log is whole, and of a step that was done; the last one of a run that was killed is not."""
    try:
        record = parse(line, "line")
    except ValueError:
        return False
    step = record.get("step", 0) if isinstance(record, dict) else None
    return isinstance(step, int) and step <= done


class Log:
    """log.jsonl, and TensorBoard scalars where it is installed.

    Args:
        folder: Of the run.
        header: The first line of a new log.
        done: Steps that a resumed run has done; records of later steps are dropped, for they will come again.
    """

    def __init__(self, folder: Path, header: dict[str, Any], done: int):
        path = folder / LOG
        lines = read_bytes(path).splitlines() if done and path.exists() else []
        kept = [line.decode() for line in lines if is_record(line, done)]
        write_file(path, "".join(line + "\n" for line in kept or [json.dumps(header)]).encode())
        self.file = open_to_append(path)
        self.board = SummaryWriter(str(folder), purge_step=done + 1) if SummaryWriter else None

    def write(self, record: dict[str, Any]) -> None:
        try:
            self.file.write((json.dumps(record) + "\n").encode())
            self.file.flush()
        except OSError as error:
            raise OSError(
                f"train: disk must have room for {self.file.name}, got {error}; free it, then resume"
            ) from error
        if self.board:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
