"""Transformers aligned a block at a time."""

import sys
from pathlib import Path

import pytest
import torch

import fastws
from fastws.compare import align_blocks
from fastws.compare.align import Config, align
from fastws.compare.align_blocks import empty_network
from fastws.compare.modules import Checkpoint, Words, require_network
from fastws.compare.running import outputs_of
from fastws.compare.tracing import trace_group, trace_symmetry
from fastws.files.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
SIZES = {"vocab_size": 70, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
SIZES |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "max_position_embeddings": 12}
GPT2 = {"n_layer": 4, "n_embd": 16, "n_head": 4, "vocab_size": 70, "n_positions": 12, "bos_token_id": None}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Writes a network, and a near copy of it that was moved by a random element, in shards; gives both."""
    # transformers looks for a package named kernels, and must not find the folder of that name
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place or ".").resolve() != ROOT])
    monkeypatch.chdir(tmp_path)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install .[hf]")

    def make(kind, dtype, continuous):
        config = transformers.LlamaConfig(**SIZES) if kind == "llama" else transformers.GPT2Config(**GPT2)
        cls = transformers.LlamaForCausalLM if kind == "llama" else transformers.GPT2LMHeadModel
        torch.manual_seed(0)
        module = cls(config).to(dtype)
        with torch.no_grad():
            for tensor in module.parameters():
                tensor.add_(0.3 * torch.randn_like(tensor))
        module.save_pretrained(tmp_path / "base", max_shard_size="4KB")
        network = require_network(Checkpoint.open(tmp_path / "base"), Words())
        group = trace_group(network) if continuous else fastws.Group(trace_symmetry(network))
        state = {name: x.detach() for name, x in module.state_dict().items()}
        noisy = {name: x + 0.01 * x.std() * torch.randn_like(x) for name, x in state.items()}
        noisy |= {name: noisy[tied] for name, tied in group.symmetry.aliases.items()}
        module.load_state_dict(group.apply(group.random(1), noisy))
        module.save_pretrained(tmp_path / "other", max_shard_size="4KB")
        return tmp_path / "base", tmp_path / "other", tmp_path / "out"

    return make


@pytest.mark.parametrize(
    "kind, dtype, continuous",
    [
        ("llama", torch.float32, True),
        ("llama", torch.bfloat16, False),
        ("gpt2", torch.float32, True),
        ("gpt2", torch.bfloat16, False),
    ],
)
def test_a_moved_copy_comes_back_block_by_block(kind, dtype, continuous, folders):
    base, other, out = folders(kind, dtype, continuous)
    config = Config(models=(str(other),), to=str(base), out=str(out), by_blocks=True, continuous=continuous)
    (report,) = align(config).values()
    assert report["aligned"]["relative"] < 0.03 < report["raw"]["relative"]
    assert report["exact"] is not continuous and report["error"] < (1e-5 if continuous else 1e-8)
    before, after, goal = (load_checkpoint(path) for path in (other, out, base))
    assert {name: (x.shape, x.dtype) for name, x in after.items()} == {
        name: (x.shape, x.dtype) for name, x in before.items()
    }
    assert all((after[name].double() - goal[name].double()).norm() < 0.1 * goal[name].double().norm() for name in after)
    assert {path.name for path in out.iterdir()} >= {path.name for path in other.iterdir()}
    network = require_network(Checkpoint.open(other), Words())
    outputs = [outputs_of(network, state)[0][0] for state in (before, after)]
    assert (outputs[0] - outputs[1]).abs().max() < (1e-4 if continuous else 1e-8) * outputs[0].abs().max()
    assert list(align(config).values()) == [report]


def test_nothing_is_written_if_a_block_would_change(folders, monkeypatch):
    base, other, out = folders("llama", torch.float32, False)
    honest = align_blocks.element_of

    def wrong(part, matched, number, a, b):
        return part.group.random(9) if number == 3 else honest(part, matched, number, a, b)

    monkeypatch.setattr(align_blocks, "element_of", wrong)
    with pytest.raises(ValueError, match=r"outputs must stay .* relative error .* of model.layers.2 after alignment"):
        align(Config(models=(str(other),), to=str(base), out=str(out), by_blocks=True))
    assert not out.exists()


def test_networks_that_have_no_blocks_are_refused(folders, tmp_path):
    base, other, out = folders("llama", torch.float32, False)
    assert all(x.is_meta for x in empty_network(Checkpoint.open(base)).module.state_dict().values())
    with pytest.raises(ValueError, match="--by-blocks must be left out but for folders of transformers"):
        align(Config(models=(str(other),), to=str(base), out=str(out), by_blocks=True, restarts=2))
