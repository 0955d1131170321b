"""How two checkpoints differ in stored coordinates, tensor by tensor, in one pass over both."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

CHUNK = 2**18  # numbers of each network that are in cache at a time
LONG = 2**28  # bytes, which take a second: less needs no bar
BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of a number


@dataclass
class Difference:
    """One tensor in two networks, a and b, as numbers of the coarser of their dtypes.

    Attributes:
        name: Of the tensor in a.
        shape: In both.
        dtypes: In a and in b.
        identical: Whether dtypes and all bytes are equal.
        unequal: Entries whose numbers differ.
        new_zeros: Entries that are zero in b alone, and in a alone.
        zeros: Entries that are zero in a, and in b.
        dot: Inner product of a and b.
        squares: Sum of squares of a, and of b.
        gap: Sum of squares of b - a.
        nonfinite: Entries that are NaN or infinite, in a or in b.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    identical: bool = True
    unequal: int = 0
    new_zeros: tuple[int, int] = (0, 0)
    zeros: tuple[int, int] = (0, 0)
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    gap: float = 0.0
    nonfinite: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def cosine(self) -> float:
        """Of a and b; 1 where both are zero."""
        lengths = math.sqrt(self.squares[0] * self.squares[1])
        return self.dot / lengths if lengths else float(self.gap == 0)

    @property
    def distance(self) -> float:
        """The length of b - a, in units of the geometric mean of the lengths of a and b."""
        lengths = math.sqrt(self.squares[0] * self.squares[1])
        return math.sqrt(self.gap / lengths) if lengths else (0.0 if self.gap == 0 else math.inf)


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype of two whose numbers lie farther apart."""
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def rounding(dtype: torch.dtype) -> float:
    """How far a tensor lies from what it was before it was rounded to a dtype, in units of its length.

    0.22 of the gap between numbers for half precision, as measured; half of it for others, with which one computes.
    """
    return torch.finfo(dtype).eps * (0.22 if dtype.itemsize <= 2 else 0.5)


def compare_tensors(
    pairs: Mapping[str, tuple[Tensor, Tensor]], description: str = "compare", progress: bool = True
) -> Iterator[Difference]:
    """Compares tensors of two networks, in order; memory does not grow with their size.

    Args:
        pairs: By name, the tensors of a and of b, of one shape each; floating point, on the CPU, maybe memory-mapped.
        description: What the progress bar says.
        progress: Whether there is one.
    """
    total = sum(a.nbytes + b.nbytes for a, b in pairs.values())
    bar = {"unit": "B", "unit_scale": True, "disable": not progress or total < LONG, "leave": False}
    with tqdm(total=total, desc=description, **bar) as moved:
        for name, (a, b) in pairs.items():
            found = Difference(name, tuple(a.shape), (a.dtype, b.dtype), identical=a.dtype == b.dtype)
            parts = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
            for one, other in parts if a.numel() else ():
                add_chunk(found, one, other)
                moved.update(one.nbytes + other.nbytes)
            yield found


def add_chunk(found: Difference, a: Tensor, b: Tensor) -> None:
    """Adds what a piece of both tensors contributes, ``[n]`` each."""
    exact = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    found.identical = found.identical and equal_bytes(a, b)
    if a.dtype != b.dtype:
        least = coarser(a.dtype, b.dtype)
        a, b = a.to(least), b.to(least)
    alike = equal_bytes(a, b)
    a, b = a.to(exact), b.to(exact)
    square = float(a.dot(a))
    if alike and math.isfinite(square):
        zeros = count_zeros(a)
        found.zeros = found.zeros[0] + zeros, found.zeros[1] + zeros
        found.squares = found.squares[0] + square, found.squares[1] + square
        found.dot += square
        return
    gap = b - a
    sums = float(a.dot(b)), square, float(b.dot(b)), float(gap.dot(gap))
    if not all(map(math.isfinite, sums)):
        finite = a.isfinite() & b.isfinite()
        found.nonfinite += len(a) - int(finite.sum())
        a, b = (x.double().where(finite, 0) for x in (a, b))
        gap = b - a
        sums = float(a.dot(b)), float(a.dot(a)), float(b.dot(b)), float(gap.dot(gap))
    found.dot += sums[0]
    found.squares = found.squares[0] + sums[1], found.squares[1] + sums[2]
    found.gap += sums[3]
    found.unequal += len(gap) - count_zeros(gap)
    add_zeros(found, a, b)


def add_zeros(found: Difference, a: Tensor, b: Tensor) -> None:
    zeros = count_zeros(a), count_zeros(b)
    if not any(zeros):
        return
    both = int(((a == 0) & (b == 0)).sum()) if all(zeros) else 0
    found.zeros = found.zeros[0] + zeros[0], found.zeros[1] + zeros[1]
    found.new_zeros = found.new_zeros[0] + zeros[1] - both, found.new_zeros[1] + zeros[0] - both


def count_zeros(x: Tensor) -> int:
    return int(numpy.count_nonzero(x.numpy() == 0))  # ten times as fast as torch's


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two pieces are equal bit by bit: NaN is what it is, and -0 is not 0."""
    return a.dtype == b.dtype and torch.equal(a.view(BYTES[a.dtype.itemsize]), b.view(BYTES[b.dtype.itemsize]))


def total(differences: list[Difference]) -> Difference:
    """All tensors as one."""
    first = differences[0]
    summed = Difference(
        "all", (sum(x.numel for x in differences),), first.dtypes, all(x.identical for x in differences)
    )
    for x in differences:
        summed.unequal += x.unequal
        summed.nonfinite += x.nonfinite
        summed.dot += x.dot
        summed.gap += x.gap
        for name in ("new_zeros", "zeros", "squares"):
            ours, theirs = getattr(summed, name), getattr(x, name)
            setattr(summed, name, (ours[0] + theirs[0], ours[1] + theirs[1]))
    return summed
