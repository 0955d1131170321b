"""Triton kernels of fastws::layerwise_mse and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _layer_sums_kernel(
    prediction, target, offsets, sigma, sums, num_weights, num_layers, clip, CLIP: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[b, l] = sum over layer l of min(((prediction[b, p] - target[b, p]) / sigma[l])**2, clip).

    One program per network and layer.
    """
    program = tl.program_id(0).to(tl.int64)
    network, layer = program // num_layers, program % num_layers
    begin, end = tl.load(offsets + 2 * layer), tl.load(offsets + 2 * layer + 1)
    scale = tl.load(sigma + layer)
    dtype = sums.dtype.element_ty
    total = tl.zeros([BLOCK], dtype)
    for start in range(begin, end, BLOCK):
        p = start + tl.arange(0, BLOCK)
        x = tl.load(prediction + network * num_weights + p, mask=p < end, other=0.0).to(dtype)
        y = tl.load(target + network * num_weights + p, mask=p < end, other=0.0).to(dtype)
        error = (x - y) / scale
        square = error * error
        if CLIP:
            square = tl.where(square > clip, clip, square)  # in this order NaN stays NaN
        total += square
    tl.store(sums + program, tl.sum(total))


@triton.jit
def _layer_gradients_kernel(
    grad,
    prediction,
    target,
    offsets,
    sigma,
    share,
    grad_prediction,
    num_weights,
    num_layers,
    clip,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_prediction[b, p] = 2 * grad * share[l] / sigma[l] * error in layer l where it is not clipped, else 0.

    One program per network and layer, which also clears what lies between the layer before and its own; that of the
    last layer clears what is left of the network.
    """
    program = tl.program_id(0).to(tl.int64)
    network, layer = program // num_layers, program % num_layers
    begin, end = tl.load(offsets + 2 * layer), tl.load(offsets + 2 * layer + 1)
    scale = tl.load(sigma + layer)
    dtype = sigma.dtype.element_ty
    slope = 2 * tl.load(grad).to(dtype) * tl.load(share + layer) / scale
    first = tl.load(offsets + 2 * layer - 1, mask=layer > 0, other=0)
    last = tl.where(layer == num_layers - 1, num_weights, end)
    for start in range(first, last, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = (p >= begin) & (p < end)
        x = tl.load(prediction + network * num_weights + p, mask=inside, other=0.0).to(dtype)
        y = tl.load(target + network * num_weights + p, mask=inside, other=0.0).to(dtype)
        error = (x - y) / scale
        gradient = slope * error
        if CLIP:
            gradient = tl.where(error * error > clip, 0.0, gradient)
        out = grad_prediction + network * num_weights + p
        tl.store(out, gradient.to(grad_prediction.dtype.element_ty), mask=p < last)


def block_size(num_weights: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(num_weights, 1)))


def layerwise_mse(
    prediction: Tensor, target: Tensor, offsets: Tensor, sigma: Tensor, share: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    prediction, target, offsets, sigma = (x.contiguous() for x in (prediction, target, offsets, sigma))
    (batch, num_weights), num_layers = prediction.shape, len(offsets)
    parts = torch.empty(batch, num_layers, dtype=sigma.dtype, device=prediction.device)
    if parts.numel() > 0:
        clipped = clip != float("inf")
        _layer_sums_kernel[(parts.numel(),)](
            prediction, target, offsets, sigma, parts, num_weights, num_layers, clip, clipped, block_size(num_weights)
        )
    sums = parts.sum(0, dtype=torch.float64)
    return (sums * share).sum().to(sigma.dtype), sums.to(sigma.dtype)


def layerwise_mse_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, offsets: Tensor, sigma: Tensor, share: Tensor, clip: float
) -> Tensor:
    prediction, target, offsets = (x.contiguous() for x in (prediction, target, offsets))
    sigma, share = sigma.contiguous(), share.contiguous()
    num_weights, num_layers = prediction.shape[1], len(offsets)
    grad_prediction = torch.empty_like(prediction)
    if num_layers == 0:
        return grad_prediction.zero_()
    if prediction.numel() > 0:
        clipped = clip != float("inf")
        _layer_gradients_kernel[(len(prediction) * num_layers,)](
            grad, prediction, target, offsets, sigma, share, grad_prediction, num_weights, num_layers, clip, clipped,
            block_size(num_weights),
        )  # fmt: skip
    return grad_prediction
