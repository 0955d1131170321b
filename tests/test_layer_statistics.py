from importlib import import_module

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastws
from fastws import _native
from fastws.ops.layer_statistics import PERCENTS, check_offsets, layer_statistics_reference
from fastws.testing import devices, implementations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OFFSETS = torch.tensor([[0, 90], [90, 92], [7, 7]])  # with gaps, overlapping, empty
EXACT = {"rtol": 1e-10, "atol": 1e-13, "equal_nan": True}  # float64, whatever the dtype of the weights


def of_numpy(flat, offsets):
    """An independent statement."""
    x, statistics = flat.cpu().double().numpy(), []
    for begin, end in offsets.tolist():
        part = x[:, begin:end]
        nan = numpy.full((7, len(x)), numpy.nan)
        some = end > begin and [part.mean(1), part.var(1), *numpy.percentile(part, PERCENTS, axis=1)]
        statistics.append(numpy.stack(some) if end > begin else nan)
    return torch.from_numpy(numpy.stack(statistics)).permute(2, 0, 1)


def example(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(1, 2 * 95, generator=generator).to(device, dtype)[:, ::2]  # not contiguous
    return flat, OFFSETS.to(device)


def assert_is_numpy(function, flat, offsets, device="cpu"):
    actual = function(flat.to(device), offsets.to(device))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.cpu(), of_numpy(flat, offsets), **EXACT)


@pytest.mark.parametrize("name, function, device", implementations("layer_statistics"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_statistics_are_those_of_numpy(name, function, device, dtype):
    flat, offsets = example(dtype, device)
    assert_is_numpy(function, flat.cpu(), offsets.cpu(), device)
    torch.testing.assert_close(function(flat, offsets), layer_statistics_reference(flat, offsets), **EXACT)


@pytest.mark.parametrize("name, function, device", implementations("layer_statistics"))
def test_layer_statistics_by_hand(name, function, device):
    flat = torch.tensor([[4.0, 0.0, 3.0, 1.0, 2.0, -7.0]], device=device)
    expected = [
        [2, 2, 0.04, 1, 2, 3, 3.96],
        [-7, 0, -7, -7, -7, -7, -7],
        [-2.5, 20.25, -6.91, -4.75, -2.5, -0.25, 1.91],
    ]
    actual = function(flat, torch.tensor([[0, 5], [5, 6], [4, 6]], device=device))
    torch.testing.assert_close(actual.cpu(), torch.tensor([expected], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name, function, device", implementations("layer_statistics"))
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_layer_statistics_of_what_is_not_finite_are_nan(name, function, device, bad):
    flat = torch.arange(80.0, device=device)[None].clone()
    flat[0, 50] = bad
    nans = function(flat, torch.tensor([[0, 50], [0, 51], [50, 80]], device=device)).isnan()[0]
    assert nans.all(1).tolist() == nans.any(1).tolist() == [False, True, True]


# numbers that are hard on a histogram of equal bins
HARD = {
    "uniform": lambda random, n: random.random(n),
    "heavy tails": lambda random, n: random.standard_cauchy(n) ** 5,
    "mostly zero": lambda random, n: random.standard_normal(n) * (random.random(n) < 0.1),
    "constant": lambda random, n: numpy.full(n, -0.3),
    "two values": lambda random, n: random.integers(2, size=n) * 1e-30,
    "far from zero": lambda random, n: 1e3 + random.standard_normal(n),
    "subnormal": lambda random, n: random.integers(1000, size=n) * 1e-44,
    "as large as can be": lambda random, n: random.choice([-3.4e38, 3.4e38, 1.0, -2.0], n),
    "exponents": lambda random, n: 2.0 ** random.integers(-120, 120, n),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HARD)
def test_layer_statistics_of_hard_numbers(kind, dtype):
    random = numpy.random.default_rng(0)
    for size in (97, 1000, 20_000):
        flat = torch.from_numpy(numpy.stack([HARD[kind](random, size) for _ in range(2)])).to(dtype)
        assert_is_numpy(torch.ops.fastws.layer_statistics, flat, torch.tensor([[0, size]]))


@pytest.mark.parametrize("name, function, device", implementations("layer_statistics"))
def test_layer_statistics_of_a_few_hard_numbers(name, function, device):
    flat = [-3.4e38, 3.4e38, 0.0, -0.0, 0.0, 1e-44, -1e-44, 1.0, 1.0, 1.0, -2.0, -2.0, 1e-30, 7.0, 3.4e38]
    assert_is_numpy(function, torch.tensor([flat]), torch.tensor([[0, len(flat)]]), device)


@pytest.mark.parametrize("name, function, device", implementations("layer_statistics"))
def test_layer_statistics_of_a_segment_of_several_blocks(name, function, device):
    flat = torch.randn(1, 2100, generator=torch.Generator().manual_seed(0))
    assert_is_numpy(function, flat, torch.tensor([[3, 2099]]), device)


@pytest.mark.parametrize(
    "name, function, device", [found for found in implementations("layer_statistics") if found[0] == "triton"]
)
def test_layer_statistics_by_programs_that_share_a_segment(name, function, device, monkeypatch):
    for constant, value in {"BLOCK": 64, "PART": 128, "TOGETHER": 2}.items():
        monkeypatch.setattr(import_module(function.__module__), constant, value)
    flat = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    flat[:, 50:250] = flat[:, 50:250].round()  # many equal ones
    offsets = torch.tensor([[3, 300], [50, 250], [0, 70]])
    assert_is_numpy(function, flat, offsets, device)
    flat[0, 260] = torch.nan
    assert function(flat.to(device), offsets.to(device))[0].isnan().all(1).tolist() == [True, False, False]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_layer_statistics_of_any_segments(data):
    size = data.draw(st.integers(1, 300))
    values = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1.0])
    seed = data.draw(st.integers(0, 2**20))
    flat = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    few = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=min(size, 20))))
    flat[:, : len(few)] = few
    bounds = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    offsets = torch.tensor(data.draw(st.lists(bounds, min_size=1, max_size=4)))
    assert_is_numpy(torch.ops.fastws.layer_statistics, flat, offsets)


@pytest.mark.skipif("layer_statistics" not in _native.COMPILED["cpu"], reason="PyTorch's sums depend on the threads")
def test_layer_statistics_do_not_depend_on_the_threads():
    flat = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    offsets, threads = torch.tensor([[0, 30], [30, 4000], [4000, 4100], [10, 5000]]), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(fastws.layer_statistics(flat, offsets))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_layer_statistics_depend_on_the_segment_and_not_on_its_order():
    flat, _ = example()
    mixed = flat[:, torch.randperm(95, generator=torch.Generator().manual_seed(1))]
    ours, theirs = (fastws.layer_statistics(x, torch.tensor([[0, 95], [0, 80]])) for x in (flat, mixed))
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], **EXACT)
    assert ((ours[:, 1] - theirs[:, 1]).abs() > 1e-3).sum() > 3  # other weights


@pytest.mark.parametrize("name, function, device", implementations("layer_statistics"))
@pytest.mark.parametrize("batch, layers", [(0, 2), (3, 0)])
def test_layer_statistics_of_nothing(name, function, device, batch, layers):
    empty = torch.empty(batch, 5, device=device), torch.zeros(layers, 2, dtype=torch.int64, device=device)
    assert function(*empty).shape == (batch, layers, 7)


@pytest.mark.parametrize("device", devices())
def test_layer_statistics_have_no_gradient(device):
    flat, offsets = example(device=device)
    statistics = fastws.layer_statistics(flat.clone().requires_grad_(), offsets)
    with pytest.raises(NotImplementedError, match="layer_statistics: weights are data"):
        statistics[:, 0].sum().backward()


@pytest.mark.parametrize("device", devices())
def test_layer_statistics_opcheck(device):
    flat, offsets = example(device=device)
    torch.library.opcheck(torch.ops.fastws.layer_statistics.default, (flat, offsets[:2]))


@pytest.mark.parametrize("device", devices())
def test_layer_statistics_compile(device):
    flat, offsets = example(device=device)
    compiled = torch.compile(fastws.layer_statistics, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(flat, offsets), fastws.layer_statistics(flat, offsets), **EXACT)


def test_layer_statistics_name_the_wrong_argument():
    flat, offsets = example()
    with pytest.raises(ValueError, match=r"layer_statistics: flat must be \[B, P\] floating point, got \[95\]"):
        fastws.layer_statistics(flat[0], offsets)
    with pytest.raises(ValueError, match=r"layer_statistics: offsets must be \[L, 2\] int64 on cpu, got \[3\]"):
        fastws.layer_statistics(flat, offsets[:, 0])
    for wrong in ([0, 153], [-1, 5], [6, 5]):
        with pytest.raises(ValueError, match=r"offsets\[1\] must have 0 <= begin <= end <= 95, got \[") as error:
            fastws.layer_statistics(flat, torch.tensor([[0, 1], wrong]))
        assert str(error.value).endswith(f"got {wrong}")
    check_offsets(offsets, 95)
