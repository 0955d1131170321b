"""Tokens: what tokenizing gives."""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """A checkpoint as a sequence of tokens: values ``[.., N, T]``, lengths ``[.., N]``, positions ``[.., N, 3]``.

    Lengths, int32, are the entries of each token that hold weights; padding follows them. Positions, int32, are the
    numbers of the token, of its layer and of its row.
    """

    values: Tensor
    lengths: Tensor
    positions: Tensor
