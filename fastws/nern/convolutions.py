"""Convolutions that learn in some of their kernels only: a step of NeRN needs no gradients of the others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastws.nern.layers import StoredLayer
from fastws.ops.kernel_gradients import kernel_gradients

FEW = 1 / 3  # of the kernels of a layer, up to which their gradients take less time than those of all
WIDE = 8  # channels from which they do
ONE = (1, 1)
PLAIN = [(stride, ONE, ONE, 1) for stride in (ONE, (2, 2))]  # stride, padding, dilation, groups


def chosen_kernels(layers: Sequence[StoredLayer], chosen: Tensor | None) -> dict[str, Tensor]:
    """By name of a layer: those of its kernels that were chosen, each once, counted from its first; ``[n]`` int64.

    Args:
        layers: Of a network, in order.
        chosen: Kernels of the network, ``[m]`` int64. Nothing is found for all of them, None, or on a GPU, where to ask
            which they are would take longer than what it saves.
    """
    if chosen is None or chosen.is_cuda:
        return {}
    chosen, ends = chosen.unique(), torch.tensor([layer.kernels for layer in layers]).cumsum(0)
    parts = chosen.tensor_split(torch.searchsorted(chosen, ends[:-1]))
    first = [0, *ends.tolist()]
    return {layer.name: part - start for layer, part, start in zip(layers, parts, first, strict=False)}


class LearnKernels(TorchFunctionMode):
    """Inside, 3x3 convolutions with certain weights have gradients in certain kernels, and 0 in the others.

    In float32, or in bfloat16 by autocast. Others, and those on other devices than the CPU, have all their gradients.

    Args:
        weights: By name, ``[F, C, kh, kw]``.
        kernels: By the same names, numbers of kernels, ``[n]`` int64, each once.
    """

    def __init__(self, weights: Mapping[str, Tensor], kernels: Mapping[str, Tensor]):
        super().__init__()
        self.kernels = {id(weights[name]): numbers for name, numbers in kernels.items()}
        self.weights = weights  # so that no other tensor gets their identity

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and not kwargs and len(args) == 7 and id(args[1]) in self.kernels:
            kernels = self.kernels[id(args[1])]
            if fits(*args) and len(kernels) <= FEW * args[1].shape[:2].numel():
                return Convolution.apply(args[0].to(computed_in(args[0])), *args[1:4], kernels)
        return function(*args, **(kwargs or {}))


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> bool:
    """Whether ``kernel_gradients`` computes the gradients of a convolution, and sooner than all would be."""
    plain = rest in PLAIN and weight.shape[2:] == (3, 3) and x.dim() == 4 and x.device.type == "cpu"
    known = weight.dtype == torch.float32 and computed_in(x) in (torch.float32, torch.bfloat16)
    return plain and known and weight.shape[1] >= WIDE and not (bias is not None and bias.requires_grad)


def computed_in(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, kernels):
        ctx.save_for_backward(x, weight, kernels)
        ctx.stride = stride
        return torch.conv2d(x, weight, bias, stride, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, kernels = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            geometry = ctx.stride, ONE, ONE, False, (0, 0), 1
            mask = True, False, False
            grad_x = torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), None, *geometry, mask)[0]
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            grad_weight.flatten(0, 1)[kernels] = kernel_gradients(x, grad, kernels, stride=ctx.stride[0])
        return grad_x, grad_weight, None, None, None
