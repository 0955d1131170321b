"""Checks that several operators share."""

import torch
from torch import Tensor

from fastws import _native
from fastws.signed import split
from fastws.table import Row, table_rows


def is_permutation(x: Tensor) -> bool:
    """Whether each row ``[.., n]`` of whole numbers holds each of 0 .. n - 1 once."""
    return bool((x.sort(-1).values == torch.arange(x.shape[-1], device=x.device)).all())


def check_table(op: str, table: Tensor, device: torch.device) -> None:
    if table.dim() != 2 or table.shape[1] != len(Row._fields) or table.dtype != torch.int64 or table.device != device:
        got = f"{list(table.shape)} {table.dtype} on {table.device}"
        raise ValueError(f"{op}: table must be [L, 11] int64 on {device}, got {got}")


def prepare_out(op: str, out: Tensor, shape: tuple[int, ...], name: str, x: Tensor, table: Tensor) -> None:
    """Checks that the result for ``x``, called ``name``, can be written into ``out``, and marks it as written."""
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        got = f"{list(out.shape)} {out.dtype} on {out.device}, {'' if out.is_contiguous() else 'not '}contiguous"
        raise ValueError(f"{op}: out must be {list(shape)} {x.dtype} on {x.device}, contiguous, got {got}")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        which = name if x.requires_grad else "out"
        raise ValueError(f"{op}: {which} must not require a gradient where out is given; call it under torch.no_grad()")
    if torch.compiler.is_compiling():  # the compiler gives the operator an out of its own where memory is shared
        return
    for which, other in ((name, x), ("table", table)):
        if shares_memory(out, other):
            raise ValueError(f"{op}: out must not share memory with {which}, got one that does")
    torch.autograd.graph.increment_version(out)  # whoever keeps it for a gradient is told


def shares_memory(x: Tensor, y: Tensor) -> bool:
    """Whether the addresses between the first and the last number of both have some in common."""
    if x.numel() == 0 or y.numel() == 0 or x.device != y.device:
        return False
    (begin, end), (first, last) = addresses(x), addresses(y)
    return begin < last and first < end


def addresses(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


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
        if vector.shape[1] != size or not is_permutation(split(vector)[0]):
            raise ValueError(f"{op}: permutations[:, {first}:{first + size}] must hold each of 0..{size - 1} once")
