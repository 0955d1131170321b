"""A module as a function of its weights: random weights in float64, changed, and how far its outputs move."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from fastws.group.slopes import MOST, STEP, OpenNorms, chosen, gradients, tangents
from fastws.layout.roles import load_state, storage_key
from fastws.symmetry.copies import FAILURES, Example, fresh, fresh_example, plain_kernels, told
from fastws.symmetry.tracer import tensors_in
from fastws.symmetry.verify import randomise

State = Mapping[str, Tensor]
SPARE = 8  # more outputs than actions whose derivatives are looked at
CLOSE = 0.05  # of derivatives, of which differences tell no more where a ReLU lies between
SizedAction = Callable[[State, float], Mapping[str, Tensor]]  # the same of a state and a size
Action = Callable[[State], Mapping[str, Tensor]]  # of a state the tensors that it changes, by name


class Function:
    """Outputs of a module for draws of random weights, float64, and for these weights changed.

    Raises:
        ValueError: If the module does not run in float64 on the examples.
    """

    def __init__(self, module: nn.Module, examples: Sequence[Example], draws: int = 2, seed: int = 0):
        self.module, self.examples, self.seed = fresh(module, True), [fresh_example(e, True) for e in examples], seed
        self.state = only_first(load_state(self.module))
        self.expected: list[list[Tensor]] = []  # the outputs for each draw
        self.tries = draws
        self.loaded = -1  # the draw whose weights the module has
        self.drawn: dict[int, dict[str, Tensor]] = {}  # the weights of each draw, where they are few
        self.plain = False  # whether it makes the same outputs without a look at each operation
        self.draw(1)
        self.plain = self._runs_plainly()
        self.draw(draws)

    def draw(self, count: int) -> None:
        """Draws weights until there are ``count`` sets of them."""
        while len(self.expected) < count:
            self._load(len(self.expected))
            try:
                with torch.no_grad():
                    self.expected.append(self._run())
            except FAILURES as error:
                raise ValueError(f"group: module must run in float64 on the examples, got {told(error)}") from error

    def _load(self, number: int) -> None:
        if number == self.loaded:
            return
        with torch.no_grad():
            if number in self.drawn:
                for name, tensor in self.drawn[number].items():
                    self.state[name].copy_(tensor)
            else:
                randomise(self.module, self.seed + number)
                if (len(self.drawn) + 1) * sum(x.numel() for x in self.state.values()) <= MOST:
                    self.drawn[number] = {name: tensor.detach().clone() for name, tensor in self.state.items()}
        self.loaded = number

    def _run(self) -> list[Tensor]:
        with nullcontext() if self.plain else plain_kernels(True):
            results = [x for e in self.examples for x in tensors_in(self.module(*e.args, **e.kwargs))]
            numbers = [x for x in results if x.is_floating_point() or x.is_complex()]
            return [torch.view_as_real(x) if x.is_complex() else x for x in numbers]

    def _runs_plainly(self) -> bool:
        self.plain = True
        try:
            with torch.no_grad():
                found = self._run()
        except FAILURES:
            return False
        pairs = zip(found, self.expected[0], strict=True)
        return all(x.dtype == torch.float64 and torch.allclose(x, y, 1e-12, 0) for x, y in pairs)

    def outputs(self, number: int, action: Action) -> list[Tensor]:
        """Outputs for a draw of weights that an action changes; afterwards they are as they were."""
        self._load(number)
        changed = action(self.state)
        kept = {name: self.state[name].detach().clone() for name in changed}
        with torch.no_grad():
            for name, tensor in changed.items():
                self.state[name].copy_(tensor)
            try:
                return self._run()
            finally:
                for name, tensor in kept.items():
                    self.state[name].copy_(tensor)

    def error(self, action: Action, enough: float = float("inf")) -> float:
        """The largest change of an output relative to the largest output, over the draws that there were at first.

        A change above ``enough`` ends the search for larger ones.
        """
        errors = [0.0]
        for number, expected in enumerate(self.expected[: self.tries]):
            for before, after in zip(expected, self.outputs(number, action), strict=True):
                finite = before.isfinite()
                if not torch.equal(finite, after.isfinite()):
                    return float("inf")
                largest = before[finite].abs().max() if finite.any() else torch.tensor(1.0)
                errors.append(float((after - before)[finite].abs().max() / largest) if finite.any() else 0.0)
            if max(errors) > enough:
                break
        return max(errors)

    def slopes(self, actions: Sequence[SizedAction], draws: int, enough: int | None = None) -> Tensor:
        """The derivatives of outputs by the size of each action, ``[n, actions]``.

        Outputs of all draws are relative to the largest of their tensor; of many, ``enough`` random sums are taken, by
        default as many as tell all null vectors.
        """
        self.draw(draws)
        rows = -(-(enough or len(actions) + SPARE) // draws)
        find = self._slopes if self._goes_back else self._differences
        return torch.cat([find(number, actions, rows) for number in range(draws)])

    def _slopes(self, number: int, actions: Sequence[SizedAction], rows: int) -> Tensor:
        """``slopes`` of one draw by gradients. Raises what torch raises where there are none."""
        self._load(number)
        changes = [tangents(action, self.state) for action in actions]
        places = {name: place for place, name in enumerate(dict.fromkeys(name for x in changes for name in x))}
        wanted = [self.state[name].requires_grad_(True) for name in places]
        try:
            with torch.enable_grad(), OpenNorms():
                numbers = chosen(self._run(), self.expected[number], rows)
            directions = [{places[name]: x for name, x in change.items()} for change in changes]
            return gradients(numbers, wanted, directions)
        finally:
            for tensor in wanted:
                tensor.requires_grad_(False)

    def _differences(self, number: int, actions: Sequence[SizedAction], rows: int) -> Tensor:
        """``slopes`` of one draw by central differences of the outputs."""
        columns, expected = [], self.expected[number]
        for action in actions:
            ends = [self.outputs(number, lambda x, a=action, by=by: a(x, by)) for by in (STEP, -STEP)]
            up, down = (chosen(end, expected, rows) for end in ends)
            columns.append((up - down) / (2 * STEP))
        return torch.stack(columns, 1).nan_to_num(0.0, 0.0, 0.0)

    @cached_property
    def _goes_back(self) -> bool:
        """Whether gradients tell what changes of all weights do; modules that detach tensors give others."""
        floating = [name for name, tensor in self.state.items() if tensor.is_floating_point()]
        factors = torch.rand(len(floating), generator=torch.Generator().manual_seed(2)).tolist()

        def scale(state: State, by: float) -> dict[str, Tensor]:
            pairs = zip(floating, factors, strict=True)
            return {name: state[name].detach().double() * (1 + by * factor) for name, factor in pairs}

        try:
            found, expected = (find(0, [scale], 8) for find in (self._slopes, self._differences))
        except FAILURES:  # modules that compute without gradients, or change weights in place
            return False
        return bool((found - expected).norm() <= CLOSE * expected.norm())

    @property
    def outputs_per_draw(self) -> int:
        return sum(x.numel() for x in self.expected[0])


def only_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors with several names only the first."""
    found = {}
    for name, tensor in state.items():
        found.setdefault(storage_key(name, tensor), name)
    return {name: state[name] for name in found.values()}
