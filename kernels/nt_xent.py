"""Triton kernels of fastws::nt_xent and its gradient, on rows that the launchers normalise."""

import torch
import triton
import triton.language as tl
from torch import Tensor, empty_like

BLOCK = 64  # rows, and columns, of a tile of similarities
CHUNK = 32  # entries of the embedding per product
SMALLEST_NORM = 1e-8


@triton.jit
def similarities(u, k, j, scale, count, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """s[k, j] = scale * dot(u[k], u[j]), -inf where j is k or no row. scale lies in memory, where it can be float64."""
    s = tl.zeros([BLOCK, BLOCK], u.dtype.element_ty)
    for start in range(0, size, CHUNK):
        e = start + tl.arange(0, CHUNK)
        left = tl.load(u + k[:, None] * size + e[None, :], mask=(k < count)[:, None] & (e < size)[None, :], other=0.0)
        right = tl.load(u + j[None, :] * size + e[:, None], mask=(j < count)[None, :] & (e < size)[:, None], other=0.0)
        s = tl.dot(left, right, s, input_precision="ieee", out_dtype=u.dtype.element_ty)
    return tl.where((k[:, None] != j[None, :]) & (j < count)[None, :], s * tl.load(scale), float("-inf"))


@triton.jit
def _logsumexp_kernel(u, logsumexp, positives, scale, count, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """logsumexp[k] = log(sum over j != k of exp(s[k, j])), positives[k] = s[k, o] for the row o of the other view.
    One program per BLOCK rows; the largest exponent is carried along, so that nothing over- or underflows."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    other = tl.where(k < count // 2, k + count // 2, k - count // 2)
    dtype = u.dtype.element_ty
    largest = tl.full([BLOCK], -1e30, dtype)
    total = tl.zeros([BLOCK], dtype)
    positive = tl.zeros([BLOCK], dtype)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        s = similarities(u, k, j, scale, count, size, BLOCK, CHUNK)
        positive += tl.sum(tl.where(j[None, :] == other[:, None], s, 0.0), axis=1)
        larger = tl.maximum(largest, tl.max(s, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(s - larger[:, None]), axis=1)
        largest = larger
    tl.store(logsumexp + k, largest + tl.log(total), mask=k < count)
    tl.store(positives + k, positive, mask=k < count)


@triton.jit
def _grad_rows_kernel(u, logsumexp, grad, scale, count, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """grad[k] = sum over j of w[k, j] * u[j], where w[k, j] = exp(s - logsumexp[k]) + exp(s - logsumexp[j]), less 2
    where j is the other view of k. One program per BLOCK rows and CHUNK entries."""
    chunks = tl.cdiv(size, CHUNK)
    k = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    other = tl.where(k < count // 2, k + count // 2, k - count // 2)
    dtype = u.dtype.element_ty
    row = tl.load(logsumexp + k, mask=k < count, other=0.0)
    sums = tl.zeros([BLOCK, CHUNK], dtype)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK).to(tl.int64)
        s = similarities(u, k, j, scale, count, size, BLOCK, CHUNK)
        column = tl.load(logsumexp + j, mask=j < count, other=0.0)
        s = tl.where(k[:, None] < count, s, float("-inf"))
        w = tl.exp(s - row[:, None]) + tl.exp(s - column[None, :])
        w -= tl.where(j[None, :] == other[:, None], 2.0, 0.0).to(dtype)
        right = tl.load(u + j[:, None] * size + e[None, :], mask=(j < count)[:, None] & (e < size)[None, :], other=0.0)
        sums = tl.dot(w, right, sums, input_precision="ieee", out_dtype=dtype)
    tl.store(grad + k[:, None] * size + e[None, :], sums, mask=(k < count)[:, None] & (e < size)[None, :])


def unit_rows(z_i: Tensor, z_j: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.cat([z_i, z_j])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    norms = z.norm(dim=1, keepdim=True)
    return z / norms.clamp(min=SMALLEST_NORM), norms


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    u, _ = unit_rows(z_i, z_j)
    count, size = u.shape
    logsumexp, positives = u.new_empty(2, count)
    grid = (triton.cdiv(count, BLOCK),)
    scale = u.new_full((), 1 / temperature)
    _logsumexp_kernel[grid](u, logsumexp, positives, scale, count, size, BLOCK, CHUNK)
    loss = (logsumexp.double() - positives.double()).mean()
    return loss.to(z_i.dtype), logsumexp.clone()


def nt_xent_backward(
    grad: Tensor, z_i: Tensor, z_j: Tensor, logsumexp: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    u, norms = unit_rows(z_i, z_j)
    count, size = u.shape
    grad_u = empty_like(u)
    grid = (triton.cdiv(count, BLOCK) * triton.cdiv(size, CHUNK),)
    scale = u.new_full((), 1 / temperature)
    _grad_rows_kernel[grid](u, logsumexp, grad_u, scale, count, size, BLOCK, CHUNK)
    grad_u *= grad.to(u.dtype) / (count * temperature)
    along = (grad_u * u).sum(dim=1, keepdim=True) * u
    grad_z = (grad_u - along.where(norms > SMALLEST_NORM, 0)) / norms.clamp(min=SMALLEST_NORM)
    grad_i, grad_j = grad_z.to(z_i.dtype).chunk(2)
    return grad_i.clone(), grad_j.clone()
