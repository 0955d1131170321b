"""The checkpoints of a folder, and which of them are of one architecture."""

import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastws.compare.modules import Checkpoint
from fastws.compare.paired import common_prefix, floating
from fastws.files.torch_file import NOT_A_TORCH_FILE
from fastws.terminal import shorten
from fastws.zoo.readers.checkpoints import find_checkpoints

FEW = 100  # files, which are opened before a bar is read


class Member(NamedTuple):
    """A network of a folder."""

    name: str  # its path in the folder
    checkpoint: Checkpoint
    weights: dict[str, Tensor]  # floating tensors but running statistics, by plain names; memory-mapped
    statistics: dict[str, Tensor]
    prefix: str  # of the names in the file, which those here are without


class Collection(NamedTuple):
    """What lies in a folder."""

    groups: list[list[Member]]  # networks of one architecture each, those of the largest group first
    left_out: dict[str, str]  # what could not be read, and why


def collect(folder: str | os.PathLike, progress: bool = False) -> Collection:
    """Opens all checkpoints of a folder; those with NaN or infinite weights, as runs that diverged have, are left out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds fewer than two checkpoints that can be read.
    """
    root = Path(folder)
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing"
        raise FileNotFoundError(f"{root}: source must be a folder of checkpoints, got {got}")
    search = find_checkpoints(root)
    left_out = {name_in(root, Path(skip.path)): skip.reason for skip in search.skipped}
    groups: dict[tuple, list[Member]] = {}
    for path in tqdm(
        search.files, desc="open", unit=" files", disable=not progress or len(search.files) < FEW, leave=False
    ):
        name = name_in(root, path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what open_whole says in a sentence
                member = open_member(name, path)
        except (OSError, *NOT_A_TORCH_FILE) as error:
            left_out[name] = str(error).splitlines()[0].removeprefix(f"{path}: ") if str(error) else "damaged"
            continue
        key = tuple(sorted((name, tuple(x.shape)) for name, x in (member.weights | member.statistics).items()))
        groups.setdefault(key, []).append(member)
    count = sum(map(len, groups.values()))
    if count < 2:
        why = "".join(f"; {name}: {reason}" for name, reason in list(left_out.items())[:1])
        raise ValueError(f"{root}: folder must hold at least two checkpoints, got {count}{why}")
    return Collection(sorted(groups.values(), key=len, reverse=True), left_out)


def open_member(name: str, path: Path) -> Member:
    checkpoint = Checkpoint.open_whole(path)
    state, prefix = floating(checkpoint), common_prefix(checkpoint.state)
    statistics = {entry.name for entry in checkpoint.layout.entries if entry.role == "norm statistic"}
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for key, tensor in state.items():
        if not math.isfinite(tensor.sum(dtype=torch.float64)):  # at once, and of 8 bits too
            raise ValueError(f"weights must be finite, got NaN or infinity in {shorten(key)!r}")
        parts[key in statistics][key.removeprefix(prefix)] = tensor
    return Member(name, checkpoint, *parts, prefix)


def name_in(root: Path, path: Path) -> str:
    """A path in a folder; the weights of a folder of transformers are that folder."""
    relative = path.relative_to(root) if path.is_relative_to(root) else path
    usual = path.name.split(".")[0] in ("model", "pytorch_model", "diffusion_pytorch_model")
    alone = usual and (path.parent / "config.json").is_file() and path.parent != root
    return str(relative.parent if alone else relative)
