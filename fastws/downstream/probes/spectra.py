"""Spectra of layers, as WeightWatcher describes them (Martin et al., arXiv 2002.06716), many networks at once."""

import math

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.table import table_rows

SPECTRA = ("log_norm", "alpha", "alpha_weighted", "log_alpha_norm", "log_spectral_norm", "stable_rank")
ITERATIONS = 2  # of the power method, where singular values are found by random projection
SEED = 0  # of these projections
SMALLEST = 1e-30  # eigenvalues and norms of layers of zeros, whose logarithm is wanted
ROUNDING = 1e-12  # of the largest eigenvalue, below which others count as zero
PAIRS_AT_ONCE = 2**24  # of eigenvalues


def layer_spectra(flat: Tensor, layout: Layout, *, leading: int | None = None) -> Tensor:
    """Six numbers of the eigenvalues of ``W' W`` of each layer ``W``, rows by weights per row, its bias left out.

    ``log_norm``: log10 of their sum, the squared Frobenius norm; ``alpha``: exponent of the power law of their tail,
    see ``power_law``; ``log_spectral_norm``: log10 of the largest; ``alpha_weighted``: the product of the two;
    ``log_alpha_norm``: log10 of the sum of their powers ``alpha``; ``stable_rank``: their sum over the largest. As
    WeightWatcher has them, but a convolution is one matrix ``[out, in * height * width]``, and small layers count too.

    Args:
        flat: Checkpoints, ``[B, P]``.
        layout: Says which weights make a layer. Layers with fewer than two rows or columns have no spectrum.
        leading: How many of the largest singular values are found, by random projection (Halko et al., arXiv
            0909.4061); None finds all. The Frobenius norm is exact all the same.

    Returns:
        ``[B, 6 L]`` float64, layer by layer.
    """
    found = []
    for row in table_rows(layout.table):
        if min(row.rows, row.row_length) < 2:
            continue
        size = row.rows * row.row_length
        matrix = flat[:, row.weight_offset : row.weight_offset + size].view(len(flat), row.rows, row.row_length)
        matrix = matrix.double()
        eigenvalues = singular_values(matrix, leading).square().clamp(min=SMALLEST)
        found.append(describe(eigenvalues, matrix.square().sum((1, 2)).clamp(min=SMALLEST)))
    return torch.cat(found, 1) if found else flat.new_zeros(len(flat), 0, dtype=torch.float64)


def singular_values(matrices: Tensor, leading: int | None) -> Tensor:
    """In descending order, ``[B, k]`` of ``[B, n, m]``."""
    smaller = min(matrices.shape[1:])
    if leading is None or leading >= smaller:
        gram = matrices @ matrices.mT if matrices.shape[1] <= matrices.shape[2] else matrices.mT @ matrices
        return torch.linalg.eigvalsh(gram).flip(1).clamp(min=0).sqrt()
    generator = torch.Generator(matrices.device).manual_seed(SEED)
    width = min(smaller, leading + 6)
    probe = torch.randn(matrices.shape[2], width, generator=generator, dtype=matrices.dtype, device=matrices.device)
    basis = torch.linalg.qr(matrices @ probe).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.mT @ basis).Q).Q
    return torch.linalg.svdvals(basis.mT @ matrices)[:, :leading]


def describe(eigenvalues: Tensor, norm: Tensor) -> Tensor:
    """The six numbers ``[B, 6]`` of eigenvalues ``[B, k]`` in descending order, and their sum ``[B]``."""
    alpha, largest = power_law(eigenvalues), eigenvalues[:, 0]
    exponents = alpha[:, None] * eigenvalues.log()
    log_alpha_norm = exponents.logsumexp(1) / math.log(10)
    columns = [norm.log10(), alpha, alpha * largest.log10(), log_alpha_norm, largest.log10(), norm / largest]
    return torch.stack(columns, 1)


def power_law(values: Tensor) -> Tensor:
    """The exponent alpha of ``p(x) ~ x^-alpha``, ``x >= x_min``, by maximum likelihood (arXiv 0706.1062, section 3).

    ``alpha = 1 + n / sum(log(x / x_min))`` over the n values of at least ``x_min``, which is the value for which the
    largest distance between the empirical and the fitted distribution function is least, as the packages powerlaw and
    WeightWatcher have it; the last value is no candidate.

    Args:
        values: Positive, in descending order, ``[B, k]``, at least two.

    Returns:
        ``[B]``.
    """
    alphas = [fit(part) for part in values.flip(1).log().split(max(1, PAIRS_AT_ONCE // values.shape[1] ** 2))]
    return torch.cat(alphas)


def fit(logs: Tensor) -> Tensor:
    """The exponents of logarithms in ascending order, ``[B, k]``."""
    size = logs.shape[1]
    number = torch.arange(size, device=logs.device)
    count = size - number[:-1]  # of values from each candidate on
    rest = logs.flip(1).cumsum(1).flip(1)[:, :-1] - count * logs[:, :-1]
    alphas = 1 + count / rest.clamp(min=SMALLEST)  # [B, k - 1]
    above = logs[:, None] - logs[:, :-1, None]  # [B, candidate, value]
    fitted = 1 - ((1 - alphas)[..., None] * above).exp()
    empirical = (number - number[:-1, None]) / count[:, None]
    distance = (fitted - empirical).abs().masked_fill(number < number[:-1, None], 0).amax(2)
    # zeros up to rounding are no tail, and values that are all equal follow no power law
    no_tail = (rest <= SMALLEST) | (logs[:, :-1] < logs[:, -1:] + math.log(ROUNDING))
    distance = distance.masked_fill(no_tail, torch.inf)
    best = distance.argmin(1, keepdim=True)
    found = alphas.gather(1, best)[:, 0]
    return torch.where(distance.gather(1, best)[:, 0].isfinite(), found, 1.0)
