"""Alignment of transformers that do not fit into memory: matched, checked and written a block at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastws.compare.aligning import Matching
from fastws.compare.hugging_face import CONFIG, build, example_inputs, read_config
from fastws.compare.modules import Checkpoint, Network, Words, folder_of, require_fit
from fastws.compare.running import same_function
from fastws.compare.states import Distance
from fastws.compare.tracing import few_blocks
from fastws.group.group import Group
from fastws.group.lines import Element
from fastws.group.repeat import Block, repeat
from fastws.layout.roles import load_state
from fastws.matching.parts import Part, element_of, find_parts, match_parts
from fastws.signed import split
from fastws.symmetry.symmetry import Symmetry

MANY = 2**28  # weights of a network from which on it is aligned a block at a time
KEPT = 3  # parts of the aligned network that are held: what is in no block, the first block of a kind, and another


def goes_by_blocks(asked: bool | None, model: Checkpoint, words: Words, how: Matching) -> bool:
    """Whether a network is aligned a block at a time: by default large ones that can be.

    Raises:
        ValueError: If it was asked for and cannot be.
    """
    if asked is False or (asked is None and model.layout.num_weights < MANY):
        return False
    folder = folder_of(model.path)
    can = model.path.is_dir() and (folder / CONFIG).is_file()
    can = can and words.architecture is None and how.by == "weights" and how.restarts == 1
    if asked and not can:
        what = "--by-blocks must be left out but for folders of transformers that are matched once by weights"
        raise ValueError(f"align: {what}, got {model.path}")
    return can


class Aligning(Mapping[str, Tensor]):
    """A network in the coordinates of another one: tensors are moved, and functions checked, as they are asked for.

    Args:
        base: The network whose coordinates are taken.
        model: The one that is moved, of one architecture with it: a folder that transformers wrote.
        continuous: Whether scales, matrices and rotations are matched too, not permutations and signs alone.

    Raises:
        ValueError: If no module of transformers is known that fits both, or if its blocks are not alike. Asking for a
            tensor raises it where a block would compute something else than before.
    """

    def __init__(self, base: Checkpoint, model: Checkpoint, continuous: bool):
        network = empty_network(model)
        for checkpoint in (base, model):
            require_fit(checkpoint, network)
        found = few_blocks(network)
        if found is None:
            what = "module must have many blocks that are alike to be aligned by blocks"
            raise ValueError(f"{model.path}: {what}, got others; give --no-by-blocks")
        self.base, self.model, self.exact = base.state, model.state, not continuous
        self.module, self.inputs, self.blocks = found
        small = Group.trace(self.module, self.inputs) if continuous else Group(Symmetry.trace(self.module, self.inputs))
        self.group, self.name = repeat(small, self.blocks), network.name
        lists = [(begin, number) for begin, like in self.blocks.like.items() for number in range(len(like))]
        self.places: dict[Block | None, int] = {block: n for n, block in enumerate([None, *lists])}
        self.names: list[list[str]] = [[] for _ in self.places]
        for name in self.group.symmetry.shapes:
            self.names[self.places[self.blocks.block(name)]].append(name)
        self.parts = find_parts(self.group, self.names)
        self.matched = match_parts(self.parts, self._load, 0, lambda n: tqdm(range(n), "match", leave=False))
        self.moved: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self.checked: set[int] = set()
        self.error = self.rounding = 0.0
        self.units = self.still = 0
        # before and after: inner product, squares, and that of the difference
        self.sums = torch.zeros(2, 4, dtype=torch.float64)

    def _load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        held = ({n: state[n] for n in self.names[number] if n in state} for state in (self.base, self.model))
        base, model = (self.parts[number].group.given(state) for state in held)
        return base, model

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.group.symmetry.shapes:
            return self.model[name]
        number = self.places[self.blocks.block(name)]
        if number not in self.checked:
            self._check(number)
        return self._moved(number)[name]

    def _moved(self, number: int) -> dict[str, Tensor]:
        """The tensors of a part of the network, moved."""
        if number not in self.moved:
            base, model = self._load(number)
            part = self.parts[number]
            element = element_of(part, self.matched, number, base, model)
            given = {name: self.model[name] for name in self.names[number] if name in self.model}
            self.moved[number] = part.group.apply(element, given)
            if number not in self.checked:
                self._count(part, number, element, base, model)
        self.moved.move_to_end(number)
        for old in [*self.moved][:-KEPT]:
            if old:  # of what is in no block each check has need
                del self.moved[old]
        return self.moved[number]

    def _count(self, part: Part, number: int, element: Element, base: Mapping, model: Mapping) -> None:
        symmetry = part.group.symmetry
        rows = [move.value for move in element if move.line == "P"]
        index, negative = split(reduce(symmetry.compose, rows, symmetry.identity()[0])[: symmetry.starts[-1]])
        still = (index == symmetry.identity()[0, : symmetry.starts[-1]]) & (negative == 0)
        self.units, self.still = self.units + len(still), self.still + int(still.sum())
        for row, state in enumerate((model, self.moved[number])):
            for name, tensor in base.items():
                if name not in part.group.statistics:
                    x, y = tensor.double(), state[name].double()
                    found = [(x * y).sum(), x.square().sum(), y.square().sum(), (x - y).square().sum()]
                    self.sums[row] += torch.stack(found)

    def _check(self, number: int) -> None:
        """Compares what a small module computes with a block, in the place of all of its kind, before and after."""
        block = next(block for block, place in self.places.items() if place == number)
        before, after = {}, {}
        for name, tensor in load_state(self.module).items():
            where = self.blocks.block(name)
            if block is not None and where is not None and self._alike(where, block):
                name_there = self.blocks.renamed(name, where, block[1])
            else:
                name_there = name
            there = self.places[self.blocks.block(name_there)]
            for found, state in ((before, self.model), (after, self._moved(there))):
                if name_there in state:
                    found[name] = state[name_there][tuple(map(slice, tensor.shape))]
        checked = same_function(Network(self.module, self.inputs, self.name), before, after)
        if not checked.holds(self.exact):
            where = "what is in no block" if block is None else f"{block[0]}{block[1]}"
            got = f"relative error {checked.error:.1e} of {where} after alignment"
            raise ValueError(f"align: outputs must stay what they are, got {got}; nothing was written")
        self.error, self.rounding = max(self.error, checked.error), max(self.rounding, checked.rounding)
        self.checked.add(number)

    def _alike(self, one: Block, other: Block) -> bool:
        like = self.blocks.like
        return one[0] == other[0] and like[one[0]][one[1]] == like[other[0]][other[1]]

    def report(self) -> dict[str, object]:
        """What was found, once all tensors were asked for."""
        raw, aligned = (
            Distance(float((apart / (x * y).sqrt()).sqrt()), float(inner / (x * y).sqrt()))
            for inner, x, y, apart in self.sums
        )
        cosine = self.matched.cosine
        canonical = None if self.exact else Distance((2 - 2 * min(1.0, cosine)) ** 0.5, cosine)._asdict()
        found = {"raw": raw._asdict(), "aligned": aligned._asdict(), "moved": 1 - self.still / max(1, self.units)}
        found |= {"canonical": canonical, "rounding": self.rounding, "error": self.error, "exact": self.exact}
        return found | {"unmatched": [], "rounds": self.matched.rounds}


def empty_network(model: Checkpoint) -> Network:
    """The module of a folder of transformers without memory for its weights."""
    folder = folder_of(model.path)
    kind, config = read_config(folder)
    with torch.device("meta"):
        module: nn.Module = build(folder / CONFIG, kind, config).eval().requires_grad_(False)
    name = f"the module of {folder / CONFIG}"
    return Network(module, example_inputs(folder / CONFIG, module), name, folder)
