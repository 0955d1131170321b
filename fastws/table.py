"""Layout tables, whose columns csrc/table.h and kernels/table.py name alike; docs/design.md says what they mean."""

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Number = TypeVar("Number", int, Tensor)


class Row(NamedTuple, Generic[Number]):
    """One row of a layout table, a layer; or the same fields of several rows as tensors of one shape."""

    weight_offset: Number
    bias_offset: Number
    rows: Number
    row_length: Number
    block: Number
    units: Number
    chunks: Number
    first_token: Number
    first_out: Number
    first_in: Number
    first_bias: Number


def table_rows(table: Tensor) -> list[Row[int]]:
    return [Row(*row) for row in table.tolist()]


def table_columns(table: Tensor) -> Row[Tensor]:
    """The columns of a table ``[.., 11]`` by name, each a view ``[..]``."""
    return Row(*table.unbind(-1))


def count_tokens(table: Tensor) -> int:
    """Tokens of a network, from the last row of its table; a table on a GPU has to be waited for."""
    if len(table) == 0:
        return 0
    last = Row(*table[-1].tolist())
    return last.first_token + last.rows * last.chunks
