"""fastws.permute of a ResNet-18, and random_permutations for 64 of them against a loop of torch.randperm.

Predicted: permute reads and writes 44.7 MB, at 20 GB/s 4.5 ms, and as much again to clear fresh memory. A draw is
184,320 indices: Philox takes 160 instructions for 32 words of 8 lanes, 0.4 ns a word; two loads, two stores and a
product an index 1 ns: 0.26 ms. torch.randperm takes 4 us a group, 768 of them 3 ms. Signs of half of the units are an
XOR of what is moved anyway, in registers: 0.95 to 1 of the speed without.

Run: fastws bench permute
"""

from collections.abc import Iterator
from functools import partial

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.benchmarks.zoo import VIEWS, resnet18, with_signs, without_signs
from fastws.ops.permute import permute_reference, random_permutations_reference
from fastws.testing import assert_equal


def make_flat(signed: bool = False):
    layout, symmetry = resnet18()
    flat, permutations = torch.randn(1, layout.num_weights, device=DEVICE), symmetry.random(1, seed=1)
    permutations = with_signs(permutations) if signed else permutations
    return flat, symmetry.tensor_table(layout).to(DEVICE), permutations.to(DEVICE)


def unsigned(flat, table, permutations):
    return torch.ops.fastws.permute(flat, table, without_signs(permutations))


def make_starts(batch: int):
    starts = torch.tensor([0, *torch.tensor(resnet18()[1].sizes).cumsum(0)], device=DEVICE)
    return starts, int(starts[-1]), batch, 1, 2


def randperm(starts, total, batch, seed, offset):
    sizes = starts.diff().tolist()
    return [[torch.randperm(size, device=starts.device) for size in sizes] for _ in range(batch)]


def check_draws(actual, reference, *args):
    """Those of torch.randperm are others."""
    if not isinstance(actual, list):
        assert_equal(actual, reference, *args)


def cases(options: Options) -> Iterator[Case]:
    yield operator_case(
        "permute",
        "resnet18",
        permute_reference,
        assert_equal,
        make_flat,
        lambda flat, *args: 2 * flat.nbytes,
        compiled=False,
    )
    yield operator_case(
        "permute",
        "resnet18 signs",
        permute_reference,
        assert_equal,
        partial(make_flat, True),
        lambda flat, *args: 2 * flat.nbytes,
        {"without signs": unsigned},
        compiled=False,
    )
    yield operator_case(
        "random_permutations",
        "64 x resnet18",
        random_permutations_reference,
        check_draws,
        partial(make_starts, 2 if options.small else VIEWS),
        lambda starts, total, batch, *args: 4 * batch * total,
        {"torch.randperm": randperm},
        compiled=False,
    )
