"""Populations that were trained: accuracy by epoch, tests, and what a network costs."""

import json

import pytest
import torch

from fastws.downstream.judging import compare as compare_zoos
from fastws.downstream.judging import compute
from fastws.downstream.sampling.sample import Config as SampleConfig
from fastws.downstream.sampling.sample import sample
from fastws.train.ae import train as ae
from fastws.zoo import Zoo, ZooWriter, make
from fastws.zoo.making.make import Config as MakeConfig

pytestmark = pytest.mark.usefixtures("in_one_thread")
IMAGE = 2 * (9 * 128 + 4 * 384 + 768 + 160)  # operations of digits-cnn on one image: maps of 3 x 3 and 2 x 2


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    """Networks from scratch, samples of them, and these trained on."""
    folder = tmp_path_factory.mktemp("zoos")
    torch.set_num_threads(1)
    options = {"optimizers": ("adam",), "lrs": (0.01,), "weight_decays": (0.0,), "threads": 1}
    make(MakeConfig(out=str(folder / "scratch"), networks=8, epochs=3, limit=100, activations=("tanh",), **options))
    scratch = Zoo.open(folder / "scratch")
    trained = {"steps": 3, "batch_size": 4, "device": "cpu"}
    ae.train(ae.Config(zoo=str(scratch.path), out=str(folder / "ae"), **trained), scratch, torch.device("cpu"))
    model = str(folder / "ae/checkpoint.pt")
    common = {"zoo": str(scratch.path), "count": 6, "device": "cpu"}
    sample(SampleConfig(out=str(folder / "noise"), method="noise", **common))
    sample(SampleConfig(out=str(folder / "kde"), method="kde", model=model, **common))
    make(MakeConfig(out=str(folder / "noise-trained"), start=str(folder / "noise"), epochs=2, threads=1))
    return folder


def test_populations_are_compared_epoch_by_epoch(zoos, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ("scratch", "noise-trained")
    config = compare_zoos.Config(continued=tuple(str(zoos / name) for name in names), out=str(tmp_path), json=True)
    compare_zoos.run(config)
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert [one["epoch"] for one in results["populations"]] == [0, 1, 2, 3]
    assert [[row["name"] for row in one["rows"]] for one in results["populations"]] == [[*names]] * 3 + [["scratch"]]
    scratch = Zoo.open(zoos / "scratch")
    first = scratch.numbers("test_accuracy")[scratch.numbers("epoch") == 1]
    (row, other) = results["populations"][1]["rows"]
    assert row["summary"]["mean"][0] == pytest.approx(first.mean()) and row["difference"] is None
    assert other["difference"]["mann_whitney_p"] == other["mann_whitney_holm"]  # one test needs no adjustment
    assert other["difference"]["shift"][0] > 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 1 and page.count("<h2>Accuracy at epoch") == 4 and "What a network costs" in page


def test_what_networks_cost(zoos):
    images = 100
    epoch = 3 * images * IMAGE
    scratch = compute.cost_of(Zoo.open(zoos / "scratch"))
    assert scratch["finetune"] == 3 * epoch and scratch["zoo"] == scratch["train"] == scratch["sample"] == 0
    assert scratch["evaluate"] == 100 * IMAGE  # of the validation images
    assert scratch["per network"]["10"] == scratch["per network"]["10000"] == 3 * epoch + 100 * IMAGE
    trained = compute.cost_of(Zoo.open(zoos / "noise-trained"))
    assert (trained["zoo"], trained["train"], trained["finetune"]) == (8 * 3 * epoch, 0, 2 * epoch)
    assert trained["per network"]["100"] == pytest.approx(8 * 3 * epoch / 100 + 2 * epoch)
    assert trained["zoo given"]["100"] == pytest.approx(2 * epoch)
    model = compute.load(str(zoos / "ae/checkpoint.pt")).model
    products = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    learned = compute.cost_of(Zoo.open(zoos / "kde"))
    assert learned["train"] == pytest.approx(3 * 4 * 2 * 3 * 2 * products, rel=0.2)  # the projection head aside
    assert learned["sample"] == pytest.approx(products, rel=0.3)  # half of the weights decode
    velocity = 2 * ((64 + 32) * 256 + 3 * 2 * 256 * 512 + 256 * 64)  # of one point
    assert compute.cost_of_flow({"steps": 10}, 99, 64) == (10 * 256 * 3 * velocity, 25 * 4 * velocity)
    velocity = 2 * (64 + 64**2 + (99 + 64) * 512 + 2 * 512 * 256 + 512 * 99)
    released = {"flow": "deepweightflow", "steps": 30_000}
    assert compute.cost_of_flow(released, 99, 64) == (30_000 * 8 * 3 * velocity, 99 * 4 * velocity)


def test_unknown_costs_are_said_to_be_unknown(zoos, tmp_path):
    moved = tmp_path / "kde"
    moved.mkdir()
    for path in (zoos / "kde").iterdir():
        gone = (b"ae/checkpoint.pt", b"ae/forgotten__.pt") if path.suffix == ".json" else (b"", b"")
        (moved / path.name).write_bytes(path.read_bytes().replace(*gone))
    found = compute.cost_of(Zoo.open(moved))
    assert found["train"] is None and found["per network"]["10"] is None and found["zoo"] > 0


def test_what_cannot_be_compared(zoos, tmp_path):
    from_files = tmp_path / "bare"
    scratch = Zoo.open(zoos / "scratch")
    with ZooWriter(from_files, scratch.layout) as writer:
        writer.append(scratch.weights[:2], {"model": ["a", "b"]})
    with pytest.raises(ValueError, match="continued must be zoos with test_accuracy and epoch, .*bare without epoch"):
        compare_zoos.compare(compare_zoos.Config(continued=(str(from_files),), out=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="train must be given with samples"):
        compare_zoos.Config(samples=("a",), out="x")
    assert not (tmp_path / "out").exists()
