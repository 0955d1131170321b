import doctest
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import CASES, networks
from small_zoo import make_small_zoo
from test_signs import CASES as SIGNED
from torch import nn

import fastws
from fastws.layout.layout import Layout
from fastws.matching.canonical import canonical, canonical_hashes, order_of
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.align import Config, align
from fastws.zoo.alignment import Alignment, aligned_rows

FORMS = ["l2", "lexicographic"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_form_is_that_of_all_permuted_copies_and_the_same_function(case, form):
    symmetry, layout, module, inputs, flat = networks(case, 3)
    copies = symmetry.permute(flat.repeat(3, 1), symmetry.random(9, seed=4), layout)
    found = [symmetry.permute(rows, canonical(rows, symmetry, layout, form), layout) for rows in (flat, copies)]
    assert torch.equal(found[0].repeat(3, 1), found[1])
    assert not torch.equal(found[0], flat)
    again = symmetry.permute(found[0], canonical(found[0], symmetry, layout, form), layout)
    assert torch.equal(again, found[0])
    layout, module = Layout.from_checkpoint(module), module.double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    outputs = []
    for row in (flat[1].double(), found[0][1].double()):
        module.load_state_dict(layout.unflatten(row, like=module))
        with torch.no_grad():
            outputs.append(module(inputs))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def published(symmetry, state, form):
    """As the published code does it: layer after layer, each applied before the next is looked at."""
    chosen = symmetry.identity()[0, : symmetry.starts[-1]].clone()
    for group, name in enumerate(symmetry.names):
        moved = symmetry.permute_state(state, symmetry.expand(chosen))
        rows = torch.cat([moved[name].flatten(1), moved[name.replace("weight", "bias")][:, None]], 1)
        if form == "l2":
            order = sorted(range(len(rows)), key=lambda unit: rows[unit].norm(), reverse=True)  # noqa: B023
        else:
            without_bias = moved[name].dim() > 2
            lists = (rows[:, :-1] if without_bias else rows).tolist()
            order = sorted(range(len(rows)), key=lambda unit: lists[unit])  # noqa: B023
        first, size = symmetry.starts[group], symmetry.sizes[group]
        chosen[first : first + size] = chosen[first : first + size][order]
    return chosen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["mlp", "CNN with flatten"])
def test_plain_networks_get_the_published_order(case, form):
    symmetry, layout, module, _, flat = networks(case, 4)
    layout = Layout.from_checkpoint(module)
    expected = torch.stack([published(symmetry, layout.unflatten(row), form) for row in flat])
    assert torch.equal(canonical(flat, symmetry, layout, form)[:, : symmetry.starts[-1]], expected)


def test_residual_stream_is_sorted_where_it_begins():
    symmetry, layout, module, _, flat = networks("ResNet", 1)
    layout = Layout.from_checkpoint(module)
    state = layout.unflatten(symmetry.permute(flat, canonical(flat, symmetry, layout), layout)[0])
    for name in symmetry.names:
        norms = state[name].flatten(1).norm(dim=1)
        assert (norms.diff() <= 0).all(), name


ODD = [name for name, (_, _, flips) in SIGNED.items() if any(flips)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ODD)
def test_form_is_that_of_all_copies_whose_units_changed_sign(name, form):
    module, inputs, _ = SIGNED[name]
    symmetry, layout = Symmetry.trace(module, inputs), Layout.from_checkpoint(module)
    flat = torch.randn(3, layout.num_weights, generator=torch.Generator().manual_seed(0))
    drawn = symmetry.random(9, seed=4, flips=True)
    copies = symmetry.permute(flat.repeat(3, 1), drawn, layout)
    assert (drawn < 0).any()
    first, second = (
        symmetry.permute(rows, canonical(rows, symmetry, layout, form, flips=True), layout) for rows in (flat, copies)
    )
    assert torch.equal(first.repeat(3, 1), second)
    assert torch.equal(symmetry.permute(first, canonical(first, symmetry, layout, form, flips=True), layout), first)
    unsigned = canonical(copies, symmetry, layout, form)
    some = torch.arange(9) % 2 == 0
    mixed = canonical(copies, symmetry, layout, form, flips=some)
    assert (unsigned >= 0).all() and torch.equal(mixed[~some], unsigned[~some])
    assert torch.equal(mixed[some], canonical(copies, symmetry, layout, form, flips=True)[some])


def test_sums_of_cubes_of_signed_rows_are_positive():
    module, inputs, _ = SIGNED["tanh"]
    symmetry, layout = Symmetry.trace(module, inputs), Layout.from_checkpoint(module)
    flat = torch.randn(2, layout.num_weights, generator=torch.Generator().manual_seed(1))
    moved = symmetry.permute(flat, canonical(flat, symmetry, layout, flips=True), layout)
    for row in moved:
        state = layout.unflatten(row)
        for layer in ("0", "2"):
            rows = torch.cat([state[f"{layer}.weight"], state[f"{layer}.bias"][:, None]], 1)
            assert (rows.double().pow(3).sum(1) > 0).all()


def test_sign_that_nothing_decides_stays():
    # tanh(W x) + x: rows and columns are one group and nothing else tells signs
    segments = ((0, 6, 1, True),)
    symmetry = Symmetry((6,), ("w.weight",), {"w.weight": (6, 6)}, {}, {"w.weight": (segments, segments)}, [])
    layout = Layout.from_checkpoint({"w.weight": torch.empty(6, 6)})
    flat = torch.randn(2, 36, generator=torch.Generator().manual_seed(0))
    assert symmetry.flips == (True,) and (canonical(flat, symmetry, layout, flips=True) >= 0).all()


def test_group_without_sorted_inputs_is_sorted_by_the_entries_of_its_rows():
    # W x + x: rows and columns are one group
    symmetry = Symmetry((6,), ("w.weight",), {"w.weight": (6, 6)}, {}, {"w.weight": (((0, 6, 1),), ((0, 6, 1),))}, [])
    layout = Layout.from_checkpoint({"w.weight": torch.empty(6, 6)})
    flat = torch.randn(4, 36, generator=torch.Generator().manual_seed(0))
    copies = symmetry.permute(flat, symmetry.random(4), layout)
    for form in FORMS:
        first, second = (
            symmetry.permute(rows, canonical(rows, symmetry, layout, form), layout) for rows in (flat, copies)
        )
        assert torch.equal(first, second) and not torch.equal(flat, copies)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_form_does_not_depend_on_the_order_of_tensors(case, form):
    symmetry, layout, module, _, flat = networks(case, 2)
    backwards = Layout.from_checkpoint(dict(reversed(module.state_dict().items())))
    turned = torch.stack([backwards.flatten(layout.unflatten(row)) for row in flat])
    assert torch.equal(canonical(turned, symmetry, backwards, form), canonical(flat, symmetry, layout, form))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_lexicographic_order_is_that_of_lists(size, length, symbols, seed):
    numbers = torch.randint(0, symbols, (3, size, length), generator=torch.Generator().manual_seed(seed)).float()
    numbers[0] = -numbers[0]  # also -0.0, which is 0.0
    expected = [sorted(range(size), key=lambda unit: rows[unit]) for rows in numbers.tolist()]  # noqa: B023
    assert order_of(numbers, "lexicographic").tolist() == expected


def test_equal_units_keep_their_order():
    symmetry, layout, module, _, flat = networks("mlp", 1)
    entry = next(entry for entry in Layout.from_checkpoint(module).entries if entry.name == symmetry.names[0])
    flat[:, entry.offset : entry.offset + entry.numel] = 0
    found = canonical(flat, symmetry, layout, "l2")[0, : symmetry.sizes[0]]
    bias = Layout.from_checkpoint(module).unflatten(flat[0])[symmetry.names[0].replace("weight", "bias")]
    assert torch.equal(found.long(), bias.abs().argsort(descending=True))
    flat[:] = 0
    assert torch.equal(canonical(flat, symmetry, layout, "lexicographic"), symmetry.identity())


def test_hashes_find_permuted_copies_and_nothing_else():
    symmetry, layout, _, _, flat = networks("CNN with flatten", 3)
    zoo = torch.cat([flat, symmetry.permute(flat, symmetry.random(3, seed=5), layout)])
    hashes = canonical_hashes(zoo, symmetry, layout)
    assert hashes[:3] == hashes[3:] and len(set(hashes)) == 3 and {len(name) for name in hashes} == {32}
    zoo[0, 0] = torch.nextafter(zoo[0, 0], torch.tensor(9.0))
    assert canonical_hashes(zoo, symmetry, layout)[0] != hashes[0]
    assert canonical_hashes(zoo, None, layout)[:3] != canonical_hashes(zoo, None, layout)[3:]
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0]])
    assert len(set(canonical_hashes(zeros, None, layout))) == 1
    assert (
        canonical_hashes(zoo.bfloat16(), symmetry, layout)[3]
        == canonical_hashes(zoo[3:4].bfloat16(), symmetry, layout)[0]
    )


@pytest.mark.parametrize("form", FORMS)
def test_zoo_is_written_like_an_alignment(tmp_path, form):
    zoo = make_small_zoo(tmp_path)
    made = align(Config(zoo=str(tmp_path), canonical=form))
    alignment = Alignment.open(zoo)
    assert alignment.method == made.method == form and alignment.permutations.shape == (36, sum(zoo.symmetry.sizes))
    assert aligned_rows(zoo, [0, 1]).shape == (2, zoo.layout.num_weights)
    last = zoo.rows(range(1, 72, 2))  # two states each; the last one's permutation is that of both
    found = canonical(last, zoo.symmetry, zoo.layout, form)
    expected = zoo.symmetry.permute(zoo.rows(range(72)), found.repeat_interleave(2, 0), zoo.layout)
    assert torch.equal(aligned_rows(zoo, range(72)), expected)
    reference = expected[1 + 2 * alignment.models.index(alignment.reference)].double()
    torch.testing.assert_close(alignment.after, expected[1::2].double() @ reference, rtol=1e-12, atol=0)


def test_bad_arguments_and_extremes():
    symmetry, layout, _, _, flat = networks("mlp", 2)
    with pytest.raises(ValueError, match=r"canonical: flat must be \[M, 722\] floating point, .*, got \[722\]"):
        canonical(flat[0], symmetry, layout)
    with pytest.raises(ValueError, match="canonical: form must be 'l2' or 'lexicographic', got 'absolute'"):
        canonical(flat, symmetry, layout, "absolute")
    with pytest.raises(ValueError, match="canonical: flat must be finite"):
        canonical(flat * torch.inf, symmetry, layout)
    assert canonical(flat[:0], symmetry, layout).shape == (0, symmetry.num_indices)
    alone = Symmetry.trace(nn.Linear(4, 3), torch.randn(1, 4))
    assert canonical(torch.randn(2, 15), alone, Layout.from_checkpoint(nn.Linear(4, 3))).shape == (2, 0)


def test_docstring_examples_run():
    result = doctest.testmod(import_module("fastws.matching.canonical"), extraglobs={"fastws": fastws, "torch": torch})
    assert result.attempted == 6 and result.failed == 0
