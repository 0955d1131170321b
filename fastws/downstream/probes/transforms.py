"""What features may be turned into before a probe sees them; what has to be fitted is fitted to the training split."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from fastws.downstream import optional

Kernel = Literal["linear", "poly", "rbf", "sigmoid", "cosine"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
COMPONENTS = (50, 33)  # of the published baselines
DENSE = 256  # networks, up to which all eigenvectors are found at once
SEED = 0
Transform = Callable[[Tensor], Tensor]


def polar(features: Tensor) -> Tensor:
    """Radius and angles to the axes, ``[r, arccos(z_1 / r), .., arccos(z_d / r)]``: ``[n, d]`` to ``[n, d + 1]``."""
    radius = features.norm(dim=1, keepdim=True)
    angles = (features / radius.where(radius > 0, 1)).clamp(-1, 1).acos()
    return torch.cat([radius, angles], 1)


def kernel_pca(train: Tensor, kernel: Kernel, components: int) -> Transform:
    """Principal components in the space of a kernel (Schölkopf et al., 1998), by scikit-learn with its defaults.

    Components are ordered by their variance, so those of a smaller number are the first ones of a larger.

    Args:
        train: Features that components are fitted to, ``[n, d]``.
        kernel: Its name.
        components: How many, at most n - 1.

    Raises:
        ValueError: If scikit-learn is not installed.
        FloatingPointError: If the kernel is not positive on these features, as ``sigmoid`` need not be.
    """
    make = optional.load("sklearn.decomposition", "scikit-learn", "eval", "kpca").KernelPCA
    solver = "dense" if len(train) <= DENSE else "arpack"
    count = min(components, len(train) - 1)
    try:
        fitted = make(count, kernel=kernel, eigen_solver=solver, random_state=SEED).fit(train.double().numpy())
    except ValueError as error:
        raise FloatingPointError(str(error)) from error
    return lambda features: torch.from_numpy(fitted.transform(features.double().numpy()))


def umap(train: Tensor, components: int) -> Transform:
    """Uniform manifold approximation and projection (arXiv 1802.03426), by umap-learn with its defaults and a seed.

    Raises:
        ValueError: If umap-learn is not installed.
    """
    make = optional.load("umap", "umap-learn", "umap", "umap").UMAP
    fitted = make(n_components=min(components, len(train) - 2), random_state=SEED, n_jobs=1).fit(train.numpy())
    return lambda features: torch.from_numpy(fitted.transform(features.numpy()))
