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
def find_layer(table, first, last, token, entry):
    """The row, from first to last - 1, of the layer that an entry of a token is in: the last that begins by then."""
    while last - first > 1:
        middle = (first + last) // 2
        before = begins_by(table, middle, token, entry)
        first = tl.where(before, middle, first)
        last = tl.where(before, last, middle)
    return first


@triton.jit
def begins_by(table, l, token, entry):  # noqa: E741
    """Whether a layer begins at an entry of a token or before."""
    begin = tl.load(table + l * COLUMNS + COLUMN_FIRST_TOKEN)
    offset = -tl.minimum(tl.load(table + l * COLUMNS + COLUMN_CHUNKS), 0)
    return (begin < token) | ((begin == token) & (offset <= entry))


@triton.jit
def find_layers(table, first, last, token, entries):
    """For each of some entries of a token the row of the layer that it is in; ``first``, that of the first of them."""
    layers = entries * 0 + first
    behind = first + 1
    while behind < last:
        begun = begins_by(table, behind, token, entries)
        layers = tl.where(begun, behind, layers)
        behind = tl.where(tl.max(begun.to(tl.int32), 0) > 0, behind + 1, last)
    return layers


@triton.jit
def place_of(table, l, token, entry, token_size):  # noqa: E741
    """Row and number within the row of an entry of a token that lies in layer ``l``: scalars, or a vector each."""
    layer = table + l * COLUMNS
    chunks = tl.load(layer + COLUMN_CHUNKS)
    entries = tl.load(layer + COLUMN_ROW_LENGTH) + (tl.load(layer + COLUMN_BIAS_OFFSET) >= 0)
    stride = tl.where(chunks > 0, chunks * token_size, entries)
    x = (token - tl.load(layer + COLUMN_FIRST_TOKEN)) * token_size + tl.minimum(chunks, 0) + entry
    return x // stride, x % stride


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
