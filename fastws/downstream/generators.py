"""Ways to draw new points from a cloud of points: codes of networks, or their weights themselves.

Every function takes anchors ``[n, d]`` and gives ``count`` new points ``[count, d]`` of the same dtype on the same
device, from a generator of random numbers that it is given. Where a point was made of certain anchors, it says which.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call

REFERENCE_SEED = 42  # of the released sampler of KDE
BANDWIDTH = 0.002  # of the published KDE, in units of codes that a tanh bounds
MANIFOLD = 3  # dimensions of the plane in which neighbours are looked for
HELD_OUT_DRAWS = 20  # per held-out point, of the loss that stops the flow
LOOK_EVERY = 50  # steps of the flow between two looks at that loss
PATIENCE = 6  # such looks without a better loss


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


def kde(anchors: Tensor, count: int, bandwidth: float, generator: torch.Generator) -> Drawn:
    """Every dimension from an anchor of its own, plus noise: ``z[s, j] = anchors[i[s, j], j] + bandwidth * normal``.

    That is sampling a Gaussian kernel density of each dimension, as arXiv 2209.14733 describes it.
    """
    chosen = integers((count, anchors.shape[1]), len(anchors), generator)
    noise = normals((count, anchors.shape[1]), anchors, generator)
    return Drawn(anchors.gather(0, chosen) + bandwidth * noise, nobody(count))


def kde_reference(anchors: Tensor, count: int, bandwidth: float) -> Drawn:
    """What the released code draws: one anchor and one number of noise for all dimensions of a sample.

    It samples each dimension's density with the same seed, so that a "sample" is an anchor that is shifted along the
    diagonal. Bit for bit what ``sklearn.neighbors.KernelDensity.sample(random_state=42)`` gives, dimension by
    dimension.
    """
    random = numpy.random.RandomState(REFERENCE_SEED)
    chosen = torch.from_numpy((random.uniform(0, 1, size=count) * len(anchors)).astype(numpy.int64))
    noise = torch.from_numpy(random.normal(numpy.zeros((count, 1)), 1.0))
    points = anchors[chosen.to(anchors.device)].double() + bandwidth * noise.to(anchors.device)
    return Drawn(points.to(anchors.dtype), chosen[:, None])


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


def neighbour(anchors: Tensor, count: int, generator: torch.Generator) -> Drawn:
    """Uniform in a cube around all anchors in the plane of their three widest directions, and back from there.

    As S_Neigh of arXiv 2209.14733, with principal components in place of UMAP: one range for all three axes.
    """
    space = Components.of(anchors, MANIFOLD)
    z = space.project(anchors)
    low, high = z.min(), z.max()
    drawn = torch.rand((count, z.shape[1]), generator=generator, device=z.device, dtype=z.dtype)
    return Drawn(space.restore(low + (high - low) * drawn), nobody(count))


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

    def project(self, points: Tensor) -> Tensor:
        return (points - self.mean) @ self.axes.T / self.scale

    def restore(self, z: Tensor) -> Tensor:
        return self.mean + (z * self.scale) @ self.axes


def gaussian(anchors: Tensor, count: int, components: int, temperature: float, generator: torch.Generator) -> Drawn:
    """A Gaussian in the space of the leading principal components: ``mean + axes * (temperature * std * normal)``."""
    space = Components.of(anchors, components)
    z = temperature * normals((count, len(space.scale)), anchors, generator)
    return Drawn(space.restore(z), nobody(count))


# --- learned samplers


class Velocity(nn.Module):
    """The velocity of a flow at points z and times t: a perceptron with three residual blocks."""

    def __init__(self, size: int, width: int = 256, hidden: int = 512, waves: int = 32):
        super().__init__()
        self.register_buffer("waves", torch.pi * torch.arange(1, waves // 2 + 1))
        self.first = nn.Linear(size + waves, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(3)
        )
        self.last = nn.Linear(width, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        waves = t[:, None] * self.waves
        x = self.first(torch.cat([z, waves.sin(), waves.cos()], 1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def flow_loss(velocity: Callable[..., Tensor], noise: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """``mean |v((1 - t) x0 + t z, t) - (z - x0)|^2``: flow matching along straight lines (arXiv 2210.02747)."""
    path = torch.lerp(noise, z, t[:, None])
    return (velocity(path, t) - (z - noise)).square().mean()


class Flow(NamedTuple):
    """A trained flow, and how it was stopped."""

    space: Components
    velocity: nn.Module
    steps: int  # of the weights that are kept
    loss: float  # on the held-out points; nan without


def train_flow(
    anchors: Tensor,
    held_out: Tensor,
    components: int,
    generator: torch.Generator,
    *,
    steps: int = 4000,
    batch: int = 256,
    lr: float = 1e-3,
    decay: float = 0.998,
) -> Flow:
    """Flow matching in the space of principal components, stopped where the loss of held-out points is lowest.

    The minimiser of the loss on the training points leads back to these points, so that a flow trained to its end
    copies them; what it makes of new is its lack of fit. With fewer than two held-out points it runs to the end.
    """
    space = Components.of(anchors, components)
    z, judge = space.project(anchors), space.project(held_out) if len(held_out) else anchors[:0]
    with torch.random.fork_rng([anchors.device] if anchors.is_cuda else []):
        torch.manual_seed(int(integers((), 2**31, generator)))
        velocity = Velocity(z.shape[1]).to(z)
    kept = {name: tensor.clone() for name, tensor in velocity.state_dict().items()}  # a running average
    best, best_steps, lowest, in_vain = kept, 0, math.inf, 0
    targets = judge.repeat(HELD_OUT_DRAWS, 1)
    times = torch.rand(len(targets), generator=generator, device=z.device).to(z)
    judged = normals(targets.shape, z, generator), targets, times  # always the same
    optimizer = torch.optim.AdamW(velocity.parameters(), lr=lr, weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200) * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = z[integers((batch,), len(z), generator)]
        t = torch.rand(batch, generator=generator, device=z.device).to(z)
        loss = flow_loss(velocity, normals(chosen.shape, z, generator), chosen, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, tensor in velocity.state_dict().items():
            kept[name].lerp_(tensor, 1 - min(decay, step / (step + 10)))
        if len(judge) > 1 and (step + 1) % LOOK_EVERY == 0:
            now = {name: tensor.clone() for name, tensor in kept.items()}
            with torch.no_grad():
                value = flow_loss(lambda z, t, now=now: functional_call(velocity, now, (z, t)), *judged).item()
            if value < lowest:
                best, best_steps, lowest, in_vain = now, step + 1, value, 0
            else:
                in_vain += 1
            if in_vain >= PATIENCE:
                break
    if len(judge) < 2:
        best, best_steps, lowest = kept, steps, math.nan
    velocity.load_state_dict(best)
    return Flow(space, velocity.eval(), best_steps, lowest)


@torch.no_grad()
def flow(trained: Flow, count: int, temperature: float, generator: torch.Generator, steps: int = 25) -> Drawn:
    """Follows the velocity from noise, by the Runge-Kutta method of fourth order."""
    like = trained.space.mean
    z, step = temperature * normals((count, len(trained.space.scale)), like, generator), 1 / steps
    for number in range(steps):
        t = torch.full((count,), number * step, device=z.device, dtype=z.dtype)
        k1 = trained.velocity(z, t)
        k2 = trained.velocity(z + step / 2 * k1, t + step / 2)
        k3 = trained.velocity(z + step / 2 * k2, t + step / 2)
        k4 = trained.velocity(z + step * k3, t + step)
        z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return Drawn(trained.space.restore(z), nobody(count))


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
