"""Weighted sample: numbers drawn with given weights, with and without replacement, the same ones on every device."""

import torch
from torch import Tensor

from fastws import _native
from fastws.random.integers import FRACTION_BITS, first_places, integers_reference
from fastws.random.philox import LOW, check_stream

SHARE_BITS = 32  # of a share of a column, and of the number of one
SPARE_DRAWS = 64


class AliasTable:
    """Weights made ready for drawing: each draw reads one entry, however many weights there are.

    Column i, of N equally likely ones, gives i or, with its share, its alias (Walker, 1977; Vose, 1991). A column is
    8 bytes, so that a draw waits for one place in memory and large tables stay in cache: shares are computed of weights
    that are integers of 62 bits, and stored in 32. So the probability of a draw with any property is that of the
    weights to within 2**-32, which no number of draws that can be made shows. A weight of zero is never drawn. Nothing
    depends on threads or device.

    Args:
        weights: ``[N]``, floating point, finite, at least 0, and not all 0; N up to 2**32, also beyond 2**24, where
            ``torch.multinomial`` ends. Kept as they are, for sampling without replacement.

    Attributes:
        weights: ``[N]``, as given.
        columns: ``[N]``, int64, each two unsigned numbers of 32 bits: the lower one is the alias, the upper one the
            share of the column that the alias gets, in steps of 2**-32, less one step. A column without alias names
            itself.
        num_positive: Number of weights above 0.

    Raises:
        ValueError: If shape, dtype or a weight does not fit.

    Example:
        >>> table = fastws.AliasTable(torch.tensor([1.0, 0.0, 2.0]))
        >>> fastws.weighted_sample(table, 6, seed=0)
        tensor([2, 2, 2, 0, 0, 0])
    """

    def __init__(self, weights: Tensor):
        if weights.dim() != 1 or len(weights) == 0 or not weights.is_floating_point():
            got = f"{list(weights.shape)} {weights.dtype}"
            raise ValueError(f"AliasTable: weights must be [N] floating point with N >= 1, got {got}")
        if len(weights) > 2**SHARE_BITS:
            raise ValueError(f"AliasTable: weights must be at most 2**32, got {len(weights)}")
        bad = int((~(weights.isfinite() & (weights >= 0))).sum())
        if bad:
            raise ValueError(
                f"AliasTable: weights must be finite and at least 0, got {bad} of {len(weights)} that are not"
            )
        self.weights = weights.detach()
        self.num_positive = int(weights.count_nonzero())
        if self.num_positive == 0:
            raise ValueError(f"AliasTable: weights must not all be 0, got {len(weights)} zeros")
        self.columns = torch.ops.fastws.alias_table(integer_weights(self.weights))


def weighted_sample(table: AliasTable, count: int, *, replacement: bool = True, seed: int, offset: int = 0) -> Tensor:
    """Draws numbers ``i`` with probability ``weights[i] / sum(weights)``.

    Draw k takes the words 2k and 2k + 1 of the Philox stream. Without replacement it is successive sampling: each draw
    is among the numbers that are left, with their weights. Exactly so, because what has been drawn already is passed
    over, and where that happens too often a table of the weights that are left is made. No gradients: integers.

    Args:
        table: ``AliasTable(weights)``; the draws are made on its device.
        count: How many, from 0; without replacement at most ``table.num_positive``.
        replacement: Whether a number may be drawn again.
        seed: Names the stream of random numbers, in ``[0, 2**63)``.
        offset: Names the draw within the stream, in ``[0, 2**63)``; training steps count it up.

    Returns:
        ``[count]``, int64, in the order of drawing.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> table = fastws.AliasTable(torch.tensor([1.0, 0.0, 2.0, 5.0]))
        >>> fastws.weighted_sample(table, 3, replacement=False, seed=0)
        tensor([3, 2, 0])
    """
    check_stream("weighted_sample", seed, offset)
    if not isinstance(table, AliasTable):
        raise ValueError(f"weighted_sample: table must be fastws.AliasTable(weights), got {type(table).__name__}")
    if count < 0:
        raise ValueError(f"weighted_sample: count must be at least 0, got {count}")
    if replacement:
        return torch.ops.fastws.weighted_sample(table.columns, 0, count, seed, offset)
    if count > table.num_positive:
        most = f"{table.num_positive}, the number of positive weights"
        raise ValueError(f"weighted_sample: count without replacement must be at most {most}, got {count}")
    return torch.ops.fastws.successive_sample(table.weights, table.columns, count, seed, offset)


def integer_weights(weights: Tensor) -> Tensor:
    """Weights, ``[N]``, of which the largest is above 0, as int64 of about the same ratios that sum to under 2**62."""
    ratios = weights.double() / weights.max().double()
    bits = 62 - len(weights).bit_length()
    total = int((ratios * 2.0**bits).long().sum())
    bits += 62 - (total + len(weights)).bit_length()
    return (ratios * 2.0**bits).long()


def alias_table_reference(weights: Tensor) -> Tensor:
    """Columns ``[N]`` for integer weights ``[N]``; together they hold as much as all weights.

    Light weights leave a part of their column empty, heavy ones exceed theirs. Lay the empty parts end to end, and the
    excesses beside them: an empty part is filled by the excess beside its beginning. Where an excess ends within an
    empty part it has given too much, and gets that back from the next heavy weight.
    """
    count, total = len(weights), int(weights.sum())
    numbers = torch.arange(count, device=weights.device)
    capacity = total // count + (numbers < total % count).long()
    excess = weights - capacity
    lights, heavies = (excess < 0).nonzero()[:, 0], (excess >= 0).nonzero()[:, 0]
    empty = -excess[lights]
    behind = torch.cat([empty.new_zeros(1), empty.cumsum(0)])  # where each empty part begins, and the last one ends
    ends = excess[heavies].cumsum(0)
    given, alias = torch.empty_like(weights), numbers.clone()
    given[lights] = empty
    given[heavies] = behind[torch.searchsorted(behind, ends)] - ends
    alias[lights] = heavies[torch.searchsorted(ends, behind[:-1], right=True)]
    alias[heavies[:-1]] = heavies[1:]
    share = (given.double() / capacity.double() * 2.0**SHARE_BITS + 0.5).long()
    share = torch.where(given < capacity, share.clamp(max=2**SHARE_BITS - 1), share)
    return torch.where(share > 0, (share - 1 << SHARE_BITS) + alias, numbers)


def weighted_sample_reference(columns: Tensor, first: int, count: int, seed: int, offset: int) -> Tensor:
    numbers, fractions = integers_reference(seed, offset, first, count, len(columns), columns.device)
    last, alias = columns[numbers] >> SHARE_BITS & LOW, columns[numbers] & LOW
    return torch.where(fractions >> FRACTION_BITS - SHARE_BITS <= last, alias, numbers)


def successive_sample_reference(weights: Tensor, columns: Tensor, count: int, seed: int, offset: int) -> Tensor:
    chosen = columns.new_empty(0)
    drawn = 0
    while len(chosen) < count:
        left = count - len(chosen)
        tries = left + left // 8 + SPARE_DRAWS
        draws = torch.ops.fastws.weighted_sample(columns, drawn, tries, seed, offset)
        together = torch.cat([chosen, draws])
        chosen = together[first_places(together)[:count]]
        drawn += tries
        # what comes next does not depend on when the table is made anew: the past decides that
        if 2 * (left - (count - len(chosen))) < tries and len(chosen) < count:
            columns = torch.ops.fastws.alias_table(integer_weights(weights.index_fill(0, chosen, 0)))
    return chosen


torch.library.define("fastws::alias_table", "(Tensor weights) -> Tensor")
torch.library.define(
    "fastws::weighted_sample", "(Tensor columns, SymInt first, SymInt count, SymInt seed, SymInt offset) -> Tensor"
)
torch.library.define(
    "fastws::successive_sample", "(Tensor weights, Tensor columns, SymInt count, SymInt seed, SymInt offset) -> Tensor"
)
torch.library.register_kernel("fastws::alias_table", "default", alias_table_reference)
torch.library.register_kernel("fastws::weighted_sample", "default", weighted_sample_reference)
torch.library.register_kernel("fastws::successive_sample", "default", successive_sample_reference)


@torch.library.register_fake("fastws::alias_table")
def alias_table_fake(weights):
    return torch.empty_like(weights)


@torch.library.register_fake("fastws::weighted_sample")
def weighted_sample_fake(columns, first, count, seed, offset):
    return columns.new_empty(count)


@torch.library.register_fake("fastws::successive_sample")
def successive_sample_fake(weights, columns, count, seed, offset):
    return columns.new_empty(count)


def successive_sample_backward(ctx, grad):
    raise NotImplementedError("weighted_sample: integers have no gradient")


torch.library.register_autograd("fastws::successive_sample", successive_sample_backward)
_native.register_without_gradient("alias_table")
_native.register_without_gradient("weighted_sample")
_native.register_triton("weighted_sample", file="weighted_sample")
