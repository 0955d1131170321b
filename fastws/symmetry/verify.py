"""Whether permutations leave the function of a module as it is: random weights, permuted, in float64 if it can."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastws.symmetry.copies import FAILURES, Example, fresh, fresh_example, plain_kernels, told
from fastws.symmetry.tracer import tensors_in

TOLERANCE = 1e-6  # a wrong permutation errs by far more
ROUNDINGS = 30  # what rounding may change, in changes that the last bits of all weights make
BLIND = 0.1  # a tolerance at which a check says nothing

Permute = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]


class Check:
    """Outputs of a module for random weights, and for these weights permuted.

    Each set of weights runs in a fresh copy. ``double`` tells whether the module runs in float64.
    """

    def __init__(self, module: nn.Module, example: Example, seed: int, count: int):
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

    def outputs(self, number: int, row: Tensor | None = None, permute: Permute | None = None, wiggle: float = 0.0):
        """Outputs for a set of random weights, by its number; permuted by a row, or wiggled by a part of themselves."""
        module, example = fresh(self.module, self.double), fresh_example(self.example, self.double)
        with torch.no_grad():
            randomise(module, self.seed + number, wiggle)
            if row is not None:
                state = module.state_dict()
                for name, tensor in permute(state, row).items():
                    if tensor is not state[name]:
                        state[name].copy_(tensor)
        with torch.no_grad(), plain_kernels(self.double):
            results = tensors_in(module(*example.args, **example.kwargs))
            return [x for x in results if (x.is_floating_point() or x.is_complex()) and x.numel() > 0]

    def error(self, number: int, actual: list[Tensor]) -> float:
        pairs = zip(self.expected[number], actual, self.scales, strict=True)
        return max((relative_error(*pair) for pair in pairs), default=0.0)

    def tolerance(self) -> float:
        """The largest error that rounding explains: outside float64 some times what one rounding makes."""
        if self.double:
            return TOLERANCE
        eps = max(torch.finfo(x.dtype).eps for x in self.expected[0])
        return max(TOLERANCE, ROUNDINGS * eps, ROUNDINGS * self.error(0, self.outputs(0, wiggle=eps)))

    def require_repeatable(self) -> None:
        """Raises ValueError if the module makes other outputs of the same weights and inputs."""
        error = self.error(0, self.outputs(0))
        if error > 0 and not error < self.tolerance():
            message = "symmetry: module must make the same outputs of the same inputs in eval mode, got random ones"
            raise ValueError(f"{message}, which differ by {error:.1e}")


def largest_error(module: nn.Module, example: Example, rows: Sequence[Tensor], permute: Permute, seed: int) -> float:
    """The largest relative error of outputs of a module when random weights, others for each row, are permuted."""
    check = Check(module, example, seed, max(2, len(rows)))
    return max((check.error(n, check.outputs(n, row, permute)) for n, row in enumerate(rows)), default=0.0)


def require_same_function(
    module: nn.Module,
    examples: Sequence[Example],
    rows: Sequence[Tensor],
    permute: Permute,
    guilty: Callable[[Callable[[Tensor], bool]], str],
) -> None:
    """Raises ValueError if permutations change outputs of a module by more than rounding explains.

    Args:
        module: The module, in any mode; it is not changed.
        examples: Arguments of its forward.
        rows: Permutations; each is tried with weights of its own.
        permute: What permutes a state dict by a row.
        guilty: Names what is wrong, given a function that tells whether a row changes the outputs.
    """
    for example in examples:
        check = Check(module, example, 0, max(2, len(rows)))
        errors = [check.error(number, check.outputs(number, row, permute)) for number, row in enumerate(rows)]
        if not max(errors) < TOLERANCE:
            require_within_rounding(check, max(errors), permute, guilty)


def require_repeatable(module: nn.Module, examples: Sequence[Example]) -> None:
    """Raises ValueError if a module makes other outputs of the same weights and inputs."""
    for example in examples:
        Check(module, example, 0, 2).require_repeatable()


def require_within_rounding(check: Check, error: float, permute: Permute, guilty) -> None:
    check.require_repeatable()
    tolerance = check.tolerance()
    if tolerance > BLIND:
        message = f"symmetry: rounding must not change outputs as much as permutations, got {tolerance:.1e}"
        raise ValueError(f"{message}; a smaller network of the same architecture, or one in float64, can be traced")
    if not error < tolerance:
        which = guilty(lambda row: not check.error(0, check.outputs(0, row, permute)) < tolerance)
        message = f"symmetry: outputs must survive permutations, got relative error {error:.1e} from {which}"
        raise ValueError(message)


def randomise(module: nn.Module, seed: int, wiggle: float = 0.0) -> None:
    """Random weights that keep activations of order 1: scales and variances in [0.5, 1.5], matrices by fan-in.

    ``wiggle`` changes each of them by up to this part of itself.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = module.state_dict().keys()  # buffers beside it are constants: masks, frequencies
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        last = name.rpartition(".")[2]
        if not tensor.is_floating_point() or tensor.dim() == 0 or name not in kept:
            continue
        if last == "running_var" or (last == "weight" and tensor.dim() == 1):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        else:
            fan_in = tensor.numel() / len(tensor) if tensor.dim() > 1 and len(tensor) else 4
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            values /= max(1, fan_in) ** 0.5
        if wiggle:
            values *= 1 + wiggle * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1)
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
