"""Layout tables as Triton kernels read them: fastws/table.py has the columns, docs/design.md what they mean."""

import triton
import triton.language as tl

COLUMN_WEIGHT_OFFSET: tl.constexpr = tl.constexpr(0)
COLUMN_BIAS_OFFSET: tl.constexpr = tl.constexpr(1)
COLUMN_ROWS: tl.constexpr = tl.constexpr(2)
COLUMN_ROW_LENGTH: tl.constexpr = tl.constexpr(3)
COLUMN_BLOCK: tl.constexpr = tl.constexpr(4)
COLUMN_UNITS: tl.constexpr = tl.constexpr(5)
COLUMN_CHUNKS: tl.constexpr = tl.constexpr(6)
COLUMN_FIRST_TOKEN: tl.constexpr = tl.constexpr(7)
COLUMN_FIRST_OUT: tl.constexpr = tl.constexpr(8)
COLUMN_FIRST_IN: tl.constexpr = tl.constexpr(9)
COLUMN_FIRST_BIAS: tl.constexpr = tl.constexpr(10)
COLUMNS: tl.constexpr = tl.constexpr(11)


@triton.jit
def find_layer(table, first, last, token):
    """The row, from first to last - 1, of the layer that a token is in: the last whose first token is not behind it."""
    while last - first > 1:
        middle = (first + last) // 2
        before = tl.load(table + middle * COLUMNS + COLUMN_FIRST_TOKEN) <= token
        first = tl.where(before, middle, first)
        last = tl.where(before, last, middle)
    return first


@triton.jit
def permuted(permutations, place, i):
    """What entry i of the vector at ``place`` in a row of permutations says: the unit, and whether it is negated.

    Where there is no vector, i itself.
    """
    index = tl.where(place >= 0, place + i, -1)
    entry = tl.load(permutations + index, mask=index >= 0, other=0)
    entry = tl.where(place >= 0, entry.to(tl.int64), i)
    negative = entry < 0
    return tl.where(negative, ~entry, entry), negative


@triton.jit
def with_sign(x, negative):
    """x, or -x where negative."""
    if x.dtype == tl.bfloat16:  # which interpreted programs know as whole numbers
        return tl.where(negative, (-x.to(tl.float32)).to(tl.bfloat16), x)
    else:
        return tl.where(negative, -x, x)
