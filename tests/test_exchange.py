"""Symmetries in the words of other libraries, and back."""

import json

import pytest
import torch
from compared import network, save
from torch import nn

from fastws.cli import main
from fastws.nn import ResNet
from fastws.symmetry.exchange import from_axes_to_perm, from_perm_spec, to_axes_to_perm, to_perm_spec
from fastws.symmetry.symmetry import Symmetry


def shapes_of(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items() if x.is_floating_point()}


def permuted(spec, perms, state):
    """What the published code does: each axis that has a name is gathered."""
    result = {}
    for name, axes in spec.items():
        tensor = state[name]
        for axis, key in enumerate(axes):
            tensor = tensor if key is None else tensor.index_select(axis, perms[key])
        result[name] = tensor
    return result


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    module = ResNet(18)
    return module, Symmetry.trace(module, torch.randn(1, 3, 8, 8))


def test_axes_to_perm_permutes_as_the_symmetry(resnet):
    module, symmetry = resnet
    spec, notes = to_axes_to_perm(symmetry)
    assert notes == [] and spec["bn1.running_var"] == ("P_conv1",) and spec["fc.weight"][0] is None
    row = symmetry.random(1)[0]
    names = dict.fromkeys(key for axes in spec.values() for key in axes if key is not None)
    perms = dict(zip(names, row.long().split(symmetry.sizes), strict=True))
    state = {name: x for name, x in module.state_dict().items() if x.is_floating_point()}
    expected = symmetry.permute_state(state, row)
    assert all(torch.equal(x, expected[name]) for name, x in permuted(spec, perms, state).items())


def test_axes_to_perm_comes_back(resnet):
    module, symmetry = resnet
    found = from_axes_to_perm(to_axes_to_perm(symmetry).spec, shapes_of(module))
    assert (found.sizes, found.axes) == (symmetry.sizes, symmetry.axes)
    assert found.verify(module, torch.randn(1, 3, 8, 8)) < 1e-9


def test_flattened_axes_are_left_out_or_named():
    module = network()
    symmetry = Symmetry.trace(module, torch.randn(1, 1, 8, 8))
    spec, notes = to_axes_to_perm(symmetry)
    assert spec["module_list.2.weight"][0] is None and spec["module_list.5.weight"][1] is None
    assert notes == [
        "group module_list.2.weight stays, for module_list.5.weight axis 1 has several entries for each unit"
    ]
    spec, notes = to_axes_to_perm(symmetry, flattened=True)
    assert notes == [] and spec["module_list.5.weight"][1] == "P_module_list.2"
    found = from_axes_to_perm(spec, shapes_of(module))
    assert found.axes == symmetry.axes


def test_heads_stay_and_are_noted():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 2)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    symmetry = Symmetry.trace(Attention(), torch.randn(1, 5, 12))
    spec, notes = to_axes_to_perm(symmetry)
    assert any("attention.in_proj" in note for note in notes) and spec["attention.in_proj_weight"] == (None, None)


def test_perm_spec_numbers_every_axis_and_comes_back(resnet):
    module, symmetry = resnet
    spec, notes = to_perm_spec(symmetry)
    stem, last = spec["conv1"]["weight"], spec["fc"]
    assert len(stem) == 4 and stem[0] == spec["bn1"]["weight"][0] and len({*stem}) == 4
    assert last["weight"][0] == last["bias"][0] >= len(symmetry.sizes)
    assert "axes that stay" in notes[-1]
    fixed = {
        number
        for name, axes in symmetry.axes.items()
        for number, segments in zip(at(spec, name), axes, strict=True)
        if segments is None
    }
    found = from_perm_spec(spec, shapes_of(module), fixed)
    assert found.axes == symmetry.axes


def at(spec, name):
    for part in name.split("."):
        spec = spec[part]
    return spec


def test_signs_are_noted():
    symmetry = Symmetry.trace(network(activation="tanh"), torch.randn(1, 1, 8, 8))
    assert to_axes_to_perm(symmetry).notes[-1] == "signs of units are left out"


def test_bad_specifications():
    shapes = {"a.weight": (4, 3), "a.bias": (4,)}
    with pytest.raises(ValueError, match="tensor 'b' must have the 1 axes of the specification, got no such tensor"):
        from_axes_to_perm({"b": ("P",)}, shapes)
    with pytest.raises(ValueError, match="axis 0 of 'a.bias' must be a multiple of 3, the size of 'P', got 4"):
        from_axes_to_perm({"a.weight": (None, "P"), "a.bias": ("P",)}, shapes)
    with pytest.raises(ValueError, match="a.weight must have a tuple of whole numbers"):
        from_perm_spec({"a": {"weight": "P"}}, shapes)
    with pytest.raises(ValueError, match="'k' must move along one axis behind the first"):
        from_axes_to_perm({"k": (None, "P", "Q")}, {"k": (2, 3, 4)})


def test_command_writes_what_other_tools_read(tmp_path, capsys):
    path = save(network().state_dict(), tmp_path / "a.safetensors")
    words = ["symmetry", path, "--architecture", "digits-cnn", "--activation", "relu", "--no-whole"]
    main([*words, "--out", str(tmp_path / "s.json")])
    assert "8 units" in capsys.readouterr().out
    symmetry = Symmetry.from_dict(json.loads((tmp_path / "s.json").read_text()))
    assert symmetry == Symmetry.trace(network(), torch.randn(1, 1, 8, 8))
    main([*words, "--format", "axes-to-perm", "--out", str(tmp_path / "p.json")])
    shown = capsys.readouterr().out
    assert "module_list.2.weight stays, for" in shown
    spec = json.loads((tmp_path / "p.json").read_text())
    assert spec["module_list.0.weight"] == ["P_module_list.0", None, None, None]
    main([*words, "--format", "perm-spec", "--out", str(tmp_path / "u.json")])
    assert json.loads((tmp_path / "u.json").read_text())["module_list"]["0"]["bias"] == [0]
