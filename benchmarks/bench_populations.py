"""Populations of networks: drawing them, measuring them and finding their nearest training networks.

Predicted, one thread. Drawing 1,000 points of 700 dimensions from 3,500 anchors, every dimension from an anchor of its
own, is 700,000 reads and normals, 15 ms; a kernel density for each dimension builds 700 trees and draws from each, 1.5
ms a dimension, 1 s: 70 to 100 times. As released it draws one anchor for all dimensions: one copy of rows. Accuracy: a
CNN-s takes 0.39 MFLOP an image, 6 us at 60 GFLOP/s; torch, whatever the batch, computes convolutions of 8, 6 and 4
channels at some 5 GFLOP/s: 12 times. Networks that cannot run side by side run one by one, because stacked ones become
grouped convolutions, which torch computes no faster. 1,000 networks against 2,000 are 2 million pairs of 40 us, 80 s,
40 on two cores.

Run: fastws bench populations
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import numpy
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from fastws.benchmarks.harness import HAS_BF16, Case, Options
from fastws.downstream.judging.memorisation import Judge
from fastws.downstream.populations import measure
from fastws.downstream.sampling import generators
from fastws.layout.layout import Layout
from fastws.nn.resnet import CIFARResNet
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.making.architectures import build, initialize
from fastws.zoo.making.measuring import condition_batch_norm, load_networks
from fastws.zoo.making.recipes import Part, Plan

if find_spec("sklearn"):
    from sklearn.neighbors import KernelDensity

BANDWIDTH = 0.002
NETWORKS = {"cnn-s": (32, 500), "res-cnn": (8, 200)}  # networks and images
BATCHES = (10, 50, 250, 500)  # images of a call of torch
NORMED = 50, 32  # networks with batch norm, and images
QUERIES, TRAINING = 10, 2000


# --- drawing


def make_anchors(small: bool) -> tuple[Tensor]:
    return (torch.randn((50, 7) if small else (3500, 700), generator=torch.Generator().manual_seed(0)),)


def draw_independent(anchors: Tensor) -> Tensor:
    return generators.kde(anchors, len(anchors) * 2 // 7, BANDWIDTH, torch.Generator().manual_seed(1)).points


def draw_reference(anchors: Tensor) -> Tensor:
    return generators.kde_reference(anchors, len(anchors) * 2 // 7, BANDWIDTH).points


def draw_by_densities(anchors: Tensor, seed: int | None) -> Tensor:
    """A density for each dimension; as released all of them draw with the same seed."""
    columns, random = [], numpy.random.RandomState(0)
    for column in anchors.double().numpy().T:
        density = KernelDensity(kernel="gaussian", bandwidth=BANDWIDTH).fit(column[:, None])
        columns.append(density.sample(len(anchors) * 2 // 7, random_state=random if seed is None else seed)[:, 0])
    return torch.from_numpy(numpy.stack(columns, 1)).to(anchors.dtype)


def check_law(actual: Tensor, truth: Callable, anchors: Tensor) -> None:
    """Other random numbers of the same law: every dimension has the spread of the anchors."""
    ratio = (actual.std(0) / anchors.std(0)).mean().item()
    if actual.shape != truth(anchors).shape or abs(ratio - 1) > 0.05:
        raise ValueError(f"populations: points must have the spread of the anchors, got {ratio:.3f} of it")


def check_equal(actual: Tensor, truth: Callable, anchors: Tensor) -> None:
    torch.testing.assert_close(actual, truth(anchors))


# --- measuring


def make_networks(name: str, small: bool) -> tuple[Tensor, Part, Plan]:
    networks, images = (2, 20) if small else NETWORKS[name]
    rng = torch.Generator().manual_seed(0)
    plan, network, rows = Plan(name, (1, 28, 28), 10, 1, 1), build(name, (1, 28, 28)), []
    layout = Layout.from_checkpoint(network)
    for seed in range(networks):
        initialize(network, "kaiming_uniform", seed)
        rows.append(layout.flatten(network.state_dict()))
    x, y = torch.randn(images, 1, 28, 28, generator=rng), torch.randint(10, (images,), generator=rng)
    return torch.stack(rows), Part(x, y), plan


def measured(weights: Tensor, part: Part, plan: Plan) -> Tensor:
    return measure(weights, plan, ["tanh"] * len(weights), part, progress=False).accuracy


@torch.no_grad()
def stacked(weights: Tensor, part: Part, plan: Plan, batch: int) -> Tensor:
    networks = load_networks(weights, plan, ["tanh"] * len(weights))
    state, right = stack_module_state(networks), torch.zeros(len(weights), dtype=torch.int64)
    logits_of = vmap(partial(functional_call, networks[0]), (0, None))  # the state is a pair of stacks
    for x, y in zip(part.x.split(batch), part.y.split(batch), strict=True):
        right += (logits_of(state, x).argmax(2) == y).sum(1)
    return right.double() / len(part.y)


@torch.no_grad()
def alone(weights: Tensor, part: Part, plan: Plan, batch: int) -> Tensor:
    right = []
    for network in load_networks(weights, plan, ["tanh"] * len(weights)):
        guesses = torch.cat([network(x).argmax(1) for x in part.x.split(batch)])
        right.append((guesses == part.y).double().mean())
    return torch.stack(right)


def check_accuracy(actual: Tensor, truth: Callable, *args) -> None:
    if (actual - truth(*args)).abs().mean() > 0.005:  # rounding decides between logits that are almost equal
        raise ValueError(f"populations: accuracies must be those of networks alone, got {actual}")


# --- batch norms


def make_normed(small: bool) -> tuple[list[CIFARResNet], Tensor]:
    torch.manual_seed(0)
    networks, images = (2, 8) if small else NORMED
    return [CIFARResNet(8, "b", width=8).eval() for _ in range(networks)], torch.randn(images, 3, 32, 32)


@torch.no_grad()
def condition_alone(networks: list[CIFARResNet], images: Tensor) -> Tensor:
    """Statistics, then logits, of a network after the other."""
    found = []
    for network in networks:
        condition_batch_norm(network, images)
        found.append(network(images))
    return torch.stack(found)


@torch.no_grad()
def condition_bf16(networks: list[CIFARResNet], images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        return condition_alone(networks, images).float()


@torch.no_grad()
def condition_stacked(networks: list[CIFARResNet], images: Tensor, *, together: int) -> Tensor:
    """Statistics of some networks at once by one pass, in training mode with momentum 1, then their logits."""
    template, found = networks[0], []
    for norm in (layer for layer in template.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    call = vmap(partial(functional_call, template), (0, None))
    for begin in range(0, len(networks), together):
        state = stack_module_state(networks[begin : begin + together])
        template.train()
        call(state, images)
        template.eval()
        found.append(call(state, images))
    return torch.cat(found)


def check_logits(actual: Tensor, truth: Callable, networks: list[CIFARResNet], images: Tensor) -> None:
    expected = truth(networks, images)
    if (actual - expected).norm() > 0.02 * expected.norm():  # as near as bf16 is
        raise ValueError("populations: logits must be those of networks alone")


# --- nearest


def make_judge(small: bool) -> tuple[Judge, Tensor]:
    network = build("cnn-s", (1, 28, 28))
    layout, symmetry = Layout.from_checkpoint(network), Symmetry.trace(network, torch.zeros(1, 1, 28, 28))
    count = 20 if small else TRAINING
    flat = torch.randn(count + 2 * QUERIES, layout.num_weights, generator=torch.Generator().manual_seed(0))
    judge = Judge(flat[:count], flat[count:-QUERIES], symmetry, layout, symmetry.flips)
    return judge, flat[-QUERIES:]


def nearest(judge: Judge, queries: Tensor) -> Tensor:
    return judge.nearest(queries)[0]


def screened(judge: Judge, queries: Tensor) -> Tensor:
    return judge.nearest(queries, 64)[0]


def check_nearest(actual: Tensor, truth: Callable, judge: Judge, queries: Tensor) -> None:
    exhaustive = truth(judge, queries)
    if (actual < exhaustive * (1 - 1e-6)).any() or actual.median() > 1.02 * exhaustive.median():
        raise ValueError("populations: distances must be those of an exhaustive search, or hardly longer")


def cases(options: Options) -> Iterator[Case]:
    common = {"op": "populations"}
    anchors = partial(make_anchors, options.small)
    if find_spec("sklearn"):
        runs = {"kernel": draw_independent, "scikit-learn": partial(draw_by_densities, seed=None)}
        yield Case(
            name="kde independent", make_args=anchors, runs=runs, truth=draw_independent, check=check_law, **common
        )
        runs = {"kernel": draw_reference, "published": partial(draw_by_densities, seed=42)}
        yield Case(
            name="kde reference", make_args=anchors, runs=runs, truth=draw_reference, check=check_equal, **common
        )
    for name, (networks, images) in NETWORKS.items():
        batches = [batch for batch in BATCHES if batch <= images]
        runs = {"kernel": measured}
        runs |= {f"torch.func, {batch} images": partial(stacked, batch=batch) for batch in batches}
        runs |= {f"one by one, {batch} images": partial(alone, batch=batch) for batch in batches[-2:]}
        yield Case(
            name=f"{name}, accuracy per network of {images} images",
            make_args=partial(make_networks, name, options.small),
            runs=runs,
            truth=partial(alone, batch=images),
            check=check_accuracy,
            units={"": 2 if options.small else networks},
            **common,
        )
    yield Case(
        name=f"resnet8 of width 8, batch norms conditioned on {NORMED[1]} images and accuracy, per network",
        make_args=partial(make_normed, options.small),
        runs={
            "kernel": condition_alone,
            **({"bf16": condition_bf16} if HAS_BF16 else {}),
            "torch.func, 10 networks": partial(condition_stacked, together=10),
            "torch.func, all": partial(condition_stacked, together=NORMED[0]),
        },
        truth=condition_alone,
        check=check_logits,
        units={"": 2 if options.small else NORMED[0]},
        **common,
    )
    yield Case(
        name=f"cnn-s, nearest of {TRAINING:,} training states, per network",
        make_args=partial(make_judge, options.small),
        runs={"kernel": nearest, "64 nearest as they lie": screened},
        truth=nearest,
        check=check_nearest,
        units={"": QUERIES},
        **common,
    )
