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

Run: python benchmarks/bench_kernel_order.py [--threads 2]
"""

import ctypes
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from harness import DEVICE, OPTIONS, record

import fastws
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
SIZES = [256, 4096, 16_384] + ([] if OPTIONS.quick else [131_072])
PUBLISHED = 4096  # rows; the published search takes minutes for more
RESNET18 = [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4  # channels of its 3 x 3 convolutions
ROUNDS = 3


def brute_force():
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "walk.cpp"), Path(folder, "walk.so")
        source.write_text(BRUTE_FORCE)
        subprocess.run(["c++", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
        function = ctypes.CDLL(str(library)).walk

    def walk(rows):
        order = torch.empty(len(rows), dtype=torch.int64)
        function(ctypes.c_void_p(rows.data_ptr()), ctypes.c_int64(len(rows)), ctypes.c_void_p(order.data_ptr()))
        return order

    return walk


def published(rows):
    x, order, left = rows.numpy(), [0], list(range(1, len(rows)))
    while left:
        candidates = left.copy()
        order.append(candidates[int((x[candidates] @ x[order[-1]]).argmax())])
        left.pop(left.index(order[-1]))
    return torch.tensor(order)


def similarity(rows, order):
    return float((rows[order[1:]] * rows[order[:-1]]).sum(1).double().mean())


def seconds(function):
    begin = time.perf_counter()
    result = function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def race(n, walk):
    """All that can, taking turns; orders are compared by what they are for, for sums in float32 may tie otherwise."""
    rows = unit_rows(torch.randn(n, 9, generator=torch.Generator().manual_seed(0)))
    moved = rows.to(DEVICE)
    runs = {"kernel": lambda: torch.ops.fastws.kernel_order(moved[None], False)[0].cpu()}
    runs |= {"brute force": lambda: walk(rows)}
    if n <= PUBLISHED:
        runs |= {"published": lambda: published(rows)}
        runs |= {"reference": lambda: kernel_order_reference(moved[None], False)[0].cpu()}
        runs |= {"kernel, improve": lambda: torch.ops.fastws.kernel_order(rows[None], True)[0]}
    times, means = {name: [] for name in runs}, {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            second, order = seconds(run)
            times[name].append(second)
            means[name] = similarity(rows, order)
    for name, values in times.items():
        greedy = name == "kernel, improve" or abs(means[name] - means["kernel"]) < 1e-6
        if not greedy or means[name] < means["kernel"] - 1e-6:
            raise ValueError(f"{name}: mean similarity must be {means['kernel']:.6f}, got {means[name]:.6f}")
        us = statistics.median(values) * 1e6
        of = times["brute force"]
        record(
            op="kernel_order",
            implementation=name,
            case=f"{n} x 9",
            us=us,
            iqr=(max(values) - min(values)) * 1e6,
            of_brute_force=statistics.median(of) * 1e6 / us,
            mean_similarity=means[name],
        )


def race_resnet18():
    generator = torch.Generator().manual_seed(0)
    inputs = [64, *RESNET18[:-1]]
    weights = [torch.randn(o, i, 3, 3, generator=generator) for o, i in zip(RESNET18, inputs, strict=True)]
    times = [seconds(lambda: network_orders(weights, "crossfilter"))[0] for _ in range(ROUNDS)]
    us = statistics.median(times) * 1e6
    record(
        op="kernel_order",
        implementation="kernel",
        case="resnet18 crossfilter",
        us=us,
        iqr=(max(times) - min(times)) * 1e6,
    )


walk = brute_force()
fastws.kernel_order(torch.ones(2, 9))  # registers
for n in SIZES:
    race(n, walk)
if not OPTIONS.quick:
    race_resnet18()
