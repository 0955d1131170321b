"""Networks of one architecture, moved to the coordinates of one of them, where a module says what may be moved."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastws.compare.modules import Checkpoint, Network, Words, find_network
from fastws.compare.tracing import trace_group, trace_symmetry
from fastws.files.checkpoints import find_checkpoint
from fastws.group.lines import Scales
from fastws.group.shifts import Shift
from fastws.layout.layout import Layout
from fastws.matching.match import match
from fastws.matching.whole import match_whole
from fastws.zoo.readers.checkpoints import find_checkpoints

MOST_NULL = 32  # networks of a folder of strangers: 496 pairs
IN_MEMORY = 2**28  # weights of all networks that are matched together, or kept; more lie in a temporary file
SMALL = 2**20  # weights of a network whose whole group is looked for without being asked for
HELPFUL = 0.5  # of a distance after permutations, from which on scales and rotations are worth their rounding
LARGEST = 2**28  # weights of a network that is matched without being asked for by --architecture


class Mover:
    """What may be moved in a network, and matching at it.

    Attributes:
        symmetry: Permutations and signs that leave the function as it is.
        group: All that leaves it, where that was asked for and is more.
        layout: Of the checkpoints.
        scope: What is matched, in words.
        notes: What is not.
    """

    def __init__(self, network: Network, layout: Layout, whole: bool = False):
        self.network, self.layout = network, layout
        group = trace_group(network) if whole else None
        self.group = group if group is not None and group.lines else None
        self.symmetry = group.symmetry if group is not None else trace_symmetry(network)
        self.symmetry.require_same(layout)
        self.flips = any(self.symmetry.flips)
        self.scope = "permutations and signs" if self.flips else "permutations"
        stay = len(self.symmetry.unpermuted)
        what = f"{stay} kinds of axes of {network.name} were not permuted; Symmetry.trace lists them"
        self.notes = [what] if stay else []
        if self.group is not None:
            ids = dict.fromkeys(line.id for line in self.group.lines)
            self.scope = f"the whole group ({', '.join(['P', *ids])})"
        elif not whole:
            self.notes.append("scales, rotations and the like were not looked at: say --whole")
        # what is left of the group in canonical form, where it is no more than permutations
        lines = self.group.lines if self.group is not None else ()
        positive = (isinstance(line, Scales) and not line.signed and not line.unit for line in lines)
        self.is_simple = all(one or isinstance(line, Shift) for one, line in zip(positive, lines, strict=True))
        entries = [entry for entry in layout.entries if entry.offset >= 0 and entry.role != "norm statistic"]
        self.weights = [slice(entry.offset, entry.offset + entry.numel) for entry in entries]

    def canonical(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state in a form that does not depend on scales, as far as there are any that may move."""
        return state if self.group is None else dict(state) | self.group.canonical(state)[0]

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """``[P]``, float32 or float64."""
        flat = self.layout.flatten(state)
        return flat.to(torch.promote_types(flat.dtype, torch.float32))

    def match(self, flat: Tensor, base: Tensor) -> Tensor:
        """Networks ``[M, P]`` in the coordinates of ``base`` ``[P]`` or ``[M, P]``; their functions stay."""
        rows = match(flat, base, self.symmetry, self.layout, flips=self.flips)
        return self.symmetry.permute(flat, rows, self.layout)

    def move(self, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network in the coordinates of another, in its own dtypes, without rounding."""
        return self.unflatten(self.match(self.flatten(state)[None], self.flatten(base))[0], state)

    def unflatten(self, flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = self.layout.unflatten(flat)
        return {name: moved[name].to(like[name].dtype) for name in moved if name in like}

    def move_whole(self, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """A network moved by the whole group, rounded to its dtypes; and its distance in canonical form."""
        element, report = match_whole(self.group, base, state)
        return self.group.apply(element, state), report.whole.distance

    def move_all(self, states: Sequence[Mapping[str, Tensor]], base: int) -> list[dict[str, Tensor]]:
        """Networks in the coordinates of one of them."""
        goal = self.flatten(states[base])
        if any(tensor.dtype == torch.float64 for state in states for tensor in state.values()):
            goal = goal.double()
        size = len(states) * len(goal)
        with tempfile.TemporaryDirectory() as folder:
            if size > IN_MEMORY:  # which stays readable without its name
                path = str(Path(folder, "moved"))
                flat = torch.from_file(path, shared=True, size=size, dtype=goal.dtype).view(len(states), -1)
            else:
                flat = torch.empty(len(states), len(goal), dtype=goal.dtype)
        for numbers in torch.arange(len(states)).split(max(1, IN_MEMORY // 16 // len(goal))):
            part = torch.stack([self.flatten(states[number]) for number in numbers.tolist()])
            flat[numbers] = self.match(part.to(goal.dtype), goal)
        moved = [self.unflatten(row, state) for row, state in zip(flat, states, strict=True)]
        if self.group is None:
            return moved
        # permutations alone keep quantised and averaged numbers what they are, so that scales are for those they help
        distances = self.distances(flat, goal).tolist()
        for number, (state, distance) in enumerate(zip(states, distances, strict=True)):
            if number != base:
                other, whole = self.move_whole(state, states[base])
                moved[number] = other if whole < HELPFUL * distance else moved[number]
        return moved

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

    def null(self, states: Sequence[Mapping[str, Tensor]], pairs: Sequence[tuple[int, int]]) -> Iterator[float]:
        """Distances of matched pairs; in canonical form, where scales may move."""
        if not self.is_simple:
            yield from (match_whole(self.group, states[b], states[a])[1].whole.distance for a, b in pairs)
            return
        step = max(1, IN_MEMORY // 16 // self.layout.num_weights)

        @lru_cache(max(2, IN_MEMORY // self.layout.num_weights))
        def forms(number: int) -> Tensor:
            return self.flatten(self.canonical(states[number]))

        for begin in range(0, len(pairs), step):
            sides = zip(*pairs[begin : begin + step], strict=True)
            flat, base = (torch.stack([forms(number) for number in side]) for side in sides)
            yield from self.distances(self.match(flat, base), base).tolist()

    def strangers(self, folder: str | os.PathLike, pair: Sequence[Checkpoint], progress: bool = False) -> list[float]:
        """Distances of all pairs of unrelated networks, and of each of them to the two that are asked about.

        The folder may hold these two as well.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If no checkpoint in it is of the architecture.
        """
        states, own = [], [os.path.realpath(find_checkpoint(checkpoint.path)) for checkpoint in pair]
        files = [path for path in find_checkpoints(Path(folder)).files if os.path.realpath(path) not in own]
        for path in files[:MOST_NULL]:
            checkpoint = Checkpoint.open(path)
            if checkpoint.layout.fingerprint == self.layout.fingerprint:
                states.append(checkpoint.state)
        if not states:
            what = "null must be a folder of unrelated networks of the architecture"
            raise ValueError(f"same: {what}, got none in {folder}; leave --null out")
        states += [checkpoint.state for checkpoint in pair]
        # the two that are asked about are no pair of their own null
        pairs = [(one, other) for other in range(len(states) - 2) for one in (*range(other), -2, -1)]
        bar = tqdm(self.null(states, pairs), "strangers", len(pairs), disable=not progress, leave=False, unit=" pairs")
        return list(bar)


def find_mover(checkpoint: Checkpoint, words: Words, whole: bool | None = None) -> tuple[Mover | None, str]:
    """What moves a network; or None and why there is none. ``whole``: by default of small networks.

    Raises:
        ValueError: If the module that the user named is not to be had or does not fit.
    """
    asked = words.architecture is not None
    if not asked and checkpoint.layout.num_weights > LARGEST:
        size = f"{checkpoint.layout.num_weights:,} weights"
        return None, f"permutations were not looked at, because {size} are many: give --architecture to match them"
    try:
        network = find_network(checkpoint, words)
    except ValueError as error:
        if asked:
            raise
        return None, f"permutations were not looked at: {error}"
    if network is None:
        return None, "permutations were not looked at, because no module is known: give --architecture"
    whole = checkpoint.layout.num_weights <= SMALL if whole is None else whole
    return Mover(network, checkpoint.layout, whole), ""
