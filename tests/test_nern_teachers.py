from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastws.nern.teachers import ARCHITECTURES, FeatureTaps, load_teacher, make_architecture
from fastws.nn import CIFARResNet

CHECKPOINTS = Path(__file__).parents[2] / "shared/data/resnets_cifar10"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return CIFARResNet(20, "a", num_classes=7).state_dict()


def test_teachers_are_read_from_both_kinds_of_files(tmp_path, state):
    save_file(state, tmp_path / "plain.safetensors")
    wrapped = {f"module.{name}": x for name, x in state.items() if "num_batches" not in name}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.th")
    for name in ("plain.safetensors", "wrapped.th"):
        teacher = load_teacher("cifar-resnet20-a", tmp_path / name)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(x, state[name]) for name, x in teacher.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": torch.zeros(2)}, r"'extra' must be nothing, got \[2\]; it is of another architecture"),
        ({"bn1.weight": None}, r"'bn1.weight' must be \[16\], got nothing"),
        ({"conv1.weight": torch.zeros(16, 1, 3, 3)}, r"'conv1.weight' must be \[16, 3, 3, 3\], got \[16, 1, 3, 3\]"),
        ({"conv1.weight": torch.full((16, 3, 3, 3), torch.nan)}, "'conv1.weight' must be finite, got 432 values"),
        ({"conv1.weight": torch.ones(16, 3, 3, 3, dtype=torch.int8)}, "'conv1.weight' must be .*, got torch.int8"),
        (
            {"conv1.weight": torch.ones(16, 3, 3, 3, dtype=torch.complex64)},
            "'conv1.weight' must be .*, got torch.complex64",
        ),
    ],
)
def test_weights_of_other_networks_are_refused(tmp_path, state, change, message):
    changed = {name: x for name, x in (state | change).items() if x is not None}
    save_file(changed, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=f"changed.safetensors: {message}"):
        load_teacher("cifar-resnet20-a", tmp_path / "changed.safetensors", num_classes=7)


def test_files_of_another_kind_of_network_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: 'conv1.weight' must be \[16, 3, 3, 3\], got nothing"):
        load_teacher("cifar-resnet20-a", tmp_path / "other.safetensors")


def test_the_architecture_that_fits_is_named(tmp_path, state):
    save_file({name: x for name, x in state.items() if "num_batches" not in name}, tmp_path / "a.safetensors")
    for architecture in ("cifar-resnet20-b", "resnet18"):
        with pytest.raises(ValueError, match="must be .*; it fits cifar-resnet20-a$"):
            load_teacher(architecture, tmp_path / "a.safetensors")


class ClassifierFirst(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.classifier, self.norm = nn.Linear(4, num_classes), nn.BatchNorm1d(4)


def test_classes_are_counted_wherever_the_classifier_is(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "first", ClassifierFirst)
    save_file(ClassifierFirst(7).state_dict(), tmp_path / "seven.safetensors")
    assert load_teacher("first", tmp_path / "seven.safetensors").classifier.out_features == 7


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="nern: architecture must be cifar-resnet8-a, .* got 'resnet19'"):
        make_architecture("resnet19", 10)
    with pytest.raises(ValueError, match="got 'os:system'"):
        make_architecture("os:system", 10)


@pytest.mark.parametrize("library, name", [("torchvision", "resnet18"), ("timm", "resnet18")])
def test_architectures_of_libraries(library, name):
    if find_spec(library) is None:
        with pytest.raises(ValueError, match=f"nern: {library} must be installed for '{library}:{name}'"):
            make_architecture(f"{library}:{name}", 10)
        return
    ours, theirs = make_architecture("resnet18", 5), make_architecture(f"{library}:{name}", 5)
    assert {n: x.shape for n, x in ours.state_dict().items()} == {n: x.shape for n, x in theirs.state_dict().items()}
    with pytest.raises(ValueError, match=f"nern: architecture must be one of {library}, got 'none-such'"):
        make_architecture(f"{library}:none-such", 5)


@pytest.mark.parametrize("depth, file", [(20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")])
def test_published_checkpoints_are_read(depth, file):
    if not (CHECKPOINTS / file).exists():
        pytest.skip(f"needs {file} of akamaster/pytorch_resnet_cifar10")
    teacher = load_teacher(f"cifar-resnet{depth}-a", CHECKPOINTS / file)
    stored = sum(p.numel() for p in teacher.parameters() if p.dim() == 4)
    assert stored == {20: 267_696, 56: 848_304}[depth]


@pytest.mark.parametrize(
    "activation", [nn.PReLU(), nn.Tanh(), nn.SELU(inplace=True), nn.CELU(), nn.SiLU(inplace=True), nn.Sigmoid()]
)
def test_maps_of_any_activation_are_recorded(activation):
    x = torch.randn(2, 3, 4, 4)
    with FeatureTaps() as taps:
        nn.Sequential(activation, nn.Flatten(), activation)(x.clone())
    assert len(taps.maps) == 1 and torch.equal(taps.maps[0], x)
    with FeatureTaps() as taps:
        torch.tanh_(input=x.clone())
    assert torch.equal(taps.maps[0], x)
