"""Triton kernels of fastws::feature_distance and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor, empty_like

EPSILON = tl.constexpr(1e-3)
BLOCK = 1024
CHUNK = 16 * BLOCK  # entries of an image that a program adds up
IMAGES = 32  # whose sums are looked at side by side


@triton.jit
def _sums_kernel(student, teacher, sums, size, chunks, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """sums[b, chunk] = the sums of a * a, t * t and (a - t)**2 over a chunk of image b. One program per chunk."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    squares_a, squares_t = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    apart = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tl.minimum(CHUNK, size - first), BLOCK):
        k = first + start + tl.arange(0, BLOCK)
        a = tl.load(student + b * size + k, mask=k < size, other=0.0).to(tl.float64)
        t = tl.load(teacher + b * size + k, mask=k < size, other=0.0).to(tl.float64)
        squares_a += a * a
        squares_t += t * t
        apart += (a - t) * (a - t)
    to = sums + 3 * tl.program_id(0).to(tl.int64)
    tl.store(to, tl.sum(squares_a))
    tl.store(to + 1, tl.sum(squares_t))
    tl.store(to + 2, tl.sum(apart))


@triton.jit
def _distance_kernel(parts, sums, distance, batch, chunks, BLOCK: tl.constexpr):
    """sums[b] = the sum of parts[b, chunk]; distance = the sum of |a * scale_a - t * scale_t|**2, from these, without
    the difference of numbers near one. One program in all."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK).to(tl.int64)
        squares_a, squares_t = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        apart = tl.zeros([BLOCK], tl.float64)
        for chunk in range(0, chunks):
            part = parts + 3 * (b * chunks + chunk)
            squares_a += tl.load(part, mask=b < batch, other=0.0)
            squares_t += tl.load(part + 1, mask=b < batch, other=0.0)
            apart += tl.load(part + 2, mask=b < batch, other=0.0)
        tl.store(sums + 3 * b, squares_a, mask=b < batch)
        tl.store(sums + 3 * b + 1, squares_t, mask=b < batch)
        tl.store(sums + 3 * b + 2, apart, mask=b < batch)
        length_a, length_t = tl.sqrt(squares_a), tl.sqrt(squares_t)
        scale_a, scale_t = 1 / (length_a + EPSILON), 1 / (length_t + EPSILON)
        longer = (length_a - length_t) * (squares_a * scale_a - squares_t * scale_t)
        total += scale_a * scale_t * (apart - longer)
    tl.store(distance, tl.sum(total))


@triton.jit
def _gradient_kernel(scale, student, teacher, sums, gradient, size, chunks, BLOCK: tl.constexpr):
    """gradient[b, k] = scale times the gradient of the distance of image b. One program per BLOCK entries of one."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    squares_a, squares_t = tl.load(sums + 3 * b), tl.load(sums + 3 * b + 1)
    product = (squares_a + squares_t - tl.load(sums + 3 * b + 2)) / 2
    length_a, length_t = tl.sqrt(squares_a), tl.sqrt(squares_t)
    scale_a, scale_t = 1 / (length_a + EPSILON), 1 / (length_t + EPSILON)
    along = (scale_a * squares_a - scale_t * product) / tl.where(length_a > 0, length_a, 1.0)
    outer = tl.load(scale) * scale_a
    k = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(student + b * size + k, mask=k < size, other=0.0)
    t = tl.load(teacher + b * size + k, mask=k < size, other=0.0)
    dtype = tl.float64 if a.dtype == tl.float64 else tl.float32
    entry = (outer * scale_a * (1 - along)).to(dtype) * a.to(dtype) - (outer * scale_t).to(dtype) * t.to(dtype)
    tl.store(gradient + b * size + k, entry.to(gradient.dtype.element_ty), mask=k < size)


def feature_distance(student: Tensor, teacher: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    student, teacher = student.contiguous(), teacher.contiguous()
    (B, K), dtype = student.shape, torch.promote_types(student.dtype, torch.float32)
    chunks = triton.cdiv(K, CHUNK)
    parts = torch.empty(B, chunks, 3, dtype=torch.float64, device=student.device)
    sums = torch.empty(B, 3, dtype=torch.float64, device=student.device)
    distance = torch.empty((), dtype=torch.float64, device=student.device)
    if student.numel() > 0:
        _sums_kernel[(B * chunks,)](student, teacher, parts, K, chunks, BLOCK, CHUNK)
    _distance_kernel[(1,)](parts, sums, distance, B, chunks, IMAGES)
    return (weight * distance).to(dtype), sums


def feature_distance_backward(grad: Tensor, student: Tensor, teacher: Tensor, sums: Tensor, weight: float) -> Tensor:
    student, teacher, sums = student.contiguous(), teacher.contiguous(), sums.contiguous()
    gradient, (B, K) = empty_like(student), student.shape
    scale = 2 * weight * grad.double()  # a plain number would reach the kernel in float32
    if student.numel() > 0:
        chunks = triton.cdiv(K, BLOCK)
        _gradient_kernel[(B * chunks,)](scale, student, teacher, sums, gradient, K, chunks, BLOCK)
    return gradient
