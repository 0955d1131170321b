"""NeRN's losses (arXiv 2212.13554, section 3; formulas as in the published code): weights, logits, feature maps.

All are scalars with gradients in what is predicted; what is stored, the teacher's side, is a constant where it does not
require grad. ``RECONSTRUCTION``, ``DISTILLATION``, ``FEATURES`` and ``SMOOTHNESS`` name them for configurations.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, softmax

from fastws.ops.feature_distance import feature_distance

EPSILON = 1e-3  # added to the norms of feature maps
STABLE = 1e-4  # added to probabilities
TEMPERATURE = 2.0

Maps = Sequence[Tensor]  # [B, ...] each


# --- weights


def rmse(predicted: Sequence[Tensor], original: Sequence[Tensor]) -> Tensor:
    """Root mean squared error over the weights of all layers together.

    ``sqrt(sum((predicted - original)**2) / n)`` for n weights in all, with gradient ``(predicted - original) / (n *
    rmse)``, and 0 where nothing differs. The published ``L2Loss``.

    Each weight's gradient depends on the errors of all. So a step that trains a few kernels takes this loss of all
    kernels, predicted without gradient, and pushes the rows of its gradient that it wants into the predictor.

    Args:
        predicted: Layers, any shapes, floating point.
        original: Layers of the same shapes.

    Returns:
        ``[]``.
    """
    check("rmse", predicted, original)
    norms = [torch.linalg.vector_norm(x - y) for x, y in zip(predicted, original, strict=True)]
    return torch.linalg.vector_norm(torch.stack(norms)) / sum(y.numel() for y in original) ** 0.5


def layer_mse(predicted: Sequence[Tensor], original: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean squared error of each; the published ``MSELoss``.

    The gradient of a weight depends on its own error only.

    Args:
        predicted: Layers, any shapes, floating point.
        original: Layers of the same shapes.

    Returns:
        ``[]``.
    """
    check("layer_mse", predicted, original)
    return torch.stack([(x - y).square().mean() for x, y in zip(predicted, original, strict=True)]).mean()


def check(where: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    shapes, expected = ([list(x.shape) for x in tensors] for tensors in (ours, theirs))
    if shapes != expected or not ours:
        pair = next((pair for pair in zip(shapes, expected, strict=False) if pair[0] != pair[1]), None)
        got = f"{pair[0]} instead of {pair[1]}" if pair else f"{len(shapes)} and {len(expected)} tensors"
        raise ValueError(f"{where}: both lists must hold tensors of the same shapes, got {got}")


# --- logits


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the softmax of ``student`` from that of ``teacher``, a mean over images.

    ``sum(p * (log p - log q)) / B`` with p of the teacher and q of the student.

    Args:
        student: Logits, ``[B, K]``, floating point.
        teacher: Logits, ``[B, K]``.

    Returns:
        ``[]``.
    """
    return kl_div(log_softmax(student, 1), softmax(teacher, 1), reduction="batchmean")


def stable_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``kl`` with 1e-4 added to q: at most 9.21, and slightly below 0 where both agree. In every published run."""
    return kl_div((softmax(student, 1) + STABLE).log(), softmax(teacher, 1), reduction="batchmean")


def both_stable_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``kl`` with 1e-4 added to p and q; the published ``MultiStableKLDivLoss``."""
    return kl_div((softmax(student, 1) + STABLE).log(), softmax(teacher, 1) + STABLE, reduction="batchmean")


def temperature_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``4 * stable_kl`` of logits divided by 2; the published ``TempStableKLDivLoss``."""
    return TEMPERATURE**2 * stable_kl(student / TEMPERATURE, teacher / TEMPERATURE)


# --- feature maps


def batch_distance(student: Maps, teacher: Maps, weights: Sequence[float]) -> Tensor:
    """As ``fastws.feature_distance``, but with one norm for all images; published ``L2AttentionLoss``.

    ``sum(weight * |F / |F| - G / (|G| + 1e-3)|**2)`` over maps, F of the teacher and G of the student.

    Args:
        student: Feature maps, ``[B, ...]`` each, floating point.
        teacher: Maps of the same shapes.
        weights: Of each map: how many times it counts.

    Returns:
        ``[]``.
    """
    check("batch_distance", student, teacher)
    norm = torch.linalg.vector_norm
    terms = [(x / (norm(x) + EPSILON) - y / norm(y)).square().sum() for x, y in zip(student, teacher, strict=True)]
    return weighted(terms, weights)


def similarity_distance(student: Maps, teacher: Maps, weights: Sequence[float]) -> Tensor:
    """Squared distance of the similarities between images (arXiv 1907.09682); published ``SPAttentionLoss``.

    ``sum(weight * |S(F) - S(G)|**2) / B**2`` over maps, where ``S(F) = F F^T``, of F as ``[B, C * H * W]``, with each
    row divided by its norm plus 1e-3. Arguments are those of ``batch_distance``.
    """
    check("similarity_distance", student, teacher)

    def similarities(x: Tensor) -> Tensor:
        products = x.flatten(1) @ x.flatten(1).T  # [B, B]
        return products / (torch.linalg.vector_norm(products, dim=1, keepdim=True) + EPSILON)

    terms = [(similarities(x) - similarities(y)).square().sum() for x, y in zip(student, teacher, strict=True)]
    return weighted(terms, weights) / len(student[0]) ** 2


def weighted(terms: list[Tensor], weights: Sequence[float]) -> Tensor:
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


# --- smoothness, for training teachers that are easier to store


def cosine_smoothness(layers: Sequence[Tensor]) -> Tensor:
    """How alike neighbouring kernels are: the cosines of each with the next, along channels and along filters, summed.

    Teachers are trained on their task's loss minus a factor of this (1e-4 in the published code). Cosines say nothing
    of 1x1 kernels, which add their ``distance_smoothness``.

    Args:
        layers: Weights, ``[C_out, C_in, kh, kw]`` each, floating point.

    Returns:
        ``[]``.
    """
    total = layers[0].new_zeros(())
    for weight in layers:
        if weight.shape[2:].numel() == 1:
            total = total + distance_smoothness([weight])
        else:
            for before, after in neighbours(weight.flatten(2)):
                total = total + cosine_similarity(before, after, dim=2).sum()
    return total


def distance_smoothness(layers: Sequence[Tensor]) -> Tensor:
    """Minus the distances of neighbouring kernels, along channels and along filters, summed.

    Kernels have norm 1; 1x1 kernels are divided by the norm of their layer. The published code subtracts neighbours
    that it did not normalise.

    Args:
        layers: Weights, ``[C_out, C_in, kh, kw]`` each, floating point.

    Returns:
        ``[]``, at most 0.
    """
    total = layers[0].new_zeros(())
    for weight in layers:
        kernels = weight.flatten(2)
        dim = None if kernels.shape[2] == 1 else 2
        kernels = kernels / torch.linalg.vector_norm(kernels, dim=dim, keepdim=True)
        for before, after in neighbours(kernels):
            total = total - torch.linalg.vector_norm(before - after, dim=2).sum()
    return total


def neighbours(kernels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of ``[C_out, C_in, k]``: kernels and the next ones, along channels and along filters."""
    return [(kernels[:, :-1], kernels[:, 1:]), (kernels[:-1], kernels[1:])]


RECONSTRUCTION: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {"rmse": rmse, "mse": layer_mse}
DISTILLATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stable_kl": stable_kl,
    "kl": kl,
    "both_stable_kl": both_stable_kl,
    "temperature_kl": temperature_kl,
}
FEATURES: dict[str, Callable[[Maps, Maps, Sequence[float]], Tensor]] = {
    "image": feature_distance,  # the published L2BatchedAttentionLoss
    "batch": batch_distance,
    "similarity": similarity_distance,
}
SMOOTHNESS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "cosine": cosine_smoothness,
    "distance": distance_smoothness,
}
