"""What was done to one tensor to make another of it: quantised, pruned, changed by few directions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.compare.differences import BYTES, Difference, coarser, rounding
from fastws.compare.kinship import spaced

BITS = (2, 3, 4, 8)  # of quantised numbers
BLOCKS = (128, 64, 32)  # entries that share a scale, where rows and tensors do not
PER_LEVEL = 4  # entries that are needed for each level before few distinct values say anything
LOOKED_AT = 128  # numbers of the first row that tell nearly all tensors from quantised ones
SAMPLED = 64  # rows or blocks that are looked at before all are
RANK = 64  # the largest that is called low
SPARE = 8  # directions beyond, which make the random range surer
AT_ONCE = 2**22  # numbers that are in memory as a copy
LARGEST = 2**25  # entries of a difference whose directions are sought; of larger ones only some rows
PIECES = (2, 4)  # N of M in a row of weights
FLOOR = 3.0  # times the rounding: changes below it have no rank that can be told


class Levels(NamedTuple):
    """Few distinct numbers."""

    bits: int  # of which they need no more
    per: str  # "tensor", "row" or "block of 64": what shares a scale


class Rank(NamedTuple):
    """Of a difference."""

    rank: int | None  # None: too small against rounding to be told
    full: bool = False  # above what is looked for


def find_levels(tensor: Tensor) -> Levels | None:
    """How many levels a tensor has that was quantised, with a scale for the tensor, its rows, or blocks of them.

    Exact: numbers are compared bit by bit. None where entries are too few to tell, or distinct numbers too many.
    """
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return None
    rows = tensor.reshape(len(tensor), -1) if tensor.numel() else tensor
    for bits in BITS:
        if has_many(rows, bits):
            continue
        needed = PER_LEVEL * 2**bits
        if tensor.numel() >= needed and has_few(rows.reshape(1, -1), 2**bits):
            return Levels(bits, "tensor")
        if len(rows) > 1 and rows.shape[1] >= needed and has_few(rows, 2**bits):
            return Levels(bits, "row")
        for block in BLOCKS:
            if block >= needed and rows.shape[1] % block == 0 and has_few(rows.reshape(-1, block), 2**bits):
                return Levels(bits, f"block of {block}")
    return None


def has_many(rows: Tensor, bits: int) -> bool:
    """Whether the first numbers alone are more than levels of so many bits, whatever shares a scale."""
    most = LOOKED_AT // BLOCKS[-1] * 2**bits  # of scales that blocks have in them, the levels of each
    return most < LOOKED_AT <= rows.shape[1] and not has_few(rows[:1, :LOOKED_AT], most)


def has_few(rows: Tensor, most: int) -> bool:
    """Whether each row ``[n, k]`` has at most so many distinct numbers; a few are looked at first."""
    bits = rows.view(BYTES[rows.dtype.itemsize])
    few = bits[spaced(len(bits), SAMPLED)][:, : PER_LEVEL * most]
    if bool((count_distinct(few) > most).any()):
        return False
    if len(bits) == 1:
        return has_few_in_all(bits[0], most)
    return all(bool((count_distinct(some) <= most).all()) for some in bits.split(max(1, AT_ONCE // bits.shape[1])))


def has_few_in_all(entries: Tensor, most: int) -> bool:
    """Whether a vector has at most so many distinct entries, without sorting it whole."""
    levels = entries[:most].unique()
    for some in entries.split(AT_ONCE):
        new = levels[torch.searchsorted(levels, some).clamp(max=len(levels) - 1)] != some
        if new.any():
            levels = torch.cat([levels, some[new]]).unique()
        if len(levels) > most:
            return False
    return True


def count_distinct(rows: Tensor) -> Tensor:
    """Distinct entries of each row."""
    ordered = rows.sort(dim=1).values
    return (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1


def stored_wider(tensor: Tensor) -> torch.dtype | None:
    """The half precision that a tensor of float32 was rounded to; None if it was not."""
    if tensor.dtype != torch.float32 or tensor.numel() < PER_LEVEL**2:
        return None
    flat = tensor.reshape(-1)
    for dtype in (torch.bfloat16, torch.float16):
        sample = flat[spaced(len(flat), 1024)]
        if all(torch.equal(some, some.to(dtype).float()) for some in (sample, *flat.split(2**22))):
            return dtype
    return None


# --- pruning


class Pruned(NamedTuple):
    """Zeros that a tensor has and that it was made from has not."""

    share: float  # of its entries that are zero
    by_magnitude: bool  # the largest that was removed is smaller than the smallest that was kept
    pattern: str | None  # "2:4"


def find_pruned(found: Difference, made: Tensor, source: Tensor, forward: bool) -> Pruned | None:
    """How ``made`` was pruned from ``source``; None if it was not. ``forward``: made is b and source a of ``found``."""
    new, zeros = found.new_zeros[0 if forward else 1], found.zeros[1 if forward else 0]
    if made.dim() == 0 or new == 0 or new < found.numel / 100:
        return None
    removed = (made == 0) & (source != 0)
    sizes = source.abs()
    kept = sizes[~removed & (made != 0)]
    smallest = float(kept.min()) if kept.numel() else math.inf
    return Pruned(zeros / found.numel, float(sizes[removed].max()) < smallest, find_pattern(made))


def find_pattern(tensor: Tensor) -> str | None:
    """``"2:4"`` where every four consecutive weights of a row have two zeros at least, likewise ``"4:8"``."""
    rows = tensor.reshape(len(tensor), -1)
    for kept in PIECES:
        if rows.shape[1] % (2 * kept) == 0 and rows.numel():
            zeros = (rows.reshape(-1, 2 * kept) == 0).sum(1)
            if bool((zeros >= kept).all()) and float((zeros == kept).float().mean()) > 0.9:
                return f"{kept}:{2 * kept}"
    return None


# --- rank


def find_rank(a: Tensor, b: Tensor, found: Difference) -> Rank:
    """The rank of b - a as matrices ``[rows, the rest]``, up to 64, by a randomised range finder with two passes.

    The smallest number of directions without which no more is left than rounding leaves (Halko, Martinsson and Tropp,
    arXiv 0909.4061).
    """
    least = rounding(coarser(a.dtype, b.dtype))
    length = math.sqrt(max(found.squares))
    if found.gap == 0:
        return Rank(0)
    if math.sqrt(found.gap) < FLOOR * least * length:
        return Rank(None)
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    level = (1.1 * least * length) ** 2 / a.numel()  # of what is left, for each entry
    rows, columns = (spaced(size, 2 * RANK) for size in a.shape)
    # a submatrix has no higher rank, and a full one is soon told from its own
    some = b[rows][:, columns].double() - a[rows][:, columns].double()
    if min(some.shape) > RANK and rank_above(torch.linalg.svdvals(some), some, 4 * level) > RANK:
        return Rank(None, full=True)
    rows = spaced(len(a), max(2 * RANK, LARGEST // a.shape[1]))
    gap = b[rows].double() - a[rows].double()
    random = torch.randn(gap.shape[1], min(RANK + SPARE, *gap.shape), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(gap @ random.double())[0]
    basis = torch.linalg.qr(gap @ torch.linalg.qr(gap.T @ basis)[0])[0]
    rank = rank_above(torch.linalg.svdvals(basis.T @ gap), gap, level)
    return Rank(rank) if rank <= min(RANK, min(gap.shape) - 1) else Rank(None, full=True)


def rank_above(strength: Tensor, matrix: Tensor, level: float) -> int:
    """How many of the largest singular values have to be taken until no more than ``level`` is left for each entry."""
    left = matrix.square().sum() - torch.cat([strength.new_zeros(1), strength.square().cumsum(0)])
    below = (left <= level * matrix.numel()).nonzero()
    return int(below[0]) if len(below) else len(strength) + 1
