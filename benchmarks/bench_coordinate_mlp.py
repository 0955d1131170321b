"""fastws.coordinate_mlp against the published evaluation, its reference and the compiled reference.

The published evaluation takes the rows of a matrix of embeddings, [n, 240], in a random order, puts batches of 4,096 of
them through five linear layers, and writes the results to their places; with gradients, one batch.

Predicted, for one core of 32 FLOPs per cycle at 3.4 GHz, 109 GFLOP/s, in fp32. Forward, n rows of width h: the first
layer is a sum of table rows, so that 2n(3h^2 + 9h) FLOPs are left; activations stay in cache. ResNet-20 at h = 180:
5.9 GFLOP, at least 54 ms, at 90 % of peak 60 ms. ResNet-56 at h = 320: 58.4 GFLOP, at least 536 ms, at 90 % 595 ms.
The published form has 8.4 and 72.9 GFLOP and moves each activation and embedding through memory: at 75 % of peak
103 + 30 ms and 890 + 200 ms, so that 2.2 and 1.8 times its speed is what fp32 has to give here. Forward and backward of
4,096 rows at h = 180: activations are kept, three products, 2.4 GFLOP, 25 ms at 90 %, and 50 MB of them written and
read, 5 ms; the published form has 3.1 GFLOP, 38 ms at 75 %, and 10 ms of memory: 1.6 times. bf16 without instructions
for it is computed in fp32 and takes as long; AVX512-BF16 has twice the FLOPs of AVX-512. A core with two units of 64
bytes has 224 GFLOP/s in fp32 and 448 in bf16: 27 and 13 ms for ResNet-20 at the peak, 261 and 130 ms for ResNet-56. The
published form multiplies bf16 as fast there, so 8 times its speed is out of reach: about 3 times, what fp32 has too. Of
what its authors ran, fp32, bf16 is 8 times as fast at 80 % of the peak.

Predicted, for an H200: 132 multiprocessors at 1.75 GHz, 67 TFLOP/s in fp32, 990 in bf16, 5.5 TB/s from the second-level
cache; device memory, 1.3 MB, does not matter. Widths are padded to 192. The whole grid at h = 180 in fp32: 465 blocks
of 64 rows, at most 4 on a multiprocessor, 15 MFLOP each; 29 us at peak, 118 us for four, 160 us at 75 % (unpadded and
evenly dealt 88 us). Each block reads 0.47 MB of weights, in all 217 MB or 40 us, hidden behind the arithmetic. In bf16
the weights, 227 KB, are copied once to each multiprocessor, 30 MB or 6 us; 1,859 tiles of 16 rows for 1,056 warps are
two rounds; a product of 16 x 16 x 8 needs 256 bytes of weights from shared memory, which gives 128 per cycle, so 888 of
them in each of 8 warps take 14,200 cycles, 8 us; with both rounds, the first layer and two small kernels that pack the
weights 30 us, bound by shared memory (by matrix units 7 us). Forward and backward of 4,096 rows in fp32: 128 blocks of
32 rows, so one for each multiprocessor; 7 cycles of shared memory for 6 of arithmetic and little to hide latency with,
60 % of that: 35 us forward, 60 us for activations and their gradients, 40 us for 224 sums over rows, 10 us for small
kernels, 145 us. The published form has about 30 kernels, at 6 us at least 180 us. ResNet-56, h = 320, does not fit:
58.4 GFLOP, at least 0.9 ms in fp32; Triton without tf32 is expected at a third of that speed.

In bfloat16 the authors' own way, float32, is the row of float32.

Run: fastws bench coordinate_mlp [--full]
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastws.benchmarks.harness import DEVICE, HAS_BF16, Case, Options, kernels
from fastws.ops.coordinate_mlp import coordinate_mlp_reference, coordinates

BATCH = 4096
NETWORKS = {  # blocks per stage of a CIFAR ResNet, and the width of its NeRN
    "ResNet-20, h = 180": (3, 180),
    "ResNet-56, h = 320": (9, 320),
}


def grid_of(blocks: int) -> list[tuple[int, int]]:
    """Filters and channels of the 3 x 3 convolutions of a CIFAR ResNet."""
    stages = [(16, 16), (32, 16), (64, 32)]
    return [(16, 3)] + [
        (width, before if block + convolution == 0 else width)
        for width, before in stages
        for block in range(blocks)
        for convolution in range(2)
    ]


class Published(nn.Module):
    """Five linear layers on rows of embeddings."""

    def __init__(self, width: int):
        super().__init__()
        sizes = [240, width, width, width, width, 9]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def arguments(model: Published, axes: list[torch.Tensor], grid: torch.Tensor, rows: torch.Tensor) -> tuple:
    """Arguments of the op, in the dtype and for the parameters of ``model``."""
    first, *rest = model.layers
    tables = [axis @ weight.T for axis, weight in zip(axes, first.weight.split(80, dim=1), strict=True)]
    tables[0] = tables[0] + first.bias
    hidden = torch.stack([x.weight for x in rest[:-1]]), torch.stack([x.bias for x in rest[:-1]])
    return *tables, grid, rows, *hidden, rest[-1].weight, rest[-1].bias, 0, False


def prepare(blocks: int, width: int, dtype: torch.dtype):
    torch.manual_seed(0)
    model = Published(width).to(DEVICE, dtype)
    layers = grid_of(blocks)
    frequencies = torch.pi * 0.76 ** torch.arange(40)
    sizes = len(layers), max(f for f, _ in layers), max(c for _, c in layers)
    phases = [torch.arange(size)[:, None] * frequencies for size in sizes]
    axes = [torch.stack([phase.sin(), phase.cos()], dim=2).flatten(1).to(DEVICE, dtype) for phase in phases]
    places = coordinates(torch.tensor(layers), torch.arange(sum(f * c for f, c in layers)))
    embeddings = torch.cat([axis[place.to(DEVICE)] for axis, place in zip(axes, places, strict=True)], dim=1)
    return model, axes, torch.tensor(layers, device=DEVICE), embeddings


class Setting(NamedTuple):
    """A predictor, what its kernels are encoded by, the numbers of those that are asked for, and a gradient of them."""

    model: Published
    axes: list[Tensor]
    grid: Tensor
    embeddings: Tensor
    rows: Tensor
    grad: Tensor


def make_setting(network: str, dtype: torch.dtype, count: int | None = None) -> tuple[Setting]:
    """All kernels of a network, or ``count`` of them in random order."""
    model, axes, grid, embeddings = prepare(*NETWORKS[network], dtype)
    rows = torch.arange(len(embeddings), device=DEVICE)
    if count is not None:
        rows = torch.randperm(len(embeddings), device=DEVICE)[:count]
    return (Setting(model, axes, grid, embeddings, rows, torch.randn(len(rows), 9, device=DEVICE)),)


@torch.no_grad()
def evaluate(function: Callable, setting: Setting) -> Tensor:
    return function(*arguments(setting.model, setting.axes, setting.grid, setting.rows))[0]


@torch.no_grad()
def published_evaluation(setting: Setting) -> Tensor:
    count = len(setting.embeddings)
    order, y = torch.randperm(count, device=DEVICE), setting.embeddings.new_zeros(count, 9)
    rest = setting.embeddings[order]
    y[order] = torch.vstack([setting.model(rest[i : i + BATCH]) for i in range(0, count, BATCH)])
    return y


def differentiate(function: Callable, setting: Setting) -> tuple[Tensor, ...]:
    *args, _ = arguments(setting.model, setting.axes, setting.grid, setting.rows)
    outputs = function(*args, DEVICE == "cpu")[0]
    return torch.autograd.grad(outputs, list(setting.model.parameters()), setting.grad)


def published_gradients(setting: Setting) -> tuple[Tensor, ...]:
    outputs = setting.model(setting.embeddings[setting.rows])
    return torch.autograd.grad(outputs, list(setting.model.parameters()), setting.grad)


def plain(layer_table, filter_table, channel_table, grid, rows, hidden_weights, hidden_biases, weight, bias, *_):
    layer, f, c = coordinates(grid, rows)
    x = (layer_table[layer] + filter_table[f] + channel_table[c]).relu()
    for w, b in zip(hidden_weights, hidden_biases, strict=True):
        x = nn.functional.linear(x, w, b).relu()
    return nn.functional.linear(x, weight, bias), None


def check_values(actual, truth, setting):
    tolerance = 1e-5 if setting.embeddings.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), truth(setting).double(), rtol=0, atol=tolerance)


def check_gradients(actual, truth, setting):
    for ours, theirs in zip(actual, truth(setting), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def forward(network: str, dtype: torch.dtype) -> Case:
    width = NETWORKS[network][1]
    ways = kernels("coordinate_mlp") | {"reference": coordinate_mlp_reference}
    ways["compiled"] = torch.compile(coordinate_mlp_reference)
    runs = {name: partial(evaluate, way) for name, way in ways.items()} | {"published": published_evaluation}
    return Case(
        op="coordinate_mlp",
        name=f"{network}, {str(dtype)[6:]}",
        make_args=partial(make_setting, network, dtype),
        runs=runs,
        truth=published_evaluation,
        check=check_values,
        rate="gflop_per_s",
        work=lambda setting: len(setting.rows) * 2 * (3 * width**2 + 9 * width),
    )


def with_gradients(network: str) -> Case:
    width = NETWORKS[network][1]
    ways = kernels("coordinate_mlp") | {"plain autograd": plain, "compiled": torch.compile(plain)}
    runs = {name: partial(differentiate, way) for name, way in ways.items()} | {"published": published_gradients}
    return Case(
        op="coordinate_mlp",
        name=f"{network}, 4,096 rows, forward and backward",
        runs=runs,
        truth=published_gradients,
        make_args=partial(make_setting, network, torch.float32, BATCH),
        check=check_gradients,
        rate="gflop_per_s",
        work=lambda setting: len(setting.rows) * 6 * (3 * width**2 + 9 * width),
    )


def cases(options: Options) -> Iterator[Case]:
    for network in options.pick(NETWORKS):
        yield forward(network, torch.float32)
    yield with_gradients("ResNet-20, h = 180")
    # without instructions for bfloat16 the rivals take minutes
    networks = (
        list(NETWORKS) if options.full or HAS_BF16 else [] if options.quick or options.small else list(NETWORKS)[:1]
    )
    for network in networks:
        yield forward(network, torch.bfloat16)
