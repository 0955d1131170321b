"""Experiments in seconds: that they run, and what they write; not what they find."""

import json
import runpy
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data_formats import write_idx

from fastws.nn import CIFARResNet, ResNet

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
    """A folder of 40 images of 32 x 32 pixels, and an untrained network."""
    folder = tmp_path_factory.mktemp("cifar")
    random = numpy.random.default_rng(0)
    for part, count in {"train": 32, "test": 8}.items():
        for number in range(count):
            path = folder / "images" / part / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)).save(path)
    torch.manual_seed(0)
    save_file(CIFARResNet(20, "a").state_dict(), folder / "resnet20.safetensors")
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_sane_resnets(experiment, tmp_path, capsys):
    module = experiment("sane_cifar100_resnet18")
    module.run(module.Config(out=str(tmp_path), smoke=True, device="cpu"))
    found = results(tmp_path)
    assert set(found["sets"]) == set(module.SMOKE)
    assert {"embedding", "statistics"} <= {line["features"] for line in found["results"]}
    table = experiment("tables").hyperrep(found)
    assert "sub 0." in table and "R² of accuracy" in table and "published" in capsys.readouterr().out


def test_sane_hub(experiment, tmp_path):
    module = experiment("sane_hub")
    (tmp_path / "more").mkdir()
    torch.save(CIFARResNet(8, "b", width=4).state_dict(), tmp_path / "more/resnet8.pt")
    options = {"more": str(tmp_path / "more"), "smoke": True, "device": "cpu"}
    module.run(module.Config(out=str(tmp_path / "run"), **options))
    found = results(tmp_path / "run")
    lines = {(line["features"], line["metric"]): line for line in found["lines"]}
    assert found["models"] == 17 and found["same shapes"] == 14
    # among six of three families one of five others is of the own one, among four of two one of three
    assert lines["shapes", "l2"]["same shapes"] == pytest.approx((6 / 5 + 8 / 3) / 14)
    assert all(0 <= line["accuracy"] <= 1 for line in lines.values()) and len(lines) == 2 * len(module.MODELS) + 2
    assert "of the same shapes" in experiment("tables").hub(found)


def test_hyperrep_digits(experiment, tmp_path, capsys):
    module = experiment("hyperrep_digits")
    module.run(module.Config(out=str(tmp_path), smoke=True, device="cpu"))
    found = results(tmp_path)
    assert set(found["verdicts"]) == set(experiment("hyperrep").SMOKE) <= set(found["sets"])
    assert all(0 <= found["sets"][name]["epoch 1"] <= 1 for name in experiment("hyperrep").SMOKE)
    assert "kde-independent" in capsys.readouterr().out
    assert "novelty" in experiment("tables").hyperrep(found)


def test_sane_cifar10_cnn(experiment, tmp_path, capsys):
    module = experiment("sane_cifar10_cnn")
    module.run(module.Config(out=str(tmp_path), smoke=True, device="cpu"))
    found = results(tmp_path)
    assert set(found["verdicts"]) == set(module.SMOKE) <= set(found["sets"])
    shown = capsys.readouterr().out
    assert "published" in shown and "kde-independent" in shown
    assert "novelty" in experiment("tables").KINDS[experiment("tables").kind("sane-digits-0")](found)


def test_hyperrep_mnist(experiment, tmp_path):
    random = numpy.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for part, count in {"train": 11_000, "t10k": 60}.items():
        pixels = random.integers(0, 256, (count, 28, 28), dtype=numpy.uint8)
        write_idx(tmp_path / "mnist" / f"{part}-images-idx3-ubyte", pixels, False)
        write_idx(
            tmp_path / "mnist" / f"{part}-labels-idx1-ubyte", (numpy.arange(count) % 10).astype(numpy.uint8), False
        )
    module = experiment("hyperrep_mnist")
    options = {"data": str(tmp_path / "mnist"), "zoo": "decay", "transfer": True, "smoke": True, "device": "cpu"}
    module.run(module.Config(out=str(tmp_path / "out"), **options))
    found = results(tmp_path / "out")
    assert set(found["verdicts"]) == set(experiment("hyperrep").SMOKE)
    assert "digits28 epoch 1" in found["sets"]["noise"]


def test_hyperrep_curve(experiment, tmp_path):
    module = experiment("hyperrep_curve")
    module.run(module.Config(out=str(tmp_path), smoke=True))
    found = results(tmp_path)
    assert [(line["networks"], line["method"]) for line in found["lines"]] == [
        (size, method) for size in (20, 40) for method in module.METHODS
    ]
    assert "40 networks" in experiment("tables").curve(found)


def test_hyperrep_lwln(experiment, tmp_path):
    module = experiment("hyperrep_lwln")
    module.run(module.Config(out=str(tmp_path), smoke=True, device="cpu"))
    found = results(tmp_path)
    assert [line["run"] for line in found["lines"]] == list(module.RUNS)
    assert "reconstructed" in experiment("tables").lwln(found)


def test_hyperrep_probes(experiment, tmp_path):
    module = experiment("hyperrep_probes")
    module.run(module.Config(out=str(tmp_path), smoke=True, device="cpu"))
    found = results(tmp_path)
    assert {line["run"] for line in found["lines"]} == {"as trained", "aligned", "equivariant", "codes: aligned"}
    assert {line["features"] for line in found["lines"] if line["run"] == "codes: aligned"} == {"embedding"}
    assert "seeds, equivariant" in experiment("tables").embeddings(found)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_barriers(experiment, kind, tmp_path, capsys):
    module = experiment("barriers")
    options = {"network": kind, "width": 8, "pairs": 2, "epochs": 2, "points": 3, "continuous": kind == "mlp"}
    module.run(module.Config(out=str(tmp_path), smoke=True, **options))
    found = results(tmp_path)
    ways = {name.partition(", ")[0] for name in found["barriers"]}
    assert {"as they are", "permuted by weights", "permuted by activations"} <= ways
    assert ("whole group" in ways) == (kind == "mlp")
    assert "loss barrier" in capsys.readouterr().out
    assert f"2 pairs of {kind} 8 wide on digits" in experiment("tables").barriers(found)


def test_lineage(experiment, tmp_path):
    module = experiment("lineage")
    module.run(module.Config(out=str(tmp_path), smoke=True))
    found = results(tmp_path)
    assert [line["networks"] for line in found["trees"]] == list(module.MOVES)
    assert [(line["precision"], line["recall"]) for line in found["trees"]] == [(1, 1)] * 3
    assert found["strangers"] == {"pairs": 28, "called relatives": 0}
    assert found["signals"][0]["raw cosine"] == 1 and found["signals"][1]["raw cosine"] < 0.5
    assert "permuted: 30 pairs of relatives" in experiment("tables").lineage(found)


@pytest.mark.parametrize("smoothness", [0.0, 1e-4])
def test_teacher(experiment, cifar, tmp_path, smoothness):
    module = experiment("nern_teacher")
    paths = {"weights": str(cifar / "resnet20.safetensors"), "data": str(cifar / "images"), "out": str(tmp_path)}
    module.run(module.Config(**paths, smoke=True, smoothness=smoothness))
    found, before = load_file(tmp_path / "teacher.safetensors"), load_file(cifar / "resnet20.safetensors")
    assert found.keys() == before.keys() and not torch.equal(found["conv1.weight"], before["conv1.weight"])
    assert {"test accuracy before", "test accuracy", "val accuracy"} <= results(tmp_path).keys()


def test_resnet20(experiment, cifar, tmp_path):
    module = experiment("nern_resnet20_cifar10")
    orders = ("infilter", "none")
    paths = {"weights": str(cifar / "resnet20.safetensors"), "images": str(cifar / "images"), "out": str(tmp_path)}
    config = replace(module.PRESET, **paths, smoke=True, curve_orders=orders)
    module.run(config)
    found = results(tmp_path)
    assert [len(found["curves"][order]) for order in orders] == [2] * len(orders)
    (row,) = found["stored"]
    assert row["hidden"] == 8 and row["training"] == "fp32" and row["precisions"].keys() == {"fp32", "fp16", "int8"}
    assert {"accuracy", "original_accuracy", "agreement", "share"} <= row["precisions"]["int8"].keys()
    assert (tmp_path / "curves.png").exists() and (tmp_path / "accuracy.png").exists()
    module.run(config)  # everything is done
    assert results(tmp_path)["stored"][0]["precisions"] == row["precisions"]


def test_resnet56(experiment, cifar, tmp_path):
    """With ResNet-20 in its place: an untrained ResNet-56 has no finite loss."""
    module = experiment("nern_resnet56_cifar10")
    paths = {"weights": str(cifar / "resnet20.safetensors"), "images": str(cifar / "images"), "out": str(tmp_path)}
    module.run(replace(module.PRESET, **paths, architecture="cifar-resnet20-a", smoke=True, curve_orders=()))
    assert results(tmp_path)["stored"][0]["hidden"] == 8
    assert not (tmp_path / "curves.png").exists()


def test_imagenet_without_images(experiment, tmp_path):
    module = experiment("nern_resnet18_imagenet")
    torch.manual_seed(0)
    save_file(ResNet(18, 1000, stem="imagenet").state_dict(), tmp_path / "resnet18.safetensors")
    paths = {"weights": str(tmp_path / "resnet18.safetensors"), "out": str(tmp_path / "out")}
    module.run(replace(module.PRESET, **paths, smoke=True, curve_orders=("none",), image_size=32))
    (row,) = results(tmp_path / "out")["stored"]
    assert row["precisions"]["fp32"]["relative_error"] > 0 and "accuracy" not in row["precisions"]["fp32"]
    assert not (tmp_path / "out/accuracy.png").exists()


def test_kept_results_have_no_paths_of_a_machine(experiment):
    tables = experiment("tables")
    found = '{"out": "/home/me/runs/q0", "command": "x --out /a/b/q0 --data data/mnist", "rate": "1/2 a / b"}'
    kept = '{"out": "q0", "command": "x --out q0 --data data/mnist", "rate": "1/2 a / b"}'
    assert tables.without_machine(found) == kept
    for path in (EXPERIMENTS / "results").glob("*.json"):
        assert tables.without_machine(path.read_text()) == path.read_text(), path


def test_table_of_results_is_what_the_files_say(experiment):
    assert experiment("tables").table() in (EXPERIMENTS / "README.md").read_text()


@pytest.mark.parametrize("script", ["zoo_probes.py", "zoo_sparse.py"])
def test_bad_input_ends_with_one_sentence(script, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTWS_DEBUG", raising=False)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))  # as python does for a script
    monkeypatch.setattr(sys, "argv", [script, "--zoo", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="fastws: .*none.zoo.json: zoo must be a folder"):
        runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")
