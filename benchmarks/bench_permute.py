"""fastws.permute of a ResNet-18, and random_permutations for 64 of them against a loop of torch.randperm.

Predicted: permute reads and writes 44.7 MB, at 20 GB/s 4.5 ms, and as much again to clear fresh memory. A draw is
184,320 indices: Philox takes 160 instructions for 32 words of 8 lanes, 0.4 ns a word; two loads, two stores and a
product an index 1 ns: 0.26 ms. torch.randperm takes 4 us a group, 768 of them 3 ms.

Run: python benchmarks/bench_permute.py
"""

import torch
from harness import race
from zoo import VIEWS, resnet18

from fastws.ops.permute import permute_reference, random_permutations_reference
from fastws.testing import assert_equal

layout, symmetry = resnet18()
starts = torch.tensor([0, *torch.tensor(symmetry.sizes).cumsum(0)])


def make_flat(device):
    flat = torch.randn(1, layout.num_weights, device=device)
    return flat, symmetry.tensor_table(layout).to(device), symmetry.random(1, seed=1).to(device)


def make_starts(device):
    return starts.to(device), int(starts[-1]), VIEWS, 1, 2


def randperm(starts, total, batch, seed, offset):
    sizes = starts.diff().tolist()
    return [[torch.randperm(size, device=starts.device) for size in sizes] for _ in range(batch)]


race("permute", "resnet18", permute_reference, assert_equal, make_flat, 8 * layout.num_weights, compiled=False)
race(
    "random_permutations",
    "64 x resnet18",
    random_permutations_reference,
    lambda actual, reference, *args: isinstance(actual, list) or assert_equal(actual, reference, *args),
    make_starts,
    4 * VIEWS * int(starts[-1]),
    {"torch.randperm": randperm},
    compiled=False,
)
