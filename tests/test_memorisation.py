"""Whether sampled networks are new: planted copies are found, held-out networks are not taken for copies."""

import json
import re

import pytest
import torch

import fastws
from fastws.downstream import compare_zoos
from fastws.downstream.memorisation import Judge, Judged, phi, verdict
from fastws.downstream.sample import Config as SampleConfig
from fastws.downstream.sample import sample
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.making.make import Config as MakeConfig

pytestmark = pytest.mark.usefixtures("in_one_thread")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("zoo"))
    torch.set_num_threads(1)
    options = {"networks": 80, "epochs": 1, "limit": 300, "activations": ("tanh",), "optimizers": ("adam",)}
    make(MakeConfig(out=path, lrs=(0.01,), threads=1, **options))
    align(AlignConfig(zoo=path))
    return Zoo.open(path)


def judged_by(zoo):
    flips = zoo.symmetry.flips
    training, held_out = (compare_zoos.states_of(zoo, split, "tanh") for split in ("train", "test"))
    return Judge(zoo.rows(training), zoo.rows(held_out), zoo.symmetry, zoo.layout, flips), flips


def test_planted_copy_is_found_and_held_out_networks_are_not_copies(zoo):
    judge, flips = judged_by(zoo)
    assert flips == (True, True, True)
    copies = judge.training[10:14].clone()
    moved = zoo.symmetry.permute(copies, zoo.symmetry.random(4, seed=5, flips=True), zoo.layout)
    moved += 0.01 * copies.std() * torch.randn_like(moved)
    found = judge.novelty(moved)
    assert found.neighbour.tolist() == [10, 11, 12, 13] and found.novelty.max() < 0.1
    assert (found.p == 1 / (1 + len(judge.held_out))).all()
    held_out = judge.novelty(judge.held_out)
    assert held_out.novelty.median().item() == pytest.approx(1) and held_out.novelty.min() > 0.5
    assert judge.recall() > 0.5


def test_phi_is_corrected_for_chance():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(50, 4000, generator=generator) < rate for rate in (0.1, 0.4))
    assert phi(a, a) == pytest.approx(1)
    assert phi(a, b) == pytest.approx(0, abs=0.02)
    assert phi(a, torch.zeros_like(a)) != phi(a, torch.zeros_like(a))  # nan: no pair has errors on both sides


def of(name, accuracy, novelty, spread=1.0, apart=1.0, width=0.002):
    def around(value):
        return value, value - width, value + width

    return Judged(
        name, name, 200, around(accuracy), (accuracy, accuracy), around(novelty), around(spread), around(apart),
        0.05, 0.9, 0.5, 1.0, 0.0,
    )  # fmt: skip


def test_verdicts_in_their_order():
    noise = [of("noise", accuracy, novelty) for accuracy, novelty in ((0.95, 0.1), (0.9, 0.6), (0.7, 1.2))]
    gaussian = [of("PCA 16", 0.85, 0.9, spread=0.4), of("PCA 64", 0.8, 1.1, spread=0.7)]
    cases = [
        (of("a", 0.96, 0.2), "a copies its training networks"),
        (of("a", 0.96, 0.9, apart=0.1), "a makes one network"),
        (of("a", 0.75, 0.9), "a is no better than noise at equal novelty: .* against 0.800"),
        (of("a", 0.95, 1.15), "a: no baseline at its novelty"),
        (of("a", 0.801, 1.05, spread=0.6), "a is no better than PCA 64"),
        (of("a", 0.9, 1.0, spread=0.6), "a is better than PCA 64 by 10.0 .* points at novelty 1.00 and spread 0.60"),
    ]
    for judged, expected in cases:
        assert re.match(expected, verdict(judged, noise, gaussian)), verdict(judged, noise, gaussian)


def test_report_tells_copies_from_mixtures(zoo, tmp_path):
    pytest.importorskip("matplotlib")
    copies = sample(SampleConfig(zoo=str(zoo.path), out=str(tmp_path / "copies"), method="noise", noise=0.02, count=12))
    mixed = sample(SampleConfig(zoo=str(zoo.path), out=str(tmp_path / "mixed"), method="kde", count=12))
    options = {"samples": (str(copies.path), str(mixed.path)), "out": str(tmp_path / "report")}
    config = compare_zoos.Config(zoo=str(zoo.path), count=12, images=100, **options)
    results = compare_zoos.compare(config)
    assert "copies its training networks" in results["verdicts"]["copies"]
    assert "copies its training networks" not in results["verdicts"]["mixed"]
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<img") == 1 and "New networks, or old ones?" in page
    stored = json.loads((tmp_path / "report/results.json").read_text())
    by_name = {one["name"]: one for one in stored["sets"]}
    assert by_name["copies"]["novelty"][0] < 0.2 < by_name["mixed"]["novelty"][0]
    assert by_name["held-out networks"]["novelty"][0] == pytest.approx(1, abs=0.1)


def test_what_cannot_be_compared(zoo, tmp_path):
    layout = fastws.Layout.from_checkpoint({"fc.weight": torch.zeros(2, 3)})
    with fastws.zoo.ZooWriter(tmp_path / "other", layout) as writer:
        writer.append(torch.zeros(2, 6), {"model": ["a", "b"]})
    config = compare_zoos.Config(zoo=str(zoo.path), samples=(str(tmp_path / "other"),), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="samples .*other must have the architecture|zoo compare: samples"):
        compare_zoos.compare(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="samples must name at least one folder"):
        compare_zoos.Config(zoo=str(zoo.path), samples=(), out="x")
