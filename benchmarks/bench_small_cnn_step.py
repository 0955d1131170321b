"""fastws.small_cnn_step against ordinary training one by one, torch.func.vmap and its reference, minibatches of 10.

Counted per network and step: the products of convolutions and dense layers, forward and for both gradients, without
input gradients of the first layer; outputs that no pooling block holds are not computed. CNN-s on 28 x 28 images: 9.3
MFLOP; CNN-l on 32 x 32: 61. Predicted for one core with AVX2 at 3.4 GHz, 109 GFLOP/s: the loops over registers reach
four fifths of that, activations, pooling, spreading of gradients, gathering of images and the optimizer take a sixth of
the time more: 70 GFLOP/s, 0.13 ms for CNN-s. Ordinary PyTorch: some 100 operations of 10 to 20 us, 1.9 ms.

Predicted for an H200 and 1,000 networks, never run: 9.3 GFLOP of CNN-s in one joint step are 0.14 ms at 67 TFLOP/s. The
bound is shared memory, of which a multiprocessor reads 32 numbers a cycle: forward, a thread reads 8 numbers, half of
them in bank conflicts of two, for 16 products; 7 numbers for 5 products of weight gradients and 6 for 4 of input
gradients, which only the winners of pooling need. That is some 160,000 cycles per network and step, while two blocks
hide each other's latency: 0.8 us at 1.7 GHz on 132 multiprocessors, 12 TFLOP/s, 160 times a core of a CPU.

Every row is one network and one step; the others train fewer networks where they would take too long.

Run: fastws bench small_cnn_step
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastws
from fastws import _native
from fastws.benchmarks.harness import DEVICE, Case, Options
from fastws.ops.small_cnn_step import small_cnn_step_reference
from fastws.small_cnn.table import CONVOLUTION, POOLING, rows_of
from fastws.zoo.making.architectures import build, initialize

NETWORKS = 64 if DEVICE == "cpu" else 1000
STEPS, BATCH, ALONE, LR = 10, 10, 4, 1e-3
SHAPES = {"cnn-s": (1, 28, 28), "cnn-l": (3, 32, 32), "mlp": (1, 28, 28)}


def make_networks(name, weights):
    networks = [build(name, SHAPES[name]).to(weights.device) for _ in weights]
    for network, flat in zip(networks, weights, strict=True):
        vector_to_parameters(flat.clone(), network.parameters())
    return networks


def one_by_one(name, weights, first, second, images, labels, batches, *rest):
    """Networks one after the other, as one process per core trains them; their weights."""
    networks = make_networks(name, weights[:ALONE])
    for network, batch in zip(networks, batches.long(), strict=False):
        optimizer = torch.optim.Adam(network.parameters(), LR)
        for rows in batch:
            optimizer.zero_grad()
            cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    return torch.stack([parameters_to_vector(network.parameters()).detach() for network in networks])


def by_vmap(name, weights, first, second, images, labels, batches, *rest):
    """Stacked weights; gradients by torch.func, one Adam for the stack, which treats every number on its own."""
    networks = make_networks(name, weights)
    template = networks[0]
    parameters, _ = stack_module_state(networks)
    optimizer = torch.optim.Adam(parameters.values(), LR)

    def loss(parameters, x, y):
        return cross_entropy(functional_call(template, parameters, x), y)

    gradients = vmap(grad(loss))
    for batch in batches.long().unbind(1):
        found = gradients({key: x.detach() for key, x in parameters.items()}, images[batch], labels[batch])
        for key, x in parameters.items():
            x.grad = found[key]
        optimizer.step()
    return torch.cat([parameters[key].detach().flatten(1) for key, _ in template.named_parameters()], 1)


def make_args(name, count):
    torch.backends.cudnn.allow_tf32 = False  # all in fp32
    rng = torch.Generator().manual_seed(0)
    network = build(name, SHAPES[name])
    weights = []
    for seed in range(count):
        initialize(network, "kaiming_uniform", seed)
        weights.append(parameters_to_vector(network.parameters()).detach())
    weights, layers = torch.stack(weights), fastws.layer_table(network, SHAPES[name])
    images, labels = torch.randn(1000, *SHAPES[name], generator=rng), torch.randint(10, (1000,), generator=rng)
    batches = torch.randint(1000, (count, STEPS, BATCH), generator=rng, dtype=torch.int32)
    zeros = torch.zeros(count, dtype=torch.float64)
    recipe = zeros.int(), zeros, zeros.int() + 2, zeros + LR, zeros, torch.arange(count)
    moments = torch.zeros_like(weights), torch.zeros_like(weights)
    return *(x.to(DEVICE) for x in (weights, *moments, images, labels, batches, layers, *recipe)), 0


def flop(layers: torch.Tensor) -> int:
    """Of a network and step."""
    rows, total = rows_of(layers), 0
    for number, row in enumerate(rows):
        if row.kind == CONVOLUTION:
            channels, height, width = row.out_shape
            if number + 1 < len(rows) and rows[number + 1].kind == POOLING:
                height, width = height // 2 * 2, width // 2 * 2
            products = height * width * torch.Size(row.weight_shape).numel()
            total += (2 if number == 0 else 3) * 2 * products
    return BATCH * total


def check(actual, truth, *args):
    weights, expected = (x if isinstance(x, torch.Tensor) else x[0] for x in (actual, truth(*args)))
    # rounding may decide which of two almost equal entries a pooling takes: rarely, one network goes elsewhere
    error = (weights - expected[: len(weights)]).abs().amax(1)
    assert error.median() < 1e-5 and error.max() < 0.02, error


def cases(options: Options) -> Iterator[Case]:
    count = ALONE if options.small else NETWORKS
    for name in options.pick(SHAPES):
        runs = {"reference": small_cnn_step_reference}
        runs |= {"torch.func": partial(by_vmap, name), "one by one": partial(one_by_one, name)}
        if _native.server("small_cnn_step", DEVICE) == "compiled":
            runs = {"kernel": torch.ops.fastws.small_cnn_step} | runs
        yield Case(
            op="small_cnn_step",
            name=f"{name} per network and step",
            make_args=partial(make_args, name, count),
            runs=runs,
            truth=small_cnn_step_reference,
            check=check,
            units={"": STEPS * count, "one by one": STEPS * ALONE},
            work=lambda *args: STEPS * count * flop(args[6]),
            rate="gflop_per_s",
        )
