"""The folder of a training run, and checkpoint.pt in it, of which a complete one is there at any moment."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastws
from fastws.devices import processor_name
from fastws.files.atomic import write_atomically
from fastws.files.checkpoints import load_plain
from fastws.files.lock import one_writer
from fastws.runs import processes
from fastws.version import __version__

OWN_HALF = re.compile(r"(checkpoint(-\d+)?\.pt|best\.pt|log\.jsonl|results\.json)\.[0-9a-f]+\.tmp")


def make_folder(path: str) -> Path:
    """Creates the folder of a run; raises OSError if nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"train: out must be a folder that can be written, got {path!r}: {error.strerror}") from error
    return folder


def claims_folder(train: Callable) -> Callable:
    """Lets one run at a time train into ``config.out``, the first argument's; its first process holds the lock."""

    @wraps(train)
    def claimed(config, **given):
        folder = make_folder(config.out)
        if processes.rank():
            return train(config, **given)
        with one_writer(folder / "checkpoint.pt"):
            for half in folder.glob("*.tmp"):  # of processes that were killed
                if OWN_HALF.fullmatch(half.name):
                    half.unlink(missing_ok=True)
            return train(config, **given)

    return claimed


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


def keep(path: Path, step: int) -> None:
    """Keeps a checkpoint beside those that follow it; a link where the disk has links, which costs no room."""
    kept = path.with_name(f"{path.stem}-{step}{path.suffix}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        with write_atomically(kept, path.stat().st_size) as file, path.open("rb") as source:
            shutil.copyfileobj(source, file)


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
