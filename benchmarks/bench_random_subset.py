"""fastws.random_subset and complement: a batch of the 1,220,608 kernels of a ResNet-18, all of them, and the rest.

Predicted for one core. A batch of 4,096: two words of Philox a number, 1 ns, and a bit in 153 KB, which must be cleared
first, 10 us: 30 us with the call; ``torch.randperm`` shuffles all 1,220,608 and reads 9.8 MB in random order, 10 to 20
ms. Of all numbers random_subset draws 1.4 times as many, 2 ns each with their bits, and writes down twice what is left,
some 3 passes over 20 MB: 15 ms, no better than randperm; only who needs the same numbers on every device needs it. The
complement of 4,096 reads the bits and writes 9.7 MB: 0.3 ms at 30 GB/s of the third cache, 0.6 with new pages.

Run: fastws bench random_subset
"""

from collections.abc import Iterator

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.ops.random_subset import complement_reference, random_subset_reference
from fastws.testing import assert_equal

KERNELS, BATCH = 1_220_608, 4096


def make_subset(count=BATCH):
    return torch.empty(0, dtype=torch.int64, device=DEVICE), KERNELS, count, 1, 2


def make_indices():
    return torch.ops.fastws.random_subset(*make_subset()), KERNELS


def randperm(place, population, count, seed, offset):
    return torch.randperm(population, device=place.device)[:count]


def check(actual, reference, place, population, count, seed, offset):
    assert len(actual) == len(actual.unique()) == count and actual.min() >= 0 and actual.max() < population


def published(indices, population):
    rest = set(range(population)) - set(indices.tolist())
    return torch.Tensor(list(rest)).to(indices.device).long()


def cases(options: Options) -> Iterator[Case]:
    for name, size in {"4,096 of resnet18": BATCH, "all of resnet18": KERNELS}.items():
        yield operator_case(
            "random_subset",
            name,
            random_subset_reference,
            check,
            lambda size=size: make_subset(size),
            lambda place, population, count, *args: 8 * count,
            {"torch.randperm": randperm},
            compiled=False,
        )
    yield operator_case(
        "complement",
        "of 4,096 of resnet18",
        complement_reference,
        assert_equal,
        make_indices,
        lambda indices, population: 8 * population,
        {"published": published},
        compiled=False,
    )
