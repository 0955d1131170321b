"""Layer statistics: moments and quantiles of the weights of every layer, for many networks at once."""

import torch
from torch import Tensor

from fastws import _native

PERCENTS = (1, 25, 50, 75, 99)
STATISTICS = ("mean", "variance", "q1", "q25", "q50", "q75", "q99")


def layer_statistics(flat: Tensor, offsets: Tensor) -> Tensor:
    """Mean, population variance and the 1, 25, 50, 75 and 99 % quantiles of segments of flat checkpoints.

    For n weights in ascending order, ``x[0] .. x[n - 1]``, and ``r, rest = divmod(percent * (n - 1), 100)``::

        quantile = x[r] + (x[r + 1] - x[r]) * rest / 100

    which is ``numpy.percentile`` with its linear interpolation. All seven are computed in float64, whatever the dtype
    of the weights. A segment that holds NaN or infinity has seven times NaN, and so has an empty one.

    Segments may leave gaps and may overlap. Weights and biases on their own, as in the features s(W) of Unterthiner et
    al. (arXiv 2002.11448), are one segment per tensor: ``layout.tensor_table``. A layer with its bias behind it is one
    segment over both. No gradients: weights are data here.

    Args:
        flat: Flat checkpoints, ``[B, P]``, floating point.
        offsets: Where segments begin and end, ``[L, 2]``, int64, ``0 <= begin <= end <= P``, on the device of ``flat``.
            On a GPU the values are trusted, unless FASTWS_CHECK=1.

    Returns:
        ``[B, L, 7]``, float64: mean, variance, and the quantiles in ascending order.

    Raises:
        ValueError: If a shape, dtype, device or offset does not fit.

    Example:
        >>> flat = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 7.0]])
        >>> fastws.layer_statistics(flat, torch.tensor([[0, 5], [5, 6]])).float()
        tensor([[[2.0000, 2.0000, 0.0400, 1.0000, 2.0000, 3.0000, 3.9600],
                 [7.0000, 0.0000, 7.0000, 7.0000, 7.0000, 7.0000, 7.0000]]])
    """
    if flat.dim() != 2 or not flat.is_floating_point():
        raise ValueError(f"layer_statistics: flat must be [B, P] floating point, got {list(flat.shape)} {flat.dtype}")
    if offsets.dim() != 2 or offsets.shape[1] != 2 or offsets.dtype != torch.int64 or offsets.device != flat.device:
        got = f"{list(offsets.shape)} {offsets.dtype} on {offsets.device}"
        raise ValueError(f"layer_statistics: offsets must be [L, 2] int64 on {flat.device}, got {got}")
    if (_native.CHECK or flat.device.type == "cpu") and not torch.compiler.is_compiling():
        check_offsets(offsets, flat.shape[1])
    return torch.ops.fastws.layer_statistics(flat, offsets)


def check_offsets(offsets: Tensor, num_weights: int) -> None:
    for number, (begin, end) in enumerate(offsets.tolist()):
        if not 0 <= begin <= end <= num_weights:
            bounds = f"0 <= begin <= end <= {num_weights}"
            raise ValueError(f"layer_statistics: offsets[{number}] must have {bounds}, got [{begin}, {end}]")


def layer_statistics_reference(flat: Tensor, offsets: Tensor) -> Tensor:
    statistics = flat.new_full((len(flat), len(offsets), len(STATISTICS)), torch.nan, dtype=torch.float64)
    for number, (begin, end) in enumerate(offsets.tolist()):
        if begin == end:
            continue
        ordered = flat[:, begin:end].double().sort(1).values
        variance, mean = torch.var_mean(ordered, 1, correction=0)
        columns = [mean, variance]
        for percent in PERCENTS:
            rank, rest = divmod(percent * (end - begin - 1), 100)
            below, above = ordered[:, rank], ordered[:, min(rank + 1, end - begin - 1)]
            columns.append(below + (above - below) * (rest / 100))
        finite = ordered.isfinite().all(1, keepdim=True)
        statistics[:, number] = torch.where(finite, torch.stack(columns, 1), torch.nan)
    return statistics


torch.library.define("fastws::layer_statistics", "(Tensor flat, Tensor offsets) -> Tensor")
torch.library.register_kernel("fastws::layer_statistics", "default", layer_statistics_reference)


@torch.library.register_fake("fastws::layer_statistics")
def layer_statistics_fake(flat, offsets):
    return flat.new_empty(flat.shape[0], offsets.shape[0], len(STATISTICS), dtype=torch.float64)


def layer_statistics_backward(ctx, grad_statistics):
    raise NotImplementedError("layer_statistics: weights are data; their statistics have no gradient")


torch.library.register_autograd("fastws::layer_statistics", layer_statistics_backward)
_native.register_triton("layer_statistics", file="layer_statistics")
