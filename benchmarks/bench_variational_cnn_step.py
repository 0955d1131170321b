"""fastws.variational_cnn_step: variational dropout of CNN-s on 28 x 28 images, minibatches of 10.

Counted per network and step: convolutions and dense layers, forward and both gradients, for the mean and once more for
the variance, without input gradients of the first layer. Predicted for one core with AVX2: 2.2 times the dense step for
the products; 50,580 normals, of which each takes a share of a Philox block (1.5 ns per word of two), logarithm, root,
sine and cosine (1 ns), and the root and quotient of the deviation (1 ns): 0.14 ms more, which no dense step has. The
published way is one process per network, whose step is some 150 small operations and their gradients: 10 ms.

Predicted for an H200 and 1,000 networks, never run: 2.2 times the 160,000 cycles of the dense step; each normal costs a
thread some 110 instructions, because only two of the eight of a Philox block are neighbours in a row, 43,000 cycles:
400,000 in all, 1.8 us on 132 multiprocessors at 1.7 GHz.

Run: fastws bench variational_cnn_step
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, linear

import fastws
from fastws import _native
from fastws.benchmarks.harness import DEVICE, Case, Options
from fastws.ops.variational_cnn_step import INITIAL_LOG_SIGMA, variational_cnn_step_reference
from fastws.small_cnn.table import CONVOLUTION, rows_of
from fastws.zoo.making.architectures import build, initialize

NETWORKS = 64 if DEVICE == "cpu" else 1000
STEPS, BATCH, ALONE = 5, 10, 4
SHAPES = {"cnn-s": (1, 28, 28), "cnn-l": (3, 32, 32)}
KL_WEIGHT = 0.004


class Published(nn.Module):
    """A layer as the published code has it: theta, log sigma^2, local reparametrisation."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.convolution = layer, isinstance(layer, nn.Conv2d)
        self.log_sigma = nn.ParameterList([torch.full_like(x, INITIAL_LOG_SIGMA) for x in layer.parameters()])

    def log_alpha(self, number):
        theta = list(self.layer.parameters())[number]
        bound = 8 if self.convolution else 10
        return (self.log_sigma[number] - 2 * (theta.abs() + 1e-15).log()).clamp(-bound, bound)

    def forward(self, x):
        weight, bias = self.layer.weight, self.layer.bias
        if self.convolution:
            spread = conv2d(x * x, self.log_alpha(0).exp() * weight * weight, self.log_alpha(1).exp() * bias * bias)
        else:
            spread = linear(x * x, self.log_alpha(0).exp() * weight * weight)
        mean = self.layer(x)
        return mean + (spread + 1e-15).sqrt() * torch.randn_like(mean)

    def divergence(self):
        total = 0
        for number in range(1 + self.convolution):
            a = self.log_alpha(number)
            total = total - (0.63576 * (1.8732 + 1.48695 * a).sigmoid() - 0.5 * (-a).exp().log1p() - 0.63576).sum()
        return total


def published(name, weights, first, second, images, labels, batches, *rest):
    """A few networks, one after the other, each by its own Adam."""
    for batch in batches[:ALONE].long():
        network = build(name, SHAPES[name])
        layers = [Published(x) if isinstance(x, nn.Conv2d | nn.Linear) else x for x in network.module_list]
        network = nn.Sequential(*layers).to(DEVICE)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for rows in batch:
            optimizer.zero_grad()
            loss = cross_entropy(network(images[rows]), labels[rows])
            divergence = sum(layer.divergence() for layer in layers if isinstance(layer, Published))
            (loss + KL_WEIGHT * divergence).backward()
            optimizer.step()


def make_args(name, count):
    torch.backends.cudnn.allow_tf32 = False  # all in fp32
    rng = torch.Generator().manual_seed(0)
    network = build(name, SHAPES[name])
    layers = fastws.layer_table(network, SHAPES[name])
    theta = []
    for _ in range(count):
        initialize(network, "kaiming_uniform", rng)
        theta.append(nn.utils.parameters_to_vector(network.parameters()).detach())
    theta = torch.stack(theta)
    weights = torch.stack([theta, torch.full_like(theta, INITIAL_LOG_SIGMA)], 1)
    images, labels = torch.randn(1000, *SHAPES[name], generator=rng), torch.randint(10, (1000,), generator=rng)
    batches = torch.randint(1000, (count, STEPS, BATCH), generator=rng, dtype=torch.int32)
    zeros = torch.zeros(count, dtype=torch.float64)
    recipe = zeros.int(), zeros, zeros.int() + 2, zeros + 1e-3, zeros, torch.arange(count)
    tensors = weights, torch.zeros_like(weights), torch.zeros_like(weights), images, labels, batches, layers, *recipe
    return *(x.to(DEVICE) for x in tensors), KL_WEIGHT, 0


def flops(layers):
    """Of a network and step."""
    total = 0
    for number, row in enumerate(rows_of(layers)):
        if row.kind == CONVOLUTION:
            outputs = torch.Size(row.out_shape).numel()
            products = outputs * torch.Size(row.weight_shape).numel() // row.out_channels
            total += (2 if number == 0 else 3) * 2 * products
    return 2 * BATCH * total


def dense_step(weights, first, second, *args):
    """One network in place of a mean and a variance."""
    plain = [x[:, 0].contiguous() for x in (weights, first, second)]
    return torch.ops.fastws.small_cnn_step(*plain, *args[:-2], 0)


def check(actual, truth, *args):
    if actual is None:  # the published way draws noise of its own
        return
    for place, (ours, wanted) in enumerate(zip(actual, truth(*args), strict=True)):
        if place < 3:  # where a gradient is nearly zero, Adam's steps go either way
            assert (ours - wanted).abs().mean() < 1e-6 * wanted.abs().mean().clamp(min=1)
        else:
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def cases(options: Options) -> Iterator[Case]:
    count = ALONE if options.small else NETWORKS
    for name in options.pick(SHAPES):
        runs = {"reference": variational_cnn_step_reference}
        if _native.server("variational_cnn_step", DEVICE) == "compiled":
            runs |= {"kernel": torch.ops.fastws.variational_cnn_step, "dense kernel": dense_step}
        runs["published"] = partial(published, name)
        yield Case(
            op="variational_cnn_step",
            name=f"{name} per network and step",
            make_args=partial(make_args, name, count),
            runs=runs,
            truth=variational_cnn_step_reference,
            check=check,
            units={"": STEPS * count, "published": STEPS * ALONE},
            work=lambda *args: STEPS * count * flops(args[6]),
            rate="gflop_per_s",
        )
