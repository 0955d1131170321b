"""Blocks that are alike: what is found in a few of them, said of all, is what is found in all."""

import json
import sys
from pathlib import Path

import pytest
from group_networks import GPT, TOKENS, Llama
from torch import nn

import fastws
from fastws.compare import tracing
from fastws.compare.hugging_face import make_hugging_face
from fastws.compare.modules import Network
from fastws.compare.tracing import few_blocks, trace_group, trace_symmetry
from fastws.group.repeat import Blocks, repeat
from fastws.layout.roles import load_state

ROOT = Path(__file__).parents[1]
SIZES = {"vocab_size": 70, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 10}
SIZES |= {"num_hidden_layers": 4, "max_position_embeddings": 12}
CONFIGS = {
    "GPT2LMHeadModel": {"n_layer": 4, "n_embd": 8, "n_head": 2, "vocab_size": 70, "n_positions": 12},
    "LlamaForCausalLM": SIZES | {"num_key_value_heads": 1},
    "BertForMaskedLM": SIZES,
    "Gemma3ForCausalLM": SIZES
    | {"num_key_value_heads": 1, "head_dim": 4, "layer_types": ["sliding_attention", "full_attention"] * 3}
    | {"num_hidden_layers": 6, "sliding_window": 4},
}
TYPES = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "BertForMaskedLM": "bert"}
TYPES |= {"Gemma3ForCausalLM": "gemma3_text"}


def lines_of(group):
    return {line.key: line for line in group.lines}


def assert_same_group(short, whole):
    # several sets of signs are as good as one another
    assert short.symmetry.unsigned() == whole.symmetry.unsigned() and short.symmetry.flips == whole.symmetry.flips
    assert lines_of(short) == lines_of(whole) and short.permutations() == whole.permutations()


def blocks_of(module, like, few=2):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_state(module).items()}
    return Blocks({"blocks.": like}, shapes, {}, {"blocks.": few})


@pytest.mark.parametrize("make", [GPT, Llama])
def test_lines_of_two_blocks_are_repeated_for_four(make):
    whole = make(width=8, heads=2, layers=4, tokens=30)
    found = repeat(fastws.Group.trace(make(width=8, heads=2, layers=2), TOKENS), blocks_of(whole, [0, 0, 0, 0]))
    assert_same_group(found, fastws.Group.trace(whole, TOKENS))
    assert found.symmetry.verify(whole, TOKENS) < 1e-9 and found.verify(whole, TOKENS) < 1e-9


def test_blocks_that_are_not_alike_are_refused():
    two = GPT(width=8, heads=2, layers=2)
    two.blocks[1].up = nn.Linear(8, 24, bias=False)
    traced = fastws.Group.trace(two, TOKENS)
    with pytest.raises(ValueError, match="blocks must be alike to be traced once"):
        repeat(traced, blocks_of(two, [0, 0]))
    wider = GPT(width=12, heads=2, layers=4)
    with pytest.raises(ValueError, match="must be .* where it moves, got"):
        repeat(fastws.Group.trace(GPT(width=8, heads=2, layers=2), TOKENS), blocks_of(wider, [0, 0, 0, 0]))


@pytest.mark.parametrize("name", CONFIGS)
def test_folders_of_transformers_are_traced_on_few_blocks(name, tmp_path, monkeypatch):
    # transformers looks for a package named kernels, and must not find the folder of that name
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place or ".").resolve() != ROOT])
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("transformers", reason="transformers is not installed: pip install .[hf]")
    content = CONFIGS[name] | {"architectures": [name], "model_type": TYPES[name]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    module, inputs = make_hugging_face(tmp_path)
    network = Network(module.eval().requires_grad_(False), inputs, name, tmp_path)
    small, _, blocks = few_blocks(network)
    few = 4 if name.startswith("Gemma3") else 2
    assert small.config.num_hidden_layers == few and small.config.vocab_size < 70
    assert [len(like) for like in blocks.like.values()] == [module.config.num_hidden_layers]
    traced = []
    trace = fastws.Group.trace
    monkeypatch.setattr(tracing.Group, "trace", lambda module, inputs: traced.append(module) or trace(module, inputs))
    group = trace_group(network)
    assert len(traced) == 1 and len(list(traced[0].parameters())) < len(list(module.parameters()))
    assert_same_group(group, trace(module, inputs))
    assert trace_symmetry(network).unsigned() == group.symmetry.unsigned()
    assert group.verify(module, inputs) < 1e-9
