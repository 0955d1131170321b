"""Matched distance: how far networks are from each other when the order, and the sign, of their neurons is free."""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastws import _native  # noqa: F401  loads the compiled kernels

SWEEPS = 100  # at most; a few are enough
NOISE = 1e-6  # gains below this share of the similarities are rounding


class Group(NamedTuple):
    """A row of the table of groups, int64 ``[G, 6]``: units that change places."""

    size: int  # units
    length: int  # weights that belong to a unit
    first: int  # where its units begin in a packed network
    first_part: int  # its rows of the table of parts
    parts: int
    may_flip: int  # whether its units may be multiplied by -1


class Part(NamedTuple):
    """A row of the table of parts, int64 ``[L, 6]``: those weights of a unit that lie in one tensor.

    They are ``before`` times the units of the group ``other``, the one that moves the tensor's other axis, one behind
    the other, each a block of ``block`` weights. Parts that keep their sign when a unit is flipped stand first.
    """

    start: int  # among the weights of a unit
    width: int
    other: int  # or -1
    before: int
    block: int
    negated: int


def matched_distance(
    queries: Tensor,
    references: Tensor,
    candidates: Tensor,
    groups: Tensor,
    parts: Tensor,
    once: Tensor,
    *,
    query_flips: Tensor | None = None,
    reference_flips: Tensor | None = None,
) -> Tensor:
    """Squared distance of each query to some references, modulo permutations and, where allowed, signs of neurons.

    From the identity on, one group after the other is moved as is best while the others stay: with the inner products
    ``S[i, j]`` of unit i of the reference and unit j of the query under the other groups' elements, the assignment that
    maximises ``sum_j S[i_j, j]``, or ``|S|`` with the sign of S where units may be flipped (weight matching, arXiv
    2209.04836, algorithm 1). Groups are visited up and down until none moves. That is a local search: both sides should
    be aligned to a common network before, so that the identity is a good start; the distance is an upper bound.

    Networks are packed: every group has its units as rows, with all weights of a unit side by side, so that weights
    between two groups are there twice; ``once`` is the root of 1/2 for these and 1 for others. See
    ``fastws.matching.packing``, which makes all of it from a symmetry and a layout. Not differentiable.

    Args:
        queries: Packed networks, ``[Q, W]``, float32.
        references: Packed networks, ``[R, W]``, float32.
        candidates: References that each query is compared with, ``[Q, K]``, int64 in ``[0, R)``.
        groups: ``[G, 6]``, int64, rows of ``Group``.
        parts: ``[L, 6]``, int64, rows of ``Part``.
        once: ``[W]``, float32.
        query_flips: Which queries may be flipped, bool ``[Q]``; by default none.
        reference_flips: Which references may be, bool ``[R]``; units are flipped where both may.

    Returns:
        ``[Q, K]``, float64.

    Raises:
        ValueError: If a shape or dtype does not fit.
        RuntimeError: On a CPU, if a candidate is out of range.

    Example:
        >>> groups, parts = torch.tensor([[2, 1, 0, 0, 1, 0]]), torch.tensor([[0, 1, -1, 1, 1, 1]])
        >>> queries, references = torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0], [-4.0, 1.0]])
        >>> fastws.matched_distance(queries, references, torch.tensor([[0, 1]]), groups, parts, torch.ones(2))
        tensor([[ 1., 41.]], dtype=torch.float64)
    """
    for name, x in (("queries", queries), ("references", references)):
        if x.dim() != 2 or x.dtype != torch.float32 or x.shape[1:] != once.shape or x.device != queries.device:
            got = f"{list(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"matched_distance: {name} must be [B, {len(once)}] float32 on one device, got {got}")
    if candidates.dim() != 2 or candidates.dtype != torch.int64 or len(candidates) != len(queries):
        got = f"{list(candidates.shape)} {candidates.dtype}"
        raise ValueError(f"matched_distance: candidates must be [{len(queries)}, K] int64, got {got}")
    for name, table, width in (("groups", groups, len(Group._fields)), ("parts", parts, len(Part._fields))):
        if table.dim() != 2 or table.shape[1] != width or table.dtype != torch.int64:
            got = f"{list(table.shape)} {table.dtype}"
            raise ValueError(f"matched_distance: {name} must be [.., {width}] int64, got {got}")
    flips = []
    for name, given, x in (("query_flips", query_flips, queries), ("reference_flips", reference_flips, references)):
        given = torch.zeros(len(x), dtype=torch.bool, device=x.device) if given is None else given
        if given.shape != x.shape[:1] or given.dtype != torch.bool:
            got = f"{list(given.shape)} {given.dtype}"
            raise ValueError(f"matched_distance: {name} must be [{len(x)}] bool, got {got}")
        flips.append(given)
    return torch.ops.fastws.matched_distance(queries, references, candidates, *flips, groups, parts, once)


def matched_distance_reference(
    queries: Tensor,
    references: Tensor,
    candidates: Tensor,
    query_flips: Tensor,
    reference_flips: Tensor,
    groups: Tensor,
    parts: Tensor,
    once: Tensor,
) -> Tensor:
    tables = [Group(*row) for row in groups.tolist()], [Part(*row) for row in parts.tolist()]
    squares = torch.zeros(candidates.shape, dtype=torch.float64)
    for query, row in enumerate(candidates.tolist()):
        for place, reference in enumerate(row):
            may_flip = bool(query_flips[query] and reference_flips[reference])
            moved = bring(queries[query].double().cpu(), references[reference].double().cpu(), *tables, may_flip)
            squares[query, place] = ((queries[query].cpu() - moved) * once.cpu()).square().sum()
    return squares.to(queries.device)


def bring(target: Tensor, network: Tensor, groups: list[Group], parts: list[Part], may_flip: bool) -> Tensor:
    """A packed network, moved towards a target."""
    network, waiting = network.clone(), [True] * len(groups)
    for sweep in range(SWEEPS):
        for number in range(len(groups)) if sweep % 2 == 0 else reversed(range(len(groups))):
            if not waiting[number]:
                continue
            waiting[number] = False
            group = groups[number]
            own = parts[group.first_part : group.first_part + group.parts]
            rows = rows_of(network, group)
            even = sum(part.width for part in own if not part.negated)
            goal = rows_of(target, group)
            kept, odd = rows[:, :even] @ goal[:, :even].T, rows[:, even:] @ goal[:, even:].T
            flips = may_flip and bool(group.may_flip)
            gain = kept + (odd.abs() if flips else odd)
            places, units = linear_sum_assignment(-gain.T.numpy())
            units, places = torch.from_numpy(units), torch.from_numpy(places)
            after = gain[units, places]
            if after.sum() - (kept + odd).diag().sum() <= NOISE * after.abs().sum():
                continue
            sign = torch.where(odd[units, places] < 0, -1.0, 1.0).double() if flips else torch.ones(group.size).double()
            moved = rows[units]
            moved[:, even:] *= sign[:, None]
            rows.copy_(moved)
            for part in own:
                if part.other < 0:
                    continue
                waiting[part.other] = True
                other = groups[part.other]
                for theirs in parts[other.first_part : other.first_part + other.parts]:
                    if theirs.other == number:
                        blocks = rows_of(network, other)[:, theirs.start : theirs.start + theirs.width]
                        shape = (other.size, theirs.before, group.size, theirs.block)
                        arranged = blocks.reshape(shape)[:, :, units]
                        arranged = arranged * sign[:, None] if theirs.negated else arranged
                        blocks.copy_(arranged.reshape(other.size, theirs.width))
        if not any(waiting):
            break
    return network


def rows_of(network: Tensor, group: Group) -> Tensor:
    """The units of a group as rows, a view."""
    return network[group.first : group.first + group.size * group.length].view(group.size, group.length)


torch.library.define(
    "fastws::matched_distance",
    "(Tensor queries, Tensor references, Tensor candidates, Tensor query_flips, Tensor reference_flips, Tensor groups, "
    "Tensor parts, Tensor once) -> Tensor",
)
torch.library.register_kernel("fastws::matched_distance", "default", matched_distance_reference)


@torch.library.register_fake("fastws::matched_distance")
def matched_distance_fake(queries, references, candidates, query_flips, reference_flips, groups, parts, once):
    return queries.new_empty(candidates.shape, dtype=torch.float64)


def matched_distance_backward(ctx, grad):
    raise NotImplementedError("matched_distance: weights are data; their distances have no gradient")


torch.library.register_autograd("fastws::matched_distance", matched_distance_backward)
