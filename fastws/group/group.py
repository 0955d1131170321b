"""The whole group: everything that may be done to the weights of an architecture without changing its function."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastws.files.names import plain_names
from fastws.group.balance import balance
from fastws.group.find import find_lines
from fastws.group.function import Function, State
from fastws.group.lines import Element, Inner, Matrices, Move, Pairs, Scales
from fastws.group.shifts import Shift
from fastws.group.streams import Rotation
from fastws.layout.roles import infer_roles
from fastws.symmetry.copies import Inputs, example_of
from fastws.symmetry.symmetry import Symmetry


class Group:
    """Permutations, signs, scales, matrices and rotations that leave the function of every checkpoint as it is.

    ``Group.trace`` is the way to get one. It holds a ``Symmetry``, the permutations of whole units, and *lines*: kinds
    of changes of the weights, each found by what it does to the outputs and tried on random weights in float64. An
    *element* is a tuple of moves, which are done one after the other: ``Move(line, value)``, where ``line`` is the key
    of a line, ``"P"`` for the permutations, whose value is a row of ``symmetry``. ``()`` changes nothing.

    Attributes:
        symmetry: The permutations of whole units.
        lines: All others, each verified.
        failed: Sentences that say what was tried and does not hold, or could not be tried.
        permutes: Whether the permutations take part.
    """

    def __init__(self, symmetry: Symmetry, lines: Iterable = (), failed: Iterable[str] = (), permutes: bool = True):
        self.symmetry, self.lines, self.failed, self.permutes = symmetry, tuple(lines), list(failed), permutes
        folds = {fold.line.key: fold.line for line in self.lines if isinstance(line, Rotation) for fold in line.folds}
        self.by_key = folds | {line.key: line for line in self.lines}
        roles = infer_roles(symmetry.shapes)
        self.statistics = frozenset(name for name, role in roles.items() if role == "norm statistic")

    @classmethod
    def trace(
        cls, module: nn.Module, example_inputs: Inputs, *more: Inputs, lines: Iterable[str] | None = None
    ) -> "Group":
        """Finds the whole group of a module, and checks every line of it.

        Args:
            module: Any module; it is not changed. A small one of the same architecture is quicker.
            example_inputs: The arguments of its forward, as ``Symmetry.trace`` takes them.
            more: Further examples.
            lines: Ids of lines to keep (``"P"`` are the permutations); by default all.

        Raises:
            ValueError: As ``Symmetry.trace`` and ``only`` do.

        Example:
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> print(fastws.Group.trace(mlp, torch.randn(1, 4)).describe())
            permutations (P): 8 units, 0.weight: 0.weight axis 0, 0.bias axis 0, 2.weight axis 1
            positive scales (S+) of 8 units: 0.weight, 0.bias against 2.weight
        """
        symmetries = [Symmetry.trace(module, example_inputs, *more)]
        if any(isinstance(part, _ConvNd) and 1 < part.groups < part.in_channels for part in module.modules()):
            symmetries.append(Symmetry.trace(module, example_inputs, *more, inside=False))
        examples = [example_of(module, inputs) for inputs in (example_inputs, *more)]
        try:
            function = Function(module, examples)
        except ValueError as error:
            group = cls(symmetries[0], (), [str(error)])
        else:
            group = max((cls(one, *find_lines(module, one, function)) for one in symmetries), key=cls.permutations)
        return group if lines is None else group.only(*lines)

    def permutations(self) -> float:
        """The logarithm of the number of permutations, those inside units with the others."""
        inner = [line for line in self.lines if isinstance(line, Inner)]
        count = sum(math.lgamma(size + 1) for size in self.symmetry.sizes)
        return count + sum(line.units * math.lgamma(line.positions + 1) for line in inner)

    def only(self, *ids: str) -> "Group":
        """The same group with some lines alone, by their ids; ``"P"`` are the permutations.

        Raises ValueError for an id that no line has.
        """
        known = {*(["P"] if self.permutes else []), *(line.id for line in self.lines)}
        strange = sorted(set(ids) - known)
        if strange:
            raise ValueError(f"group: lines must be of {', '.join(sorted(known))}, got {strange[0]}")
        kept = [line for line in self.lines if line.id in ids]
        return Group(self.symmetry, kept, self.failed, self.permutes and "P" in ids)

    def without(self, *ids: str) -> "Group":
        """The same group without some lines, by their ids; those that no line has are passed over."""
        kept = [line for line in self.lines if line.id not in ids]
        return Group(self.symmetry, kept, self.failed, self.permutes and "P" not in ids)

    def discrete(self) -> "Group":
        """The permutations and signs alone, which round nothing in any precision."""
        lines = [line.discrete() for line in self.lines]
        return Group(self.symmetry, [line for line in lines if line is not None], self.failed, self.permutes)

    # --- elements

    def random(self, seed: int = 0) -> Element:
        """A random element: one move of every line. Continuous values are well conditioned: factors in [0.5, 2]."""
        generator = Generator().manual_seed(seed)
        moves = [Move(line.key, line.random(generator)) for line in self.lines]
        if self.permutes and self.symmetry.sizes:
            moves.append(Move("P", self.symmetry.random(1, seed, flips=True)[0]))
        return tuple(moves)

    def compose(self, first: Element, second: Element) -> Element:
        """The element that does what ``first`` and then ``second`` do."""
        return (*first, *second)

    def inverse(self, element: Element) -> Element:
        """The element that undoes ``element``."""
        return tuple(Move(key, self._invert(key, value)) for key, value in reversed(element))

    def _invert(self, key: str, value: Tensor) -> Tensor:
        return self.symmetry.inverse(value) if key == "P" else self._line(key).invert(value)

    def _line(self, key: str):
        if key not in self.by_key:
            raise ValueError(f"group: moves must be of the lines of this group, got {key}")
        return self.by_key[key]

    def apply(self, element: Element, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moves a checkpoint: other weights, the same function.

        Args:
            element: Of this group.
            state: A state dict. Of tied tensors one or all names may be there.

        Returns:
            The same names, shapes, dtypes and devices. All is computed in float64 and rounded once, at the end; tensors
            that nothing moves are handed on.

        Raises:
            ValueError: If a tensor of the architecture is missing or has another shape, or a line is not of the group.
        """
        names = {name: self._plain(plain) for name, plain in plain_names(state).items()}
        given = self._given(names, state)
        moved = self.act(element, given)
        cast = {n: x if x is given[n] else x.to(given[n].device, given[n].dtype) for n, x in moved.items()}
        return {name: cast.get(names[name], tensor) for name, tensor in state.items()}

    def _plain(self, name: str) -> str:
        return self.symmetry.aliases.get(name, name)

    def given(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a state dict by the names of ``symmetry``, without aliases and what the group does not know.

        Raises ValueError as ``apply`` does.
        """
        return self._given({name: self._plain(plain) for name, plain in plain_names(state).items()}, state)

    def _given(self, names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shapes = {name: shape for name, shape in self.symmetry.shapes.items() if name not in self.symmetry.aliases}
        given: dict[str, Tensor] = {}
        for name, plain in names.items():
            if plain not in shapes:
                continue
            if tuple(state[name].shape) != shapes[plain]:
                raise ValueError(f"group: {name} must be {list(shapes[plain])}, got {list(state[name].shape)}")
            if plain in given and not torch.equal(given[plain], state[name]):
                raise ValueError(f"group: {name} must hold the numbers of {plain}, to which it is tied, got others")
            given.setdefault(plain, state[name].detach())
        missing = sorted(shapes.keys() - given.keys())
        if missing:
            raise ValueError(f"group: state must hold {missing[0]} {list(shapes[missing[0]])}, got no such tensor")
        return given

    def act(self, element: Element, state: State) -> dict[str, Tensor]:
        """Moves tensors by the names of ``symmetry`` without aliases; what changes becomes float64."""
        state = dict(state)
        for key, value in element:
            if key == "P":
                state |= self.symmetry.permute_state(state, value)
            else:
                state |= self._line(key).act(state, value)
        return state

    def canonical(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Element]:
        """A checkpoint with all that is continuous in a form that does not depend on how it was before.

        Gains beside a stream that can be rotated are folded into its readers, what writes into it is centred, free
        biases are 0, and scales, pairs and matrices are where the sum of squares of the weights is least; that leaves
        permutations, signs, phases and orthogonal matrices.

        Args:
            state: A state dict, as ``apply`` takes it.

        Returns:
            The checkpoint, float64 by the names of ``symmetry`` without aliases, and the element that made it.

        Raises:
            ValueError: As ``apply`` does, if a gain that must be folded is 0, or if numbers are not finite.
        """
        work = {name: tensor.double() for name, tensor in self.given(state).items()}
        broken = [name for name, tensor in work.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"group: weights must be finite, got others in {broken[0]}")
        moves: list[Move] = []

        def move(line, value: Tensor) -> None:
            work.update(line.act(work, value))
            moves.append(Move(line.key, value))

        folded = set()
        for rotation in (line for line in self.lines if isinstance(line, Rotation)):
            for fold in rotation.folds:
                folded.add(fold.line.key)
                move(fold.line, fold.value(work))
        for line in self.lines:
            if isinstance(line, Shift):
                move(line, line.to_zero(work))
        scaled = [line for line in self.lines if isinstance(line, Scales | Pairs | Matrices) and line.key not in folded]
        moves += balance([x for x in scaled if not isinstance(x, Scales) or not x.unit], work, self.statistics)
        return work, tuple(moves)

    def verify(
        self, module: nn.Module, inputs: Inputs, element: Element | None = None, trials: int = 2, seed: int = 0
    ) -> float:
        """The largest change that elements make in the outputs of a module, relative to the largest output.

        Args:
            module: The module that was traced, or one of the same architecture; it is not changed.
            inputs: The arguments of its forward, as ``trace`` takes them.
            element: What to try; by default random elements.
            trials: How many sets of random weights, in float64.
            seed: Of weights and elements.

        Raises:
            ValueError: If the module does not run in float64.
        """
        function = Function(module, [example_of(module, inputs)], trials, seed)
        elements = [self.random(seed + trial) for trial in range(trials)] if element is None else [element]
        return max(function.error(lambda state, chosen=chosen: self.act(chosen, state)) for chosen in elements)

    def describe(self) -> str:
        """One line per line of the group: what moves, how, and where."""
        moved = [
            f"permutations (P): {text}" for text in self.symmetry.describe().splitlines()[: len(self.symmetry.sizes)]
        ]
        return "\n".join([*(moved if self.permutes else ()), *(line.describe() for line in self.lines), *self.failed])

    def __repr__(self) -> str:
        return f"Group({len(self.symmetry.sizes)} groups of permutations, {len(self.lines)} lines)"
