"""Weight matching: the neurons of networks in the order of those of a reference (Git Re-Basin, arXiv 2209.04836)."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastws.layout import Layout
from fastws.ops.permute import permute
from fastws.segments import Segments
from fastws.symmetry import Symmetry

BATCH_BYTES = 2**28  # of weights that are matched at a time
BATCH_NETWORKS = 256  # at most; so often a progress bar moves
Norms = Literal["exclude", "include"]


def match(
    flat: Tensor,
    reference: Tensor,
    symmetry: Symmetry,
    *,
    sweeps: int = 100,
    tolerance: float = 1e-12,
    norms: Norms = "exclude",
) -> Tensor:
    """Finds permutations that bring networks close to a reference (Git Re-Basin, algorithm 1, arXiv 2209.04836).

    Coordinate descent on ``objective(symmetry.permute(flat, permutations), ...)``, from the identity: in turn each
    group gets the assignment that is best while the others stay, until none of a network's groups gains. Sweeps go
    through the groups forward and backward by turns. A group is visited again only when one that it shares a tensor
    with has moved. The objective never falls: an assignment that gains nothing is not taken, which matters for a group
    on both axes of one tensor, whose assignment problem is only the tangent of the objective. Deterministic, where the
    published code visits groups in a random order: to no advantage, but with another result each time.

    Args:
        flat: Networks to move, ``[M, P]``, floating point. All M are worked on together.
        reference: ``[P]``, on the device of ``flat``.
        symmetry: Of their architecture.
        sweeps: Most visits of a group.
        tolerance: Smallest gain that counts, as a share of the reference's sum of squares.
        norms: ``"exclude"`` leaves running means and variances out of the objective, which they would dominate because
            they have another scale than weights; ``"include"`` is what the published code does. Weights and biases of
            norm layers take part.

    Returns:
        int32 ``[M, S]`` for ``symmetry.permute(flat, permutations)``.

    Raises:
        ValueError: If a shape, dtype or device does not fit, or a weight is NaN or infinite.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> symmetry = fastws.Symmetry.trace(mlp, torch.randn(1, 4))
        >>> reference = fastws.Layout.from_checkpoint(mlp).flatten(mlp)
        >>> moved = symmetry.permute(reference, symmetry.random(5))
        >>> torch.equal(symmetry.permute(moved, match(moved, reference, symmetry)), reference.expand(5, -1))
        True
    """
    check_networks("match", flat, reference, symmetry, norms)
    if sweeps < 0 or tolerance < 0:
        raise ValueError(f"match: sweeps and tolerance must be at least 0, got {sweeps} and {tolerance}")
    flat = flat.detach()
    matcher = Matcher(reference.detach(), symmetry, norms, sweeps, tolerance)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = [matcher.match(part, pool) for part in flat.split(batch_size(flat.shape[1]))]
    return torch.cat(parts)


def objective(flat: Tensor, reference: Tensor, symmetry: Symmetry, *, norms: Norms = "exclude") -> Tensor:
    """The inner product of each network with the reference, float64 ``[M]``: what ``match`` maximises.

    ``flat``, ``reference``, ``symmetry`` and ``norms`` are those of ``match``.
    """
    check_networks("objective", flat, reference, symmetry, norms)
    weights = reference.double().clone()  # a copy also of float64
    for entry in layout_of(symmetry).entries:
        if entry.role == "norm statistic" and norms == "exclude":
            weights[entry.offset : entry.offset + entry.numel] = 0
    return torch.cat([part.double() @ weights for part in flat.split(batch_size(flat.shape[1]))])


# --- matching


class Place(NamedTuple):
    """Where a group lies in a tensor: entries of an axis ``[size * entries]``, all those of a unit together."""

    tensor: int
    axis: int
    index: Tensor | None  # None: the axis as it is

    def arrange(self, tensor: Tensor, size: int) -> Tensor:
        """``[k, *shape]`` -> ``[k, size, weights of a unit]``"""
        tensor = tensor.movedim(1 + self.axis, 1)
        tensor = tensor if self.index is None else tensor.index_select(1, self.index)
        return tensor.reshape(len(tensor), size, -1)


class Matcher:
    """A reference, prepared for networks to be matched to it. The arguments are those of ``match``."""

    def __init__(self, reference: Tensor, symmetry: Symmetry, norms: Norms, sweeps: int, tolerance: float):
        self.symmetry, self.sweeps, self.device = symmetry, sweeps, reference.device
        self.dtype = torch.promote_types(reference.dtype, torch.float32)  # of the similarities
        self.least_gain = tolerance * float(reference.to(self.dtype).norm()) ** 2
        layout = layout_of(symmetry)
        self.entries = [entry for entry in layout.entries if entry.numel]
        self.tables = symmetry.tensor_table(layout)[
            :, None
        ].clone()  # each tensor as a checkpoint of its own, [L, 1, 11]
        self.tables[:, :, 0] = 0
        self.tables = self.tables.to(self.device)
        self.reference = [reference[entry.offset : entry.offset + entry.numel] for entry in self.entries]
        self.places = self.find_places(norms)
        members = torch.zeros(len(symmetry.sizes), len(self.entries), dtype=torch.int64)
        for group, places in enumerate(self.places):
            for place in places:
                members[group, place.tensor] += 1
        # who must be visited after a group has moved: itself only if it lies on both axes of a tensor
        self.neighbours = (members @ members.T - members.sum(1).diag() > 0).to(self.device)

    def find_places(self, norms: Norms) -> list[list[Place]]:
        """The places of each group."""
        places: list[list[Place]] = [[] for _ in self.symmetry.sizes]
        for tensor, entry in enumerate(self.entries):
            if entry.role == "norm statistic" and norms == "exclude":
                continue
            for axis, segments in enumerate(self.symmetry.axes[entry.name]):
                for group, index in units(segments or (), self.symmetry.sizes).items():
                    in_order = index == list(range(entry.shape[axis]))
                    places[group].append(Place(tensor, axis, None if in_order else torch.tensor(index).to(self.device)))
        return places

    def match(self, flat: Tensor, pool: Executor) -> Tensor:
        """Permutations ``[k, S]`` of networks ``[k, P]``; ``pool`` solves assignment problems."""
        if not is_finite(flat):
            bad = int((~flat.isfinite().all(1)).sum())
            raise ValueError(f"match: flat must be finite, got NaN or infinity in {bad} rows; leave them out")
        rows = self.symmetry.identity(len(flat), self.device)
        everyone = torch.arange(len(flat), device=self.device)
        values = torch.stack([self.value(flat, rows, tensor, everyone) for tensor in range(len(self.entries))], 1)
        waiting = torch.ones(len(flat), len(self.places), dtype=torch.bool, device=self.device)
        order = list(range(len(self.places)))
        for sweep in range(self.sweeps):
            for group in order if sweep % 2 == 0 else order[::-1]:
                active = waiting[:, group].nonzero().flatten()
                waiting[active, group] = False
                moved = self.improve(flat, rows, values, group, active, pool) if len(active) else active
                waiting[moved] |= self.neighbours[group]
            if not waiting.any():
                break
        return rows

    def improve(self, flat: Tensor, rows: Tensor, values: Tensor, group: int, active: Tensor, pool: Executor) -> Tensor:
        """Moves one group of the networks ``active`` as is best for them; returns those that it helped.

        ``rows`` ``[k, S]`` and ``values`` ``[k, L]``, the inner products tensor by tensor, are kept up to date.
        """
        first, size = self.symmetry.starts[group], self.symmetry.sizes[group]
        assignment = solve(self.similarity(flat, rows, group, active).cpu(), pool).to(self.device)
        changed = (assignment != torch.arange(size, device=self.device)).any(1)
        active, assignment = active[changed], assignment[changed]
        if not len(active):
            return active
        proposed = rows[active, : self.symmetry.starts[-1]]
        proposed[:, first : first + size] = proposed[:, first : first + size].gather(1, assignment)
        proposed = self.symmetry.expand(proposed)
        # not from the similarities, which are of lower precision, and a tangent where a tensor holds the group twice
        proposed_values = values[active]
        for tensor in {place.tensor for place in self.places[group]}:
            proposed_values[:, tensor] = self.value(flat, proposed, tensor, active)
        helped = (proposed_values - values[active]).sum(1) > self.least_gain
        rows[active[helped]], values[active[helped]] = proposed[helped], proposed_values[helped]
        return active[helped]

    def value(self, flat: Tensor, permutations: Tensor, tensor: int, active: Tensor) -> Tensor:
        """Inner products of one tensor of the networks ``active``, permuted, with the reference: float64 ``[k]``."""
        return self.permuted(flat, permutations, tensor, active).double() @ self.reference[tensor].double()

    def similarity(self, flat: Tensor, rows: Tensor, group: int, active: Tensor) -> Tensor:
        """Inner products of the units of networks, as they lie, with those of the reference: ``[k, size, size]``."""
        size = self.symmetry.sizes[group]
        total = torch.zeros(len(active) * size, size, dtype=self.dtype, device=self.device)
        for place in self.places[group]:
            shape = self.entries[place.tensor].shape
            tensor = self.permuted(flat, rows[active], place.tensor, active).view(-1, *shape)
            theirs = place.arrange(tensor, size).to(self.dtype)
            own = place.arrange(self.reference[place.tensor].view(1, *shape), size).to(self.dtype)
            total.addmm_(theirs.flatten(0, 1), own[0].T)
        return total.view(-1, size, size)

    def permuted(self, flat: Tensor, permutations: Tensor, tensor: int, active: Tensor) -> Tensor:
        """One tensor of the networks ``active``, permuted: ``[k, numel]``."""
        entry = self.entries[tensor]
        weights = flat[:, entry.offset : entry.offset + entry.numel].index_select(0, active)
        return permute(weights, self.tables[tensor], permutations)


def solve(similarity: Tensor, pool: Executor) -> Tensor:
    """The unit of each network that goes to each place: ``[k, size, size]`` (unit, place) -> int64 ``[k, size]``."""

    def solve_some(some: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        return [linear_sum_assignment(one.T, maximize=True)[1] for one in some]

    workers = min(len(similarity), torch.get_num_threads())
    parts = pool.map(solve_some, numpy.array_split(similarity.numpy(), workers))
    return torch.from_numpy(numpy.stack([row for part in parts for row in part]))


def units(segments: Segments, sizes: Sequence[int]) -> dict[int, list[int]]:
    """The groups along an axis: for each its entries, those of its first unit before those of the second."""
    found: dict[int, list[tuple[int, int]]] = {}  # numbers of units and entries
    seen = Counter()
    entry = 0
    for group, count, block in segments:
        if group is not None:
            first, size = seen[group], sizes[group]
            found.setdefault(group, []).extend(((first + i // block) % size, entry + i) for i in range(count * block))
            seen[group] += count
        entry += count * block
    return {group: [entry for _, entry in sorted(members)] for group, members in found.items()}


def layout_of(symmetry: Symmetry) -> Layout:
    """The layout of what a symmetry permutes."""
    shapes = {name: shape for name, shape in symmetry.shapes.items() if name not in symmetry.aliases}
    return Layout.from_checkpoint({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def is_finite(x: Tensor) -> bool:
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())  # a sum is one pass without a mask, and may overflow


def batch_size(num_weights: int) -> int:
    return max(1, min(BATCH_NETWORKS, BATCH_BYTES // (4 * num_weights)))


def check_networks(where: str, flat: Tensor, reference: Tensor, symmetry: Symmetry, norms: str) -> None:
    length = layout_of(symmetry).num_weights
    if flat.dim() != 2 or flat.shape[1] != length or not flat.is_floating_point():
        got = f"{list(flat.shape)} {flat.dtype}"
        raise ValueError(f"{where}: flat must be [M, {length}] floating point, as the symmetry says, got {got}")
    if reference.shape != (length,) or reference.device != flat.device or not reference.is_floating_point():
        got = f"{list(reference.shape)} {reference.dtype} on {reference.device}"
        raise ValueError(f"{where}: reference must be [{length}] floating point on {flat.device}, got {got}")
    if not is_finite(reference):
        raise ValueError(f"{where}: reference must be finite, got NaN or infinity; take another network")
    if norms not in ("exclude", "include"):
        raise ValueError(f"{where}: norms must be 'exclude' or 'include', got {norms!r}")
