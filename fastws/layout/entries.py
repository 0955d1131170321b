"""Entries: the tensors of a checkpoint in a row, and the table of those that are tokenized."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from fastws.layout.roles import Role, bias_name
from fastws.table import Row

Span = Literal["row", "layer", "network"]  # what the entries of a token are of, at most
NATIVE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes that a flat vector can have


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    offset: int  # of its first number in the flat vector; -1: kept aside

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def parse_entry(fields: Mapping) -> Entry:
    """The entry that ``dataclasses.asdict`` and JSON made plain, from a file that may be anybody's."""
    entry = Entry(
        fields["name"], tuple(fields["shape"]), dtype_named(fields["dtype"]), fields["role"], fields["offset"]
    )
    if not isinstance(entry.name, str) or entry.role not in get_args(Role):
        raise ValueError(f"name and role must be strings, a role one of {get_args(Role)}, got {fields}")
    if not all(type(size) is int and size >= 0 for size in entry.shape):
        raise ValueError(f"shape must be of whole numbers from 0, got {fields}")
    return entry


def dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be one of torch, got {name!r}")
    return dtype


def check_offsets(entries: Sequence[Entry]) -> None:
    """Raises ValueError unless entries follow each other without gaps: operators trust the tables made of them."""
    end = 0
    for entry in entries:
        expected = end if entry.dtype.is_floating_point else -1
        if type(entry.offset) is not int or entry.offset != expected:
            raise ValueError(f"layout: offset of {entry.name!r} must be {expected}, got {entry.offset!r}")
        end += entry.numel if entry.offset >= 0 else 0
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError(f"layout: names of {len(entries)} entries must differ, got one twice")
    if not 0 < end < 2**63:
        what = f"{len(entries)} tensors without one" if end == 0 else f"{end} numbers"
        raise ValueError(f"layout: checkpoint must hold a floating tensor, and less than 2**63 numbers, got {what}")


def find_layers(entries: Sequence[Entry], norm: str) -> list[tuple[Entry, Entry | None]]:
    """The tokenized tensors, each with the bias that is the last entry of its rows."""
    by_name = {entry.name: entry for entry in entries}
    layers, attached = [], set()
    for entry in entries:
        if entry.offset < 0 or entry.numel == 0:
            continue
        bias = by_name.get(bias_name(entry.name)) if entry.role.endswith("weight") else None
        if bias is None or not bias.role.endswith("bias") or bias.shape != entry.shape[:1] or bias.name in attached:
            bias = None
        else:
            attached.add(bias.name)
        layers.append((entry, bias))
    skip = ("norm weight", "norm bias", "norm statistic") if norm == "skip" else ()
    return [(entry, bias) for entry, bias in layers if entry.name not in attached and entry.role not in skip]


def flat_order(layers: Sequence[tuple[Entry, Entry | None]]) -> list[tuple[Entry, None]]:
    """The tensors of layers, biases as layers of their own, in the order of the flat vector."""
    tensors = [entry for layer in layers for entry in layer if entry is not None]
    return [(entry, None) for entry in sorted(tensors, key=lambda entry: entry.offset)]


def make_table(layers: Sequence[tuple[Entry, Entry | None]], token_size: int, span: Span = "row") -> Tensor:
    table, end = [], 0  # in entries of tokens
    for entry, bias in layers:
        rows = entry.shape[0] if entry.shape else 1
        length = entry.numel // rows
        units = entry.shape[1] if len(entry.shape) > 1 else 1
        begin = end if span == "network" else -(-end // token_size) * token_size
        chunks = -(-row_length(entry, bias) // token_size) if span == "row" else -(begin % token_size)
        row = Row(
            weight_offset=entry.offset,
            bias_offset=-1 if bias is None else bias.offset,
            rows=rows,
            row_length=length,
            block=length // units,
            units=units,
            chunks=chunks,
            first_token=begin // token_size,
            first_out=-1,
            first_in=-1,
            first_bias=-1,
        )
        table.append(row)
        end = begin + rows * row.stride(token_size)
    return torch.tensor(table, dtype=torch.int64, device="cpu").view(-1, len(Row._fields))


def row_length(entry: Entry, bias: Entry | None) -> int:
    return entry.numel // (entry.shape[0] if entry.shape else 1) + (bias is not None)


def flat_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype of a flat vector that holds all of ``dtypes`` exactly; float32 for floats of 8 bits."""
    return reduce(torch.promote_types, (d if d in NATIVE else torch.float32 for d in dtypes))
