"""fastws.weighted_sample, 4,096 of the 1,220,608 kernels of a ResNet-18, and AliasTable.

Predicted for one core: a draw is two words of Philox, 1 ns, and 8 bytes from a table of 9.8 MB, which is in the third
cache: 50 ns of latency, of which ten overlap: 25 us in all, and 3 us for the call. With cold caches each draw waits for
memory, 100 ns of which ten overlap, 41 us, and the call for its code, 60 us. ``torch.distributions.Categorical``
divides all weights by their sum, checks them, adds them up and searches: several passes over 4.9 MB and new memory for
each, 5 ms. The table itself: weights become integers in seven passes over 10 MB, 15 ms; each column is looked at four
times, by branches that cannot be foretold in half of the cases, 10 ns each: 40 ms.

What came out otherwise: with cold caches any operator takes 50 to 80 us, a new tensor alone 30 to 40. 4,096 draws from
a table of ten kilobytes add little to that, from this one 80 us: 160 in all. So the cold sample is 33 times as fast
as a Categorical, which hardly notices cold caches; 40 times would need a call that does not pass the dispatcher.

``step``: the sample and its complement, as a training step of NeRN needs them, against the published code, which makes
the complement as a difference of Python sets. The complement reads 4,096 indices and writes 9.7 MB: 0.3 ms.

Run: fastws bench weighted_sample
"""

from collections.abc import Iterator
from functools import cache

import torch

import fastws
from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.ops.weighted_sample import alias_table_reference, integer_weights, weighted_sample_reference
from fastws.testing import assert_equal

KERNELS, BATCH = 1_220_608, 4096


@cache
def make_weights():
    """Like the norms of kernels, of which the largest is about ten times the mean."""
    return (0.5 * torch.randn(KERNELS, generator=torch.Generator().manual_seed(0))).exp().to(DEVICE)


def make_integers():
    return (integer_weights(make_weights()),)


def make_sample():
    return fastws.AliasTable(make_weights()).columns, 0, BATCH, 1, 2


def follows_the_weights(sample, *args):
    """Other methods draw other numbers, but of the same mean weight."""
    weights = make_weights().double()
    expected = (weights.square().sum() / weights.sum()).item()
    assert len(sample) == BATCH and abs(weights[sample].mean().item() / expected - 1) < 0.05


def categorical(*args):
    return torch.distributions.Categorical(make_weights()).sample([BATCH])


def multinomial(*args):
    return torch.multinomial(make_weights(), BATCH, replacement=True)


def step(*args):
    sample = torch.ops.fastws.weighted_sample(*args)
    return sample, fastws.complement(sample, KERNELS)


def step_reference(*args):
    sample = weighted_sample_reference(*args)
    left = torch.ones(KERNELS, dtype=torch.bool, device=DEVICE)
    left[sample] = False
    return sample, left.nonzero()[:, 0]


def published_step(*args):
    sample = categorical()
    rest = set(range(KERNELS)) - set(sample.tolist())
    return sample, torch.Tensor(list(rest)).to(DEVICE).long()


def check_step(actual, truth, *args):
    sample, left = actual
    follows_the_weights(sample)
    assert len(left) + len(sample.unique()) == KERNELS and not torch.isin(sample, left).any()


def cases(options: Options) -> Iterator[Case]:
    yield operator_case(
        "alias_table",
        "resnet18",
        alias_table_reference,
        assert_equal,
        make_integers,
        lambda *args: 16 * KERNELS,
        compiled=False,
    )
    rivals = {"torch Categorical": categorical, "torch.multinomial": multinomial}
    yield operator_case(
        "weighted_sample",
        "4,096 of resnet18",
        weighted_sample_reference,
        follows_the_weights,
        make_sample,
        lambda *args: 16 * BATCH,
        rivals,
        compiled=False,
    )
    runs = {"kernel": step, "reference": step_reference, "published": published_step}
    yield Case(
        op="weighted_sample",
        name="and its complement",
        make_args=make_sample,
        runs=runs,
        truth=step_reference,
        check=check_step,
    )
