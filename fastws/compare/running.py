"""What a module computes with the weights of a checkpoint, and whether two sets of weights are one function."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastws.compare.modules import Network
from fastws.symmetry.copies import FAILURES, example_of, fresh, fresh_example, plain_kernels, told
from fastws.symmetry.tracer import tensors_in

EXACT = 1e-8  # what other orders of summation change in float64, relative to the largest output
ROUNDINGS = 4.0  # of a change that rounding all weights anew makes, up to which a change counts as rounding
SEEDS = 3  # rounding anew is tried with


class Checked(NamedTuple):
    """What was found of two sets of weights."""

    error: float  # largest difference of an output, relative to the largest output
    rounding: float  # the same where each weight is rounded anew to the dtype of its file
    double: bool  # whether the module computed in float64

    def holds(self, exact: bool) -> bool:
        """Whether it is one function; ``exact``: weights only moved, so that nothing but sums is rounded otherwise."""
        return self.error <= (EXACT if exact and self.double else max(EXACT, ROUNDINGS * self.rounding))


@torch.no_grad()
def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Puts the tensors that a module has into it, whatever their dtype; tied ones once or twice."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in state:
            tensor.copy_(state[name])
    return module


def outputs_of(network: Network, state: Mapping[str, Tensor]) -> tuple[list[Tensor], bool]:
    """The outputs for the example inputs, in float64 if the module can, and whether it can.

    Raises:
        ValueError: If the module does not run, or its outputs are not finite.
    """
    example, failures = example_of(network.module, network.inputs), []
    for double in (True, False):
        try:
            module = load_state(fresh(network.module, double), state)
            ready = fresh_example(example, double)
            with torch.no_grad(), plain_kernels(double):
                outputs = [x for x in tensors_in(module(*ready.args, **ready.kwargs)) if x.is_floating_point()]
            break
        except FAILURES as error:
            failures.append(error)
    else:
        raise ValueError(f"{network.name}: module must run on its example inputs, got {told(failures[-1])}")
    if not all(x.isfinite().all() for x in outputs):
        raise ValueError(f"{network.name}: outputs must be finite to be compared, got NaN or infinity")
    return outputs, double


def same_function(network: Network, state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Checked:
    """How far apart the outputs of two sets of weights are, beside what rounding the first ones anew changes."""
    expected, double = outputs_of(network, state)
    found = [outputs_of(network, rounded(state, seed))[0] for seed in range(SEEDS)]
    rounding = max(relative_error(expected, outputs) for outputs in found)
    return Checked(relative_error(expected, outputs_of(network, other)[0]), rounding, double)


def rounded(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Float64 weights that differ from those of a state by up to half of a last bit, at random."""
    random, changed = torch.Generator().manual_seed(seed), {}
    for name, tensor in state.items():
        changed[name] = tensor
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=random, dtype=torch.float64) - 0.5
            changed[name] = tensor.double() * (1 + torch.finfo(tensor.dtype).eps * noise)
    return changed


def relative_error(expected: list[Tensor], actual: list[Tensor]) -> float:
    pairs = zip(expected, actual, strict=True)
    scale = max((float(x.abs().max()) for x in expected if x.numel()), default=0.0)
    worst = max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0)
    return worst / scale if scale else worst
