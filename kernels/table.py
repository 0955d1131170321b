"""Layout tables as Triton kernels read them; docs/design.md says what the columns mean."""

import triton
import triton.language as tl

COLUMNS: tl.constexpr = tl.constexpr(11)


@triton.jit
def find_layer(table, first, last, token):
    """The row, from first to last - 1, of the layer that a token is in: the last whose first token is not behind it."""
    while last - first > 1:
        middle = (first + last) // 2
        before = tl.load(table + middle * COLUMNS + 7) <= token
        first = tl.where(before, middle, first)
        last = tl.where(before, last, middle)
    return first


@triton.jit
def permuted(permutations, place, i):
    """Entry i of the vector at ``place`` in a row of permutations, or i itself where there is none."""
    index = tl.where(place >= 0, place + i, -1)
    entry = tl.load(permutations + index, mask=index >= 0, other=0)
    return tl.where(place >= 0, entry.to(tl.int64), i)
