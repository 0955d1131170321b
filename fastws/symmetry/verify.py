"""Whether permutations leave the function of a module as it is: random weights, permuted, in float64."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastws.symmetry.trace import in_double
from fastws.symmetry.tracer import tensors_in


def largest_error(
    module: nn.Module,
    inputs: tuple,
    rows: Iterable[Tensor],
    permute_state: Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]],
    seed: int,
) -> float:
    """The largest relative error of the outputs of a copy of a module when its random weights are permuted by rows."""
    module, inputs = in_double(module, inputs)
    error = 0.0
    with torch.no_grad():
        randomise(module, seed)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        expected = outputs(module, inputs)
        for row in rows:
            module.load_state_dict(permute_state(state, row))
            for exact, actual in zip(expected, outputs(module, inputs), strict=True):
                error = max(error, relative_error(exact, actual))
    return error


def randomise(module: nn.Module, seed: int) -> None:
    """Random weights that keep activations of order 1: scales and variances in [0.5, 1.5], matrices by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    kept = module.state_dict().keys()  # buffers beside it are constants: masks, frequencies
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        last = name.rpartition(".")[2]
        if not tensor.is_floating_point() or tensor.dim() == 0 or name not in kept:
            continue
        if last == "running_var" or (last == "weight" and tensor.dim() == 1):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        else:
            fan_in = tensor.numel() / len(tensor) if tensor.dim() > 1 else 4
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / max(1, fan_in) ** 0.5
        tensor.copy_(values)


def outputs(module: nn.Module, inputs: Sequence) -> list[Tensor]:
    results = [x for x in tensors_in(module(*inputs)) if x.is_floating_point() and x.numel() > 0]
    if not any(torch.isfinite(x).any() for x in results):
        raise ValueError("symmetry: outputs of the module must hold finite numbers, got none with random weights")
    return results


def relative_error(exact: Tensor, actual: Tensor) -> float:
    """The largest difference, relative to the largest number; NaN and infinite numbers must be the same."""
    equal = (exact == actual) | (exact.isnan() & actual.isnan())
    difference = (actual - exact).abs().masked_fill(equal, 0).nan_to_num(nan=torch.inf)
    scale = exact[exact.isfinite()].abs().max() if exact.isfinite().any() else torch.tensor(0.0)
    return float(difference.max() / scale.clamp(min=torch.finfo(torch.float64).tiny))
