import pytest
import torch
from group_networks import GPT, TOKENS, Experts, Gated, Latent, Llama, Recurrent, ResNeXt, mlp, resnet8
from torch import nn

import fastws
from fastws.matching.visits import Visitor, find_units
from fastws.matching.whole import climb, closeness, match_whole
from fastws.symmetry.verify import randomise

IMAGE = torch.linspace(-1, 1, 3 * 64).sin().view(1, 3, 8, 8)
X = torch.linspace(-1, 1, 8).view(2, 4)
CASES = {
    "relu": (mlp(width=24), X),
    "tanh": (mlp(nn.Tanh, width=24), X),
    "gated": (Gated(width=16), X),
    "low rank": (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False)), X),
    "resnet": (resnet8(), IMAGE),
    "gpt": (GPT(layers=1), TOKENS),
    "tied": (GPT(layers=1, tied=True), TOKENS),
    "llama": (Llama(shared=4), TOKENS),
    "grouped queries": (Llama(), TOKENS),
}
CASES |= {
    "grouped convolution": (ResNeXt(), IMAGE),
    "few wide groups": (ResNeXt(2, 8, 8, nn.functional.relu), IMAGE),
    "experts": (Experts(), X),
    "latent": (Latent(), torch.linspace(-3, 3, 40).sin().view(1, 5, 8)),
    "projected lstm": (Recurrent(2), torch.linspace(-3, 3, 18).sin().view(1, 6, 3)),
}
TRACED = {}


def drawn(name, seed=3):
    """A module with random weights, its group, and its weights in coordinates that are not canonical."""
    module, inputs = CASES[name]
    if name not in TRACED:
        TRACED[name] = fastws.Group.trace(module, inputs)
    module, group = module.double(), TRACED[name]
    with torch.no_grad():
        randomise(module, seed)
    return group, group.given(group.apply(group.random(seed + 1), module.state_dict()))


def noisy(group, state, amount):
    generator = torch.Generator().manual_seed(1)
    added = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in state.items()}
    spread = {name: 0.0 if name in group.statistics or x.numel() < 2 else float(x.std()) for name, x in state.items()}
    return {name: x + amount * spread[name] * added[name] for name, x in state.items()}


@pytest.mark.parametrize("amount", [0.0, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_a_planted_element_is_found_whatever_the_coordinates(name, amount):
    group, a = drawn(name)
    like_a = noisy(group, a, amount)
    planted = group.random(9)
    found, report = match_whole(group, a, group.apply(planted, like_a))
    # under noise the best fit is not the planted element: descent from there
    reference, _ = group.canonical(a)
    visitor = Visitor(group, reference, group.canonical(like_a)[0])
    climb(visitor, find_units(group), outwards=False)
    true = closeness(reference, visitor.state, group.statistics)
    assert report.whole.distance <= 1.05 * true.distance + 1e-6
    assert report.whole.cosine >= report.permutations.cosine - 1e-12
    assert group.verify(CASES[name][0], CASES[name][1], found) < 1e-9
    if not amount:
        moved = group.apply(found, group.apply(planted, a))
        for key, tensor in a.items():
            torch.testing.assert_close(moved[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "resnet", "gpt", "llama"])
def test_strangers_come_no_farther_than_by_permutations(name):
    (group, a), (_, b) = drawn(name, 3), drawn(name, 13)
    _, report = match_whole(group, a, b)
    assert report.raw.objective <= report.permutations.objective
    assert report.permutations.cosine < report.whole.cosine


@pytest.mark.parametrize("name", ["relu", "resnet", "gpt", "llama"])
def test_matches_are_repeated_and_restarts_make_none_worse(name):
    (group, a), (_, b) = drawn(name, 3), drawn(name, 13)
    found, report = match_whole(group, a, b)
    again, _ = match_whole(group, a, b)
    assert all(torch.equal(x.value, y.value) for x, y in zip(found, again, strict=True))
    _, more = match_whole(group, a, b, restarts=3)
    assert more.whole.objective >= report.whole.objective


def test_a_network_stays_where_it_is_for_itself():
    group, a = drawn("gpt")
    found, report = match_whole(group, a, a)
    assert report.whole.distance < 1e-7
    moved = group.apply(found, a)
    for key, tensor in a.items():
        torch.testing.assert_close(moved[key], tensor, rtol=1e-6, atol=1e-6)


def test_free_biases_do_not_make_strangers():
    group, a = drawn("gpt")
    key_bias = "blocks.0.attention.k.bias"
    _, report = match_whole(group, a, a | {key_bias: torch.randn(16, dtype=torch.float64)})
    assert report.raw.distance > 0.01 and report.whole.distance < 1e-6


def test_networks_that_cannot_be_matched_are_refused():
    group, a = drawn("relu")
    with pytest.raises(ValueError, match="match: weights of b must be finite, got others in 0.bias"):
        match_whole(group, a, a | {"0.bias": torch.full((24,), torch.nan)})
    with pytest.raises(ValueError, match="match: restarts must be at least 1, got 0"):
        match_whole(group, a, a, restarts=0)
    with pytest.raises(ValueError, match="match: networks must have the same tensors, got x of one alone"):
        closeness({}, {"x": torch.zeros(1)})
