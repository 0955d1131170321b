"""Pruning by what a NeRN cannot reconstruct (arXiv 2212.13554, section 5), and by magnitude or chance beside it.

Weights that neighbours do not explain are those that a smooth function of the coordinates misses; pruning them first
is the claim to be tested. What is pruned are the original weights, not the reconstructed ones.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastws.nern.losses import check

Criterion = Literal["reconstruction", "magnitude", "random"]
Unit = Literal["weight", "kernel", "filter"]
AXES = {"weight": 4, "kernel": 2, "filter": 1}  # axes of a layer that number its units


def prune(
    original: Sequence[Tensor],
    share: float,
    criterion: Criterion = "reconstruction",
    *,
    reconstructed: Sequence[Tensor] | None = None,
    unit: Unit = "weight",
    seed: int = 0,
) -> list[Tensor]:
    """Sets a share of the weights to zero.

    "reconstruction" takes the largest relative errors ``|w - v| / |w|``, a weight that is zero before all others;
    "magnitude" the smallest ``|w|``; "random" any. Kernels and filters go by the mean over their weights. Weights and
    kernels are compared over all layers, filters within their layer, of which each loses the share; parts of a unit
    are not taken.

    Args:
        original: Layers, ``[C_out, C_in, kh, kw]`` or ``[out, in]``, floating point.
        share: Part of the units to prune, in [0, 1].
        criterion: Which go first.
        reconstructed: Layers of the same shapes, for "reconstruction".
        unit: What is pruned as a whole.
        seed: Of "random".

    Returns:
        New layers.

    Raises:
        ValueError: If a name, number or shape does not fit.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"prune: share must be in [0, 1], got {share}")
    if unit not in AXES:
        raise ValueError(f"prune: unit must be one of {list(AXES)}, got {unit!r}")
    scores = score(original, criterion, reconstructed, seed)
    scores = [x.flatten(AXES[unit]).mean(-1) if x.dim() > AXES[unit] else x for x in scores]
    if unit == "filter":
        kept = [keep(x, share) for x in scores]
    else:
        sizes = [x.numel() for x in scores]
        kept = keep(torch.cat([x.flatten() for x in scores]), share).split(sizes)
        kept = [part.view(x.shape) for part, x in zip(kept, scores, strict=True)]
    return [x * mask.view(*mask.shape, *[1] * (x.dim() - mask.dim())) for x, mask in zip(original, kept, strict=True)]


def score(
    original: Sequence[Tensor], criterion: str, reconstructed: Sequence[Tensor] | None, seed: int
) -> list[Tensor]:
    """Of each weight; the lowest are pruned first."""
    match criterion:
        case "magnitude":
            return [x.abs() for x in original]
        case "random":
            generator = torch.Generator().manual_seed(seed)
            return [torch.rand(x.shape, generator=generator).to(x.device) for x in original]
        case "reconstruction":
            if reconstructed is None:
                raise ValueError("prune: reconstructed must be there for the criterion reconstruction, got None")
            check("prune", reconstructed, original)
            errors = [(x - y).abs() / x.abs() for x, y in zip(original, reconstructed, strict=True)]
            return [-error.nan_to_num(nan=torch.inf, posinf=torch.inf) for error in errors]
    raise ValueError(f"prune: criterion must be reconstruction, magnitude or random, got {criterion!r}")


def keep(scores: Tensor, share: float) -> Tensor:
    """False for the lowest; of equals the first. The product with a share as 0.29 may be just below a whole number."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(stable=True)[: int(share * scores.numel() * (1 + 1e-12))]] = False
    return kept.view(scores.shape)
