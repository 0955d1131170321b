"""Layer-wise normalised MSE: the reconstruction loss of whole networks in which every layer has a scale of its own."""

import math

import torch
from torch import Tensor

from fastws import _native

REDUCTIONS = ("global_mean", "layer_mean")


def layerwise_mse(
    prediction: Tensor,
    target: Tensor,
    offsets: Tensor,
    sigma: Tensor,
    *,
    weights: Tensor | None = None,
    clip: float | None = None,
    reduction: str = "global_mean",
) -> tuple[Tensor, Tensor]:
    """Squared error of flat checkpoints, every layer in units of its standard deviation, and the sum of each layer.

    For the layers ``[begin[l], end[l])`` of ``offsets``, with ``e = (prediction[b, p] - target[b, p]) / sigma[l]``::

        sums[l] = sum over b and over p in layer l of min(e**2, clip)
        loss    = sum over l of weights[l] * sums[l] / divisor[l]

    ``divisor[l]`` is ``B`` times the weights of all layers together for "global_mean", ``B`` times those of layer l
    for "layer_mean", in which all layers count alike. Weights outside of all layers reach neither loss nor gradient.
    This is the layer-wise loss normalisation of generative hyper-representations (arXiv 2209.14733, section 3). The
    share of a layer's variance that is reconstructed is ``1 - sums[l] / (sums[l] of the mean network as prediction)``.

    Half precision is added up in float32. The loss is differentiable once, in ``prediction`` and ``target``; clipped
    entries have no gradient. The sums have none.

    Args:
        prediction: Flat checkpoints, ``[B, P]``, floating point.
        target: Flat checkpoints, ``[B, P]``, with the dtype of ``prediction``.
        offsets: Where layers begin and end, ``[L, 2]``, int64, ascending and disjoint: ``0 <= begin <= end <= next
            begin``, the last end at most ``P``. On a GPU the values are trusted, unless FASTWS_CHECK=1.
        sigma: Scale of each layer, ``[L]``, float32 or float64, positive: the standard deviation of the layer's weights
            over all networks of the training split, at least 1e-4 in the published code. Trusted on a GPU likewise.
        weights: How much each layer counts, ``[L]`` like ``sigma``; 1 by default.
        clip: Largest squared error of one entry, in units of ``sigma**2``; by default errors are not clipped.
        reduction: "global_mean" or "layer_mean".

    Returns:
        The loss, ``[]``, and the sums of the layers over the batch, ``[L]``, both float32, or float64 for float64
        checkpoints.

    Raises:
        ValueError: If a shape, dtype, device, offset, scale or name does not fit.

    Example:
        >>> prediction, target = torch.tensor([[1.0, 2.0, 8.0]]), torch.tensor([[0.0, 0.0, 0.0]])
        >>> offsets, sigma = torch.tensor([[0, 2], [2, 3]]), torch.tensor([1.0, 4.0])
        >>> fastws.layerwise_mse(prediction, target, offsets, sigma)
        (tensor(3.), tensor([5., 4.]))
        >>> fastws.layerwise_mse(prediction, target, offsets, sigma, reduction="layer_mean")[0]
        tensor(6.5000)
    """
    check_layerwise_mse(prediction, target, offsets, sigma, weights, clip, reduction)
    dtype = sum_dtype(prediction)
    sizes = (offsets[:, 1] - offsets[:, 0]).to(dtype)
    divisor = sizes.sum() if reduction == "global_mean" else sizes
    share = (1 if weights is None else weights.to(dtype)) / (max(len(prediction), 1) * divisor.clamp(min=1))
    share = share.expand(len(offsets)).contiguous()
    limit = math.inf if clip is None else float(clip)
    return torch.ops.fastws.layerwise_mse(prediction, target, offsets, sigma.to(dtype), share, limit)


def check_layerwise_mse(prediction, target, offsets, sigma, weights, clip, reduction) -> None:
    if prediction.dim() != 2 or not prediction.is_floating_point():
        got = f"{list(prediction.shape)} {prediction.dtype}"
        raise ValueError(f"layerwise_mse: prediction must be [B, P] and floating point, got {got}")
    if target.shape != prediction.shape or target.dtype != prediction.dtype or target.device != prediction.device:
        raise ValueError(
            f"layerwise_mse: target must be {list(prediction.shape)} {prediction.dtype} on {prediction.device}, "
            f"got {list(target.shape)} {target.dtype} on {target.device}"
        )
    if offsets.dim() != 2 or offsets.shape[1] != 2 or offsets.dtype != torch.int64 or offsets.device != target.device:
        got = f"{list(offsets.shape)} {offsets.dtype} on {offsets.device}"
        raise ValueError(f"layerwise_mse: offsets must be [L, 2] int64 on {target.device}, got {got}")
    for name, scale in [("sigma", sigma)] + ([] if weights is None else [("weights", weights)]):
        fits = scale.shape == offsets.shape[:1] and scale.dtype in (torch.float32, torch.float64)
        if not fits or scale.device != target.device:
            got = f"{list(scale.shape)} {scale.dtype} on {scale.device}"
            expected = f"[{len(offsets)}] float32 or float64 on {target.device}"
            raise ValueError(f"layerwise_mse: {name} must be {expected}, got {got}")
    if clip is not None and not clip > 0:
        raise ValueError(f"layerwise_mse: clip must be positive, or None for no clipping, got {clip}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"layerwise_mse: reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")
    if (_native.CHECK or target.device.type == "cpu") and not torch.compiler.is_compiling():
        check_values(offsets, sigma, target.shape[1])


def check_values(offsets: Tensor, sigma: Tensor, num_weights: int) -> None:
    end = 0
    for number, (begin, stop) in enumerate(offsets.tolist()):
        if not end <= begin <= stop <= num_weights:
            bounds = f"{end} <= begin <= end <= {num_weights}"
            raise ValueError(f"layerwise_mse: offsets[{number}] must have {bounds}, got [{begin}, {stop}]")
        end = stop
    if not (sigma > 0).all():
        number = int((~(sigma > 0)).nonzero()[0])
        raise ValueError(f"layerwise_mse: sigma[{number}] must be positive, got {sigma[number].item()}")


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which errors are computed and added up."""
    return torch.promote_types(x.dtype, torch.float32)


def layerwise_mse_reference(
    prediction: Tensor, target: Tensor, offsets: Tensor, sigma: Tensor, share: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    dtype = sum_dtype(prediction)
    sums = prediction.new_zeros(len(offsets), dtype=dtype)
    for number, (begin, end) in enumerate(offsets.tolist()):
        error = (prediction[:, begin:end].to(dtype) - target[:, begin:end].to(dtype)) / sigma[number].to(dtype)
        sums[number] = error.square().clamp(max=clip).sum()
    return (sums * share.to(dtype)).sum(), sums


def layerwise_mse_backward_reference(
    grad: Tensor, prediction: Tensor, target: Tensor, offsets: Tensor, sigma: Tensor, share: Tensor, clip: float
) -> Tensor:
    grad_prediction = torch.zeros_like(prediction, memory_format=torch.contiguous_format)
    dtype = sum_dtype(prediction)
    for number, (begin, end) in enumerate(offsets.tolist()):
        scale = sigma[number].to(dtype)
        error = (prediction[:, begin:end].to(dtype) - target[:, begin:end].to(dtype)) / scale
        slope = 2 * grad.to(dtype) * share[number].to(dtype) / scale
        grad_prediction[:, begin:end] = (slope * error).masked_fill(error.square() > clip, 0)
    return grad_prediction


SCHEMA = "Tensor prediction, Tensor target, Tensor offsets, Tensor sigma, Tensor share, float clip"
torch.library.define("fastws::layerwise_mse", f"({SCHEMA}) -> (Tensor loss, Tensor sums)")
torch.library.define("fastws::layerwise_mse_backward", f"(Tensor grad, {SCHEMA}) -> Tensor")
torch.library.register_kernel("fastws::layerwise_mse", "default", layerwise_mse_reference)
torch.library.register_kernel("fastws::layerwise_mse_backward", "default", layerwise_mse_backward_reference)


@torch.library.register_fake("fastws::layerwise_mse")
def layerwise_mse_fake(prediction, target, offsets, sigma, share, clip):
    dtype = sum_dtype(prediction)
    return prediction.new_empty((), dtype=dtype), prediction.new_empty(offsets.shape[0], dtype=dtype)


@torch.library.register_fake("fastws::layerwise_mse_backward")
def layerwise_mse_backward_fake(grad, prediction, target, offsets, sigma, share, clip):
    return prediction.new_empty(prediction.shape)


def layerwise_mse_setup_context(ctx, inputs, output):
    *tensors, ctx.clip = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def layerwise_mse_backward(ctx, grad_loss, grad_sums):
    if grad_loss is None:
        return (None,) * 6
    grad_prediction = torch.ops.fastws.layerwise_mse_backward(grad_loss, *ctx.saved_tensors, ctx.clip)
    return grad_prediction, -grad_prediction if ctx.needs_input_grad[1] else None, None, None, None, None


def layerwise_mse_double_backward(ctx, grad):
    raise NotImplementedError("layerwise_mse: differentiable once")


torch.library.register_autograd(
    "fastws::layerwise_mse", layerwise_mse_backward, setup_context=layerwise_mse_setup_context
)
torch.library.register_autograd("fastws::layerwise_mse_backward", layerwise_mse_double_backward)
_native.register_triton("layerwise_mse", file="layerwise_mse")
_native.register_triton("layerwise_mse_backward", file="layerwise_mse")
