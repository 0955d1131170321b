"""Checkpoint files as others write them: names, keys, dtypes, and what is no checkpoint."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastws
from fastws.files.checkpoints import load_checkpoint
from fastws.files.names import plain_names
from fastws.nern.teachers import load_teacher, make_architecture
from fastws.zoo import read_checkpoints


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def save(state, path):
    save_file(dict(state), path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


# --- names

NAMES = {
    "parallel": (["module.a.weight", "module.b"], ["a.weight", "b"]),
    "compiled": (["_orig_mod.a.weight", "_orig_mod.b"], ["a.weight", "b"]),
    "both": (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
    "both, otherwise": (["_orig_mod.module.module._orig_mod.a", "_orig_mod.module.module._orig_mod.b"], ["a", "b"]),
    "compiled inside": (["layers.0._orig_mod.weight", "head.weight"], ["layers.0.weight", "head.weight"]),
    "not around all": (["module.a", "b"], ["module.a", "b"]),
    "not in front": (["a.module.b", "a.module.c"], ["a.module.b", "a.module.c"]),
    "two would become one": (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),
    "a tensor of this name": (["_orig_mod", "a"], ["_orig_mod", "a"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("names, plain", NAMES.values(), ids=NAMES)
def test_plain_names(names, plain):
    assert plain_names(names) == dict(zip(names, plain, strict=True))


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_are_dropped_in_every_format(tmp_path, prefix):
    net = network()
    layout, state = fastws.Layout.from_checkpoint(net), net.state_dict()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    files = [save(wrapped, tmp_path / f"a.{suffix}") for suffix in ("pt", "safetensors")]
    torch.save({"state_dict": wrapped}, tmp_path / "key.pt")
    torch.save(wrapped, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for suffix, index in (("safetensors", "a.safetensors.index.json"), ("pt", "a.bin.index.json")):
        (tmp_path / index).write_text(json.dumps({"weight_map": dict.fromkeys(wrapped, f"a.{suffix}")}))
        files.append(tmp_path / index)
    for source in (wrapped, tmp_path / "key.pt", tmp_path / "legacy.pt", *files):
        assert torch.equal(layout.flatten(source), layout.flatten(net))
        other = fastws.Layout.from_checkpoint(source)
        assert {entry.name: entry.shape for entry in other.entries} == {k: tuple(v.shape) for k, v in state.items()}
    zoo = read_checkpoints([*files[:2], tmp_path / "legacy.pt"], tmp_path / "zoo", like=layout)
    assert torch.equal(zoo.weights, layout.flatten(net).expand(3, -1))


def wrapped_networks(net):
    inner = copy.deepcopy(net)
    inner[0] = torch.compile(inner[0], backend="eager")
    compiled = torch.compile(net, backend="eager")
    return {
        "parallel": nn.DataParallel(net),
        "compiled": compiled,
        "one layer": inner,
        "both": nn.DataParallel(compiled),
    }


@pytest.mark.parametrize("name", ["parallel", "compiled", "one layer", "both"])
def test_wrapped_modules_have_the_layout_and_the_symmetry_of_what_they_wrap(name):
    net, x = network(), torch.randn(1, 4)
    layout, wrapped = fastws.Layout.from_checkpoint(net), wrapped_networks(net)[name]
    assert fastws.Layout.from_checkpoint(wrapped) == layout
    assert torch.equal(layout.flatten(wrapped), layout.flatten(net))
    symmetry = fastws.Symmetry.trace(wrapped, x)
    assert symmetry == fastws.Symmetry.trace(net, x) and symmetry.sizes == (8,)
    permutations, state = symmetry.random(1, 3)[0], wrapped.state_dict()
    permuted = symmetry.permute_state(state, permutations)
    assert permuted.keys() == state.keys()
    assert torch.equal(layout.flatten(permuted), symmetry.permute(layout.flatten(net), permutations, layout))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_teachers_may_be_saved_with_wrappers(tmp_path, suffix):
    state = make_architecture("cifar-resnet20-a", 10).state_dict()
    path = save({f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}, tmp_path / f"a.{suffix}")
    assert load_checkpoint(path).keys() == state.keys()
    loaded = load_teacher("cifar-resnet20-a", path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
