import pytest
import torch
from checkpoints import checkpoints, permuted_tables, small_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import fastws
from fastws import _native
from fastws.ops.token_views import token_views_reference
from fastws.random.philox import normal_reference
from fastws.testing import assert_as_accurate, devices, implementations

CASES = [  # dtype of the zoo, of the values, permuted, token size, window
    (torch.float32, torch.float32, True, 17, 9),
    (torch.float32, torch.float32, False, 64, 5),
    (torch.float32, torch.bfloat16, True, 1, 30),
    (torch.float16, torch.float16, True, 64, 5),
    (torch.bfloat16, torch.float32, True, 17, 9),
    (torch.bfloat16, torch.bfloat16, False, 17, 9),
    (torch.bfloat16, torch.float16, True, 17, 9),
    (torch.float64, torch.float64, True, 17, 9),
    (torch.float64, torch.float32, True, 17, 9),
]
NOTHING = torch.empty(0)


def example(token_size=17, window=9, dtype=torch.float32, device="cpu", permute=True, scale=False, signed=False):
    """Arguments of the op up to window: five views of four networks."""
    layout = fastws.Layout.from_checkpoint(small_checkpoint(), token_size)
    rng = torch.Generator().manual_seed(1)
    _, table, sizes = permuted_tables(layout, rng)
    zoo = torch.randn(4, layout.num_weights, generator=rng).to(dtype)
    model = torch.tensor([3, 0, 1, 1, 2])
    start = torch.randint(0, layout.num_tokens - window + 1, (5,), generator=rng)
    permutations = fastws.random_permutations(sizes, 5, seed=5) if permute else torch.empty(5, 0, dtype=torch.int32)
    if signed:  # half of the entries with a minus, in all views but the first
        negated = torch.rand(permutations.shape, generator=rng) < 0.5
        negated[0] = False
        permutations = torch.where(negated, ~permutations, permutations)
    layers = torch.tensor([[0, len(table)]]).expand(5, 2)
    factors = [torch.rand(len(table), generator=rng) if scale else NOTHING for _ in range(2)]
    args = zoo, table, model * layout.num_weights, layers, start, permutations, *factors
    return [x.to(device) for x in args] + [token_size, window]


@pytest.mark.parametrize("name, function, device", implementations("token_views"))
@pytest.mark.parametrize("dtype, out_dtype, permute, token_size, window", CASES)
@pytest.mark.parametrize("signed", [False, True])
def test_token_views_move_data_exactly(name, function, device, dtype, out_dtype, permute, token_size, window, signed):
    args = *example(token_size, window, dtype, device, permute, signed=signed and permute), 0.0, 0, 1, 2, out_dtype
    for actual, expected in zip(function(*args), token_views_reference(*args), strict=True):
        truncates = (
            name == "triton" and device == "cpu" and out_dtype == torch.bfloat16
        )  # interpreted, it does not round
        torch.testing.assert_close(actual, expected, rtol=2**-7 if truncates else 0, atol=0)


@pytest.mark.parametrize("name, function, device", implementations("token_views"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("noise, erase, scale", [(0.1, 0, False), (0, 2**31, False), (0, 0, True), (0.3, 2**30, True)])
@pytest.mark.parametrize("offset", [2, 2**33])
def test_token_views_are_as_accurate_as_the_reference(name, function, device, dtype, noise, erase, scale, offset):
    args = *example(dtype=dtype, device=device, scale=scale), noise, erase, 2**40 + 1, offset, torch.float32

    def values(*args):
        return token_views_reference(*args)[0]

    actual = function(*args)
    assert_as_accurate(actual[0], values, *args)
    assert torch.equal(actual[0] == 0, values(*args) == 0)  # the same entries are erased


@settings(max_examples=40, deadline=None)
@given(state=checkpoints(), token_size=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_token_views_are_slices_of_permuted_tokens(state, token_size, seed, data):
    layout = fastws.Layout.from_checkpoint(state, token_size)
    tensor_table, table, sizes = permuted_tables(layout, torch.Generator().manual_seed(seed))
    zoo = torch.randn(3, layout.num_weights)
    window = data.draw(st.integers(1, layout.num_tokens))
    start = torch.tensor([data.draw(st.integers(0, layout.num_tokens - window)) for _ in range(2)])
    model = torch.tensor([2, 0])
    permutations = fastws.random_permutations(sizes, 2, seed)
    permutations[1] = ~permutations[1]
    views = fastws.token_views(zoo, table, token_size, model, start, window, permutations)
    tokens = layout.tokenize(fastws.permute(zoo[model], tensor_table, permutations))
    for b in range(2):
        part = slice(int(start[b]), int(start[b]) + window)
        assert torch.equal(views.values[b], tokens.values[b, part])
        assert torch.equal(views.lengths[b], tokens.lengths[part])
        assert torch.equal(views.positions[b], tokens.positions[part])


@pytest.mark.parametrize("name, function, device", implementations("token_views"))
def test_token_views_of_several_architectures(name, function, device):
    states = small_checkpoint(), {"fc.weight": torch.randn(5, 7), "fc.bias": torch.randn(5)}
    layouts = [fastws.Layout.from_checkpoint(state, token_size=8) for state in states]
    flats = [layout.flatten(state) for layout, state in zip(layouts, states, strict=True)]
    tables = [permuted_tables(layout, torch.Generator().manual_seed(3)) for layout in layouts]
    table = torch.cat([table for _, table, _ in tables])
    count = len(layouts[0].table)
    base, layers = torch.tensor([0, len(flats[0])]), torch.tensor([[0, count], [count, len(table)]])
    rows = torch.zeros(2, max(sum(sizes) for _, _, sizes in tables), dtype=torch.int32)
    for row, (_, _, sizes) in zip(rows, tables, strict=True):
        row[: sum(sizes)] = fastws.random_permutations(sizes, 1, seed=2)[0]
    start, window = torch.tensor([4, 0]), 12  # longer than the second network: the rest is padding
    arguments = torch.cat(flats), table, base, layers, start, rows, NOTHING, NOTHING
    arguments = [x.to(device) for x in arguments]
    values, lengths, positions = (x.cpu() for x in function(*arguments, 8, window, 0.0, 0, 0, 0, torch.float32))
    for b, layout in enumerate(layouts):
        permuted = fastws.permute(flats[b][None], tables[b][0], rows[b : b + 1])
        tokens = layout.tokenize(permuted[0])
        begin, inside = int(start[b]), min(window, layout.num_tokens - int(start[b]))
        assert torch.equal(values[b, :inside], tokens.values[begin : begin + inside])
        assert torch.equal(positions[b, :inside], tokens.positions[begin : begin + inside])
        assert not values[b, inside:].any() and not lengths[b, inside:].any()
    public = fastws.token_views(
        torch.cat(flats), table, 8, torch.tensor([0, 1]), start, window, rows, base=base, layers=layers
    )
    assert torch.equal(public.values, values) and torch.equal(public.lengths, lengths)


def test_normals_have_the_moments_of_normals():
    x = normal_reference(1, 0, 400_000, "cpu").double()
    assert abs(x.mean()) < 5 / 400_000**0.5 and abs(x.var() - 1) < 5 * (2 / 400_000) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / 400_000) ** 0.5
    assert abs((x[0::2] * x[1::2]).mean()) < 5 / 200_000**0.5  # the two of a pair are independent


def test_token_views_noise_is_multiplicative_and_counts_along_the_values():
    zoo, table, base, layers, start, permutations, *_ = example(17, 9)
    views = [torch.ops.fastws.token_views(zoo, table, base, layers, start, permutations, NOTHING, NOTHING, 17, 9, n, 0,
                                          3, 4, torch.float32)[0] for n in (0.0, 0.2)]  # fmt: skip
    normal = normal_reference(3, 8, views[0].numel(), "cpu").view(views[0].shape)
    torch.testing.assert_close(views[1], views[0] * (1 + 0.2 * normal), rtol=1e-5, atol=1e-6)


def test_token_views_do_not_depend_on_the_threads():
    args = *example(17, 9, scale=True), 0.1, 2**30, 1, 2, torch.float32
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(torch.ops.fastws.token_views(*args)[0])
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", devices())
def test_token_views_opcheck_and_refuses_gradients(device):
    args = *example(device=device), 0.1, 2**30, 1, 2, torch.bfloat16
    torch.library.opcheck(torch.ops.fastws.token_views.default, args)
    values = torch.ops.fastws.token_views(args[0].requires_grad_(), *args[1:])[0]
    with pytest.raises(NotImplementedError, match="token_views: weights are data"):
        values.float().sum().backward()


def test_token_views_compile_once_for_all_offsets():
    zoo, table, *_ = example()
    model, start = torch.tensor([0, 1]), torch.tensor([2, 3])

    def view(offset):
        return 2 * fastws.token_views(zoo, table, 17, model, start, 5, noise=0.1, seed=3, offset=offset).values

    compiled = torch.compile(view, fullgraph=True, backend="aot_eager")  # needs no compiler
    for offset in range(2, 5):
        assert torch.equal(compiled(offset), view(offset))
    with torch.compiler.set_stance("fail_on_recompile"):
        for offset in range(5, 9):
            assert torch.equal(compiled(offset), view(offset))


def test_token_views_name_the_wrong_argument(monkeypatch):
    layout = fastws.Layout.from_checkpoint(small_checkpoint(), 17)
    zoo, table, model, start = torch.randn(4, layout.num_weights), layout.table, torch.tensor([3]), torch.tensor([0])

    def refuse(sentence, zoo=zoo, table=table, token_size=17, model=model, start=start, window=4, *args, **options):
        with pytest.raises(ValueError, match="token_views: " + sentence):
            fastws.token_views(zoo, table, token_size, model, start, window, *args, **options)

    refuse("weights must be .* floating point", zoo=zoo.long())
    refuse("weights must be .* contiguous", zoo=zoo.t().contiguous().t())
    refuse("token_size and window must be at least 1, got 0 and 4", token_size=0)
    refuse("token_size and window must be at least 1, got 17 and -1", window=-1)
    refuse(rf"window must be at most the {layout.num_tokens} tokens of a network, got 99", window=99)
    refuse("start must leave room for the window of 4 tokens", start=torch.tensor([layout.num_tokens - 3]))
    refuse(r"model must be in \[0, 4\), got 4..4", model=torch.tensor([4]))
    refuse(r"model must be \[1\] torch.int64 on cpu, got \[1\] torch.int32", model=model.int())
    refuse("noise must be at least 0", noise=-1.0)
    refuse(r"noise must be at least 0 and erase in \[0, 1\]", erase=1.5)
    refuse(r"scale must be \[\d+\] torch.float32", scale=torch.ones(3))
    _, permuted, sizes = permuted_tables(layout, torch.Generator().manual_seed(1))
    broken = torch.zeros(1, sum(sizes), dtype=torch.int32)
    monkeypatch.setattr(_native, "CHECK", True)
    with pytest.raises(ValueError, match="token_views: permutations.* must hold each of"):
        fastws.token_views(zoo, permuted, 17, model, start, 4, broken)
