"""Whether permutations leave the function of a module as it is: random weights, permuted, in float64 if it can."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from fastws.symmetry.copies import FAILURES, Example, fresh, fresh_example, plain_kernels, told
from fastws.symmetry.tracer import tensors_in

TOLERANCE = 1e-6  # a wrong permutation errs by far more
ROUNDINGS = 30  # what rounding may change, in changes that the last bits of all weights make
BLIND = 0.1  # a tolerance at which a check says nothing
LARGE = 2**16  # entries of a tensor from which on float32 is drawn, five times as fast

Change = Callable[[nn.Module], None]  # changes the weights of a module in place


class Check:
    """Outputs of a module for random weights, and for these weights changed.

    Each set of weights runs in a fresh copy. ``double`` tells whether the module runs in float64.
    """

    def __init__(self, module: nn.Module, example: Example, seed: int = 0, count: int = 2):
        self.module, self.example, self.seed = module, example, seed
        failures = []
        for self.double in (True, False):
            try:
                self.expected = [self.outputs(number) for number in range(count)]
                break
            except FAILURES as error:
                failures.append(error)
        else:
            message = f"symmetry: module must run on the inputs in eval mode, got {told(failures[-1])}"
            raise ValueError(message) from failures[-1]
        if not any(torch.isfinite(x).any() for x in self.expected[0]):
            message = "symmetry: outputs of the module must hold finite numbers, got none with random weights"
            raise ValueError(message)
        self.scales = [spread(entries) for entries in zip(*self.expected, strict=True)]
        if not any(scale.any() for scale in self.scales):
            message = "symmetry: outputs must depend on the weights to be checked, got the same for other weights"
            raise ValueError(message)

    def weighted(self, number: int, wiggle: float = 0.0) -> nn.Module:
        """A copy of the module with a set of random weights, by its number; ``wiggle``: changed by a part of them."""
        module = fresh(self.module, self.double)
        with torch.no_grad():
            randomise(module, self.seed + number, wiggle)
        return module

    def run(self, module: nn.Module) -> list[Tensor]:
        """The outputs of a copy of the module that are numbers."""
        example = fresh_example(self.example, self.double)
        with plain_kernels(self.double):
            results = tensors_in(module(*example.args, **example.kwargs))
            return [x for x in results if (x.is_floating_point() or x.is_complex()) and x.numel() > 0]

    def outputs(self, number: int, change: Change | None = None, wiggle: float = 0.0) -> list[Tensor]:
        """Outputs for a set of random weights, by its number, which are changed before."""
        module = self.weighted(number, wiggle)
        with torch.no_grad():
            if change is not None:
                change(module)
            return self.run(module)

    def error(self, number: int, change: Change) -> float:
        """How far a change of the weights of a number moves the outputs."""
        return self.difference(number, self.outputs(number, change))

    def difference(self, number: int, actual: list[Tensor]) -> float:
        expected = self.expected[number] if number < len(self.expected) else self.outputs(number)
        pairs = zip(expected, actual, self.scales, strict=True)
        return max((relative_error(*pair) for pair in pairs), default=0.0)

    @cached_property
    def tolerance(self) -> float:
        """The largest error that rounding explains: outside float64 some times what one rounding makes."""
        if self.double:
            return TOLERANCE
        eps = max(torch.finfo(x.dtype).eps for x in self.expected[0])
        return max(TOLERANCE, ROUNDINGS * eps, ROUNDINGS * self.difference(0, self.outputs(0, wiggle=eps)))

    def require_repeatable(self) -> None:
        """Raises ValueError if the module makes other outputs of the same weights and inputs."""
        error = self.difference(0, self.outputs(0))
        if error > 0 and not error < self.tolerance:
            message = "symmetry: module must make the same outputs of the same inputs in eval mode, got random ones"
            raise ValueError(f"{message}, which differ by {error:.1e}")

    def require_same_function(self, rows: Sequence[Tensor], permuting, guilty) -> None:
        """Raises ValueError if permutations change outputs of the module by more than rounding explains.

        Args:
            rows: Permutations; each is tried with weights of its own.
            permuting: Gives the change of weights that a row makes.
            guilty: Names what is wrong, given a function that tells whether a row changes the outputs.
        """
        error = max(self.error(number, permuting(row)) for number, row in enumerate(rows))
        if error < TOLERANCE:
            return
        self.require_repeatable()
        if self.tolerance > BLIND:
            message = f"symmetry: rounding must not change outputs as much as permutations, got {self.tolerance:.1e}"
            raise ValueError(f"{message}; a smaller network of the same architecture, or one in float64, can be traced")
        if not error < self.tolerance:
            which = guilty(lambda row: not self.error(0, permuting(row)) < self.tolerance)
            message = f"symmetry: outputs must survive permutations, got relative error {error:.1e} from {which}"
            raise ValueError(message)


def randomise(module: nn.Module, seed: int, wiggle: float = 0.0) -> None:
    """Random weights that keep activations of order 1: scales and variances in [0.5, 1.5], matrices by fan-in.

    ``wiggle`` changes each of them by up to this part of itself.
    """
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    kept = module.state_dict().keys()  # buffers beside it are constants: masks, frequencies
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        last = name.rpartition(".")[2]
        if not tensor.is_floating_point() or name not in kept:
            continue
        if tensor.dim() == 0 and not isinstance(tensor, nn.Parameter):
            continue
        dtype = torch.float64 if tensor.numel() < LARGE else torch.float32
        if tensor.dim() == 0 or last == "running_var" or (last == "weight" and tensor.dim() == 1):
            values = torch.rand(tensor.shape, generator=generator, dtype=dtype) + 0.5
        else:
            fan_in = tensor.numel() / len(tensor) if tensor.dim() > 1 and len(tensor) else 4
            values = torch.randn(tensor.shape, generator=generator, dtype=dtype)
            values /= max(1, fan_in) ** 0.5
        if wiggle:
            values *= 1 + wiggle * (2 * torch.rand(tensor.shape, generator=other, dtype=dtype) - 1)
        tensor.copy_(values)


def spread(entries: Sequence[Tensor]) -> Tensor:
    """How much each entry of an output varies with the weights: what an error of it is measured by."""
    stacked = torch.stack([x.abs() if x.is_complex() else x for x in entries])
    return (stacked.amax(0) - stacked.amin(0)).nan_to_num(nan=0.0, posinf=0.0)


def relative_error(exact: Tensor, actual: Tensor, scale: Tensor) -> float:
    """The largest difference of entries, each relative to its own scale and beyond its own last bits.

    NaN and infinite numbers must be the same. Scales below a thousandth of the median vary little by chance.
    """
    equal = (exact == actual) | (exact.isnan() & actual.isnan())
    difference = (actual - exact).abs().masked_fill(equal, 0).nan_to_num(nan=torch.inf)
    rounding = 64 * torch.finfo(exact.dtype).eps * exact.abs().nan_to_num(posinf=0.0)
    tiny = torch.finfo(scale.dtype).tiny
    return float(((difference - rounding).clamp(min=0) / scale.clamp(min=tiny)).max())
