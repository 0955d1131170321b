"""Triton kernels of fastws::masked_mse and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor, empty_like

SMALLEST_STD = 1e-8


@triton.jit
def _token_sums_kernel(prediction, target, lengths, sums, rows, size, MOMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[0, k] = squared error of token k; with MOMENTS sums[1, k] = mean of its valid target entries, sums[2, k] =
    sum of their squared deviations from it. One program per token; sums are in the dtype of ``sums``."""
    k = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + k)
    dtype = sums.dtype.element_ty
    error_sum = tl.zeros([BLOCK], dtype)
    target_sum = tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        t = start + tl.arange(0, BLOCK)
        b = tl.load(target + k * size + t, mask=t < length, other=0.0).to(dtype)
        error = tl.load(prediction + k * size + t, mask=t < length, other=0.0).to(dtype) - b
        error_sum += error * error
        target_sum += b
    tl.store(sums + k, tl.sum(error_sum))
    if MOMENTS:
        mean = tl.sum(target_sum) / tl.maximum(length, 1).to(dtype)
        square_sum = tl.zeros([BLOCK], dtype)
        for start in range(0, size, BLOCK):
            t = start + tl.arange(0, BLOCK)
            b = tl.load(target + k * size + t, mask=t < length, other=0.0).to(dtype)
            deviation = tl.where(t < length, b - mean, 0.0)
            square_sum += deviation * deviation
        tl.store(sums + rows + k, mean)
        tl.store(sums + 2 * rows + k, tl.sum(square_sum))


@triton.jit
def _scaled_errors_kernel(grad, prediction, target, lengths, divisor, grad_prediction, size, BLOCK: tl.constexpr):
    """grad_prediction[k, t] = 2 * grad / divisor * (prediction[k, t] - target[k, t]) where t < lengths[k], else 0.
    One program per token."""
    k = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + k)
    dtype = divisor.dtype.element_ty
    scale = 2 * tl.load(grad).to(dtype) / tl.load(divisor)
    for start in range(0, size, BLOCK):
        t = start + tl.arange(0, BLOCK)
        a = tl.load(prediction + k * size + t, mask=t < length, other=0.0).to(dtype)
        b = tl.load(target + k * size + t, mask=t < length, other=0.0).to(dtype)
        tl.store(grad_prediction + k * size + t, (scale * (a - b)).to(grad_prediction.dtype.element_ty), mask=t < size)


def block_size(size: int) -> int:
    return min(1024, triton.next_power_of_2(max(size, 1)))


def masked_mse(prediction: Tensor, target: Tensor, lengths: Tensor, normalize: int) -> tuple[Tensor, Tensor]:
    prediction, target, lengths = prediction.contiguous(), target.contiguous(), lengths.contiguous()
    (B, N, T), rows = prediction.shape, lengths.numel()
    moments = normalize == 2
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    sums = torch.empty(3 if moments else 1, rows, dtype=dtype, device=prediction.device)
    if rows > 0:
        _token_sums_kernel[(rows,)](prediction, target, lengths, sums, rows, T, moments, block_size(T))
    if normalize == 0:
        divisor = torch.full((), max(B * N * T, 1), dtype=torch.float64, device=prediction.device)
    else:
        divisor = lengths.sum().clamp(min=1).double()
    if moments:
        means, counts = sums[1].double(), lengths.flatten()
        mean = (counts * means).sum() / divisor
        squares = (sums[2] + counts * (means - mean).square()).sum()
        divisor = divisor * (squares / divisor).clamp(min=SMALLEST_STD**2)
    return (sums[0].sum(dtype=torch.float64) / divisor).to(prediction.dtype), divisor.to(dtype)


def masked_mse_backward(grad: Tensor, prediction: Tensor, target: Tensor, lengths: Tensor, divisor: Tensor) -> Tensor:
    prediction, target, lengths = prediction.contiguous(), target.contiguous(), lengths.contiguous()
    grad_prediction, T = empty_like(prediction), prediction.shape[2]
    if prediction.numel() > 0:
        _scaled_errors_kernel[(lengths.numel(),)](
            grad, prediction, target, lengths, divisor, grad_prediction, T, block_size(T)
        )
    return grad_prediction
