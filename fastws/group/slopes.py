"""Derivatives of the outputs of a module by changes of its weights, all changes in one pass backwards.

Differences of outputs would need two passes for each change, and a ReLU that one of them passes spoils it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastws.symmetry.copies import FAILURES

STEP = 1e-4  # of differences
MOST = 2**26  # numbers of gradients that are held at once


class OpenNorms(TorchFunctionMode):
    """Batch norms in eval mode as sums and products: their own operation refuses gradients of moments."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm and not (kwargs.get("training") or len(args) > 5 and args[5]):
            return batch_norm(*args, **kwargs)
        return function(*args, **kwargs)


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Tensor:
    def wide(x: Tensor) -> Tensor:
        return x.view(1, -1, *[1] * (input.dim() - 2))

    result = (input - wide(running_mean)) / wide(running_var + eps).sqrt()
    result = result if weight is None else result * wide(weight)
    return result if bias is None else result + wide(bias)


def tangents(action, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How the tensors that an action changes begin to change with its size."""
    up, down = (action(state, by) for by in (STEP, -STEP))
    return {name: (up[name] - down[name]) / (2 * STEP) for name in up}


def chosen(outputs: Sequence[Tensor], expected: Sequence[Tensor], count: int) -> Tensor:
    """At most ``count`` sums of finite outputs with random factors, ``[n]``.

    Outputs are relative to the largest that is expected of their tensor.
    """
    flat = []
    for x, before in zip(outputs, expected, strict=True):
        finite = before.isfinite()
        scale = before[finite].abs().max().clamp(min=1e-300) if finite.any() else 1.0
        flat.append(torch.where(finite & x.isfinite(), x / scale, 0.0).flatten())
    numbers = torch.cat(flat)
    if len(numbers) <= count:
        return numbers
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(count, len(numbers), generator=generator, dtype=torch.float64)
    return (factors / len(numbers) ** 0.5) @ numbers.double()


def gradients(numbers: Tensor, wanted: Sequence[Tensor], directions: Sequence[Mapping[int, Tensor]]) -> Tensor:
    """The derivatives of numbers ``[n]`` along directions, each a change for some of the tensors wanted, ``[n, d]``.

    Raises what torch raises where a module cannot be derived.
    """
    slopes = torch.zeros(len(numbers), len(directions), dtype=torch.float64)
    rows = torch.eye(len(numbers)).to(numbers)
    step, batched = max(1, MOST // max(1, sum(x.numel() for x in wanted))), True
    begin = 0
    while begin < len(numbers):
        part = rows[begin : begin + step] if batched else rows[begin : begin + 1]
        options = {"retain_graph": True, "allow_unused": True}
        try:
            if batched:
                found = torch.autograd.grad(numbers, wanted, part, is_grads_batched=True, **options)
            else:
                single = torch.autograd.grad(numbers, wanted, part[0], **options)
                found = [x if x is None else x[None] for x in single]
        except FAILURES:
            if not batched:
                raise
            batched = False  # some operations go back one by one only
            continue
        for column, direction in enumerate(directions):
            for place, change in direction.items():
                if found[place] is not None:
                    slopes[begin : begin + len(part), column] += found[place].flatten(1) @ change.flatten().to(part)
        begin += len(part)
    return slopes.nan_to_num(0.0, 0.0, 0.0)
