from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastws
from fastws import _native
from fastws.ops.random_subset import complement_reference, random_integers_reference, random_subset_reference
from fastws.random.integers import first_places, integers_reference
from fastws.random.philox import philox_reference
from fastws.testing import devices, implementations

STREAMS = [(0, 0), (2**40 + 3, 5), (2**63 - 1, 2**33)]
BOUNDS = [1, 2, 1000, 2**24 + 3, 2**31 + 7, 2**33 + 5, 2**62]
SIZES = [(1, 1), (2, 1), (2, 2), (7, 3), (7, 7), (200, 0), (300, 299), (5000, 11), (5000, 2501)]  # population, count

FEWER = 1 if "random_subset" in _native.COMPILED["cpu"] else 4  # draws, which take the reference a millisecond each


def place(device="cpu"):
    return torch.empty(0, dtype=torch.int64, device=device)


def chi_square(values, outcomes):
    """Pearson's statistic of equally likely outcomes."""
    counts = torch.zeros(outcomes, dtype=torch.float64).index_add_(0, values, torch.ones(len(values)).double())
    expected = len(values) / outcomes
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("seed, offset", STREAMS)
def test_draws_are_the_long_multiplication(bound, seed, offset):
    words = philox_reference(seed, offset, 64, "cpu").tolist()
    numbers = [low + 2**32 * high for low, high in zip(words[::2], words[1::2], strict=True)]
    integers, fractions = integers_reference(seed, offset, 0, 32, bound, "cpu")
    assert integers.tolist() == [x * bound >> 64 for x in numbers]
    assert fractions.tolist() == [(x * bound & (2**64 - 1)) >> 2 for x in numbers]


def test_draws_may_begin_anywhere():
    integers, fractions = integers_reference(3, 4, 0, 50, 10**6, "cpu")
    for first in (1, 2, 31):
        later = integers_reference(3, 4, first, 50 - first, 10**6, "cpu")
        assert torch.equal(later[0], integers[first:]) and torch.equal(later[1], fractions[first:])
    far = 2**41 + 1
    assert torch.equal(
        integers_reference(3, 4, far, 9, 10, "cpu")[0], integers_reference(3, 4, far - 1, 10, 10, "cpu")[0][1:]
    )


def test_first_places_by_hand():
    assert first_places(torch.tensor([5, 3, 5, 5, 1, 3])).tolist() == [0, 1, 4]
    assert first_places(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("name, function, device", implementations("random_integers"))
@pytest.mark.parametrize("bound", BOUNDS)
def test_random_integers_are_the_reference(name, function, device, bound):
    for (seed, offset), first in zip(STREAMS, (0, 7, 2**40), strict=True):
        args = place(device), bound, first, 300, seed, offset
        assert torch.equal(function(*args), random_integers_reference(*args))
    assert len(function(place(device), bound, 0, 0, 1, 2)) == 0


@pytest.mark.parametrize("name, function, device", implementations("random_subset"))
@pytest.mark.parametrize("population, count", [*SIZES, (2**24 + 9, 700), (2**40, 300)])
def test_random_subset_is_the_reference(name, function, device, population, count):
    for seed, offset in STREAMS:
        args = place(device), population, count, seed, offset
        subset = function(*args)
        assert torch.equal(subset, random_subset_reference(*args))
        assert len(subset.unique()) == count and not ((subset < 0) | (subset >= population)).any()


def test_random_subset_of_all_is_the_beginning_of_every_subset():
    permutation = fastws.random_subset(1000, 1000, seed=1)
    assert torch.equal(permutation.sort().values, torch.arange(1000))
    for count in (1, 499, 500):  # a later round has other numbers to draw from, but draws the same
        assert torch.equal(fastws.random_subset(1000, count, seed=1), permutation[:count])
    assert torch.equal(fastws.random_subset(1000, 700, seed=1), permutation[:700])


@pytest.mark.parametrize("population, count", [(5, 2), (4, 4), (6, 3)])
def test_random_subset_is_uniform_over_ordered_subsets(population, count):
    every = {x: i for i, x in enumerate(permutations(range(population), count))}
    draws = 6000 // FEWER
    drawn = [tuple(fastws.random_subset(population, count, seed=11, offset=i).tolist()) for i in range(draws)]
    statistic = chi_square(torch.tensor([every[x] for x in drawn]), len(every))
    freedom = len(every) - 1  # 4.5 standard deviations above the mean of chi square
    assert abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_random_subset_takes_every_number_equally_often():
    for population, count in [(40, 8), (40, 33)]:
        drawn = torch.cat([fastws.random_subset(population, count, seed=2, offset=i) for i in range(3000 // FEWER)])
        # without replacement, counts vary less than those of independent draws, by this factor
        statistic = chi_square(drawn, population) / ((population - count) / (population - 1))
        assert abs(statistic - (population - 1)) < 4.5 * (2 * (population - 1)) ** 0.5


def test_random_subset_differs_between_seeds_and_offsets():
    first = fastws.random_subset(10**6, 50, seed=1)
    assert torch.equal(first, fastws.random_subset(10**6, 50, seed=1, offset=0))
    assert not torch.equal(first, fastws.random_subset(10**6, 50, seed=2))
    assert not torch.equal(first, fastws.random_subset(10**6, 50, seed=1, offset=1))


@pytest.mark.parametrize("name, function, device", implementations("complement"))
@settings(max_examples=40, deadline=None)
@given(
    population=st.sampled_from([1, 63, 64, 65, 1000, 70_000, 200_000]),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.99]),
    seed=st.integers(0, 99),
)
def test_complement_is_the_set_difference(name, function, device, population, share, seed):
    indices = fastws.random_subset(population, int(share * population), seed).repeat(2).to(device)
    left = function(indices, population)
    assert torch.equal(left, complement_reference(indices, population))
    if population <= 1000:
        assert left.tolist() == sorted(set(range(population)) - set(indices.tolist()))


def test_complement_of_nothing_and_of_everything():
    none = torch.tensor([], dtype=torch.int64)
    assert fastws.complement(none, 70).tolist() == list(range(70)) and fastws.complement(none, 0).tolist() == []
    assert fastws.complement(torch.arange(70).flip(0), 70).tolist() == []
    assert fastws.complement(torch.arange(10)[::2], 10).tolist() == [1, 3, 5, 7, 9]  # not contiguous


def test_complement_does_not_depend_on_the_threads():
    threads, indices = torch.get_num_threads(), fastws.random_subset(3_000_000, 1_000_000, seed=1)
    left = []
    for count in (1, 3):
        torch.set_num_threads(count)
        left.append(fastws.complement(indices, 3_000_000))
    torch.set_num_threads(threads)
    assert torch.equal(*left)


@pytest.mark.parametrize("device", devices())
def test_random_subset_opcheck(device):
    torch.library.opcheck(torch.ops.fastws.random_integers.default, (place(device), 1000, 3, 20, 1, 2))
    torch.library.opcheck(torch.ops.fastws.random_subset.default, (place(device), 1000, 20, 1, 2))
    indices = torch.tensor([3, 0, 3], device=device)
    torch.library.opcheck(torch.ops.fastws.complement.default, (indices, 6))


def test_random_subset_compiles_once_for_all_offsets():
    def draw(x, offset):
        return x[fastws.random_subset(100, 10, 7, offset)]

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")  # needs no compiler
    x = torch.randn(100)
    for offset in range(2, 5):
        assert torch.equal(compiled(x, offset), draw(x, offset))
    with torch.compiler.set_stance("fail_on_recompile"):
        for offset in range(5, 9):
            assert torch.equal(compiled(x, offset), draw(x, offset))


def test_random_subset_names_the_wrong_argument():
    with pytest.raises(ValueError, match=r"random_subset: count must be in \[0, 5\], the population, got 6"):
        fastws.random_subset(5, 6, seed=0)
    with pytest.raises(ValueError, match=r"random_subset: population must be in \[0, 2\*\*62\], got -1"):
        fastws.random_subset(-1, 0, seed=0)
    with pytest.raises(ValueError, match="random_subset: seed and offset must be in"):
        fastws.random_subset(5, 3, seed=-1)
    with pytest.raises(ValueError, match="random_subset: seed and offset must be in"):
        fastws.random_subset(5, 3, seed=0, offset=2**63)
    with pytest.raises(ValueError, match=r"complement: indices must be in \[0, 5\), got -1 to 5"):
        fastws.complement(torch.tensor([-1, 5]), 5)
    with pytest.raises(
        ValueError, match=r"complement: indices must be \[n\] int64 and population at least 0, got \[2\] torch.int32"
    ):
        fastws.complement(torch.tensor([1, 2], dtype=torch.int32), 5)
