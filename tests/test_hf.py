"""Models of transformers: folders that they write, and their symmetries; with tiny random weights."""

import sys
from pathlib import Path

import pytest
import torch

import fastws

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install .[hf]")

ROOT = Path(__file__).parents[1]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
SMALL = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL |= {"intermediate_size": 20, "max_position_embeddings": 8}


@pytest.fixture(autouse=True)
def outside_of_the_repository(monkeypatch):
    """transformers looks for a package named kernels, and must not find the folder of that name."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place or ".").resolve() != ROOT])


def bert():
    config = transformers.BertConfig(**SMALL, type_vocab_size=2)
    kinds = torch.tensor([[0] * 5 + [1] * 3] * 2)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": kinds}
    return transformers.BertForMaskedLM(config), inputs


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=3, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS}


@pytest.mark.parametrize("make", [bert, llama])
def test_symmetry_of_a_model_permutes_its_saved_folder(make, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    model = model.eval()
    symmetry = fastws.Symmetry.trace(model, inputs)
    assert 12 in symmetry.sizes and symmetry.sizes.count(20) == 2 and symmetry.sizes.count(3) >= 2
    model.save_pretrained(tmp_path / "model")
    layout = fastws.Layout.from_checkpoint(tmp_path / "model")
    flat = layout.flatten(tmp_path / "model")
    permuted = symmetry.permute(flat, symmetry.random(1, seed=1)[0], layout)
    assert not torch.equal(permuted, flat)
    other, _ = make()
    other = other.eval()
    missing = other.load_state_dict(layout.unflatten(permuted), strict=False).missing_keys
    assert missing and set(missing) <= symmetry.aliases.keys()  # a folder holds one of several names that are tied
    with torch.no_grad():
        before, after = (network(**inputs)[0] for network in (model, other))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
