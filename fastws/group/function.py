"""A module as a function of its weights: random weights in float64, changed, and how far its outputs move."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastws.layout.roles import load_state, storage_key
from fastws.symmetry.copies import FAILURES, Example, fresh, fresh_example, plain_kernels, told
from fastws.symmetry.tracer import tensors_in
from fastws.symmetry.verify import randomise

State = Mapping[str, Tensor]
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
        self.plain = False  # whether it makes the same outputs without a look at each operation
        self.draw(1)
        self.plain = self._runs_plainly()
        self.draw(draws)

    def draw(self, count: int) -> None:
        """Draws weights until there are ``count`` sets of them."""
        while len(self.expected) < count:
            self._load(len(self.expected))
            try:
                self.expected.append(self._run())
            except FAILURES as error:
                raise ValueError(f"group: module must run in float64 on the examples, got {told(error)}") from error

    def _load(self, number: int) -> None:
        if number != self.loaded:
            with torch.no_grad():
                randomise(self.module, self.seed + number)
            self.loaded = number

    def _run(self) -> list[Tensor]:
        with torch.no_grad(), nullcontext() if self.plain else plain_kernels(True):
            results = [x for e in self.examples for x in tensors_in(self.module(*e.args, **e.kwargs))]
            numbers = [x for x in results if x.is_floating_point() or x.is_complex()]
            return [torch.view_as_real(x) if x.is_complex() else x for x in numbers]

    def _runs_plainly(self) -> bool:
        self.plain = True
        try:
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

    def slopes(self, actions: Sequence[SizedAction], draws: int, step: float = 1e-4) -> Tensor:
        """The derivatives of all outputs by the size of each action, ``[outputs, actions]``, by central differences.

        Outputs of all draws are relative to the largest of their tensor.
        """
        self.draw(draws)
        columns: list[list[Tensor]] = [[] for _ in actions]
        for number, expected in enumerate(self.expected[:draws]):
            for action, column in zip(actions, columns, strict=True):
                up, down = (self.outputs(number, lambda x, a=action, by=by: a(x, by)) for by in (step, -step))
                for before, high, low in zip(expected, up, down, strict=True):
                    scale = before[before.isfinite()].abs().max() if before.isfinite().any() else 1.0
                    column.append(((high - low) / (2 * step * scale)).nan_to_num(0.0, 0.0, 0.0).flatten())
        return torch.stack([torch.cat(column) for column in columns], 1)

    @property
    def outputs_per_draw(self) -> int:
        return sum(x.numel() for x in self.expected[0])


def only_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors with several names only the first."""
    found = {}
    for name, tensor in state.items():
        found.setdefault(storage_key(name, tensor), name)
    return {name: state[name] for name in found.values()}
