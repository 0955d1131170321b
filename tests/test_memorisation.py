"""Whether sampled networks are new: planted copies are found, held-out networks are not taken for copies."""

import json

import numpy
import pytest
import torch

import fastws
from fastws.downstream.judging import compare as compare_zoos
from fastws.downstream.judging import judged as judging
from fastws.downstream.judging import scene
from fastws.downstream.judging.memorisation import Judge
from fastws.downstream.populations import Measured
from fastws.downstream.sampling.sample import Config as SampleConfig
from fastws.downstream.sampling.sample import sample
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.measuring import disagreement

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
    training, held_out = (scene.states_of(zoo, split, "tanh") for split in ("train", "test"))
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
    assert held_out.novelty.quantile(0.5).item() == pytest.approx(1) and held_out.novelty.min() > 0.5
    assert judge.recall() > 0.5


def test_exact_and_planted_copies_are_as_near_as_they_are(zoo):
    judge, _ = judged_by(zoo)
    copies = judge.training[20:24]
    moved = zoo.symmetry.permute(copies, zoo.symmetry.random(4, seed=6, flips=True), zoo.layout)
    distance, neighbour = judge.nearest(moved)
    assert neighbour.tolist() == [20, 21, 22, 23] and (distance < 1e-3 * copies.norm(dim=1)).all()


@pytest.fixture(scope="module")
def strangers():
    """Networks that nobody trained, all of one distribution: 300 to learn from, 100 held out, 100 samples."""
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    layout, symmetry = fastws.Layout.from_checkpoint(network), fastws.Symmetry.trace(network, torch.randn(1, 6))
    flat = torch.randn(500, layout.num_weights, generator=torch.Generator().manual_seed(0))
    judge = Judge(flat[:300], flat[300:400], symmetry, layout, symmetry.flips)
    return judge, flat[400:]


def test_p_values_of_networks_like_held_out_ones_are_uniform(strangers):
    judge, samples = strangers
    p = judge.novelty(samples).p
    assert (p <= 0.05).double().mean() <= 0.12 and p.mean().item() == pytest.approx(0.5, abs=0.1)


def test_leaving_one_out_is_as_fair_as_holding_out(strangers):
    judge, _ = strangers
    alone = judge.others(torch.arange(100), torch.arange(300))
    assert alone.median().item() == pytest.approx(judge.unit, rel=0.05)
    pairs = judge.others(torch.arange(20), torch.arange(300) // 2)  # two states of each network
    assert (pairs >= alone[:20] - 1e-9).all()


def test_phi_is_corrected_for_chance():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(50, 4000, generator=generator) < rate for rate in (0.1, 0.4))
    torch.testing.assert_close(judging.phi(a, a), torch.ones(50, dtype=torch.float64))
    assert judging.phi(a, b).mean().item() == pytest.approx(0, abs=0.02)
    expected = [numpy.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert judging.phi(a, b).numpy() == pytest.approx(expected)
    assert judging.phi(a, torch.zeros_like(a)).isnan().all()


def test_largest_share_of_common_errors():
    wrong = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    theirs = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]).bool()
    assert judging.max_iou(wrong, theirs).tolist() == [pytest.approx(2 / 3), 0]
    assert judging.max_iou(wrong[1:], torch.zeros(2, 4, dtype=torch.bool)).isnan().all()


def test_partners_are_held_out_networks_of_equal_accuracy():
    held_out = numpy.array([0.9, 0.8, 0.5])
    partner = judging.partners_of(numpy.array([0.895, 0.81, 0.7, 0.5]), held_out)
    assert partner.tolist() == [0, 1, -1, 2]
    own, theirs = numpy.array([1.0, 3.0, 99.0, numpy.nan]), numpy.array([10.0, 20.0, 30.0])
    assert judging.paired(own, theirs, partner) == (2, 15)
    mean, none = judging.paired(own[:3], theirs, numpy.full(3, -1))
    assert mean == pytest.approx(103 / 3) and numpy.isnan(none)


def test_disagreement_and_neighbours():
    predictions = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0], [0, 2, 2, 1]], dtype=torch.uint8)
    pairs = [(predictions[i] != predictions[j]).double().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert disagreement(predictions).item() == pytest.approx(numpy.mean(pairs))
    assert disagreement(predictions[:1]).isnan()
    assert judging.effective(torch.tensor([3.0, 3.0, 0.0])) == pytest.approx(2)
    assert judging.effective_of_uniform(1, 50) == pytest.approx(1)
    assert 1 < judging.effective_of_uniform(2, 4) < 2  # one time in four both draws are the same


def test_replicates_are_of_networks_drawn_again(strangers):
    judge, samples = strangers
    accuracy = torch.rand(100, dtype=torch.float64)
    found = judging.replicates(judge, samples, judge.novelty(samples), Measured(accuracy, accuracy, None, None))
    assert found.accuracy[0] == pytest.approx(accuracy.mean().item())
    assert (found.choosing[0], found.scoring[0]) == pytest.approx(
        (accuracy[::2].mean().item(), accuracy[1::2].mean().item())
    )
    assert found.novelty[0] == pytest.approx(judge.nearest(samples)[0].quantile(0.5).item() / judge.unit)
    assert found.spread[0] == pytest.approx(samples.std(0).mean().item() / judge.sd, rel=1e-4)
    assert found.accuracy[1:].std() == pytest.approx(accuracy.std().item() / 10, rel=0.1)
    # of few networks the weights' spread is less, and two resampled medians differ
    assert found.apart[0] == pytest.approx(1, abs=0.1) and 0 < found.apart[1:].std() < 0.1


def test_report_tells_copies_from_mixtures(zoo, tmp_path):
    pytest.importorskip("matplotlib")
    copies = sample(SampleConfig(zoo=str(zoo.path), out=str(tmp_path / "copies"), method="noise", noise=0.02, count=12))
    mixed = sample(SampleConfig(zoo=str(zoo.path), out=str(tmp_path / "mixed"), method="kde", count=12))
    options = {"samples": (str(copies.path), str(mixed.path)), "out": str(tmp_path / "report")}
    config = compare_zoos.Config(train=str(zoo.path), count=12, images=100, **options)
    results = compare_zoos.compare(config)
    assert "copies its training networks" in results["verdicts"]["copies"]
    assert "copies its training networks" not in results["verdicts"]["mixed"]
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<img") == 1 and "New networks, or old ones?" in page
    stored = json.loads((tmp_path / "report/results.json").read_text())
    by_name = {one["name"]: one for one in stored["sets"]}
    assert by_name["copies"]["novelty"][0] < 0.2 < by_name["mixed"]["novelty"][0]
    assert by_name["held-out networks"]["novelty"][0] == pytest.approx(1)
    assert {"untrained networks", "average of all", "noise of 0.4 sd", "PCA 16 + Gaussian, T = 0.7"} <= set(by_name)
    assert by_name["average of all"]["spread"][0] == pytest.approx(0, abs=1e-3)
    (table,) = stored["populations"]
    assert [row["name"] for row in table["rows"]] == ["held-out networks", "untrained networks", "copies", "mixed"]
    assert stored["costs"]["copies"]["zoo"] > 0


def test_what_cannot_be_compared(zoo, tmp_path):
    layout = fastws.Layout.from_checkpoint({"fc.weight": torch.zeros(2, 3)})
    with fastws.zoo.ZooWriter(tmp_path / "other", layout) as writer:
        writer.append(torch.zeros(2, 6), {"model": ["a", "b"]})
    config = compare_zoos.Config(train=str(zoo.path), samples=(str(tmp_path / "other"),), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="samples .*other must have the architecture|zoo compare: samples"):
        compare_zoos.compare(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="samples must name at least one folder"):
        compare_zoos.Config(train=str(zoo.path), samples=(), out="x")
    with pytest.raises(ValueError, match="samples must be folders of different names, got 'kde' more than once"):
        compare_zoos.Config(train=str(zoo.path), samples=("a/kde", "b/kde"), out="x")
