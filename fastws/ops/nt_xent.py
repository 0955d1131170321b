"""NT-Xent: the contrastive loss of two views of a batch."""

import torch
from torch import Tensor

from fastws import _native

SMALLEST_NORM = 1e-8


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy: each embedding has to find its other view among the batch.

    With the 2B rows ``u = cat(z_i, z_j) / norm``, ``s[k, l] = dot(u[k], u[l]) / temperature`` and ``o`` the row of the
    other view of ``k``, ``loss = sum_k(log(sum_{l != k} exp(s[k, l])) - s[k, o]) / 2B`` (SimCLR, arXiv 2002.05709,
    equation 1). Norms below 1e-8 count as 1e-8, so that rows of zeros have cosine 0. Half precision is computed in
    float32. No matrix of 2B x 2B is stored on CPU and CUDA. Differentiable once, in ``z_i`` and ``z_j``.

    Args:
        z_i: Embeddings of the first view, ``[B, E]``, floating point, B and E at least 1.
        z_j: Embeddings of the second view, like ``z_i``.
        temperature: Divides the cosines; positive and finite.

    Returns:
        The loss, ``[]``, with the dtype of ``z_i``; 0 for B = 1, which has no negatives.

    Raises:
        ValueError: If a shape, dtype, device or value does not fit.

    Example:
        >>> z = torch.eye(2)
        >>> fastws.nt_xent(z, z, temperature=1.0)  # log(e + 2) - 1
        tensor(0.5514)
    """
    if z_i.dim() != 2 or z_i.numel() == 0 or not z_i.is_floating_point():
        raise ValueError(
            f"nt_xent: z_i must be [B, E], not empty and floating point, got {list(z_i.shape)} {z_i.dtype}"
        )
    if z_j.shape != z_i.shape or z_j.dtype != z_i.dtype or z_j.device != z_i.device:
        raise ValueError(
            f"nt_xent: z_j must be {list(z_i.shape)} {z_i.dtype} on {z_i.device}, "
            f"got {list(z_j.shape)} {z_j.dtype} on {z_j.device}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"nt_xent: temperature must be positive and finite, got {temperature}")
    return torch.ops.fastws.nt_xent(z_i, z_j, temperature)[0]


def unit_rows(z_i: Tensor, z_j: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of both views divided by their norms, ``[2B, E]``, and the norms, ``[2B, 1]``."""
    z = torch.cat([z_i, z_j])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    norms = z.norm(dim=1, keepdim=True)
    return z / norms.clamp(min=SMALLEST_NORM), norms


def similarities(u: Tensor, temperature: float) -> Tensor:
    """Cosines over temperature, ``[2B, 2B]``; a row is not compared with itself."""
    return (u @ u.T / temperature).fill_diagonal_(-torch.inf)


def nt_xent_reference(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    u, _ = unit_rows(z_i, z_j)
    s = similarities(u, temperature)
    logsumexp = s.logsumexp(dim=1)
    positives = torch.arange(len(u), device=u.device).roll(len(z_i))
    loss = torch.nn.functional.cross_entropy(s, positives)
    return loss.to(z_i.dtype), logsumexp


def nt_xent_backward_reference(
    grad: Tensor, z_i: Tensor, z_j: Tensor, logsumexp: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    u, norms = unit_rows(z_i, z_j)
    p = (similarities(u, temperature) - logsumexp[:, None]).exp()
    grad_s = p - torch.eye(len(u), dtype=u.dtype, device=u.device).roll(len(z_i), dims=1)
    grad_u = (grad_s + grad_s.T) @ u * (grad.to(u.dtype) / (len(u) * temperature))
    along = (grad_u * u).sum(dim=1, keepdim=True) * u
    grad_z = (grad_u - along.where(norms > SMALLEST_NORM, 0)) / norms.clamp(min=SMALLEST_NORM)
    grad_i, grad_j = grad_z.to(z_i.dtype).chunk(2)
    return grad_i.clone(), grad_j.clone()


torch.library.define(
    "fastws::nt_xent", "(Tensor z_i, Tensor z_j, float temperature) -> (Tensor loss, Tensor logsumexp)"
)
torch.library.define(
    "fastws::nt_xent_backward",
    "(Tensor grad, Tensor z_i, Tensor z_j, Tensor logsumexp, float temperature) -> (Tensor grad_i, Tensor grad_j)",
)
torch.library.register_kernel("fastws::nt_xent", "default", nt_xent_reference)
torch.library.register_kernel("fastws::nt_xent_backward", "default", nt_xent_backward_reference)


@torch.library.register_fake("fastws::nt_xent")
def nt_xent_fake(z_i, z_j, temperature):
    dtype = torch.promote_types(z_i.dtype, torch.float32)
    return z_i.new_empty(()), z_i.new_empty(2 * z_i.shape[0], dtype=dtype)


@torch.library.register_fake("fastws::nt_xent_backward")
def nt_xent_backward_fake(grad, z_i, z_j, logsumexp, temperature):
    return z_i.new_empty(z_i.shape), z_j.new_empty(z_j.shape)


def nt_xent_setup_context(ctx, inputs, output):
    z_i, z_j, ctx.temperature = inputs
    _, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(z_i, z_j, logsumexp)


def nt_xent_backward(ctx, grad_loss, grad_logsumexp):
    return *torch.ops.fastws.nt_xent_backward(grad_loss, *ctx.saved_tensors, ctx.temperature), None


def nt_xent_double_backward(ctx, grad_i, grad_j):
    raise NotImplementedError("nt_xent: differentiable once")


torch.library.register_autograd("fastws::nt_xent", nt_xent_backward, setup_context=nt_xent_setup_context)
torch.library.register_autograd("fastws::nt_xent_backward", nt_xent_double_backward)
_native.register_triton("nt_xent", file="nt_xent")
_native.register_triton("nt_xent_backward", file="nt_xent")
