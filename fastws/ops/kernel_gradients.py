"""Kernel gradients: the gradient of a convolution in some of its 3x3 kernels."""

import torch
from torch import Tensor

from fastws import _native  # noqa: F401  (loads the compiled kernel)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def kernel_gradients(inputs: Tensor, grad: Tensor, kernels: Tensor, *, stride: int = 1) -> Tensor:
    """The gradient of a 3x3 convolution with padding 1 in some of its kernels, at a cost in proportion to their number.

    With F filters of C channels, kernel ``f * C + c`` is that of filter f and channel c. A step of NeRN (arXiv
    2212.13554) learns from a few kernels of a network and needs no gradients of the others. No gradients of its own.

    Args:
        inputs: What goes into the convolution, ``[B, C, H, W]``, float32, float64 or bfloat16; channels last is
            fastest.
        grad: Gradient of what comes out, ``[B, F, OH, OW]`` with ``OH = (H - 1) // stride + 1`` and OW alike.
        kernels: Numbers of kernels, ``[n]``, int64, below ``F * C``. Trusted, not checked, on a GPU.
        stride: Of the convolution, 1 or 2.

    Returns:
        Gradients, ``[n, 3, 3]``, of the dtype of the inputs; float32 for bfloat16, whose products are added up in it.

    Raises:
        ValueError: If an argument does not fit.

    Example:
        >>> inputs, grad = torch.arange(9.0).view(1, 1, 3, 3), torch.zeros(1, 2, 3, 3)
        >>> grad[0, 1, 1, 1] = 1  # of filter 1, at the center
        >>> fastws.kernel_gradients(inputs, grad, torch.tensor([1]))
        tensor([[[0., 1., 2.],
                 [3., 4., 5.],
                 [6., 7., 8.]]])
    """
    check(inputs, grad, kernels, stride)
    return torch.ops.fastws.kernel_gradients(inputs.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1), kernels, stride)


def check(inputs: Tensor, grad: Tensor, kernels: Tensor, stride: int) -> None:
    if inputs.dim() != 4 or inputs.numel() == 0 or inputs.dtype not in DTYPES:
        must, got = "[B, C, H, W] float32, float64 or bfloat16, not empty", f"{list(inputs.shape)} {inputs.dtype}"
        raise ValueError(f"kernel_gradients: inputs must be {must}, got {got}")
    if stride not in (1, 2):
        raise ValueError(f"kernel_gradients: stride must be 1 or 2, got {stride}")
    batch, channels, *sizes = inputs.shape
    shape = [batch, grad.shape[1] if grad.dim() == 4 else "F", *((size - 1) // stride + 1 for size in sizes)]
    if list(grad.shape) != shape or (grad.dtype, grad.device) != (inputs.dtype, inputs.device):
        wanted, got = f"{shape} {inputs.dtype} on {inputs.device}", f"{list(grad.shape)} {grad.dtype} on {grad.device}"
        raise ValueError(f"kernel_gradients: grad must be {wanted}, got {got}")
    if kernels.dim() != 1 or kernels.dtype != torch.int64 or kernels.device != inputs.device:
        got = f"{list(kernels.shape)} {kernels.dtype} on {kernels.device}"
        raise ValueError(f"kernel_gradients: kernels must be [n] int64 on {inputs.device}, got {got}")
    if len(kernels) and (kernels.device.type == "cpu" or _native.CHECK) and not torch.compiler.is_compiling():
        smallest, largest = (int(x) for x in kernels.aminmax())
        if smallest < 0 or largest >= channels * grad.shape[1]:
            got = f"{smallest} to {largest}"
            raise ValueError(f"kernel_gradients: kernels must be in [0, {channels * grad.shape[1]}), got {got}")


def kernel_gradients_reference(inputs: Tensor, grad: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """Of channels last, ``[B, H, W, C]`` and ``[B, OH, OW, F]``."""
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    inputs, grad = (x.permute(0, 3, 1, 2).to(dtype) for x in (inputs, grad))
    shape = [grad.shape[1], inputs.shape[1], 3, 3]
    return torch.nn.grad.conv2d_weight(inputs, shape, grad, stride, 1).flatten(0, 1)[kernels]


torch.library.define("fastws::kernel_gradients", "(Tensor inputs, Tensor grad, Tensor kernels, int stride) -> Tensor")
torch.library.register_kernel("fastws::kernel_gradients", "default", kernel_gradients_reference)


@torch.library.register_fake("fastws::kernel_gradients")
def kernel_gradients_fake(inputs, grad, kernels, stride):
    return inputs.new_empty(kernels.shape[0], 3, 3, dtype=torch.promote_types(inputs.dtype, torch.float32))


def kernel_gradients_backward(ctx, grad):
    raise NotImplementedError("kernel_gradients: no gradients of its own; detach its arguments")


torch.library.register_autograd("fastws::kernel_gradients", kernel_gradients_backward)
