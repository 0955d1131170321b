"""Ways to draw new points from a cloud of points: codes of networks, or their weights themselves.

Every function takes anchors ``[n, d]`` and gives ``count`` new points ``[count, d]`` of the same dtype on the same
device, from a generator of random numbers that it is given. Where a point was made of certain anchors, it says which.
"""

import math
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from fastws.downstream import optional

REFERENCE_SEED = 42  # of the released sampler of KDE
BANDWIDTH = 0.002  # of the published KDE of codes that a tanh bounds
TOKEN_BANDWIDTH = 0.2  # of the published KDE of SANE's tokens
MANIFOLD = 3  # dimensions of the plane in which neighbours are looked for
Manifold = Literal["pca", "umap"]


class Drawn(NamedTuple):
    """New points, and which anchors each was made of (-1: none in particular)."""

    points: Tensor  # [count, d]
    anchors: Tensor  # [count, k] int64


def nobody(count: int) -> Tensor:
    return torch.full((count, 1), -1)


def integers(count: tuple[int, ...], bound: int, generator: torch.Generator) -> Tensor:
    return torch.randint(bound, count, generator=generator, device=generator.device)


def normals(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def direct(anchors: Tensor, count: int) -> Drawn:
    """The anchors themselves, from the first on, again and again if they are too few."""
    chosen = torch.arange(count) % len(anchors)
    return Drawn(anchors[chosen.to(anchors.device)], chosen[:, None])


def uniform(anchors: Tensor, count: int, generator: torch.Generator) -> Drawn:
    """Uniform in [-1, 1] in every dimension: the cube that a bounded code lives in (S_U of arXiv 2209.14733)."""
    shape = (count, anchors.shape[1])
    points = torch.rand(shape, generator=generator, device=anchors.device, dtype=anchors.dtype)
    return Drawn(2 * points - 1, nobody(count))


def prior(anchors: Tensor, count: int, std: float, generator: torch.Generator) -> Drawn:
    """Normal around zero, whatever the anchors are: GAUSS of arXiv 2406.09997."""
    return Drawn(std * normals((count, anchors.shape[1]), anchors, generator), nobody(count))


def kde(anchors: Tensor, count: int, bandwidth: float | Tensor, generator: torch.Generator, *, width: int = 1) -> Drawn:
    """Every part j from an anchor of its own, plus noise: ``z[s, j] = anchors[i[s, j], j] + bandwidth * normal``.

    That is sampling a Gaussian kernel density of each part: of each dimension, as arXiv 2209.14733 describes it, of
    each token (arXiv 2406.09997, equation 7), or of whole points.

    Args:
        anchors: ``[n, d]``.
        count: Points to draw.
        bandwidth: Standard deviation of the noise, or that of each dimension, ``[d]``.
        generator: Of the random numbers.
        width: Consecutive entries that make a part; d is a multiple of it.
    """
    size = anchors.shape[1]
    parts = size // width
    # 32 bits where they suffice: their draws take a tenth of the time, and one selection of a flat vector a third
    dtype = torch.int32 if anchors.numel() < 2**31 else torch.int64
    options = {"generator": generator, "device": generator.device, "dtype": dtype}
    chosen = torch.randint(len(anchors), (count, parts), **options)
    anchor = chosen[:, :1].long().cpu() if parts == 1 else nobody(count)
    chosen.mul_(parts).add_(torch.arange(parts, dtype=dtype, device=chosen.device))
    table = anchors.flatten() if width == 1 else anchors.reshape(-1, width)
    points = table.index_select(0, chosen.flatten()).view(count, size)
    noise = normals((count, size), anchors, generator)
    return Drawn(points.addcmul_(noise, torch.as_tensor(bandwidth, dtype=noise.dtype, device=noise.device)), anchor)


def kde_reference(anchors: Tensor, count: int, bandwidth: float, *, width: int = 1) -> Drawn:
    """What the released code draws: one anchor, and the same noise for all parts of a sample.

    It samples the density of each part with the same seed, so that a "sample" is an anchor that is shifted: by one
    number where parts are dimensions, by one vector where they are tokens. Bit for bit what
    ``sklearn.neighbors.KernelDensity.sample(random_state=42)`` gives, part by part; ``width`` is that of ``kde``.
    """
    random = numpy.random.RandomState(REFERENCE_SEED)
    chosen = torch.from_numpy((random.uniform(0, 1, size=count) * len(anchors)).astype(numpy.int64))
    noise = torch.from_numpy(random.normal(numpy.zeros((count, 1, width)), bandwidth)).to(anchors.device)
    points = anchors[chosen.to(anchors.device)].double().view(count, -1, width) + noise
    return Drawn(points.flatten(1).to(anchors.dtype), chosen[:, None])


def noisy(anchors: Tensor, count: int, scale: Tensor, generator: torch.Generator) -> Drawn:
    """An anchor each, plus normal noise of standard deviation ``scale`` ``[d]``."""
    chosen = integers((count,), len(anchors), generator)
    points = anchors[chosen] + scale * normals((count, anchors.shape[1]), anchors, generator)
    return Drawn(points, chosen.cpu()[:, None])


def average(anchors: Tensor, count: int, together: int, generator: torch.Generator) -> Drawn:
    """The mean of ``together`` different anchors each; of all of them where these are not more."""
    together = min(together, len(anchors))
    order = torch.rand(count, len(anchors), generator=generator, device=anchors.device).argsort(1)[:, :together]
    return Drawn(torch.stack([anchors[chosen].mean(0) for chosen in order]), order.cpu())


def neighbour(anchors: Tensor, count: int, generator: torch.Generator, manifold: Manifold = "pca") -> Drawn:
    """Uniform in a cube around all anchors in three dimensions that they were brought to, and back from there.

    S_Neigh of arXiv 2209.14733: one range for all three axes. ``"umap"`` is as released (arXiv 1802.03426, 15
    neighbours, least distance 0.01), by umap-learn; ``"pca"`` are principal components in its place.

    Raises:
        ValueError: If umap-learn is not installed.
    """
    if manifold == "umap":
        make = optional.load("umap", "umap-learn", "umap", "manifold umap", "sample").UMAP
        options = {"n_neighbors": min(15, len(anchors) - 1), "min_dist": 0.01, "random_state": REFERENCE_SEED}
        fitted = make(n_components=MANIFOLD, n_jobs=1, **options).fit(anchors.cpu().numpy())
        z = torch.from_numpy(fitted.embedding_).to(anchors)
        points = torch.from_numpy(fitted.inverse_transform(in_cube(z, count, generator).cpu().numpy()))
        return Drawn(points.to(anchors), nobody(count))
    space = Components.of(anchors, MANIFOLD)
    return Drawn(space.restore(in_cube(space.project(anchors), count, generator)), nobody(count))


def in_cube(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Uniform between the least and the largest of all numbers in ``z`` ``[n, k]``: ``[count, k]``."""
    low, high = z.min(), z.max()
    return low + (high - low) * torch.rand((count, z.shape[1]), generator=generator, device=z.device, dtype=z.dtype)


class Components(NamedTuple):
    """The leading principal components of points; coordinates have standard deviation 1."""

    mean: Tensor  # [d]
    axes: Tensor  # [k, d], orthonormal
    scale: Tensor  # [k]

    @classmethod
    def of(cls, points: Tensor, count: int) -> "Components":
        """At most ``count`` components, and no more than points can have; 0 takes all."""
        mean = points.double().mean(0)
        _, singular, axes = torch.linalg.svd(points.double() - mean, full_matrices=False)
        scale = singular / math.sqrt(max(1, len(points) - 1))
        # directions without any spread are rounding
        found = int((scale > scale.max() * 1e-6).sum())
        kept = min(found, count) if count else found
        return cls(*(x.to(points.dtype) for x in (mean, axes[:kept], scale[:kept])))

    def leading(self, count: int) -> "Components":
        """The first ``count`` of them; 0 takes all."""
        return self._replace(axes=self.axes[: count or None], scale=self.scale[: count or None])

    def project(self, points: Tensor) -> Tensor:
        return (points - self.mean) @ self.axes.T / self.scale

    def restore(self, z: Tensor) -> Tensor:
        return self.mean + (z * self.scale) @ self.axes


def gaussian(space: Components, count: int, temperature: float, generator: torch.Generator) -> Drawn:
    """A Gaussian in the space of the leading principal components: ``mean + axes * (temperature * std * normal)``."""
    z = temperature * normals((count, len(space.scale)), space.mean, generator)
    return Drawn(space.restore(z), nobody(count))


# --- a learned sampler


def gan(
    anchors: Tensor, count: int, generator: torch.Generator, *, components: int = 0, steps: int = 2000, batch: int = 128
) -> Drawn:
    """A generative adversarial network in the space of principal components.

    The published figures name a GAN whose code was not released; this one is ours: non-saturating loss, and the
    gradient of the judge at real points held down (R1, arXiv 1801.04406), which keeps so small a game stable.
    """
    space = Components.of(anchors, components)
    z = space.project(anchors)
    size, width, noise = z.shape[1], 256, 64
    with torch.random.fork_rng([anchors.device] if anchors.is_cuda else []):
        torch.manual_seed(int(integers((), 2**31, generator)))
        maker, judge = (
            nn.Sequential(
                nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
                nn.Linear(width, outputs),
            ).to(z)
            for inputs, outputs in ((noise, size), (size, 1))
        )  # fmt: skip
    optimizers = [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.99)) for part in (maker, judge)]
    softplus = nn.functional.softplus
    for _ in range(steps):
        real = z[integers((batch,), len(z), generator)].requires_grad_()
        made = maker(normals((batch, noise), z, generator))
        score = judge(real)
        (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        loss = softplus(-score).mean() + softplus(judge(made.detach())).mean() + slope.square().sum(1).mean() / 2
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        loss = softplus(-judge(made)).mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    with torch.no_grad():
        return Drawn(space.restore(maker(normals((count, noise), z, generator))), nobody(count))
