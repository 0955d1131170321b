"""A population: networks of one or several architectures, of which windows of tokens are cut.

Their weights lie in one stretch of bytes, in memory or in files, and tables of all architectures stand one below the
other, so that a batch of windows is one call of an operator, whatever networks are in it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastws
from fastws.devices import to_device
from fastws.files.arena import Arena
from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.table import Row, table_columns
from fastws.tokens import Tokens
from fastws.windows.measured import Measured

OFFSETS = [Row._fields.index(name) for name in ("weight_offset", "bias_offset")]
FIRST_TOKEN = Row._fields.index("first_token")
LARGE = 2**40  # more tokens than a network has


class Kind(NamedTuple):
    """One architecture: its tokens, what may be permuted, and how its layers are scaled."""

    layout: Layout
    symmetry: Symmetry | None  # None: nothing is permuted
    mean: Tensor  # of each layer, [L] float32
    std: Tensor  # what is divided by

    @classmethod
    def of(cls, layout: Layout, symmetry: Symmetry | None = None) -> "Kind":
        """Without statistics: weights are what they are."""
        return cls(layout, symmetry, torch.zeros(len(layout.table)), torch.ones(len(layout.table)))


class Population(NamedTuple):
    """Networks, and where their weights are. Tensors on the device of the weights, ``kind`` and ``aligned`` on the CPU.

    A number that has another dtype than others of its network is found in another of ``weights``, which are views of
    the same bytes.
    """

    kinds: tuple[Kind, ...]
    kind: Tensor  # of each network, int64 [m]
    weights: tuple[Tensor, ...]  # [A], one view of all bytes for each dtype
    tables: tuple[Tensor, ...]  # int64 [sum L, 11], one for each of weights, in whose entries it counts
    bases: tuple[Tensor, ...]  # int64 [m], the first entry of each network in each of weights
    where: Tensor  # int64 [sum L], in which of weights each layer is
    layers: Tensor  # int64 [m, 2], first and one past the last row of each network in tables
    scale: Tensor  # float32 [sum L], 1 / std
    shift: Tensor  # float32 [sum L], - mean / std
    may_flip: Tensor | None = None  # which networks keep their function when units change their sign, bool [m]
    aligned: Tensor | None = None  # permutations that align each network, int32 [m, S]; None: they are as they lie
    arena: Arena | None = None  # the files that the weights are in; None: they are in memory
    measured: Measured | None = None  # scales of each network for itself, in place of scale and shift

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def token_size(self) -> int:
        return self.kinds[0].layout.token_size

    @property
    def num_tokens(self) -> Tensor:
        """Tokens of each network, int64 ``[m]``, on the CPU."""
        return torch.tensor([kind.layout.num_tokens for kind in self.kinds])[self.kind]

    def move(self, device: Callable[[Tensor], Tensor]) -> "Population":
        """The same with its weights elsewhere, by a function that moves tensors."""
        fields = {name: tuple(map(device, getattr(self, name))) for name in ("weights", "tables", "bases")}
        fields |= {name: device(getattr(self, name)) for name in ("where", "layers", "scale", "shift")}
        may_flip = None if self.may_flip is None else device(self.may_flip)
        return self._replace(**fields, may_flip=may_flip)


def make_population(
    kinds: Sequence[Kind],
    kind: Tensor,
    content: Tensor,
    begins: Tensor,
    dtypes: Sequence[torch.dtype],
    **fields,
) -> Population:
    """Puts tables together.

    Args:
        kinds: The architectures.
        kind: Of each network.
        content: All bytes, uint8 ``[A]``, A a multiple of 8.
        begins: Byte that each network begins at, int64 ``[m]``, a multiple of the sizes of its dtypes.
        dtypes: Of the flat vectors of each kind.
        fields: Others of the population.
    """
    known = list(dict.fromkeys(dtypes))
    counts = torch.tensor([len(k.layout.table) for k in kinds])
    of_kind = torch.tensor([known.index(dtype) for dtype in dtypes])
    where, table = of_kind.repeat_interleave(counts), torch.cat([tabled(k) for k in kinds])
    tables, bases = [], []
    for number, dtype in enumerate(known):
        # networks of other dtypes are read too, each layer from the first byte of all, and thrown away
        own, offsets = table.clone(), table[:, OFFSETS]
        own[:, OFFSETS] = torch.where((where == number)[:, None] | (offsets < 0), offsets, 0)
        tables.append(own)
        bases.append(torch.where(of_kind[kind] == number, begins, 0) // dtype.itemsize)
    ends = counts.cumsum(0)
    mean, std = torch.cat([k.mean for k in kinds]), torch.cat([k.std for k in kinds])
    population = Population(
        tuple(kinds),
        kind,
        tuple(content.view(dtype) for dtype in known),
        tuple(tables),
        tuple(bases),
        where,
        torch.stack([ends - counts, ends], 1)[kind],
        1 / std,
        -mean / std,
        **fields,
    )
    return population.move(lambda x: x.to(content.device))


def tabled(kind: Kind) -> Tensor:
    return kind.layout.table if kind.symmetry is None else kind.symmetry.table(kind.layout)


def random_permutations(
    population: Population, model: Tensor, seed: int, offset: int, *, flips: bool | Tensor = False, still: int = 0
) -> Tensor:
    """One row of permutations for each of the networks ``model`` ``[B]``, int32 ``[B, S]`` on the device.

    Those of networks without a symmetry move nothing; nor do those of the first ``still``.
    """
    device, kind = population.device, population.kind[model]
    parts = []
    for number in kind.unique().tolist():
        symmetry, rows = population.kinds[number].symmetry, (kind == number).nonzero().flatten()
        if symmetry is None:
            continue
        chosen = flips if not isinstance(flips, Tensor) or len(rows) == len(model) else flips[to_device(rows, device)]
        drawn = symmetry.random(len(rows), seed, offset, device=device, flips=chosen)
        count = int((rows < still).sum())
        if count:
            drawn[:count] = symmetry.identity(1, device)
        parts.append((rows, drawn))
    if len(parts) == 1 and len(parts[0][0]) == len(model):
        return parts[0][1]
    width = max((drawn.shape[1] for _, drawn in parts), default=0)
    permutations = torch.zeros(len(model), width, dtype=torch.int32, device=device)
    for rows, drawn in parts:
        permutations[to_device(rows, device), : drawn.shape[1]] = drawn
    return permutations


def align(population: Population, model: Tensor, permutations: Tensor | None) -> Tensor | None:
    """The permutations of networks ``model`` ``[B]`` behind those that align them."""
    if population.aligned is None:
        return permutations
    rows = population.aligned[model].to(population.device)
    if permutations is None:
        return rows
    composed = permutations.clone()
    kind = population.kind[model]
    for number in kind.unique().tolist():
        symmetry, own = population.kinds[number].symmetry, (kind == number).nonzero().flatten()
        size = symmetry.num_indices
        composed[own, :size] = symmetry.compose(rows[own, :size], permutations[own, :size])
    return composed


def cut(
    population: Population,
    model: Tensor,
    start: Tensor,
    window: int,
    permutations: Tensor | None = None,
    **augmentation,
) -> Tokens:
    """Windows of networks ``model`` ``[B]`` from tokens ``start`` ``[B]`` on, int64 on the CPU; see ``token_views``.

    Tokens past the end of a network are padding.
    """
    device = population.device
    if population.arena is not None:
        view, row = touched(population, model, start, window)
        prefetch(population, model[view], start[view], row, window)
        if population.measured is not None:
            population.measured.measure(population, model[view], row)
    model_there, start = to_device(model, device), to_device(start, device)
    own, chosen = (population, model_there) if population.measured is None else narrow(population, model)
    found = [
        fastws.token_views(
            weights, table, population.token_size, chosen, start, window, permutations,
            scale=own.scale, shift=own.shift, dtype=torch.float32, base=base, layers=own.layers, **augmentation,
        )
        for weights, table, base in zip(own.weights, own.tables, own.bases, strict=True)
    ]  # fmt: skip
    values, lengths, positions = found[0]
    if len(found) > 1:
        which = population.where[rows_of_tokens(population, model_there, positions)][..., None]
        for number, other in enumerate(found[1:], start=1):
            values = torch.where(which == number, other.values, values)
    if population.measured is not None:
        values = population.measured.clean(values, model)
    return Tokens(values, lengths, positions)


def narrow(population: Population, model: Tensor) -> tuple[Population, Tensor]:
    """The tables of networks ``[B]`` alone, each with scales of its own, and where each of them then is, ``[B]``.

    Layers of another dtype are read from the zeros behind the files.
    """
    chosen, place = model.unique(return_inverse=True)
    counts = population.layers[chosen, 1] - population.layers[chosen, 0]
    ends = counts.cumsum(0)
    owner = torch.arange(len(chosen)).repeat_interleave(counts)
    row = torch.arange(len(owner)) + (population.layers[chosen, 0] - ends + counts)[owner]
    tables, bases, where = [], [], population.where[row]
    for number, (table, base) in enumerate(zip(population.tables, population.bases, strict=True)):
        own, base = table[row], base[chosen]
        if len(population.tables) > 1:
            zeros = population.arena.end // population.weights[number].element_size() - base[owner]
            elsewhere, offsets = (where != number)[:, None], own[:, OFFSETS]
            own[:, OFFSETS] = torch.where(elsewhere & (offsets >= 0), zeros[:, None], offsets)
        tables.append(own)
        bases.append(base)
    known = population.measured.first[chosen][owner] + row
    scale = 1 / population.measured.std[known]
    shift = -population.measured.mean[known] * scale
    fields = {"layers": torch.stack([ends - counts, ends], 1), "scale": scale, "shift": shift, "where": where}
    return population._replace(tables=tuple(tables), bases=tuple(bases), **fields), place


def rows_of_tokens(population: Population, model: Tensor, positions: Tensor) -> Tensor:
    """Which row of the tables each token is of, int64 ``[B, W]``; that of padding is any of its network."""
    return population.layers[model, 0][:, None] + positions[..., 1]


def touched(population: Population, model: Tensor, start: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Views and rows of the tables, ``[P]`` each: every layer that a window has tokens of."""
    first, last = population.layers[model].unbind(1)
    tokens = population.tables[0][:, FIRST_TOKEN]
    # tables lie one below the other: with the number of its table before it the first token of a row grows
    number = torch.zeros_like(tokens)
    number[population.layers[:, 0]] = LARGE
    number = number.cumsum(0)
    keys, place = number + tokens, number[first] + start
    low = torch.searchsorted(keys, place, right=True) - 1
    high = torch.searchsorted(keys, place + window)
    low = torch.maximum(low, first)
    counts = torch.minimum(high, last) - low
    view = torch.arange(len(model)).repeat_interleave(counts)
    return view, torch.arange(len(view)) + (low - counts.cumsum(0) + counts)[view]


def prefetch(population: Population, model: Tensor, start: Tensor, row: Tensor, window: int) -> None:
    """Asks for the bytes of windows of layers ``row`` ``[P]``; rows that are permuted are read when they are needed."""
    size, where = population.token_size, population.where[row]
    begins, sizes = torch.zeros_like(row), torch.zeros_like(row)
    for number, (weights, table, base) in enumerate(
        zip(population.weights, population.tables, population.bases, strict=True)
    ):
        own, width = table_columns(table[row]), weights.element_size()
        first, stride, length = own.first_entry(size), own.stride(size), own.row_length
        low, high = ((token * size - first).clamp(min=0) for token in (start, start + window))
        high = torch.minimum(high, own.rows * stride)
        skipped, stop = (x // stride * length + torch.minimum(x % stride, length) for x in (low, high))
        whole = own.first_in >= 0  # columns are permuted, so that any of a row may be needed
        skipped = torch.where(whole, low // stride * length, skipped)
        stop = torch.where(whole, -(-high // stride) * length, stop)
        begin = (base[model] + own.weight_offset + skipped) * width
        length = torch.where(own.first_out >= 0, 0, stop - skipped) * width
        begins, sizes = (torch.where(where == number, *pair) for pair in ((begin, begins), (length, sizes)))
    some = sizes > 0
    population.arena.prefetch(begins[some].tolist(), sizes[some].tolist())
