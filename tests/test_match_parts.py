"""Matching a part of a network at a time."""

import pytest
import torch
from group_networks import GPT, TOKENS, Llama

import fastws
from fastws.matching.parts import element_of, find_parts, match_parts
from fastws.matching.whole import closeness, match_whole
from fastws.symmetry.verify import randomise

MAKE = {
    "gpt": lambda: GPT(layers=3),
    "tied": lambda: GPT(layers=3, tied=True),
    "llama": lambda: Llama(layers=2),
    "tied llama": lambda: Llama(layers=2, tied=True),
}
FOUND = {}


def traced(name):
    if name not in FOUND:
        module = MAKE[name]()
        FOUND[name] = module, fastws.Group.trace(module, TOKENS)
    return FOUND[name]


def weights(module, seed):
    with torch.no_grad():
        randomise(module.double(), seed)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def matched(group, a, b):
    """Network b in the coordinates of network a, a part at a time, and what was found."""
    a, b = group.given(a), group.given(b)
    names = [[name for name in a if not name.startswith("blocks.")]]
    names += [[name for name in a if name.startswith(f"blocks.{number}.")] for number in range(3)]
    names = [some for some in names if some]
    parts = find_parts(group, names)
    held = [[{name: x[name] for name in some} for x in (a, b)] for some in names]
    found = match_parts(parts, held.__getitem__, 0)
    moved = {}
    for number, part in enumerate(parts):
        moved |= part.group.apply(element_of(part, found, number, *held[number]), held[number][1])
    return moved, found


def outputs(module, state):
    module.load_state_dict(state, strict=False)
    with torch.no_grad():
        return module(TOKENS)


@pytest.mark.parametrize("lines", ["whole", "discrete"])
@pytest.mark.parametrize("name", MAKE)
def test_planted_elements_are_found_part_by_part(name, lines):
    module, group = traced(name)
    group = group if lines == "whole" else fastws.Group(group.symmetry)
    a = group.given(weights(module, 0))
    torch.manual_seed(1)
    near = {key: x + 0.02 * x.std() * torch.randn_like(x) for key, x in a.items()}
    b = group.apply(group.random(2), near)
    moved, found = matched(group, a, b)
    assert closeness(a, moved).distance < 0.03 < 0.5 < closeness(a, b).distance
    assert found.cosine > 0.99
    expected = outputs(module, b)
    assert (outputs(module, moved) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_strangers_come_nearly_as_close_as_at_once(name):
    module, group = traced(name)
    a, b = (group.given(weights(module, seed)) for seed in (3, 4))
    moved, found = matched(group, a, b)
    expected = outputs(module, b)
    assert (outputs(module, moved) - expected).abs().max() < 1e-8 * expected.abs().max()
    _, report = match_whole(group, a, b)
    assert found.cosine > 0.8 * report.whole.cosine > 0.1
