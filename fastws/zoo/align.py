"""Alignment of a zoo: every network's neurons in the order of those of one reference network (arXiv 2209.04836).

Networks that differ by the order of their neurons are one function. Weight matching finds, by coordinate descent over
the permutation groups of the architecture, the order that is closest to the reference. A zoo keeps one permutation per
model, a few kB, beside its weights; ``aligned_rows`` applies them while it reads.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy
import pyarrow
import pyarrow.compute
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm import tqdm

from fastws.layout import Layout
from fastws.segments import Segments
from fastws.symmetry import Symmetry
from fastws.zoo.format import Zoo, find_nonfinite, write_atomically

FORMAT = 1
ALIGNMENT = "alignment.safetensors"
BATCH_BYTES = 2**28  # of weights that are matched at a time
BATCH_NETWORKS = 256  # at most; so often the progress bar moves
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
        self.least_gain = tolerance * float(torch.linalg.vector_norm(reference, dtype=torch.float64)) ** 2
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
        bad = find_nonfinite(flat)
        if len(bad):
            raise ValueError(f"match: flat must be finite, got NaN or infinity in {len(bad)} rows; leave them out")
        rows = self.symmetry.identity(len(flat), self.device)
        waiting = torch.ones(len(flat), len(self.places), dtype=torch.bool, device=self.device)
        order = list(range(len(self.places)))
        for sweep in range(self.sweeps):
            for group in order if sweep % 2 == 0 else order[::-1]:
                active = waiting[:, group].nonzero().flatten()
                waiting[active, group] = False
                moved = self.improve(flat, rows, group, active, pool) if len(active) else active
                waiting[moved] |= self.neighbours[group]
            if not waiting.any():
                break
        return rows

    def improve(self, flat: Tensor, rows: Tensor, group: int, active: Tensor, pool: Executor) -> Tensor:
        """Permutes one group of the networks ``active`` in ``rows`` as is best; returns those that it helped."""
        first, size = self.symmetry.starts[group], self.symmetry.sizes[group]
        assignment = solve(self.similarity(flat, rows, group, active).cpu(), pool).to(self.device)
        changed = (assignment != torch.arange(size, device=self.device)).any(1)
        active, assignment = active[changed], assignment[changed]
        if not len(active):
            return active
        proposed = rows[active, : self.symmetry.starts[-1]]
        proposed[:, first : first + size] = proposed[:, first : first + size].gather(1, assignment)
        proposed = self.symmetry.expand(proposed)
        gain = torch.zeros(len(active), dtype=torch.float64, device=self.device)
        for tensor in {place.tensor: None for place in self.places[group]}:
            weights = self.reference[tensor].double()
            for sign, permutations in [(1, proposed), (-1, rows[active])]:
                gain += sign * (self.permuted(flat, permutations, tensor, active).double() @ weights)
        helped = gain > self.least_gain
        rows[active[helped]] = proposed[helped]
        return active[helped]

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
        return torch.ops.fastws.permute(weights, self.tables[tensor], permutations)


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
    if len(find_nonfinite(reference[None])):
        raise ValueError(f"{where}: reference must be finite, got NaN or infinity; take another network")
    if norms not in ("exclude", "include"):
        raise ValueError(f"{where}: norms must be 'exclude' or 'include', got {norms!r}")


# --- zoos


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the models of a zoo are aligned, and to what.

    Attributes:
        reference: Id of the model whose last state the others were matched to.
        chosen: Why that one.
        norms: ``"exclude"`` or ``"include"``, see ``match``.
        models: Ids of all models, in the order of what follows.
        permutations: int32 ``[models, sum(symmetry.sizes)]``.
        before: Inner product with the reference, float64 ``[models]``.
        after: The same after the permutation.
    """

    reference: str
    chosen: str
    norms: Norms
    models: tuple[str, ...]
    permutations: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def open(cls, zoo: Zoo, path: str | os.PathLike | None = None) -> "Alignment":
        """Reads what ``align`` wrote; ``path`` is a file, by default ``alignment.safetensors`` in the zoo.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or was made for another architecture.
        """
        path = zoo.path / ALIGNMENT if path is None else Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: alignment must be there, got none; run fastws zoo align")
        try:
            with safe_open(path, framework="pt") as file:
                fields = json.loads((file.metadata() or {})["alignment"])
                tensors = {name: file.get_tensor(name) for name in ("permutations", "before", "after")}
            made_for, version = fields.pop("fingerprint"), fields.pop("format")
            alignment = cls(**fields | {"models": tuple(fields["models"])}, **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: file must be an alignment, got {error!r}; run fastws zoo align again") from error
        shape = len(alignment.models), sum(symmetry_of(zoo).sizes)
        if (version, made_for, tuple(alignment.permutations.shape)) != (FORMAT, zoo.layout.fingerprint, shape):
            raise ValueError(
                f"{path}: alignment must be of the architecture {zoo.layout.fingerprint} with permutations "
                f"{list(shape)}, got {made_for} with {list(alignment.permutations.shape)}; run fastws zoo align again"
            )
        return alignment

    def save(self, zoo: Zoo, path: Path) -> None:
        """Writes one safetensors file, atomically; what is not a tensor is JSON in its header."""
        fields = {name: getattr(self, name) for name in ("reference", "chosen", "norms", "models")}
        text = json.dumps(fields | {"format": FORMAT, "fingerprint": zoo.layout.fingerprint})
        tensors = {name: getattr(self, name) for name in ("permutations", "before", "after")}
        content = safetensors.torch.save(tensors, {"alignment": text})
        with write_atomically(path, len(content)) as file:
            file.write(content)


def aligned_rows(zoo: Zoo, rows: Tensor | Sequence[int], alignment: Alignment | None = None) -> Tensor:
    """Copies of rows of a zoo ``[k, P]``, aligned: ``zoo.rows(rows)``, permuted while they are read.

    A trainer that holds its zoo in memory takes this once in place of ``zoo.rows``; nothing else changes, and random
    permutations drawn on top of it are as random as before.

    Args:
        zoo: An open zoo.
        rows: Integers in ``[0, M)``.
        alignment: That of the zoo, ``Alignment.open(zoo)``, which is also the default.

    Raises:
        FileNotFoundError: If the zoo has no alignment.
        ValueError: If a model was added since it was made.
    """
    alignment = alignment or Alignment.open(zoo)
    flat, rows = zoo.rows(rows), torch.as_tensor(rows, dtype=torch.int64).flatten()
    ids = zoo.properties["model"].cast("string").take(pyarrow.array(rows.numpy()))
    places = pyarrow.compute.index_in(ids, value_set=pyarrow.array(alignment.models, "string"))
    if places.null_count:
        new = ids.filter(places.is_null())[0]
        raise ValueError(f"aligned_rows: models must be in the alignment, got {str(new)!r}; run fastws zoo align again")
    return symmetry_of(zoo).permute(flat, alignment.permutations[torch.from_numpy(places.to_numpy().copy()).long()])


@dataclass(frozen=True, kw_only=True)
class Config:
    """Aligns the networks of a zoo to one of them, and keeps the permutations with the zoo."""

    zoo: str  # folder

    out: str | None = None  # file to write; by default alignment.safetensors in the zoo
    reference: str | None = None  # model id; by default the best of the train split
    best: str = "test_accuracy"  # property that says which is the best, by its last value
    norms: Norms = "exclude"  # running means and variances: whether they count in the distance
    sweeps: int = 100  # most visits of each permutation group
    device: str = "cpu"  # or cuda


def align(config: Config) -> Alignment:
    """Matches the last state of every model of a zoo to that of the reference, and writes the permutations.

    All states of a model get the permutation of its last one, so that its path through training stays a path.

    Raises:
        ValueError: If the zoo has no symmetry or no models, or there is no such reference or property.
        OSError: If the file cannot be written.
    """
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"zoo align: device must be cpu where no GPU is, got {config.device!r}")
    zoo = Zoo.open(config.zoo)
    symmetry, last = symmetry_of(zoo), last_rows(zoo)
    reference, chosen = choose_reference(config, zoo, last)
    target = zoo.rows([last[reference]])[0].to(config.device)
    rows, options = torch.tensor(list(last.values())), {"norms": config.norms}
    permutations, before, after = [], [], []
    with tqdm(total=len(rows), desc="align", unit=" networks") as bar:
        for part in rows.split(batch_size(zoo.layout.num_weights)):
            flat = zoo.rows(part).to(config.device)
            found = match(flat, target, symmetry, sweeps=config.sweeps, **options)
            permutations.append(found[:, : sum(symmetry.sizes)].cpu())
            before.append(objective(flat, target, symmetry, **options).cpu())
            after.append(objective(symmetry.permute(flat, found), target, symmetry, **options).cpu())
            bar.update(len(part))
    results = (torch.cat(parts).contiguous() for parts in (permutations, before, after))
    alignment = Alignment(reference, chosen, config.norms, tuple(last), *results)
    alignment.save(zoo, Path(config.out) if config.out else zoo.path / ALIGNMENT)
    return alignment


def symmetry_of(zoo: Zoo) -> Symmetry:
    if zoo.symmetry is None:
        raise ValueError(f"{zoo.path}: zoo must have a symmetry, got none; write it with that of Symmetry.trace")
    return zoo.symmetry


def last_rows(zoo: Zoo) -> dict[str, int]:
    """The row of each model's last epoch; of its last row, where epochs are not known."""
    models = zoo.properties["model"].cast("string").to_pylist()
    known = "epoch" in zoo.properties.column_names
    epochs = zoo.properties["epoch"].to_pylist() if known else range(len(models))
    last: dict[str, int] = {}
    for row, model in enumerate(models):
        if model not in last or epochs[row] >= epochs[last[model]]:
            last[model] = row
    if not last:
        raise ValueError(f"{zoo.path}: zoo must hold networks, got none")
    return last


def choose_reference(config: Config, zoo: Zoo, last: dict[str, int]) -> tuple[str, str]:
    """The id of the reference, and why it was chosen."""
    if config.reference is not None:
        if config.reference not in last:
            some = ", ".join(list(last)[:3])
            raise ValueError(f"zoo align: reference must be a model of {zoo.path}: {some} ..; got {config.reference!r}")
        return config.reference, "named"
    if config.best not in zoo.properties.column_names:
        known = ", ".join(zoo.properties.column_names)
        raise ValueError(f"zoo align: best must be one of {known}, got {config.best!r}; or name a reference")
    values = zoo.properties[config.best].to_numpy()
    candidates = [model for model in zoo.splits["train"] if model in last and numpy.isfinite(values[last[model]])]
    if not candidates:
        raise ValueError(f"zoo align: reference must be named, got no train model of {zoo.path} with {config.best}")
    best = max(sorted(candidates), key=lambda model: values[last[model]])  # the first of equals
    return best, f"highest last {config.best} of the train split"


def run(config: Config) -> None:
    alignment = align(config)
    print(f"{config.out or Path(config.zoo) / ALIGNMENT}: permutations of {len(alignment.models):,} models")
    print(f"reference: model {alignment.reference}, {alignment.chosen}")
    before, after = alignment.before.mean(), alignment.after.mean()
    print(f"mean inner product with the reference: {before:.4g} before, {after:.4g} after")
