import math
import mmap
import sys
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastws
from fastws import _native
from fastws.ops.weighted_sample import (
    SHARE_BITS,
    alias_table_reference,
    integer_weights,
    weighted_sample_reference,
)
from fastws.random.integers import integers_reference
from fastws.testing import devices, implementations

MAP_NORESERVE = 0x4000  # which Python 3.11 does not know by name
WHOLE = 2**SHARE_BITS
STREAMS = [(0, 0), (2**40 + 3, 5), (2**63 - 1, 2**33)]
WEIGHTS = {
    "one": torch.tensor([3.0]),
    "equal": torch.ones(6),
    "small": torch.tensor([0.5, 0.0, 3.0, 1e-3, 0.0, 1.0, 0.25]),
    "zeros": torch.tensor([0.0, 0.0, 5.0, 0.0]),
    "tiny": torch.tensor([1.0, 1e-300, 0.0, 1e-15], dtype=torch.float64),
    "huge": torch.tensor([1e308, 1e308, 0.0, 1e308, 3e307], dtype=torch.float64),
    "subnormal": torch.tensor([5e-324, 1e-323, 0.0], dtype=torch.float64),
    "half": torch.tensor([1.0, 2.0, 0.0, 6e4], dtype=torch.float16),
}
FEW = torch.tensor([5.0, 0.0, 1.0, 3.0, 0.5], dtype=torch.float64)


def shares_and_aliases(columns):
    """How much of each column goes to another number, of WHOLE, and to which."""
    last, alias = columns >> SHARE_BITS & WHOLE - 1, columns & WHOLE - 1
    return torch.where(alias == torch.arange(len(columns)), 0, last + 1), alias


def probabilities(table):
    """What the columns give to each number, added up exactly as the sum of shares."""
    share, alias = shares_and_aliases(table.columns)
    given = (WHOLE - share).double().index_add(0, alias, share.double())
    return given / WHOLE / len(share)


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum().item()


def lognormal(count, sigma, seed=0):
    return (sigma * torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).exp()


@pytest.mark.parametrize("name, function, device", implementations("alias_table"))
@pytest.mark.parametrize("count, sigma", [(1, 0), (2, 1), (1000, 1), (70_000, 0.3), (200_001, 3), (200_000, 8)])
@pytest.mark.parametrize("arrangement", ["random", "ascending", "descending"])
def test_alias_table_is_the_reference(name, function, device, count, sigma, arrangement):
    weights = lognormal(count, sigma).to(device)
    weights[1::7] = 0
    if arrangement != "random":
        weights = weights.sort(descending=arrangement == "descending").values
    integers = integer_weights(weights)
    assert torch.equal(function(integers), alias_table_reference(integers))


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(0, 2**40), min_size=1, max_size=40).filter(any))
def test_alias_table_holds_the_weights(weights):
    integers = torch.tensor(weights) * 40
    for function in (torch.ops.fastws.alias_table, alias_table_reference):
        share, alias = shares_and_aliases(function(integers))
        assert ((share >= 0) & (share <= WHOLE) & (alias >= 0) & (alias < len(weights))).all()
        whole, extra = divmod(40 * sum(weights), len(weights))
        given = [0] * len(weights)
        for i, (part, other) in enumerate(zip(share.tolist(), alias.tolist(), strict=True)):
            capacity = whole + (i < extra)
            given[i] += (WHOLE - part) * capacity
            given[other] += part * capacity
        off = [found / WHOLE - 40 * weight for weight, found in zip(weights, given, strict=True)]
        assert sum(map(abs, off)) <= 2 * 2.0**-SHARE_BITS * 40 * sum(weights)
        assert all((weight > 0) == (found > 0) for weight, found in zip(weights, given, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_alias_table_gives_each_weight_its_share(weights):
    table = fastws.AliasTable(weights)
    exact = weights.double() / weights.max().double()
    exact = exact / exact.sum()
    assert (probabilities(table) - exact).abs().sum() <= 2 * 2.0**-SHARE_BITS
    assert torch.equal(probabilities(table) > 0, integer_weights(weights) > 0)
    assert table.num_positive == weights.count_nonzero()


def test_alias_table_is_8_bytes_a_weight():
    assert fastws.AliasTable(torch.ones(1000)).columns.nbytes == 8000


@pytest.mark.parametrize("weights", [[2**61, 2**61, 1], [5, -1], [2**62, 2**62]])
def test_alias_table_takes_no_integers_that_it_cannot_hold(weights):
    if "alias_table" not in _native.COMPILED["cpu"]:
        pytest.skip("the reference trusts its caller")
    with pytest.raises(RuntimeError, match=r"weights must be at least 0 and sum to at most 2\*\*62"):
        torch.ops.fastws.alias_table(torch.tensor(weights))


def test_integer_weights_use_62_bits_and_keep_ratios():
    for weights in (lognormal(1000, 2), torch.ones(1 << 16), torch.tensor([1.0, 0.0])):
        integers = integer_weights(weights)
        assert 2**59 < int(integers.sum()) < 2**62
        ratios = integers.double() / integers.max().double()
        torch.testing.assert_close(ratios, weights.double() / weights.max().double(), rtol=0, atol=2.0**-44)


@pytest.mark.parametrize("name, function, device", implementations("weighted_sample"))
@pytest.mark.parametrize("count", [0, 1, 257, 3000])
def test_weighted_sample_is_the_reference(name, function, device, count):
    columns = fastws.AliasTable(lognormal(1001, 1).to(device)).columns
    for (seed, offset), first in zip(STREAMS, (0, 5, 2**40), strict=True):
        args = columns, first, count, seed, offset
        assert torch.equal(function(*args), weighted_sample_reference(*args))


@pytest.mark.parametrize("name, function, device", implementations("weighted_sample"))
def test_weighted_sample_follows_the_weights(name, function, device):
    weights = lognormal(60, 1)
    weights[::5] = 0
    columns = fastws.AliasTable(weights.to(device)).columns
    counts = torch.bincount(function(columns, 0, 20_000, 3, 4).cpu(), minlength=60).double()
    positive = weights > 0
    assert counts[~positive].sum() == 0
    statistic = chi_square(counts[positive], 20_000 * weights[positive] / weights.sum())
    assert statistic < 85.4  # quantile 0.999 of chi square with 47 degrees of freedom
    assert statistic > 22.2  # and 0.001: no better than chance


@pytest.mark.parametrize("replacement", [True, False])
def test_weighted_sample_never_draws_a_weight_of_zero(replacement):
    weights = torch.zeros(10_000)
    weights[::100] = torch.rand(100, generator=torch.Generator().manual_seed(0)) + 1e-30
    drawn = fastws.weighted_sample(fastws.AliasTable(weights), 100, replacement=replacement, seed=1)
    assert (weights[drawn] > 0).all() and (replacement or len(drawn.unique()) == 100)


def successive_probability(weights, order):
    left, probability = float(weights.sum()), 1.0
    for i in order:
        probability *= float(weights[i]) / left
        left -= float(weights[i])
    return probability


@pytest.mark.parametrize("count", [2, 4])
def test_weighted_sample_without_replacement_is_successive_sampling(count):
    orders = list(permutations((0, 2, 3, 4), count))
    expected = torch.tensor([successive_probability(FEW, order) for order in orders], dtype=torch.float64)
    assert expected.sum().item() == pytest.approx(1)
    table, number, draws = fastws.AliasTable(FEW), {order: i for i, order in enumerate(orders)}, 4000
    drawn = [fastws.weighted_sample(table, count, replacement=False, seed=5, offset=i) for i in range(draws)]
    counts = torch.bincount(torch.tensor([number[tuple(x.tolist())] for x in drawn]), minlength=len(orders))
    statistic, freedom = chi_square(counts, draws * expected), len(orders) - 1
    assert abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_weighted_sample_without_replacement_passes_over_what_came_before():
    table = fastws.AliasTable(lognormal(500, 1))
    drawn = fastws.weighted_sample(table, 3000, seed=9).tolist()
    assert fastws.weighted_sample(table, 100, replacement=False, seed=9).tolist() == list(dict.fromkeys(drawn))[:100]


def test_weighted_sample_without_replacement_makes_new_tables(monkeypatch):
    """A weight of 1 and three of 1e-9: after the first, the others are drawn with a table of their own."""
    weights = torch.full((4,), 1e-9, dtype=torch.float64)
    weights[2] = 1
    table, firsts = fastws.AliasTable(weights), []
    for i in range(1500):
        drawn = fastws.weighted_sample(table, 4, replacement=False, seed=6, offset=i).tolist()
        assert drawn[0] == 2 and sorted(drawn) == [0, 1, 2, 3]
        firsts.append(drawn[1:])
    number = {order: i for i, order in enumerate(permutations((0, 1, 3)))}
    counts = torch.bincount(torch.tensor([number[tuple(x)] for x in firsts]), minlength=6)
    assert chi_square(counts, 250.0) < 20.5  # quantile 0.999 of chi square with 5 degrees of freedom


def test_weighted_sample_without_replacement_of_weights_too_small_to_be_integers():
    weights = torch.tensor([10.0**-k for k in range(0, 300, 10)], dtype=torch.float64)
    drawn = fastws.weighted_sample(fastws.AliasTable(weights), 30, replacement=False, seed=0)
    assert drawn.tolist() == list(range(30))  # each ten orders of magnitude below the one before


def test_alias_table_of_more_than_2_to_the_24_weights():
    if "alias_table" not in _native.COMPILED["cpu"]:
        pytest.skip("the reference takes seconds and gigabytes")
    weights = torch.zeros(2**24 + 5)
    weights[-4:] = torch.tensor([1.0, 0.0, 3.0, 4.0])
    weights[7] = 8.0
    drawn = fastws.weighted_sample(fastws.AliasTable(weights), 16_000, seed=0)
    numbers, counts = drawn.unique(return_counts=True)
    assert numbers.tolist() == [7, 2**24 + 1, 2**24 + 3, 2**24 + 4]
    assert chi_square(counts, torch.tensor([8000.0, 1000.0, 3000.0, 4000.0])) < 16.3  # 0.999 of 3 degrees of freedom


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is there only where it is touched is asked of Linux")
def test_weighted_sample_of_more_than_2_to_the_31_columns():
    """Pages of memory that exist only where they are touched."""
    count = 2**31 + 11
    room = mmap.mmap(-1, 8 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    columns = torch.frombuffer(room, dtype=torch.int64)
    args = columns, 0, 1000, 1, 2
    numbers, _ = integers_reference(1, 2, 0, 1000, count, columns.device)
    last = numbers.max()
    assert 2**31 - 2**24 < last < count and numbers.double().mean() == pytest.approx(2**30, rel=0.1)
    columns[numbers] = numbers + (WHOLE - 1 << SHARE_BITS)  # those that are drawn name themselves
    for sample in (torch.ops.fastws.weighted_sample, weighted_sample_reference):
        assert torch.equal(sample(*args), numbers)
    columns[last] = 5 - (1 << SHARE_BITS)  # all of the last one goes to number 5
    for sample in (torch.ops.fastws.weighted_sample, weighted_sample_reference):
        assert torch.equal(sample(*args), torch.where(numbers == last, 5, numbers))


def test_weighted_sample_does_not_depend_on_the_threads():
    threads, weights, drawn = torch.get_num_threads(), lognormal(300_000, 2), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        table = fastws.AliasTable(weights)
        drawn.append((table.columns, fastws.weighted_sample(table, 10_000, seed=1)))
    torch.set_num_threads(threads)
    for columns, sample in drawn[1:]:
        assert torch.equal(columns, drawn[0][0]) and torch.equal(sample, drawn[0][1])


def test_weighted_sample_differs_between_seeds_and_offsets():
    table = fastws.AliasTable(torch.ones(10**4))
    first = fastws.weighted_sample(table, 50, seed=1)
    for seed, offset in [(2, 0), (1, 1)]:
        assert not torch.equal(first, fastws.weighted_sample(table, 50, seed=seed, offset=offset))
    assert torch.equal(first[:20], fastws.weighted_sample(table, 20, seed=1))


@pytest.mark.parametrize("device", devices())
def test_weighted_sample_opcheck(device):
    weights = torch.tensor([1.0, 0.0, 2.0, 4.0], device=device)
    integers = integer_weights(weights)
    torch.library.opcheck(torch.ops.fastws.alias_table.default, (integers,))
    columns = torch.ops.fastws.alias_table(integers)
    torch.library.opcheck(torch.ops.fastws.weighted_sample.default, (columns, 3, 20, 1, 2))
    torch.library.opcheck(torch.ops.fastws.successive_sample.default, (weights, columns, 3, 1, 2))


@pytest.mark.parametrize("replacement", [True, False])
def test_weighted_sample_compiles_once_for_all_offsets(replacement):
    table = fastws.AliasTable(lognormal(100, 1))

    def draw(x, offset):
        return x[fastws.weighted_sample(table, 10, replacement=replacement, seed=7, offset=offset)]

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")  # needs no compiler
    x = torch.randn(100)
    for offset in range(2, 5):
        assert torch.equal(compiled(x, offset), draw(x, offset))
    with torch.compiler.set_stance("fail_on_recompile"):
        for offset in range(5, 9):
            assert torch.equal(compiled(x, offset), draw(x, offset))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_alias_table_names_the_wrong_weights(bad):
    with pytest.raises(ValueError, match="AliasTable: weights must be finite and at least 0, got 2 of 3 that are not"):
        fastws.AliasTable(torch.tensor([1.0, bad, bad]))


def test_weighted_sample_names_the_wrong_argument():
    with pytest.raises(ValueError, match="AliasTable: weights must not all be 0, got 3 zeros"):
        fastws.AliasTable(torch.zeros(3))
    with pytest.raises(ValueError, match=r"AliasTable: weights must be at most 2\*\*32, got 4294967297"):
        fastws.AliasTable(torch.ones(1).expand(2**32 + 1))
    with pytest.raises(ValueError, match=r"AliasTable: weights must be \[N\] floating point with N >= 1, got \[0\]"):
        fastws.AliasTable(torch.tensor([]))
    table = fastws.AliasTable(FEW)
    with pytest.raises(ValueError, match="count without replacement must be at most 4, the number of positive weights"):
        fastws.weighted_sample(table, 5, replacement=False, seed=0)
    with pytest.raises(ValueError, match=r"table must be fastws.AliasTable\(weights\), got Tensor"):
        fastws.weighted_sample(torch.ones(3), 2, seed=0)
    with pytest.raises(ValueError, match="weighted_sample: count must be at least 0, got -1"):
        fastws.weighted_sample(table, -1, seed=0)
    with pytest.raises(ValueError, match="weighted_sample: seed and offset must be in"):
        fastws.weighted_sample(table, 1, seed=-1)
    with pytest.raises(ValueError, match="weighted_sample: seed and offset must be in"):
        fastws.weighted_sample(table, 1, seed=2**63)
