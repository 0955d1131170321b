"""Attention of all tokens of a window to all, for short windows and small heads."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastws import _native

MAX_TOKENS = 1024  # up to which a block of similarities of the compiled kernel stays in cache
MAX_SIZE = {torch.float32: 24, torch.float64: 24}  # entries of a head; see benchmarks/bench_attention.py
MAX_HALF_SIZE = 128  # of half precision, whose gradients are slow in torch


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention without a mask: every token of a window attends to every token.

    ``out[b, :, h] = softmax(q[b, :, h] @ k[b, :, h].T / sqrt(d)) @ v[b, :, h]`` (arXiv 1706.03762, equation 1). On a
    CPU, windows of up to 1,024 tokens with heads of up to 24 entries (128 of half precision, which is computed in
    float32) run through a kernel of their own; everything else is ``scaled_dot_product_attention`` of torch.

    Args:
        qkv: Queries, keys and values side by side, ``[B, W, 3 * H * d]``, floating point, as one linear layer gives
            them: of each, the H heads one after the other.
        heads: H.

    Returns:
        ``[B, W, H * d]``, of the dtype of ``qkv``. Differentiable once.

    Raises:
        ValueError: If an argument does not fit.

    Example:
        >>> fastws.attention(torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, 4.0]]]), 1)
        tensor([[[3.],
                 [3.]]])
    """
    if qkv.dim() != 3 or not qkv.is_floating_point() or qkv.shape[2] == 0:
        what = "[B, W, 3 * H * d] floating point with entries"
        raise ValueError(f"attention: qkv must be {what}, got {list(qkv.shape)} {qkv.dtype}")
    if heads < 1 or qkv.shape[2] % (3 * heads):
        what = f"a positive number that divides a third of {qkv.shape[2]} entries"
        raise ValueError(f"attention: heads must be {what}, got {heads}")
    if serves(qkv, heads):
        return torch.ops.fastws.attention(qkv, heads)[0]
    return merge(scaled_dot_product_attention(*split(qkv, heads)))


def serves(qkv: Tensor, heads: int) -> bool:
    """Whether the compiled kernel is there and the faster way."""
    size = MAX_SIZE.get(qkv.dtype, MAX_HALF_SIZE)
    small = qkv.shape[1] <= MAX_TOKENS and qkv.shape[2] <= 3 * heads * size
    return qkv.device.type == "cpu" and small and "attention" in _native.COMPILED["cpu"]


def split(qkv: Tensor, heads: int) -> Tensor:
    """``[B, W, 3 * H * d]`` -> query, key and value, ``[3, B, H, W, d]``."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def merge(of_heads: Tensor) -> Tensor:
    """``[B, H, W, d]`` -> ``[B, W, H * d]``."""
    return of_heads.transpose(1, 2).flatten(2)


def sum_dtype(x: Tensor) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def attention_reference(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    query, key, value = split(qkv.to(sum_dtype(qkv)), heads)
    scores = query @ key.mT / query.shape[3] ** 0.5
    return merge(scores.softmax(3) @ value).to(qkv.dtype), scores.logsumexp(3)


def attention_backward_reference(grad: Tensor, qkv: Tensor, logsumexp: Tensor, heads: int) -> Tensor:
    dtype = sum_dtype(qkv)
    query, key, value = split(qkv.to(dtype), heads)
    scale = query.shape[3] ** -0.5
    shares = (query @ key.mT * scale - logsumexp[..., None]).exp()
    grad = grad.to(dtype).unflatten(2, (heads, -1)).transpose(1, 2)
    grad_shares = grad @ value.mT
    grad_scores = shares * (grad_shares - (shares * grad_shares).sum(3, keepdim=True)) * scale
    parts = [merge(part) for part in (grad_scores @ key, grad_scores.mT @ query, shares.mT @ grad)]
    return torch.cat(parts, 2).to(qkv.dtype)


torch.library.define("fastws::attention", "(Tensor qkv, int heads) -> (Tensor out, Tensor logsumexp)")
torch.library.define("fastws::attention_backward", "(Tensor grad, Tensor qkv, Tensor logsumexp, int heads) -> Tensor")
torch.library.register_kernel("fastws::attention", "default", attention_reference)
torch.library.register_kernel("fastws::attention_backward", "default", attention_backward_reference)


@torch.library.register_fake("fastws::attention")
def attention_fake(qkv, heads):
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), qkv.new_empty(batch, heads, tokens, dtype=sum_dtype(qkv))


@torch.library.register_fake("fastws::attention_backward")
def attention_backward_fake(grad, qkv, logsumexp, heads):
    return qkv.new_empty(qkv.shape)


def attention_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], output[1])
    ctx.heads = inputs[1]


def attention_backward(ctx, grad, grad_logsumexp):
    return torch.ops.fastws.attention_backward(grad, *ctx.saved_tensors, ctx.heads), None


def attention_double_backward(ctx, grad):
    raise NotImplementedError("attention: differentiable once")


torch.library.register_autograd("fastws::attention", attention_backward, setup_context=attention_setup_context)
torch.library.register_autograd("fastws::attention_backward", attention_double_backward)
