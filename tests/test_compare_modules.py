"""From a checkpoint and a name to the module that computes with it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastws.compare.modules import Checkpoint, Words, find_network, require_network
from fastws.nn import CIFARResNet, ResNet
from fastws.zoo.making.architectures import build

ROOT = Path(__file__).parents[1]


def saved(module, path):
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, path)
    return Checkpoint.open(path)


def test_factory(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(
        "import torch\ndef small():\n    return torch.nn.Linear(3, 2), torch.ones(1, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    checkpoint = saved(nn.Linear(3, 2), tmp_path / "a.safetensors")
    network = require_network(checkpoint, Words(architecture="own_networks:small"))
    assert network.module(network.inputs).shape == (1, 2) and not network.module.training
    other = saved(nn.Linear(4, 2), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: checkpoint must fit own_networks:small, but"):
        require_network(other, Words(architecture="own_networks:small"))


@pytest.mark.parametrize(
    "name, shape, classes", [("digits-cnn", (1, 8, 8), 10), ("cnn-s", (1, 28, 28), 7), ("cnn-l", (3, 32, 32), 10)]
)
def test_classes_and_images_of_zoo_architectures_follow_from_the_checkpoint(name, shape, classes, tmp_path):
    module = build(name, shape, num_classes=classes)
    checkpoint = saved(module, tmp_path / "a.safetensors")
    network = require_network(checkpoint, Words(architecture=name, activation="tanh"))
    assert network.inputs.shape == (1, *shape) and network.module(network.inputs).shape == (1, classes)
    network.module.load_state_dict(checkpoint.state)
    assert torch.equal(network.module(network.inputs), module.eval()(network.inputs))
    with pytest.raises(ValueError, match=f"--activation must be given for {name}"):
        require_network(checkpoint, Words(architecture=name))


def test_one_name_of_two_networks_is_the_one_that_fits(tmp_path):
    with torch.device("meta"):
        cifar, imagenet = ResNet(18, 7), ResNet(18, 5, stem="imagenet")
    for module, stem in ((cifar, 3), (imagenet, 7)):
        made = module.to_empty(device="cpu")
        checkpoint = saved(made, tmp_path / "a.safetensors")
        network = find_network(checkpoint, Words(architecture="resnet18"))
        assert network.module.conv1.kernel_size == (stem, stem)
        assert network.module.fc.out_features == made.fc.out_features


def test_without_a_name_there_is_no_module_but_advice(tmp_path):
    checkpoint = saved(CIFARResNet(20, "a"), tmp_path / "a.safetensors")
    assert find_network(checkpoint, Words()) is None
    with pytest.raises(ValueError, match=r"--architecture must say .* got none; it fits cifar-resnet20-a$"):
        require_network(checkpoint, Words())


def test_another_network_names_the_first_tensor_that_differs(tmp_path):
    checkpoint = saved(nn.Linear(3, 2), tmp_path / "a.safetensors")
    for name in ("cifar-resnet20-a", "cnn-s"):
        with pytest.raises(ValueError, match=f"a.safetensors: checkpoint must fit {name}, but '.*weight' must be"):
            require_network(checkpoint, Words(architecture=name, activation="relu"))


def test_quantised_weights_are_refused(tmp_path):
    save_file({"a.weight": torch.ones(2, 2, dtype=torch.int8), "a.bias": torch.ones(2)}, tmp_path / "a.safetensors")
    refused = pytest.raises(ValueError, match="must hold its weights as floats, got 4 quantised")
    with pytest.warns(UserWarning, match="quantised"), refused:
        Checkpoint.open_whole(tmp_path / "a.safetensors")


# --- folders of transformers


def test_folder_without_transformers_or_of_unknown_architecture(tmp_path):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for content, said in (({}, "must name its architecture"), ({"architectures": ["os"]}, "os")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"config.json: .*{said}.*give --architecture module:function"):
            find_network(checkpoint, Words())


@pytest.mark.parametrize("tied", [False, True])
def test_folder_of_transformers(tied, tmp_path, monkeypatch):
    # transformers looks for a package named kernels, and must not find the folder of that name
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place or ".").resolve() != ROOT])
    monkeypatch.chdir(tmp_path)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install .[hf]")
    small = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.LlamaConfig(**small, intermediate_size=20, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    network = require_network(Checkpoint.open(tmp_path), Words())
    network.module.load_state_dict(model.state_dict())
    torch.testing.assert_close(network.module(**network.inputs).logits, model(**network.inputs).logits)
