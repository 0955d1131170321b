"""Checks that several operators share."""

import torch
from torch import Tensor

from fastws import _native
from fastws.table import Row, table_rows


def is_permutation(x: Tensor) -> bool:
    """Whether each row ``[.., n]`` of whole numbers holds each of 0 .. n - 1 once."""
    return bool((x.sort(-1).values == torch.arange(x.shape[-1], device=x.device)).all())


def check_table(op: str, table: Tensor, device: torch.device) -> None:
    if table.dim() != 2 or table.shape[1] != len(Row._fields) or table.dtype != torch.int64 or table.device != device:
        got = f"{list(table.shape)} {table.dtype} on {table.device}"
        raise ValueError(f"{op}: table must be [L, 11] int64 on {device}, got {got}")


def check_permutations(op: str, permutations: Tensor, batch: int, table: Tensor) -> None:
    """Shape, dtype and device; with FASTWS_CHECK=1 also that each vector ``table`` names is a permutation."""
    if (
        permutations.dim() != 2
        or len(permutations) != batch
        or permutations.dtype != torch.int32
        or permutations.device != table.device
    ):
        got = f"{list(permutations.shape)} {permutations.dtype} on {permutations.device}"
        raise ValueError(f"{op}: permutations must be [{batch}, S] int32 on {table.device}, got {got}")
    if not _native.CHECK or torch.compiler.is_compiling():
        return
    rows = table_rows(table)
    vectors = {(first, row.rows) for row in rows for first in (row.first_out, row.first_bias) if first >= 0}
    vectors |= {(row.first_in, row.units) for row in rows if row.first_in >= 0}
    for first, size in sorted(vectors):
        vector = permutations[:, first : first + size]
        if vector.shape[1] != size or not is_permutation(vector):
            raise ValueError(f"{op}: permutations[:, {first}:{first + size}] must hold each of 0..{size - 1} once")
