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

    @property
    def row_entries(self) -> Number:
        """Entries of a row in tokens: its weights, and its bias if it has one."""
        return self.row_length + (self.bias_offset >= 0)

    @property
    def dense(self) -> Number:
        """Whether rows follow each other without padding, so that a token may span several: a truth value."""
        return self.chunks <= 0

    def first_entry(self, token_size: int) -> Number:
        """Where the layer begins in a network's tokens, counted in entries."""
        return self.first_token * token_size - self.dense * self.chunks

    def stride(self, token_size: int) -> Number:
        """Entries of tokens from the beginning of a row to that of the next."""
        return self.dense * self.row_entries + (self.chunks > 0) * self.chunks * token_size

    def end_token(self, token_size: int) -> Number:
        """The token behind the last one that has an entry of the layer, or its padding."""
        end = self.first_entry(token_size) + self.rows * self.stride(token_size)
        return (end + token_size - 1) // token_size


def table_rows(table: Tensor) -> list[Row[int]]:
    return [Row(*row) for row in table.tolist()]


def table_columns(table: Tensor) -> Row[Tensor]:
    """The columns of a table ``[.., 11]`` by name, each a view ``[..]``."""
    return Row(*table.unbind(-1))


def count_tokens(table: Tensor, token_size: int) -> int:
    """Tokens of a network, from the last row of its table; a table on a GPU has to be waited for."""
    return Row(*table[-1].tolist()).end_token(token_size) if len(table) else 0
