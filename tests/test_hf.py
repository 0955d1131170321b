"""Models of transformers: folders that they write, and their symmetries; with tiny random weights."""

import sys
from pathlib import Path

import pytest
import torch

import fastws
from fastws.commands.hub_symmetry import find_symmetry

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


def test_models_of_a_hub_are_traced_with_few_blocks(tmp_path):
    for name, kind in {"llama": "LlamaForCausalLM", "bert": "BertForMaskedLM"}.items():
        torch.manual_seed(0)
        deep = SMALL | {"num_hidden_layers": 5}
        model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**deep)).eval()
        model.save_pretrained(tmp_path / name)
        config = (tmp_path / name / "config.json").read_text()
        layout = fastws.Layout.from_checkpoint(tmp_path / name)
        symmetry = find_symmetry(config, layout)
        assert symmetry.sizes.count(20) == 5
        moved = symmetry.permute(layout.flatten(tmp_path / name), symmetry.random(1, seed=1)[0], layout)
        with torch.no_grad():
            before = model(IDS)[0]
            model.load_state_dict(layout.unflatten(moved), strict=False)
            torch.testing.assert_close(model(IDS)[0], before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="config must"):
        find_symmetry(config.replace("BertForMaskedLM", "NoSuchModel"), layout)
