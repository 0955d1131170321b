"""Networks of networks: linear layers that commute with the symmetry of an architecture, and what they are made of.

The layers of neural functionals (arXiv 2302.14040, NP with codes at inputs and outputs), in a form that any traced
symmetry has (arXiv 2402.05232 without the terms of repeated axes): wherever an axis of a tensor consists of the units
of a group, the tensor is seen by the group as its mean over the other axis. An entry becomes a linear function of
itself, of all that the groups of its two axes see, and of the means of all tensors.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastws.layout.layout import Layout
from fastws.layout.roles import bias_name
from fastws.symmetry.segments import Segments
from fastws.symmetry.symmetry import Symmetry

ONE = ("one", "")  # the group of an axis that is not there, or has one entry


class Piece(NamedTuple):
    """A part of a tensor as a matrix of units: ``index[r, c]`` says where the numbers of a pair of units lie.

    What a group does not move of an axis is a group of its own, whose units are told apart by codes; kernel positions
    and the entries of a block are channels.
    """

    rows: tuple  # group of the first axis
    columns: tuple  # group of the second
    index: Tensor  # into the flat vector, [n, m, k]


def axis_units(name: str, axis: int, length: int, segments: Segments | None, sizes: Sequence[int]) -> dict:
    """The entries of an axis by group, ``[n, k]`` each: k entries for each of its n units.

    Entries that stay are a group of the tensor's own, of one entry for each unit; one alone is no group.
    """
    if segments is None:
        key = ("fixed", name, axis) if length > 1 else ONE
        return {key: torch.arange(length)[:, None]}
    found: dict[tuple, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    begun, place = Counter(), 0
    for group, count, block, _ in segments:
        for _ in range(count):
            key = ("fixed", name, axis) if group is None else ("group", group)
            unit = begun[key] if group is None else begun[key] % sizes[group]
            begun[key] += 1
            found[key][unit] += range(place, place + block)
            place += block
    return {key: torch.tensor([units[unit] for unit in sorted(units)]) for key, units in found.items()}


def pieces_of(layout: Layout, symmetry: Symmetry) -> list[Piece]:
    """All floating tensors of a layout as matrices of units.

    Raises:
        ValueError: If the symmetry is of other tensors.
    """
    symmetry.require_same(layout)
    partners = {bias_name(entry.name): entry.name for entry in layout.entries if len(entry.shape) > 1}
    pieces = []
    for entry in layout.entries:
        if entry.offset < 0 or not entry.numel:
            continue
        moved = symmetry.axes[entry.name]
        second = next((axis for axis in range(1, len(moved)) if moved[axis]), min(1, len(moved) - 1))
        # a bias that stays has the units of its weight's rows
        owner = partners.get(entry.name, entry.name) if len(entry.shape) == 1 else entry.name
        shape = entry.shape or (1,)
        index = torch.arange(entry.offset, entry.offset + entry.numel).view(shape)
        rows = axis_units(owner, 0, shape[0], moved[0] if moved else None, symmetry.sizes)
        if len(shape) == 1:
            columns, index = {ONE: torch.zeros(1, 1, dtype=torch.int64)}, index[:, None, None]
        else:
            columns = axis_units(entry.name, second, shape[second], moved[second], symmetry.sizes)
            index = index.movedim(second, 1).reshape(shape[0], shape[second], -1)
        for row_key, row in rows.items():
            for column_key, column in columns.items():
                part = index[row][:, :, column]  # [n, a, m, b, rest]
                pieces.append(Piece(row_key, column_key, part.transpose(1, 2).flatten(2).contiguous()))
    return pieces


def joined(pieces: Sequence[Piece]) -> list[tuple[int, bool]]:
    """Every axis of every piece that has units: the number of the piece, and whether it is the second axis."""
    axes = [(number, False) for number, piece in enumerate(pieces) if piece.rows != ONE]
    return axes + [(number, True) for number, piece in enumerate(pieces) if piece.columns != ONE]


class EquivariantLinear(nn.Module):
    """A linear map of features of all pieces that commutes with permutations of the units of every group.

    ``y[r, c] = A x[r, c] + R view(r) + C view(c) + M mean + b``, where the view of a unit is what all pieces that have
    its group on an axis are on average at this unit, and the mean is that of all pieces.

    Args:
        pieces: Of the architecture.
        inputs: Channels of each number, C.
        outputs: Likewise, D.
    """

    def __init__(self, pieces: Sequence[Piece], inputs: int, outputs: int):
        super().__init__()
        sizes = [piece.index.shape[2] for piece in pieces]
        self.groups: dict[tuple, list[tuple[int, bool]]] = defaultdict(list)
        for number, second in joined(pieces):
            piece = pieces[number]
            self.groups[piece.columns if second else piece.rows].append((number, second))
        # where an axis is missing, the view of the other is the piece itself
        self.whole = [ONE not in (piece.rows, piece.columns) for piece in pieces]
        self.own = nn.ModuleList(
            nn.Linear(size * inputs, size * outputs, bias=False) if whole else nn.Identity()
            for size, whole in zip(sizes, self.whole, strict=True)
        )
        self.views = nn.ModuleList(
            nn.Linear(
                sum(sizes[number] for number, _ in axes) * inputs,
                sum(sizes[number] for number, _ in axes) * outputs,
                bias=False,
            )
            for axes in self.groups.values()
        )
        self.means = nn.Linear(sum(sizes) * inputs, sum(sizes) * outputs)
        self.widths = [size * outputs for size in sizes]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of each piece, ``[B, n, m, k C]`` to ``[B, n, m, k D]``."""
        means = self.means(torch.cat([x.mean((1, 2)) for x in features], 1)).split(self.widths, 1)
        outputs = [mean[:, None, None] for mean in means]
        for axes, linear in zip(self.groups.values(), self.views, strict=True):
            views = torch.cat([features[number].mean(1 if second else 2) for number, second in axes], 2)
            parts = linear(views).split([self.widths[number] for number, _ in axes], 2)
            for (number, second), part in zip(axes, parts, strict=True):
                outputs[number] = outputs[number] + part.unsqueeze(1 if second else 2)
        for number, whole in enumerate(self.whole):
            if whole:
                outputs[number] = outputs[number] + self.own[number](features[number])
        return [y.expand(*x.shape[:3], -1) for x, y in zip(features, outputs, strict=True)]


class Codes(nn.Module):
    """Learned vectors that tell the units apart that nothing moves: inputs, outputs and the like."""

    def __init__(self, pieces: Sequence[Piece], channels: int):
        super().__init__()
        self.axes = [
            (number, second)
            for number, second in joined(pieces)
            if (pieces[number].columns if second else pieces[number].rows)[0] == "fixed"
        ]
        self.vectors = nn.ParameterList()
        for number, second in self.axes:
            rows, columns, size = pieces[number].index.shape
            self.vectors.append(torch.randn(columns if second else rows, size * channels))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        features = list(features)
        for (number, second), vectors in zip(self.axes, self.vectors, strict=True):
            features[number] = features[number] + vectors.unsqueeze(0 if second else 1)
        return features


class EquivariantNetwork(nn.Module):
    """Numbers that are foretold of networks, the same for all orders of their units (arXiv 2302.14040).

    Weights are divided by their tensor's scale, and pass through layers that commute with permutations, codes before
    each and ReLU behind. Means over what a symmetry moves, and what is known of each network otherwise, go through a
    perceptron. Where units may change their sign, a weight comes with its size, ``[w, |w|]``: signs are not invariants
    of such a network, and random ones are for training to draw.

    Args:
        layout: Of the networks.
        symmetry: Of their architecture.
        outputs: How many numbers, K.
        known: How many numbers are known of each network otherwise, as statistics of its layers, F.
        channels: Of each layer.
        head: Width of both layers of the perceptron.

    Raises:
        ValueError: If the symmetry is of other tensors than the layout.
    """

    def __init__(
        self,
        layout: Layout,
        symmetry: Symmetry,
        outputs: int = 1,
        *,
        known: int = 0,
        channels: Sequence[int] = (8, 8),
        head: int = 256,
    ):
        super().__init__()
        self.pieces = pieces_of(layout, symmetry)
        self.signed = any(symmetry.flips)
        widths = [1 + self.signed, *channels]
        self.codes = nn.ModuleList(Codes(self.pieces, width) for width in widths[:-1])
        self.layers = nn.ModuleList(EquivariantLinear(self.pieces, *pair) for pair in pairwise(widths))
        for number, piece in enumerate(self.pieces):
            self.register_buffer(f"index{number}", piece.index, persistent=False)
        self.register_buffer("scale", torch.ones(layout.num_weights))
        self.register_buffer("known_mean", torch.zeros(known))
        self.register_buffer("known_std", torch.ones(known))
        pooled = sum(self._pooled_units(piece) * piece.index.shape[2] for piece in self.pieces) * widths[-1]
        self.head = nn.Sequential(
            nn.Linear(pooled + known, head), nn.ReLU(), nn.Linear(head, head), nn.ReLU(), nn.Linear(head, outputs)
        )
        self.offsets = [(e.offset, e.offset + e.numel) for e in layout.entries if e.offset >= 0 and e.numel]

    @staticmethod
    def _pooled_units(piece: Piece) -> int:
        rows, columns, _ = piece.index.shape
        return (rows if piece.rows[0] == "fixed" else 1) * (columns if piece.columns[0] == "fixed" else 1)

    @torch.no_grad()
    def set_scales(self, flat: Tensor, known: Tensor | None = None) -> None:
        """Takes scales from training networks: each tensor's std, and mean and std of what is known otherwise.

        Args:
            flat: ``[m, P]``.
            known: ``[m, F]``.
        """
        for begin, end in self.offsets:
            spread = flat[:, begin:end].double().std()
            self.scale[begin:end] = spread if spread > 0 else 1  # a std of one number is nan, and greater than nothing
        if known is not None:
            std = known.double().std(0, correction=0)
            self.known_mean.copy_(known.double().mean(0))
            self.known_std.copy_(std.where(std > 0, 1))

    def equivariant(self, flat: Tensor) -> list[Tensor]:
        """Features of each piece behind the last layer, ``[B, n, m, k D]``, of flat networks ``[B, P]``."""
        flat = flat / self.scale
        features = []
        for number in range(len(self.pieces)):
            x = flat[:, getattr(self, f"index{number}")]
            features.append(torch.cat([x, x.abs()], 3) if self.signed else x)
        for codes, layer in zip(self.codes, self.layers, strict=True):
            features = [x.relu() for x in layer(codes(features))]
        return features

    def forward(self, flat: Tensor, known: Tensor | None = None) -> Tensor:
        """Logits ``[B, K]`` of flat networks ``[B, P]`` and of what is known of them, ``[B, F]``."""
        pooled = []
        for piece, x in zip(self.pieces, self.equivariant(flat), strict=True):
            moved = [axis for axis, key in ((1, piece.rows), (2, piece.columns)) if key[0] != "fixed"]
            pooled.append((x.mean(moved, keepdim=True) if moved else x).flatten(1))
        if known is not None:
            pooled.append((known - self.known_mean) / self.known_std)
        return self.head(torch.cat(pooled, 1))
