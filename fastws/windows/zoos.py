"""Zoos as one population: in memory where they fit, else read from their files as windows are cut."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastws.files.arena import map_files
from fastws.layout.entries import Span
from fastws.layout.layout import Layout
from fastws.layout.moments import Statistic, layer_scales
from fastws.windows.population import Kind, Population, make_population
from fastws.zoo.alignment import Alignment, permutations_of, rows_of
from fastws.zoo.format.zoo import Zoo

GIGABYTE = 10**9
ROWS = 64  # networks that are read at a time
PART = 0.5  # of the free memory that networks may take unless it is said


class Group(NamedTuple):
    """Networks that are evaluated together: those of one zoo, or of one folder."""

    name: str
    train: Tensor  # rows of the population, int64, on the CPU
    val: Tensor


def layouts_of(zoos: Sequence[Zoo], token_size: int | None, norm: Literal["keep", "skip"], span: Span) -> list[Layout]:
    """The layouts of zoos with one size of tokens: by default that of the longest row of all."""
    layouts = [zoo.layout.with_tokens(token_size, norm, span) for zoo in zoos]
    size = max(layout.token_size for layout in layouts)
    return [layout if layout.token_size == size else layout.with_tokens(size) for layout in layouts]


def open_zoos(
    zoos: Sequence[Zoo],
    chosen: Sequence[dict[str, Tensor]],
    layouts: Sequence[Layout],
    device: torch.device,
    *,
    permute: bool = True,
    aligned: bool = False,
    statistic: Statistic | None = "std",
    memory: float | None = None,
) -> tuple[Population, list[Group]]:
    """Networks of zoos as one population.

    Args:
        zoos: Open ones.
        chosen: The rows of each that are wanted, by split: ``"train"`` and ``"val"``.
        layouts: Of their tokens; see ``layouts_of``.
        device: Where windows are wanted. What does not fit is read from files, and cut on the CPU.
        permute: Whether tables are to have permutations, for zoos that have a symmetry.
        aligned: Networks in the order that ``fastws zoo align`` found.
        statistic: Of each zoo's training networks, by which layers are scaled; None: as they are.
        memory: Gigabytes that the networks may take; by default half of what is free.

    Raises:
        FileNotFoundError: If ``aligned`` and a zoo has no alignment.
    """
    kinds, groups, rows, first = [], [], [], 0
    for zoo, splits, layout in zip(zoos, chosen, layouts, strict=True):
        kind = Kind.of(layout, zoo.symmetry if permute or aligned else None)
        if statistic is not None:
            kind = kind._replace(**scales(zoo, splits["train"], layout, aligned, statistic))
        kinds.append(kind)
        counts = [len(splits[split]) for split in ("train", "val")]
        numbers = torch.arange(first, first + sum(counts)).split(counts)
        groups.append(Group(name_of(zoo, zoos), *numbers))
        rows.append(torch.cat([splits["train"], splits["val"]]))
        first += sum(counts)
    kind = torch.arange(len(zoos)).repeat_interleave(torch.tensor([len(some) for some in rows]))
    may_flip = torch.cat([zoo.may_flip[some] for zoo, some in zip(zoos, rows, strict=True)])
    fields = {"may_flip": may_flip if may_flip.any() else None, "dtypes": [zoo.dtype for zoo in zoos]}
    size = sum(len(some) * row_bytes(zoo) for zoo, some in zip(zoos, rows, strict=True))
    if fits(size, memory, device):
        kinds = [k if permute else k._replace(symmetry=None) for k in kinds]
        content, begins = read_all(zoos, rows, aligned, size, device)
        return make_population(kinds, kind, content, begins, **fields), groups
    arena = map_files([file for zoo in zoos for file in zoo.weight_files])
    begins = torch.cat(find_rows(zoos, rows, arena.begins))
    fields["aligned"] = permutations_in(zoos, rows, kinds) if aligned else None
    return make_population(kinds, kind, arena.bytes, begins, arena=arena, **fields), groups


def name_of(zoo: Zoo, zoos: Sequence[Zoo]) -> str:
    alike = sum(other.path.name == zoo.path.name for other in zoos) > 1
    return str(zoo.path) if alike else zoo.path.name


def scales(zoo: Zoo, rows: Tensor, layout: Layout, aligned: bool, statistic: Statistic) -> dict[str, Tensor]:
    read = rows_of(zoo, aligned)

    def networks() -> Iterator[Tensor]:
        for part in rows.split(ROWS):
            yield from read(part)

    return dict(zip(("mean", "std"), layer_scales(networks(), layout, statistic), strict=True))


def row_bytes(zoo: Zoo) -> int:
    return zoo.layout.num_weights * zoo.dtype.itemsize


def fits(size: int, memory: float | None, device: torch.device) -> bool:
    if memory is not None:
        return size <= memory * GIGABYTE
    if device.type == "cuda":
        return size <= PART * torch.cuda.mem_get_info(device)[0]
    return size <= PART * free_memory()


def free_memory() -> int:
    """Bytes that programs may still take, what the system keeps of files included."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    known = dict(line.split(":", 1) for line in lines)
    if "MemAvailable" in known:
        return int(known["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_all(
    zoos: Sequence[Zoo], rows: Sequence[Tensor], aligned: bool, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The bytes of chosen rows, one behind the other, each zoo from a multiple of 64; and where each row begins."""
    content = torch.empty(size + 64 * (len(zoos) + 1) & -64, dtype=torch.uint8, device=device)
    begins, end = [], 0
    for zoo, some in zip(zoos, rows, strict=True):
        read, width = rows_of(zoo, aligned), row_bytes(zoo)
        begins.append(end + torch.arange(len(some)) * width)
        for part, first in zip(some.split(ROWS), begins[-1][::ROWS].tolist(), strict=True):
            content[first : first + len(part) * width] = read(part).flatten().view(torch.uint8).to(device)
        end = (end + len(some) * width + 63) & -64
    return content, torch.cat(begins)


def find_rows(zoos: Sequence[Zoo], rows: Sequence[Tensor], files: Tensor) -> Iterator[Tensor]:
    """Where chosen rows begin in the mapped files of all zoos."""
    found, file = [], 0
    for zoo, some in zip(zoos, rows, strict=True):
        begins = []
        for shard in zoo.shards:
            data = int(files[file]) + shard.storage_offset() * zoo.dtype.itemsize
            begins.append(data + torch.arange(len(shard)) * row_bytes(zoo))
            file += 1
        found.append(torch.cat(begins)[some])
    return found


def permutations_in(zoos: Sequence[Zoo], rows: Sequence[Tensor], kinds: Sequence[Kind]) -> Tensor:
    """What aligns each of the chosen networks, int32 ``[m, S]``, S that of the largest symmetry."""
    found = [
        kind.symmetry.expand(permutations_of(zoo, some, Alignment.open(zoo)))
        for zoo, some, kind in zip(zoos, rows, kinds, strict=True)
    ]
    width = max(x.shape[1] for x in found)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in found])
