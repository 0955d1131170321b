"""Experiments in seconds: that they run, and what they write; not what they find."""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastws.nn import CIFARResNet

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if (EXPERIMENTS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder of 40 images of 32 x 32 pixels, and untrained networks."""
    folder = tmp_path_factory.mktemp("cifar")
    random = numpy.random.default_rng(0)
    for part, count in {"train": 32, "test": 8}.items():
        for number in range(count):
            path = folder / "images" / part / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)).save(path)
    torch.manual_seed(0)
    for depth in (20, 56):
        save_file(CIFARResNet(depth, "a").state_dict(), folder / f"resnet{depth}.safetensors")
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("smoothness", [0.0, 1e-4])
def test_teacher(experiment, cifar, tmp_path, smoothness):
    module = experiment("nern_teacher")
    paths = {"weights": str(cifar / "resnet20.safetensors"), "data": str(cifar / "images"), "out": str(tmp_path)}
    module.run(module.Config(**paths, smoke=True, smoothness=smoothness))
    found, before = load_file(tmp_path / "teacher.safetensors"), load_file(cifar / "resnet20.safetensors")
    assert found.keys() == before.keys() and not torch.equal(found["conv1.weight"], before["conv1.weight"])
    assert {"test accuracy before", "test accuracy", "val accuracy"} <= results(tmp_path).keys()
