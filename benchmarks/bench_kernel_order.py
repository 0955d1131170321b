"""fastws.kernel_order against brute force in C++, the published search, and its own reference.

Predicted for one core, 131,072 random directions in 9 dimensions, the hard case. Brute force (structure of arrays,
swap-remove, this machine's widest vectors) multiplies n^2 / 2 * 9 = 7.7e10 times, 1.6 s at 16 per cycle and 3 GHz; but
it reads 36 bytes for each 9 of them, 309 GB in all, which at 25 GB/s from the third cache takes 12 s. The search over
boxes looks at about 4 % of the rows that are left, 2,400 in 40 leaves of 2.3 KB: 0.1 s of arithmetic, and 40 x 100 ns
of waiting for leaves; with 1 us for the boxes and 1 us for queues and branches 6 us a step, 0.8 s, and 0.2 s for making
leaves: 1 s, 12 times less than brute force. The 4,096 rows of a layer of ResNet-20 fit into the second cache, where
both are bound by arithmetic and the search looks at a tenth; nothing is to be won at 256 rows.

``improve``: 30 kicks per row, 75,000 at most, of about 30 us each, so 1 ms per row. A kick's reversals grow with the
length of the path, up to 25,000 rows.

Rows: ``brute force`` is compiled with ``c++ -O3 -march=native``; ``published`` restates the published search in numpy,
with its lists, for paths up to 4,096 rows; ``resnet18`` orders all layers of a ResNet-18, of random weights, side by
side on the given threads.

Run: fastws bench kernel_order [--threads 2]
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options
from fastws.nern.orders import network_orders
from fastws.ops.kernel_order import kernel_order_reference, unit_rows

BRUTE_FORCE = r"""
#include <cstdint>
#include <numeric>
#include <vector>

extern "C" void walk(const float* rows, int64_t n, int64_t* order) {
  constexpr int64_t d = 9, block = 1024, lanes = 16;
  const int64_t stride = n + 1024 + 16;  // not a power of two: columns would fall on the same lines of the cache
  std::vector<float> columns(stride * d);
  std::vector<int64_t> names(n);
  std::iota(names.begin(), names.end(), 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < d; ++k) columns[k * stride + i] = rows[i * d + k];
  int64_t left = n, place = 0;
  for (int64_t step = 0; step < n; ++step) {
    const int64_t current = order[step] = names[place];
    names[place] = names[--left];
    for (int64_t k = 0; k < d; ++k) columns[k * stride + place] = columns[k * stride + left];
    const float* q = rows + current * d;
    float best = -2;
    for (int64_t first = 0; first < left; first += block) {
      const int64_t count = left - first < block ? left - first : block;
      float found[block], most[lanes];
      for (int64_t i = 0; i < block; ++i) {
        float sum = q[0] * columns[first + i];
        for (int64_t k = 1; k < d; ++k) sum += q[k] * columns[k * stride + first + i];
        found[i] = sum;
      }
      for (int64_t i = count; i < block; ++i) found[i] = -2;
      for (int64_t lane = 0; lane < lanes; ++lane) most[lane] = -2;
      for (int64_t i = 0; i < block; i += lanes)
        for (int64_t lane = 0; lane < lanes; ++lane)
          most[lane] = found[i + lane] > most[lane] ? found[i + lane] : most[lane];
      float top = -2;
      for (int64_t lane = 0; lane < lanes; ++lane) top = most[lane] > top ? most[lane] : top;
      if (top < best || top == -2) continue;
      for (int64_t i = 0; i < count; ++i)
        if (found[i] > best || (found[i] == best && names[first + i] < names[place]))
          best = found[i], place = first + i;
    }
  }
}
"""
SIZES = 256, 4096, 16_384, 131_072
PUBLISHED = 4096  # rows; the published search takes minutes for more
RESNET18 = [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4  # channels of its 3 x 3 convolutions


@cache
def brute_force() -> Callable:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "walk.cpp"), Path(folder, "walk.so")
        source.write_text(BRUTE_FORCE)
        subprocess.run(["c++", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
        function = ctypes.CDLL(str(library)).walk

    def walk(rows):
        rows, order = rows.cpu(), torch.empty(len(rows), dtype=torch.int64)
        function(ctypes.c_void_p(rows.data_ptr()), ctypes.c_int64(len(rows)), ctypes.c_void_p(order.data_ptr()))
        return order

    return walk


def published(rows):
    x, order, left = rows.cpu().numpy(), [0], list(range(1, len(rows)))
    while left:
        candidates = left.copy()
        order.append(candidates[int((x[candidates] @ x[order[-1]]).argmax())])
        left.pop(left.index(order[-1]))
    return torch.tensor(order)


def similarity(rows, order):
    return float((rows[order[1:]] * rows[order[:-1]]).sum(1).double().mean())


def check(actual, truth, rows):
    """Orders are compared by what they are for, for sums in float32 may tie otherwise; an improved one is better."""
    rows, found, least = rows.cpu(), actual.cpu(), truth(rows).cpu()
    if similarity(rows, found) < similarity(rows, least) - 1e-6:
        raise ValueError(f"kernel_order: mean similarity must be {similarity(rows, least):.6f}, got less")


def make_rows(count: int) -> tuple[torch.Tensor]:
    return (unit_rows(torch.randn(count, 9, generator=torch.Generator().manual_seed(0))).to(DEVICE),)


def make_weights() -> tuple[list[torch.Tensor]]:
    generator, inputs = torch.Generator().manual_seed(0), [64, *RESNET18[:-1]]
    return ([torch.randn(o, i, 3, 3, generator=generator) for o, i in zip(RESNET18, inputs, strict=True)],)


def check_network(actual, truth, weights):
    for order, weight in zip(actual, weights, strict=True):
        assert torch.equal(order.flatten().sort().values, torch.arange(weight.shape[0] * weight.shape[1]))


def cases(options: Options) -> Iterator[Case]:
    for count in SIZES[:1] if options.small else SIZES[:-2] if options.quick else SIZES:
        runs = {"kernel": lambda rows: torch.ops.fastws.kernel_order(rows[None], False)[0]}
        runs |= {"brute force": lambda rows: brute_force()(rows)}
        if count <= PUBLISHED:
            runs |= {"published": published}
            runs |= {"reference": lambda rows: kernel_order_reference(rows[None], False)[0]}
            runs |= {"kernel, improve": lambda rows: torch.ops.fastws.kernel_order(rows[None], True)[0]}
        yield Case(
            op="kernel_order",
            name=f"{count} x 9",
            make_args=lambda count=count: make_rows(count),
            runs=runs,
            truth=runs["brute force"],
            check=check,
        )
    if not (options.quick or options.small):
        runs = {"kernel": lambda weights: network_orders(weights, "crossfilter")}
        yield Case(
            op="kernel_order",
            name="resnet18 crossfilter",
            make_args=make_weights,
            runs=runs,
            truth=runs["kernel"],
            check=check_network,
        )
