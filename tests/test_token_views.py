import pytest
import torch
from checkpoints import checkpoints, permuted_tables, small_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import fastws
from fastws import _native
from fastws.ops.token_views import token_views_reference
from fastws.random.philox import normal_reference, philox_reference
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


SPANS = ("row", "layer", "network")


def example(
    token_size=17, window=9, dtype=torch.float32, device="cpu", permute=True, scale=False, signed=False, span="row"
):
    """Arguments of the op up to window: five views of four networks."""
    layout = fastws.Layout.from_checkpoint(small_checkpoint(), token_size, span=span)
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
@pytest.mark.parametrize(
    "dtype, out_dtype, permute, token_size, window, signed, span",
    [(*case, False, "row") for case in CASES]
    # signs and spans are of places, whatever the dtype: size 17 in one, 1 and 64 in others
    + [(*case, True, span) for case in (CASES[0], CASES[2], CASES[3]) for span in SPANS],
)
def test_token_views_move_data_exactly(
    name, function, device, dtype, out_dtype, permute, token_size, window, signed, span
):
    window = min(window, 3) if span == "network" else window
    views = example(token_size, window, dtype, device, permute, signed=signed and permute, span=span)
    args = *views, 0.0, 0, 1, 2, out_dtype
    for actual, expected in zip(function(*args), token_views_reference(*args), strict=True):
        truncates = (
            name == "triton" and device == "cpu" and out_dtype == torch.bfloat16
        )  # interpreted, it does not round
        torch.testing.assert_close(actual, expected, rtol=2**-7 if truncates else 0, atol=0)


@pytest.mark.parametrize("name, function, device", implementations("token_views"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "noise, erase, scale, offset",
    [(0.1, 0, False, 2), (0, 2**31, False, 2**33), (0, 0, True, 2), (0.3, 2**30, True, 2**33)],
)
def test_token_views_are_as_accurate_as_the_reference(name, function, device, dtype, noise, erase, scale, offset):
    args = *example(dtype=dtype, device=device, scale=scale), noise, erase, 2**40 + 1, offset, torch.float32

    def values(*args):
        return token_views_reference(*args)[0]

    actual = function(*args)
    assert_as_accurate(actual[0], values, *args)
    assert torch.equal(actual[0] == 0, values(*args) == 0)  # the same entries are erased


@settings(max_examples=60, deadline=None)
@given(
    state=checkpoints(),
    token_size=st.integers(1, 40),
    span=st.sampled_from(SPANS),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_token_views_are_slices_of_permuted_tokens(state, token_size, span, seed, data):
    layout = fastws.Layout.from_checkpoint(state, token_size, span=span)
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


AUGMENTED = [  # dtype of the zoo, of the values, what tokens span, their size, and additive noise, erasing and blocks
    (torch.float32, torch.float32, "row", 17, 0.3, 0.25, 0.5),
    (torch.float32, torch.float32, "network", 260, 0.3, 0.0, 1.0),
    (torch.float32, torch.float32, "layer", 17, 0.0, 0.0, 1.0),
    (torch.float64, torch.float32, "layer", 23, 0.3, 0.25, 1.0),
    (torch.bfloat16, torch.float32, "network", 64, 0.3, 0.25, 1.0),
    (torch.float32, torch.bfloat16, "row", 64, 0.3, 0.25, 1.0),
    (torch.float16, torch.float16, "layer", 30, 0.0, 0.0, 1.0),
]


@pytest.mark.parametrize("name, function, device", implementations("token_views"))
@pytest.mark.parametrize("dtype, out_dtype, span, token_size, additive, erase, block", AUGMENTED)
def test_augmented_views_are_those_of_the_reference(
    name, function, device, dtype, out_dtype, span, token_size, additive, erase, block
):
    window = 1 if token_size > 200 else 5
    args = example(token_size, window, dtype, device, signed=True, scale=True, span=span)
    noise = torch.linspace(0, additive, len(args[1])).to(device) if additive else None
    random = 0.1, round(erase * 2**32), 5, 2**33, out_dtype, noise, -1.25, round(block * 2**32), 2**22, 2**23
    actual, expected = function(*args, *random), token_views_reference(*args, *random)
    assert_as_accurate(actual[0], lambda *x: token_views_reference(*x)[0], *args, *random)
    assert torch.equal(actual[0] == -1.25, expected[0] == -1.25) and (actual[0] == -1.25).any()
    for x, y in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(x, y)
    padding = torch.arange(token_size, device=device) >= actual[1][..., None]
    assert not actual[0][padding].any() and not actual[0][padding].signbit().any()


@pytest.mark.parametrize("name, function, device", implementations("token_views"))
@pytest.mark.parametrize("dtype, span, token_size", [(torch.float32, "row", 17), (torch.float64, "network", 64)])
def test_what_is_erased_may_become_normals(name, function, device, dtype, span, token_size):
    args = example(token_size, 5, dtype, device, signed=True, scale=True, span=span)
    noise = torch.full((len(args[1]),), 0.3, device=device)
    random = 0.1, 2**30, 5, 2**33, torch.float32, noise

    def view(value, block):
        return function(*args, *random, value, block, 2**22, 2**23)[0]

    for block in (0, 2**32):
        normals, zeros = view(torch.nan, block), view(0.0, block)
        erased = normals != zeros
        assert torch.equal(normals[~erased], zeros[~erased]) and not zeros[erased].any()
        assert_as_accurate(
            normals, lambda *x: token_views_reference(*x)[0], *args, *random, torch.nan, block, 2**22, 2**23
        )
        assert 0.7 < normals[erased].std() < 1.3 and abs(normals[erased].mean()) < 0.3


def test_blocks_are_those_that_the_docstring_states():
    """Of the flat vector of each permuted network, whatever tokens span; other draws have the numbers they had."""
    seed, offset, shortest, longest = 7, 3, 0.1, 0.4
    words = philox_reference(seed, 2**63 + 2 * offset + 1, 24 * 200, "cpu").view(200, 24).tolist()
    layout = fastws.Layout.from_checkpoint(small_checkpoint(), 17)
    size, blocks = layout.num_weights, []
    for row in words:
        tries = [(int(size * (shortest + (longest - shortest) * (row[2 + 2 * t] >> 8) / 2**24)),
                  size * (row[3 + 2 * t] >> 8) // 2**24) for t in range(10)]  # fmt: skip
        length, begin = next((n, first) for n, first in tries if first + n < size)
        blocks.append((begin, begin + length) if row[0] < 0.5 * 2**32 else (0, 0))
    erase = fastws.Erasing(block=0.5, shortest=shortest, longest=longest, value=9.0)
    zoo = torch.randn(200, size)
    generator = torch.Generator().manual_seed(1)
    tensor_table, _, sizes = permuted_tables(layout, generator)
    permutations = fastws.random_permutations(sizes, 200, 1)
    flat = fastws.permute(zoo, tensor_table, permutations)
    for row, (begin, end) in zip(flat, blocks, strict=True):
        row[begin:end] = 9.0
    for span, token_size in (("row", 17), ("layer", 17), ("network", None)):
        layout = layout.with_tokens(token_size, span=span)
        _, table, _ = permuted_tables(layout, torch.Generator().manual_seed(1))
        every = torch.arange(200), torch.zeros(200, dtype=torch.int64), layout.num_tokens
        views = fastws.token_views(
            zoo, table, layout.token_size, *every, permutations, erase=erase, seed=seed, offset=offset
        )
        assert torch.equal(layout.detokenize(views.values), flat)
    assert 60 < sum(end > 0 for _, end in blocks) < 140


def test_blocks_have_the_published_law():
    """With probability p 2 to 33 % of a vector, one block, longer ones less often, for fewer places hold them."""
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.ones(10, 100)}, span="network")
    every = torch.zeros(4000, dtype=torch.int64)
    views = fastws.token_views(
        torch.ones(1, 1000), layout.table, 1000, every, every, 1, erase=fastws.Erasing(block=0.5)
    )
    erased = views.values[:, 0] == 0
    lengths = erased.sum(1)
    touched = lengths > 0
    assert touched.double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert lengths[touched].min() >= 20 and lengths[touched].max() <= 330
    assert (erased[:, 1:] != erased[:, :-1]).sum(1).max() <= 2  # one block, not several
    share = torch.linspace(0.02, 0.33, 10_001).double()
    expected = 1000 * (share * (1 - share)).sum() / (1 - share).sum()  # begins are uniform where the block fits
    assert lengths[touched].double().mean().item() == pytest.approx(expected.item(), abs=5 * 90 / 2000**0.5)


def test_additive_noise_is_in_units_of_each_layer_and_a_draw_of_its_own():
    zoo, table, base, layers, start, permutations, *_ = example(17, 9, span="network")
    model, std = base // zoo.shape[1], torch.linspace(0, 1, len(table))
    layout = fastws.Layout.from_checkpoint(small_checkpoint(), 17, span="network")
    options = {"permutations": permutations, "seed": 3, "offset": 4}
    plain = fastws.token_views(zoo, table, 17, model, start, 9, **options)
    views = fastws.token_views(zoo, table, 17, model, start, 9, noise=fastws.Noise(0.2, std), **options).values
    normals = [normal_reference(3, draw, views.numel(), "cpu").view(views.shape) for draw in (8, 2**63 + 8)]
    entries = start[:, None, None] * 17 + torch.arange(9 * 17).view(9, 17)
    layer = torch.searchsorted(layout.tensor_table[:, 0].contiguous(), entries, right=True) - 1
    expected = plain.values * (1 + 0.2 * normals[0]) + std[layer] * normals[1]
    inside = torch.arange(17) < plain.lengths[..., None]
    torch.testing.assert_close(views, torch.where(inside, expected, 0), rtol=1e-5, atol=1e-6)
    same = fastws.token_views(zoo, table, 17, model, start, 9, noise=fastws.Noise(additive=0.5), **options).values
    each = fastws.Noise(additive=torch.full((len(table),), 0.5))
    assert torch.equal(same, fastws.token_views(zoo, table, 17, model, start, 9, noise=each, **options).values)


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


@pytest.mark.parametrize("span", SPANS)
def test_token_views_do_not_depend_on_the_threads(span):
    args = *example(17, 9, scale=True, span=span), 0.1, 2**30, 1, 2, torch.float32
    args += (torch.linspace(0, 1, len(args[1])), 0.5, 2**31, 2**22, 2**23)
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
    args = *example(device=device, span="layer"), 0.1, 2**30, 1, 2, torch.bfloat16
    additive = torch.ones(len(args[1]), device=device)
    torch.library.opcheck(torch.ops.fastws.token_views.default, (*args, additive, 0.5, 2**31, 2**22, 2**23))
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
    refuse("noise must be at least 0", noise=fastws.Noise(additive=-0.1))
    refuse(r"erase.block must be in \[0, 1\]", erase=fastws.Erasing(block=1.5))
    refuse(
        r".* shortest not above longest in \[0, 1\], got 1, 0.5 and 0.33", erase=fastws.Erasing(block=1, shortest=0.5)
    )
    refuse("erase.value must be finite, got nan", erase=fastws.Erasing(0.5, value=float("nan")))
    refuse(r"additive must be \[\d+\] torch.float32", noise=fastws.Noise(additive=torch.ones(3)))
    refuse(r"scale must be \[\d+\] torch.float32", scale=torch.ones(3))
    _, permuted, sizes = permuted_tables(layout, torch.Generator().manual_seed(1))
    broken = torch.zeros(1, sum(sizes), dtype=torch.int32)
    monkeypatch.setattr(_native, "CHECK", True)
    with pytest.raises(ValueError, match="token_views: permutations.* must hold each of"):
        fastws.token_views(zoo, permuted, 17, model, start, 4, broken)
