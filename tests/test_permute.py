import pytest
import torch
from checkpoints import checkpoints, permuted_tables, small_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import compile_for_host, numbers, pointers

import fastws
from fastws import _native
from fastws.ops.permute import permute_reference, random_permutations_reference
from fastws.signed import split
from fastws.table import table_rows
from fastws.testing import devices, implementations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [[1], [5], [3, 1, 90, 17], [257, 2]]


def negate(permutations, seed=0):
    """Half of the entries of permutations with a minus."""
    chosen = torch.rand(permutations.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(chosen, ~permutations, permutations)


def example(batch=3, dtype=torch.float32, device="cpu", signed=False):
    layout = fastws.Layout.from_checkpoint(small_checkpoint())
    rng = torch.Generator().manual_seed(1)
    table, _, sizes = permuted_tables(layout, rng)
    flat = torch.randn(batch, 2 * layout.num_weights, generator=rng).to(device, dtype)[:, ::2]  # not contiguous
    permutations = fastws.random_permutations(sizes, batch, seed=5)
    return flat, table.to(device), (negate(permutations) if signed else permutations).to(device)


@pytest.mark.parametrize("name, function, device", implementations("permute"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("signed", [False, True])
def test_permute_is_the_reference(name, function, device, dtype, inverse, batch, signed):
    args = example(batch, dtype, device, signed)
    torch.testing.assert_close(function(*args, inverse), permute_reference(*args, inverse), rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(state=checkpoints(), seed=st.integers(0, 99))
def test_permute_is_index_select(state, seed):
    layout = fastws.Layout.from_checkpoint(state)
    table, _, sizes = permuted_tables(layout, torch.Generator().manual_seed(seed))
    permutations = negate(fastws.random_permutations(sizes, 1, seed), seed)
    flat = layout.flatten(state)
    permuted = layout.unflatten(fastws.permute(flat[None], table, permutations)[0])
    entries = [entry for entry in layout.entries if entry.offset >= 0]
    for entry, row in zip(entries, table_rows(table), strict=True):
        expected = state[entry.name]
        for axis, place in ((0, row.first_out), (1, row.first_in)):
            if place >= 0:
                index, negative = split(permutations[0, place : place + entry.shape[axis]].long())
                wide = [-1 if a == axis else 1 for a in range(expected.dim())]
                expected = expected.index_select(axis, index) * (1 + 2 * negative).view(wide)
        assert torch.equal(permuted[entry.name], expected)


@pytest.mark.parametrize("signed", [False, True])
def test_permute_inverts_itself_and_notices_a_wrong_permutation(signed):
    flat, table, permutations = example(signed=signed)
    permuted = fastws.permute(flat, table, permutations)
    assert not torch.equal(permuted, flat)
    assert torch.equal(torch.ops.fastws.permute(permuted, table, permutations, True), flat)
    assert not torch.equal(torch.ops.fastws.permute(permuted, table, permutations.roll(1, 0), True), flat)


@pytest.mark.parametrize("device", devices())
def test_permute_gradients(device):
    flat, table, permutations = example(2, torch.float64, device)
    function = lambda x: fastws.permute(x, table, permutations)  # noqa: E731
    assert torch.autograd.gradcheck(function, flat.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(function, flat.clone().requires_grad_())


@pytest.mark.parametrize("device", devices())
def test_permute_opcheck(device):
    flat, table, permutations = example(device=device)
    torch.library.opcheck(torch.ops.fastws.permute.default, (flat.requires_grad_(), table, permutations))
    starts = torch.tensor([0, 3, 5], device=device)
    torch.library.opcheck(torch.ops.fastws.random_permutations.default, (starts, 5, 4, 1, 2))


def test_permute_compiles_once_for_all_offsets():
    layout = fastws.Layout.from_checkpoint(small_checkpoint())
    table, _, sizes = permuted_tables(layout, torch.Generator().manual_seed(1))
    flat, starts = torch.randn(3, layout.num_weights), torch.tensor([0, *torch.tensor(sizes).cumsum(0)])

    def augment(flat, offset):
        permutations = torch.ops.fastws.random_permutations(starts, sum(sizes), len(flat), 1, offset)
        return fastws.permute(2 * flat, table, permutations)

    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")  # needs no compiler
    for offset in range(2, 5):
        assert torch.equal(compiled(flat, offset), augment(flat, offset))
    with torch.compiler.set_stance("fail_on_recompile"):
        for offset in range(5, 9):
            assert torch.equal(compiled(flat, offset), augment(flat, offset))


@pytest.mark.parametrize("name, function, device", implementations("random_permutations"))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch", [0, 3])
def test_random_permutations_are_the_reference(name, function, device, sizes, batch):
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device=device)
    for seed, offset in [(2**40 + 3, 5), (2**63 - 1, 2**33)]:
        args = starts, sum(sizes), batch, seed, offset
        assert torch.equal(function(*args), random_permutations_reference(*args))


def test_random_permutations_on_host_are_the_reference():
    """The device code of CUDA, threads of which are fibers; the last group does not fit into shared memory."""
    function = compile_for_host("permute").random_permutations
    starts = torch.tensor([0, 3, 4, 94, 94, 1100, 9500])
    for batch, seed, offset in [(3, 2**40 + 3, 5), (2, 2**63 - 1, 2**33)]:
        drawn = torch.full((batch, 9500), -1, dtype=torch.int32)
        function(numbers(9500, len(starts) - 1, batch, seed, offset), pointers(starts, drawn))
        assert torch.equal(drawn, random_permutations_reference(starts, 9500, batch, seed, offset))


@pytest.mark.parametrize("name, function, device", implementations("random_permutations"))
def test_random_permutations_are_permutations(name, function, device):
    sizes = [7, 1, 30]
    drawn = function(torch.tensor([0, 7, 8, 38], device=device), 38, 4, 3, 0)
    for group in drawn.split(sizes, 1):
        assert torch.equal(group.sort(1).values, torch.arange(group.shape[1]).int().to(device).expand_as(group))


def test_random_permutations_are_uniform():
    draws = 24_000
    drawn = fastws.random_permutations([4], draws, seed=1)
    counts = torch.unique(drawn, dim=0, return_counts=True)[1].double()
    assert len(counts) == 24
    chi_square = ((counts - draws / 24) ** 2 / (draws / 24)).sum()
    assert chi_square < 49.7  # quantile 0.999 of chi square with 23 degrees of freedom


def test_random_permutations_differ_between_draws_seeds_and_offsets():
    first = fastws.random_permutations([50], 2, seed=1)
    assert torch.equal(first, fastws.random_permutations([50], 2, seed=1))
    others = [first[1:], *(fastws.random_permutations([50], 1, seed=s, offset=o) for s, o in [(2, 0), (1, 1)])]
    assert all(not torch.equal(first[:1], other) for other in others)


def test_random_permutations_do_not_depend_on_the_threads():
    threads, drawn = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        drawn.append(fastws.random_permutations([300, 40], 64, seed=1))
    torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_permute_names_the_wrong_argument(monkeypatch):
    flat, table, permutations = example()
    with pytest.raises(ValueError, match=r"permute: permutations must be \[3, S\] int32 on cpu, got"):
        fastws.permute(flat, table, permutations.long())
    with pytest.raises(ValueError, match="permute: flat must be"):
        fastws.permute(flat.int(), table, permutations)
    with pytest.raises(ValueError, match="random_permutations: batch must be at least 0 and sizes at least 1, got 2"):
        fastws.random_permutations([3, 0], 2, seed=0)
    with pytest.raises(ValueError, match="random_permutations: seed and offset must be in"):
        fastws.random_permutations([3], 2, seed=-1)
    broken = permutations.clone()
    broken[1, 0] = broken[1, 1]
    monkeypatch.setattr(_native, "CHECK", True)
    with pytest.raises(ValueError, match=r"permute: permutations\[:, 0:\d+\] must hold each of 0..\d+ once"):
        fastws.permute(flat, table, broken)
    fastws.permute(flat, table, permutations)
