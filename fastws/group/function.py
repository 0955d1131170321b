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
Action = Callable[[State], Mapping[str, Tensor]]  # of a state the tensors that it changes, by name


class Function:
    """Outputs of a module for draws of random weights, float64, and for these weights changed.

    Raises:
        ValueError: If the module does not run in float64 on the examples.
    """

    def __init__(self, module: nn.Module, examples: Sequence[Example], draws: int = 2, seed: int = 0):
        self.module, self.examples, self.seed = module, [fresh_example(example, True) for example in examples], seed
        self.drawn: list[tuple[nn.Module, dict[str, Tensor], list[Tensor]]] = []
        self.plain = False  # whether it makes the same outputs without a look at each operation
        self.draw(1)
        self.plain = self._runs_plainly()
        self.draw(draws)

    def draw(self, count: int) -> None:
        """Draws weights until there are ``count`` sets of them."""
        while len(self.drawn) < count:
            module = fresh(self.module, True)
            with torch.no_grad():
                randomise(module, self.seed + len(self.drawn))
            try:
                outputs = self._run(module)
            except FAILURES as error:
                raise ValueError(f"group: module must run in float64 on the examples, got {told(error)}") from error
            self.drawn.append((module, only_first(load_state(module)), outputs))

    def _run(self, module: nn.Module) -> list[Tensor]:
        with torch.no_grad(), nullcontext() if self.plain else plain_kernels(True):
            results = [x for e in self.examples for x in tensors_in(module(*e.args, **e.kwargs))]
            numbers = [x for x in results if x.is_floating_point() or x.is_complex()]
            return [torch.view_as_real(x) if x.is_complex() else x for x in numbers]

    def _runs_plainly(self) -> bool:
        module, _, expected = self.drawn[0]
        self.plain = True
        try:
            found = self._run(module)
        except FAILURES:
            return False
        return all(
            x.dtype == torch.float64 and torch.allclose(x, y, 1e-12, 0) for x, y in zip(found, expected, strict=True)
        )

    def outputs(self, number: int, action: Action) -> list[Tensor]:
        """Outputs for a draw of weights that an action changes; afterwards they are as they were."""
        module, state, _ = self.drawn[number]
        changed = action(state)
        kept = {name: state[name].detach().clone() for name in changed}
        with torch.no_grad():
            for name, tensor in changed.items():
                state[name].copy_(tensor)
            try:
                return self._run(module)
            finally:
                for name, tensor in kept.items():
                    state[name].copy_(tensor)

    def error(self, action: Action) -> float:
        """The largest change of an output relative to the largest output, over all draws."""
        errors = [0.0]
        for number, (_, _, expected) in enumerate(self.drawn):
            for before, after in zip(expected, self.outputs(number, action), strict=True):
                finite = before.isfinite()
                if not torch.equal(finite, after.isfinite()):
                    return float("inf")
                largest = before[finite].abs().max() if finite.any() else torch.tensor(1.0)
                errors.append(float((after - before)[finite].abs().max() / largest) if finite.any() else 0.0)
        return max(errors)

    def slope(self, action: Callable[[State, float], Mapping[str, Tensor]], step: float = 1e-4) -> Tensor:
        """The derivative of all outputs by the size of an action, ``[outputs]``, by central differences.

        Outputs are relative to the largest of their tensor.
        """
        parts = []
        for number, (_, _, expected) in enumerate(self.drawn):
            up, down = (self.outputs(number, lambda state, by=by: action(state, by)) for by in (step, -step))
            for before, high, low in zip(expected, up, down, strict=True):
                scale = before[before.isfinite()].abs().max() if before.isfinite().any() else 1.0
                parts.append(((high - low) / (2 * step * scale)).nan_to_num(0.0, 0.0, 0.0).flatten())
        return torch.cat(parts)

    @property
    def outputs_per_draw(self) -> int:
        return sum(x.numel() for x in self.drawn[0][2])


def only_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors with several names only the first."""
    found = {}
    for name, tensor in state.items():
        found.setdefault(storage_key(name, tensor), name)
    return {name: state[name] for name in found.values()}
