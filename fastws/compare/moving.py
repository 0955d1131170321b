"""Networks of one architecture, moved to the coordinates of one of them, where a module says what may be moved."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastws.compare.modules import Checkpoint, Network
from fastws.layout.layout import Layout
from fastws.matching.match import match
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.readers.checkpoints import find_checkpoints

MOST_NULL = 32  # networks of a folder of strangers: 496 pairs


class Mover:
    """What may be permuted in a network, and matching at it.

    Attributes:
        symmetry: Permutations and signs that leave the function as it is.
        layout: Of the checkpoints.
        scope: What is matched, in words.
        notes: What is not.
    """

    def __init__(self, network: Network, layout: Layout):
        self.symmetry, self.layout = Symmetry.trace(network.module, network.inputs), layout
        self.symmetry.require_same(layout)
        self.scope = "permutations and signs" if any(self.symmetry.flips) else "permutations"
        stay = len(self.symmetry.unpermuted)
        what = f"{stay} kinds of axes of {network.name} were not permuted; Symmetry.trace lists them"
        self.notes = [what] if stay else []
        entries = [entry for entry in layout.entries if entry.offset >= 0 and entry.role != "norm statistic"]
        self.weights = [slice(entry.offset, entry.offset + entry.numel) for entry in entries]

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """``[P]``, float32 or float64."""
        flat = self.layout.flatten(state)
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def match(self, flat: Tensor, base: Tensor) -> Tensor:
        """Networks ``[M, P]`` in the coordinates of ``base`` ``[P]`` or ``[M, P]``; their functions stay."""
        rows = match(flat, base, self.symmetry, self.layout, flips=any(self.symmetry.flips))
        return self.symmetry.permute(flat, rows, self.layout)

    def move(self, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network in the coordinates of another, in its own dtypes: elements are exact."""
        flat = self.match(self.flatten(state)[None], self.flatten(base))[0]
        moved = self.layout.unflatten(flat)
        return {name: moved[name].to(state[name].dtype) for name in moved if name in state}

    def distances(self, flat: Tensor, base: Tensor) -> Tensor:
        """``||a - b|| / (||a|| ||b||)**0.5`` of weights without running statistics, float64 ``[M]``."""
        gap, ours, theirs = (torch.zeros(len(flat), dtype=torch.float64) for _ in range(3))
        base = base.expand(len(flat), -1)
        for part in self.weights:
            a, b = flat[:, part].double(), base[:, part].double()
            gap += (a - b).square().sum(1)
            ours += a.square().sum(1)
            theirs += b.square().sum(1)
        return (gap / (ours * theirs).sqrt()).sqrt()

    def strangers(self, folder: str | os.PathLike, pair: Sequence[Checkpoint], progress: bool = False) -> list[float]:
        """Distances of all pairs of unrelated networks, and of each of them to the two that are asked about.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If no checkpoint in it is of the architecture.
        """
        rows = []
        for path in find_checkpoints(Path(folder)).files[:MOST_NULL]:
            checkpoint = Checkpoint.open(path)
            if checkpoint.layout.fingerprint == self.layout.fingerprint:
                rows.append(self.flatten(checkpoint.state))
        if not rows:
            what = "null must be a folder of unrelated networks of the architecture"
            raise ValueError(f"same: {what}, got none in {folder}; leave --null out")
        flat = torch.stack(rows)
        own = torch.stack([self.flatten(checkpoint.state) for checkpoint in pair])
        everyone = torch.cat([own, flat])
        found = []
        # from the first stranger on: the pair itself is no part of its own null
        for number in tqdm(range(2, len(everyone)), desc="strangers", disable=not progress, leave=False):
            found += self.distances(self.match(everyone[:number], everyone[number]), everyone[number]).tolist()
        return found
