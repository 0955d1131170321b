"""Weight matching: the neurons of networks in the order of those of a reference (Git Re-Basin, arXiv 2209.04836)."""

import math
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy
import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.matching.assignment import solve
from fastws.matching.places import Place, find_places
from fastws.ops.permute import permute
from fastws.signed import split
from fastws.symmetry.symmetry import Symmetry
from fastws.table import table_columns

BATCH_BYTES = 2**28  # of weights and similarities that are worked on at a time
BATCH_NETWORKS = 256  # at most; so often a progress bar moves
CHUNK_WEIGHTS = 2**20  # of one tensor, which are gathered and multiplied at a time
Norms = Literal["exclude", "include"]


def match(
    flat: Tensor,
    reference: Tensor,
    symmetry: Symmetry,
    layout: Layout,
    *,
    sweeps: int = 100,
    restarts: int = 1,
    tolerance: float = 1e-12,
    norms: Norms = "exclude",
    flips: bool | Tensor = False,
) -> Tensor:
    """Finds permutations that bring networks close to a reference (Git Re-Basin, algorithm 1, arXiv 2209.04836).

    Coordinate descent on ``objective`` of the permuted networks, from the identity: in turn each group gets the
    assignment that is best while the others stay, until none of a network's groups gains. Sweeps go through the groups
    forward and backward by turns. A group is visited again only when one that it shares a tensor with has moved. The
    objective never falls: an assignment that gains nothing is not taken, which matters for a group on both axes of one
    tensor, whose assignment problem is only the tangent of the objective. Deterministic, where the published code
    visits groups in a random order: to no advantage on average, but for one network the one, for another the other ends
    higher. Further ``restarts`` visit groups in random orders too, the same at every call.

    Args:
        flat: Networks to move, ``[M, P]``, floating point. All M are worked on together.
        reference: ``[P]``, on the device of ``flat``; or ``[M, P]``, one for each network.
        symmetry: Of their architecture.
        layout: What the networks were flattened with.
        sweeps: Most visits of a group.
        restarts: Runs from the identity, each with other orders of the groups; a network keeps the best of them.
        tolerance: Smallest gain that counts, as a share of the sum of squares of the reference's tensors in which the
            group lies; where the similarities are less exact, their rounding error.
        norms: ``"exclude"`` leaves running means and variances out of the objective, which they would dominate because
            they have another scale than weights; ``"include"`` is what the published code does. Weights and biases of
            norm layers take part.
        flips: Whether units of the groups that ``symmetry.flips`` says may change their sign too: of all networks, or
            bool ``[M]``, of each. Only networks whose activations are odd keep their function. A unit then takes the
            sign that is best, for its assignment is solved on E + |O| in place of E + O, where E are the inner products
            of what does not change its sign with the unit, and O of what does.

    Returns:
        int32 ``[M, S]`` for ``symmetry.permute(flat, permutations, layout)``.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or a weight is NaN or infinite.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> symmetry = fastws.Symmetry.trace(mlp, torch.randn(1, 4))
        >>> layout = fastws.Layout.from_checkpoint(mlp)
        >>> reference = layout.flatten(mlp)
        >>> moved = symmetry.permute(reference, symmetry.random(5), layout)
        >>> found = match(moved, reference, symmetry, layout)
        >>> torch.equal(symmetry.permute(moved, found, layout), reference.expand(5, -1))
        True
    """
    check_networks("match", flat, reference, layout, norms)
    if sweeps < 0 or tolerance < 0:
        raise ValueError(f"match: sweeps and tolerance must be at least 0, got {sweeps} and {tolerance}")
    if restarts < 1:
        raise ValueError(f"match: restarts must be at least 1, got {restarts}")
    flips = check_flips("match", flips, flat)
    flat, reference = flat.detach(), reference.detach()

    def match_part(part: Tensor, reference: Tensor, flips: Tensor, pool: Executor) -> Tensor:
        matcher = Matcher(reference, symmetry, layout, norms, sweeps, tolerance)
        found = matcher.match(part, flips, pool)
        for restart in range(1, restarts):
            both = found, matcher.match(part, flips, pool, restart)
            moved = (symmetry.permute(part, rows, layout) for rows in both)
            before, after = (objective(x, reference, symmetry, layout, norms=norms) for x in moved)
            found = torch.where((after > before)[:, None], both[1], found)
        return found

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        size = batch_size(symmetry)
        networks = flat.split(size)
        theirs = reference.split(size) if reference.dim() == 2 else [reference] * len(networks)
        parts = zip(networks, theirs, flips.split(size), strict=True)
        return torch.cat([match_part(*part, pool) for part in parts])


def objective(
    flat: Tensor, reference: Tensor, symmetry: Symmetry, layout: Layout, *, norms: Norms = "exclude"
) -> Tensor:
    """The inner product of each network with the reference, float64 ``[M]``: what ``match`` maximises.

    ``flat``, ``reference``, ``symmetry``, ``layout`` and ``norms`` are those of ``match``.
    """
    check_networks("objective", flat, reference, layout, norms)
    symmetry.require_same(layout)
    weights = reference.double().clone()  # a copy also of float64
    for entry in layout.entries:
        if entry.role == "norm statistic" and norms == "exclude":
            weights[..., entry.offset : entry.offset + entry.numel] = 0
    size = batch_size(symmetry)
    if weights.dim() == 1:
        return torch.cat([part.double() @ weights for part in flat.split(size)])
    pairs = zip(flat.split(size), weights.split(size), strict=True)
    return torch.cat([(part.double() * theirs).sum(1) for part, theirs in pairs])


# --- matching


@dataclass
class State:
    """Networks that are being matched.

    The similarities of a group, inner products of its units with those of the reference, depend on how the other axes
    are permuted. They are kept; at the next visit only what belongs to units that moved meanwhile is computed.
    """

    flat: Tensor  # [k, P]
    rows: Tensor  # [k, S], the permutations so far
    flips: Tensor  # bool [k], the networks whose units may change their sign
    # group: [1 or 2, k, units, units of the reference], of what keeps its sign and, with signs, of what changes it
    similarities: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, Tensor] = field(default_factory=dict)  # group: the rows that its similarities were computed with


class Matcher:
    """A reference, prepared for networks to be matched to it. The arguments are those of ``match``."""

    def __init__(
        self, reference: Tensor, symmetry: Symmetry, layout: Layout, norms: Norms, sweeps: int, tolerance: float
    ):
        self.symmetry, self.sweeps, self.device = symmetry, sweeps, reference.device
        self.dtype = torch.promote_types(reference.dtype, torch.float32)  # of the similarities
        self.entries = [entry for entry in layout.entries if entry.offset >= 0 and entry.numel]
        table = symmetry.tensor_table(layout)
        self.tables = table[:, None].clone()  # each tensor as a checkpoint of its own, [L, 1, 11]
        table_columns(self.tables).weight_offset.zero_()
        self.tables = self.tables.to(self.device)
        # [numel] each, or [k, numel] where each network has its own
        self.reference = [reference[..., entry.offset : entry.offset + entry.numel] for entry in self.entries]
        self.places = [
            [place for place in places if norms == "include" or self.entries[place.tensor].role != "norm statistic"]
            for places in find_places(symmetry, layout, self.device)
        ]
        squares = [x.double().square().sum(-1) for x in self.reference]  # [] or [k]
        held = [{place.tensor for place in places} for places in self.places]
        self.least_gain = [tolerance * sum(squares[tensor] for tensor in tensors) for tensors in held]
        members = torch.zeros(len(symmetry.sizes), len(self.entries), dtype=torch.int64)
        for group, places in enumerate(self.places):
            for tensor, _ in {(place.tensor, place.axis) for place in places}:
                members[group, tensor] += 1
        # who must be visited after a group has moved: itself only if it lies on both axes of a tensor
        self.neighbours = (members @ members.T - members.sum(1).diag() > 0).to(self.device)

    def match(self, flat: Tensor, flips: Tensor, pool: Executor, restart: int = 0) -> Tensor:
        """Permutations ``[k, S]`` of networks ``[k, P]``; ``pool`` solves assignment problems."""
        if not is_finite(flat):
            bad = int((~flat.isfinite().all(1)).sum())
            raise ValueError(f"match: flat must be finite, got NaN or infinity in {bad} rows; leave them out")
        state = State(flat, self.symmetry.identity(len(flat), self.device), flips)
        waiting = torch.ones(len(flat), len(self.places), dtype=torch.bool, device=self.device)
        groups, numbers = numpy.arange(len(self.places)), numpy.random.default_rng(restart)
        for sweep in range(self.sweeps):
            order = numbers.permutation(groups) if restart else groups[:: (-1) ** sweep]
            for group in order.tolist():
                active = waiting[:, group].nonzero().flatten()
                waiting[active, group] = False
                moved = self.improve(state, group, active, pool) if len(active) else active
                waiting[moved] |= self.neighbours[group]
            if not waiting.any():
                break
        return state.rows

    def improve(self, state: State, group: int, active: Tensor, pool: Executor) -> Tensor:
        """Moves one group of the networks ``active`` as is best for them; returns those that it helped."""
        first, size = self.symmetry.starts[group], self.symmetry.sizes[group]
        own = slice(first, first + size)
        first_visit = group not in state.similarities
        similarity, *changed = self.refresh(state, group, active)
        current, signs = split(state.rows[active, own])
        before = chosen(similarity, current)
        for part in changed:  # what changes its sign with the units
            before += chosen(part, current) * (1 + 2 * signs)
            similarity = similarity + torch.where(state.flips[active, None, None], part.abs(), part)
        best = solve(similarity.cpu(), None if first_visit else current.cpu(), pool).to(self.device)
        after = chosen(similarity, best)
        gain = (after - before).sum(1)
        for part in changed:
            best = best ^ -((chosen(part, best) < 0) & state.flips[active, None]).to(best.dtype)
        proposed = state.rows[active, : self.symmetry.starts[-1]]
        proposed[:, own] = best
        proposed = self.symmetry.expand(proposed)
        if self.neighbours[group, group]:  # then similarities are only a tangent of the objective
            gain = self.value(state.flat, proposed, group, active)
            gain -= self.value(state.flat, state.rows[active], group, active)
        # similarities are rounded: what they say of a smaller gain is noise
        noise = torch.finfo(self.dtype).eps * after.norm(dim=1)
        least = torch.as_tensor(self.least_gain[group], device=self.device)
        helped = gain > noise.clamp(min=least[active] if least.dim() else least)
        state.rows[active[helped]] = proposed[helped]
        return active[helped]

    def refresh(self, state: State, group: int, active: Tensor) -> Tensor:
        """The similarities of a group of the networks ``active``, ``[1 or 2, k, size, size]``."""
        if group not in state.similarities:  # all networks are active
            size = self.symmetry.sizes[group]
            shape = 1 + self.symmetry.flips[group], len(active), size, size
            state.similarities[group] = torch.zeros(shape, dtype=self.dtype, device=self.device)
            state.seen[group] = state.rows.clone()
            for place in self.places[group]:
                self.add_all(state, place, state.similarities[group][int(place.negated)])
            return state.similarities[group]
        for place in self.places[group]:
            if place.other is not None:
                moved = state.rows[active, place.other] != state.seen[group][active, place.other]
                some = moved.any(1)
                if some.any():
                    self.add_moved(state, place, group, active[some], moved[some])
        state.seen[group][active] = state.rows[active]
        return state.similarities[group][:, active]

    def add_all(self, state: State, place: Place, similarity: Tensor) -> None:
        """Adds what one tensor contributes to the similarities of all networks."""
        size, reference = similarity.shape[1], self.reference[place.tensor]
        shared = place.arrange(reference[None], size)[0].to(self.dtype) if reference.dim() == 1 else None
        for networks in torch.arange(len(state.flat)).split(chunk_size(reference)):
            theirs = self.weights(state, place, networks)
            if place.other is not None:
                theirs = place.select(theirs, state.rows[networks, place.other])
            theirs = place.arrange(theirs, size).to(self.dtype)
            into = similarity[networks[0] : networks[-1] + 1]
            if shared is not None:
                into.view(-1, size).addmm_(theirs.flatten(0, 1), shared.T)
            else:
                into.baddbmm_(theirs, place.arrange(reference[networks], size).to(self.dtype).mT)

    def add_moved(self, state: State, place: Place, group: int, active: Tensor, moved: Tensor) -> None:
        """Adds what the units of the other axis that ``moved`` ``[k, units]`` change in one tensor's contribution."""
        size = self.symmetry.sizes[group]
        similarity, reference = state.similarities[group][int(place.negated)], self.reference[place.tensor]
        step = chunk_size(reference)
        for networks, here in zip(active.split(step), moved.split(step), strict=True):
            # those that moved first; networks where fewer did are filled up with units that add zeros
            most = int(here.sum(1).max())
            where = here.byte().argsort(stable=True, dim=1, descending=True)[:, :most]
            theirs = self.weights(state, place, networks)
            after, before = (
                place.select(theirs, rows[networks, place.other].gather(1, where)).to(self.dtype)
                for rows in (state.rows, state.seen[group])
            )
            own = reference[None] if reference.dim() == 1 else reference[networks]
            own = place.arrange(place.select(own, where), size).to(self.dtype)
            similarity[networks] += torch.bmm(place.arrange(after.sub_(before), size), own.mT)

    def weights(self, state: State, place: Place, networks: Tensor) -> Tensor:
        """One tensor of some networks, ``[k, numel]``; of a single one, which may be large, without a copy."""
        entry = self.entries[place.tensor]
        rows = slice(int(networks), int(networks) + 1) if len(networks) == 1 else networks
        return state.flat[rows, entry.offset : entry.offset + entry.numel]

    def value(self, flat: Tensor, permutations: Tensor, group: int, active: Tensor) -> Tensor:
        """Inner products of a group's tensors, permuted, with the reference, of the networks ``active``: ``[k]``."""
        value = torch.zeros(len(active), dtype=torch.float64, device=self.device)
        for place in {place.tensor: place for place in self.places[group]}.values():
            entry = self.entries[place.tensor]
            tensor = flat[active, entry.offset : entry.offset + entry.numel]
            permuted = permute(tensor, self.tables[place.tensor], permutations)
            reference = self.reference[place.tensor].double()
            value += (
                permuted.double() @ reference
                if reference.dim() == 1
                else (permuted.double() * reference[active]).sum(1)
            )
        return value


def chosen(similarity: Tensor, assignment: Tensor) -> Tensor:
    """The similarities of the units that an assignment ``[k, size]`` sends to each place, float64 ``[k, size]``."""
    return similarity.gather(1, assignment.long()[:, None])[:, 0].double()


def chunk_size(tensor: Tensor) -> int:
    """Networks whose weights ``[.., numel]`` of one tensor stay in cache."""
    return max(1, CHUNK_WEIGHTS // tensor.shape[-1])


def is_finite(x: Tensor) -> bool:
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())  # a sum is one pass without a mask, and may overflow


def batch_size(symmetry: Symmetry) -> int:
    """Networks that are matched at a time: as many as fit with their similarities."""
    numbers = sum(math.prod(shape) for shape in symmetry.shapes.values()) + sum(size**2 for size in symmetry.sizes)
    return max(1, min(BATCH_NETWORKS, BATCH_BYTES // (4 * numbers)))


def check_flips(where: str, flips: bool | Tensor, flat: Tensor) -> Tensor:
    """Which networks may change signs, bool ``[M]``."""
    if not isinstance(flips, Tensor):
        flips = torch.full((len(flat),), flips, device=flat.device)
    if flips.shape != (len(flat),) or flips.dtype != torch.bool:
        raise ValueError(
            f"{where}: flips must be a bool, or [{len(flat)}] of them, got {list(flips.shape)} {flips.dtype}"
        )
    return flips.to(flat.device)


def check_networks(where: str, flat: Tensor, reference: Tensor, layout: Layout, norms: str) -> None:
    length = layout.num_weights
    if flat.dim() != 2 or flat.shape[1] != length or not flat.is_floating_point():
        got = f"{list(flat.shape)} {flat.dtype}"
        raise ValueError(f"{where}: flat must be [M, {length}] floating point, as the layout says, got {got}")
    shapes = (length,), (len(flat), length)
    if tuple(reference.shape) not in shapes or reference.device != flat.device or not reference.is_floating_point():
        got = f"{list(reference.shape)} {reference.dtype} on {reference.device}"
        raise ValueError(
            f"{where}: reference must be [{length}] or [M, {length}] floating point on {flat.device}, got {got}"
        )
    if not is_finite(reference):
        raise ValueError(f"{where}: reference must be finite, got NaN or infinity; take another network")
    if norms not in ("exclude", "include"):
        raise ValueError(f"{where}: norms must be 'exclude' or 'include', got {norms!r}")
