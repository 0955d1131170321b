"""Signed permutations: a row of indices in which ~p = -1 - p stands for unit p, negated.

``new[c] = sign[c] * old[index[c]]``. Unsigned permutations are rows as they always were.
"""

from torch import Tensor


def split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each entry, and -1 where it is negated, else 0: ``rows == index ^ negative``. Integers of any width."""
    negative = rows >> (8 * rows.element_size() - 1)
    return rows ^ negative, negative
