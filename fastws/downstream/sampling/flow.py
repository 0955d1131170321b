"""Flow matching in the space of principal components: learns which way points move from noise to networks.

The minimiser of the loss on the training points leads back to these points, so that a flow that is trained to its end
copies them; what it makes of new is its lack of fit. So by default it is stopped where the loss of held-out networks is
lowest. ``train_deepweightflow`` is the recipe of arXiv 2601.05052 as it was released, which is not.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastws.downstream.sampling.generators import Components, Drawn, integers, nobody, normals

STEPS = 4000  # of training, at most
BATCH = 256  # points of a step
INTEGRATION_STEPS = 25  # from noise to a sample
HELD_OUT_DRAWS = 20  # per held-out point, of the loss that stops the flow
LOOK_EVERY = 50  # steps of the flow between two looks at that loss
PATIENCE = 6  # such looks without a better loss


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


def flow_loss(
    velocity: Callable[..., Tensor], noise: Tensor, z: Tensor, t: Tensor, jitter: Tensor | float = 0.0
) -> Tensor:
    """``mean |v((1 - t) x0 + t z + jitter, t) - (z - x0)|^2``: flow matching on straight lines (arXiv 2210.02747)."""
    path = torch.lerp(noise, z, t[:, None]) + jitter
    return (velocity(path, t) - (z - noise)).square().mean()


class Flow(NamedTuple):
    """A trained flow, and how it was stopped."""

    space: Components
    velocity: nn.Module
    steps: int  # of training, until it was stopped
    kept: int  # steps of the weights that are kept
    loss: float  # that they were kept for
    source: float = 1.0  # std of the noise that samples begin from
    integration_steps: int = INTEGRATION_STEPS


def train_flow(
    space: Components,
    anchors: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    lr: float = 1e-3,
    decay: float = 0.998,
) -> Flow:
    """Flow matching in the space of principal components, stopped where the loss of held-out points is lowest.

    The minimiser of the loss on the training points leads back to these points, so that a flow trained to its end
    copies them; what it makes of new is its lack of fit. With fewer than two held-out points it runs to the end.
    """
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
    return Flow(space, velocity.eval(), step + 1, best_steps, lowest)


class ReleasedVelocity(nn.Module):
    """The velocity of DeepWeightFlow: a perceptron of the point beside an embedding of the time."""

    def __init__(self, size: int, hidden: int = 512, dropout: float = 0.1, waves: int = 64):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, waves), nn.GELU(), nn.Linear(waves, waves))
        widths, layers = (size + waves, hidden, hidden // 2, hidden), []
        for place, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.GELU()]
            layers += [nn.Dropout(dropout)] if place < 2 else []
        self.net = nn.Sequential(*layers, nn.Linear(hidden, size))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([z, self.time(t[:, None])], 1))


def train_deepweightflow(anchors: Tensor, generator: torch.Generator, *, steps: int = 30_000) -> Flow:
    """DeepWeightFlow as released (arXiv 2601.05052), for comparison: it copies its training networks.

    All principal components, of which as many networks have one less, not scaled; noise of standard deviation 0.01 from
    one table of 100 points; batches of 8; the weights of the lowest loss of a single batch are kept, and nothing is
    held out. What is called 100 steps of integration are 99.
    """
    space = Components.of(anchors, 0)
    space = space._replace(scale=torch.ones_like(space.scale))
    z = space.project(anchors)
    table, batch, source, jitter, lr, least_lr = 100, 8, 0.01, 0.001, 5e-4, 1e-6
    sources = source * normals((table, z.shape[1]), z, generator)
    with torch.random.fork_rng([anchors.device] if anchors.is_cuda else []):
        torch.manual_seed(int(integers((), 2**31, generator)))
        velocity = ReleasedVelocity(z.shape[1]).to(z)
        optimizer = torch.optim.AdamW(velocity.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, least_lr)
        kept, best, lowest = {}, 0, math.inf
        orders = [passes(points, batch, generator) for points in (sources, z)]
        for step in range(steps):
            first, last = (next(order) for order in orders)
            first, last = first[: len(last)], last[: len(first)]
            t = torch.rand(len(first), generator=generator, device=z.device).to(z)
            loss = flow_loss(velocity, first, last, t, jitter * normals(first.shape, z, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if loss.item() < lowest:  # the weights behind the step, as released
                kept = {name: tensor.clone() for name, tensor in velocity.state_dict().items()}
                best, lowest = step + 1, loss.item()
    velocity.load_state_dict(kept)
    return Flow(space, velocity.eval(), steps, best, lowest, source, 99)


def passes(points: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of one pass over points after the other, each in an order of its own."""
    while True:
        order = torch.randperm(len(points), generator=generator, device=generator.device)
        yield from points[order].split(batch)


@torch.no_grad()
def follow(trained: Flow, count: int, temperature: float, generator: torch.Generator) -> Drawn:
    """New points: follows the velocity from noise, by the Runge-Kutta method of fourth order."""
    space, step = trained.space, 1 / trained.integration_steps
    z = temperature * trained.source * normals((count, len(space.scale)), space.mean, generator)
    for number in range(trained.integration_steps):
        t = torch.full((count,), number * step, device=z.device, dtype=z.dtype)
        k1 = trained.velocity(z, t)
        k2 = trained.velocity(z + step / 2 * k1, t + step / 2)
        k3 = trained.velocity(z + step / 2 * k2, t + step / 2)
        k4 = trained.velocity(z + step * k3, t + step)
        z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return Drawn(space.restore(z), nobody(count))
