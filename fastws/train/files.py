"""What a run writes: checkpoint.pt, of which a complete one is there at any moment, and the lines of log.jsonl."""

import json
import platform
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastws
from fastws.devices import processor_name
from fastws.files.atomic import open_to_append, write_atomically, write_file
from fastws.files.checkpoints import load_plain
from fastws.files.json import parse
from fastws.files.limits import read_bytes
from fastws.runs import processes
from fastws.version import __version__

if find_spec("tensorboard"):
    from torch.utils.tensorboard import SummaryWriter
else:
    SummaryWriter = None


OWN_HALF = re.compile(r"(checkpoint\.pt|best\.pt|log\.jsonl|results\.json)\.[0-9a-f]+\.tmp")


def make_folder(path: str) -> Path:
    """Creates the folder of a run; raises OSError if nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for half in folder.glob("*.tmp") if processes.rank() == 0 else ():  # of processes that were killed
            if OWN_HALF.fullmatch(half.name):
                half.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"train: out must be a folder that can be written, got {path!r}: {error.strerror}") from error
    return folder


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain containers, atomically.

    Raises:
        OSError: If the disk is full.
    """
    size = sum(tensor.nbytes for tensor in tensors(state))
    try:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError("No space left on device")
        with write_atomically(path, size) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's archive writer, after a failed write
        room = f"disk must have room for {(size >> 20) + 1} MiB at {path}"
        reason = error.__cause__ or error
        raise OSError(f"train: {room}, got {reason}; free it, then run the same command again to resume") from error


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for child in children for tensor in tensors(child)]


def load(path: Path) -> dict[str, Any]:
    """Reads what ``save`` wrote; nothing but tensors and plain containers is accepted."""
    try:
        return load_plain(path)
    except ValueError as error:
        got = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"train: {path} must be a checkpoint, got that {got}; remove it to start anew") from error


def describe(device: torch.device) -> dict[str, str]:
    """Versions, commit and device, for the first line of a log."""
    root = Path(fastws.__file__).parents[1]
    commit = "unknown"
    if (root / "setup.py").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or commit
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "fastws": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "device": f"{device.type}: {name}, {torch.get_num_threads()} threads",
    }


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
        path = folder / "log.jsonl"
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
