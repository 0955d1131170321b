import copy
import doctest
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from group_networks import (
    GPT,
    TOKENS,
    Attention,
    Beside,
    Experts,
    Gated,
    GroupNormed,
    Latent,
    Llama,
    PostNorm,
    Recurrent,
    Residual,
    ResNeXt,
    mlp,
    resnet8,
)
from torch import nn

import fastws
import fastws.group.group
from fastws.group.finding import null_vectors
from fastws.symmetry.verify import randomise

IMAGE = torch.linspace(-1, 1, 3 * 64).sin().view(1, 3, 8, 8)
X = torch.linspace(-1, 1, 8).view(2, 4)
CASES = {
    "relu": (mlp(), X, {"S+": 2}),
    "gelu": (mlp(nn.GELU), X, {}),
    "silu": (mlp(nn.SiLU), X, {}),
    "elu": (mlp(nn.ELU), X, {}),
    "gated": (Gated(), X, {"G": 1}),
    "gated by relu": (Gated(F.relu), X, {"G": 1, "S+": 1}),
    "clamped": (Gated(clamped=True), X, {}),
    "low rank": (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False)), X, {"L": 1}),
    "gpt": (GPT(layers=1), TOKENS, {"N1": 3, "N3": 1, "N5": 1, "A2": 1, "A3": 1, "A8": 1, "A9": 1}),
    "tied": (GPT(layers=1, tied=True), TOKENS, {"N1": 2, "N5": 1, "A2": 1, "A3": 1, "A8": 1, "A9": 1}),
    "llama": (Llama(), TOKENS, {"N1": 3, "N2": 1, "A2": 1, "A4": 1, "G": 1, "P": 1}),
    "interleaved": (Llama(rotary="interleaved"), TOKENS, {"N1": 3, "N2": 1, "A2": 1, "A4": 1, "G": 1, "P": 1}),
    "grouped convolution": (ResNeXt(), IMAGE, {"P": 2}),
    "few wide groups": (ResNeXt(2, 8, 8, F.relu), IMAGE, {"P": 2, "S+": 2}),
    "flattened beside others": (Beside(), IMAGE, {}),
    "experts": (Experts(), X, {"G": 1, "P": 1}),
    "experts with relu": (Experts(gated=False), X, {"S+": 1, "P": 1}),
    "latent": (Latent(), torch.linspace(-3, 3, 40).sin().view(1, 5, 8), {"N1": 1, "N2": 1, "A2": 1, "A3": 1}),
    "post-norm": (PostNorm(), X, {"N1": 1, "N5": 1}),
    "projected lstm": (Recurrent(2), torch.linspace(-3, 3, 18).sin().view(1, 6, 3), {"L": 1}),
    "group norm": (GroupNormed(), IMAGE, {}),
    "bias before a batch norm": (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)).eval(),
        X,
        {"B1": 2, "B2": 1},
    ),
    "resnet": (resnet8(), IMAGE, {"B1": 18, "B3": 6}),
}
GROUPS = {}


def traced(name):
    if name not in GROUPS:
        module, inputs, _ = CASES[name]
        GROUPS[name] = fastws.Group.trace(module, inputs)
    return GROUPS[name]


@pytest.mark.parametrize("name", CASES)
def test_the_lines_of_each_network_are_found_and_no_others(name):
    module, inputs, expected = CASES[name]
    group = traced(name)
    assert Counter(line.id for line in group.lines) == expected
    assert group.verify(module, inputs) < 1e-9
    for line in group.lines:
        assert group.only(line.id).verify(module, inputs, trials=1) < 1e-9
        assert f"({line.id})" in group.describe()


@pytest.mark.parametrize("name", ["relu", "gated", "low rank", "gpt", "llama", "resnet", "experts"])
def test_an_element_moves_a_checkpoint_keeps_its_function_and_can_be_undone(name):
    module, inputs, _ = CASES[name]
    group, moved = traced(name), copy.deepcopy(module).double().eval()
    with torch.no_grad():
        randomise(moved, 5)
    state = copy.deepcopy(moved).state_dict()
    first, second = group.random(1), group.random(2)
    element = group.compose(first, second)
    changed = group.apply(element, state)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    before = moved(inputs)
    moved.load_state_dict(changed)
    assert (moved(inputs) - before).abs().max() < 1e-9 * before.abs().max()
    for key in {name for line in group.lines for name in line.tensors}:
        assert not torch.allclose(changed[key], state[key])
    back = group.apply(group.inverse(element), changed)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["relu", "gated by relu", "low rank", "gpt", "tied", "llama", "resnet"])
def test_the_canonical_form_does_not_depend_on_what_is_continuous(name):
    module, inputs, _ = CASES[name]
    group = traced(name)
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        randomise(module, 5)
    state = module.state_dict()
    canonical, element = group.canonical(state)
    assert group.verify(module, inputs, element) < 1e-9
    back = group.apply(group.inverse(element), canonical)
    for key, tensor in canonical.items():
        torch.testing.assert_close(back[key], state[key], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(group.apply(element, state)[key], tensor, rtol=1e-8, atol=1e-8)
    other, _ = group.canonical(group.apply(group.without("P").random(6), state))
    for key, tensor in canonical.items():  # what is left are signs, phases and rotations, which keep norms
        torch.testing.assert_close(other[key].norm(), tensor.norm(), rtol=1e-5, atol=1e-9)


def test_null_vectors_of_many_outputs_need_no_square_of_them():
    slopes = torch.randn(2_000_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert null_vectors(torch.cat([slopes, -2 * slopes[:, :1]], 1)) == [[2, 0, 1]]


def test_what_is_discrete_rounds_nothing_in_half_precision():
    group = traced("gated").discrete()
    state = {name: tensor.bfloat16() for name, tensor in CASES["gated"][0].state_dict().items()}
    moved = group.apply(group.random(3), state)
    assert {line.id for line in group.lines} == {"G"}
    for name, tensor in state.items():
        assert moved[name].dtype == torch.bfloat16
        assert torch.equal(moved[name].abs().flatten().sort()[0], tensor.abs().flatten().sort()[0])
    assert not torch.equal(moved["up.weight"], state["up.weight"])


def test_lines_can_be_chosen_and_switched_off():
    group = traced("llama")
    assert {line.id for line in group.without("N1", "P").lines} == {"A2", "A4", "G", "N2"}
    assert {move.line for move in group.only("P").random()} == {"P", "P:blocks.0.attention.q.weight"}
    with pytest.raises(ValueError, match="group: lines must be of A2, A4, G, N1, N2, P, got XY"):
        group.only("XY")
    with pytest.raises(ValueError, match="group: lines must be of A2, A4, G, N1, N2, got P"):
        group.without("P").only("P")


def test_lines_are_chosen_where_none_can_be_looked_for(monkeypatch):
    def refuse(*_):
        raise ValueError("group: module must run in float64 on the examples")

    monkeypatch.setattr(fastws.group.group, "Function", refuse)
    assert not fastws.Group.trace(mlp(), X).only("P").lines
    with pytest.raises(ValueError, match="group: lines must be of P, got S+"):
        fastws.Group.trace(mlp(), X, lines=["S+"])


def test_states_that_do_not_fit_are_refused():
    group, state = traced("relu"), CASES["relu"][0].state_dict()
    with pytest.raises(ValueError, match=r"group: 0.bias must be \[8\], got \[3\]"):
        group.apply((), state | {"0.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"group: state must hold 0.bias \[8\], got no such tensor"):
        group.apply((), {name: tensor for name, tensor in state.items() if name != "0.bias"})
    for name in ("gpt", "relu"):
        broken = {key: torch.full_like(tensor, torch.nan) for key, tensor in CASES[name][0].state_dict().items()}
        with pytest.raises(ValueError, match="group: weights must be finite, got others in"):
            traced(name).canonical(broken)
    with pytest.raises(ValueError, match="group: moves must be of the lines of this group, got S:x"):
        group.apply((("S:x", torch.ones(8)),), state)


def test_docstring_examples_run():
    result = doctest.testmod(fastws.group.group, extraglobs={"fastws": fastws, "torch": torch})
    assert result.attempted and not result.failed


def test_tied_tensors_move_as_one():
    module, inputs, _ = CASES["tied"]
    group = traced("tied")
    moved = group.apply(group.random(), module.state_dict())
    assert torch.equal(moved["head.weight"], moved["tokens.weight"])
    with pytest.raises(ValueError, match="must hold the numbers of tokens.weight, to which it is tied"):
        group.apply((), module.state_dict() | {"head.weight": torch.zeros(20, 16)})


def test_lines_of_a_deep_network_do_not_depend_on_its_inputs():
    """Every convolution before a batch norm has its scales, however little its outputs depend on it."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        blocks = (Residual(4, 4, 1) for _ in range(6))
        deep = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
        found.append(fastws.Group.trace(deep.eval(), torch.randn(1, 3, 16, 16)))
    assert found[0].describe() == found[1].describe()
    assert sum(line.id == "B1" for line in found[0].lines) == 2 * 12


def test_modules_without_gradients_have_the_same_lines():
    class Closed(nn.Sequential):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    names = [fastws.Group.trace(kind(*mlp()), x).describe() for kind in (nn.Sequential, Closed)]
    assert names[0] == names[1] and "S+" in names[0]


def test_a_free_bias_that_is_the_only_one_is_found():
    attention = Attention(8, 2, bias=False)
    attention.k = nn.Linear(8, 8)
    group = fastws.Group.trace(attention, torch.randn(1, 5, 8))
    assert [line.tensors for line in group.lines if line.id == "A8"] == [["k.bias"]]
