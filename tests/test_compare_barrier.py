"""fastws barrier: what stands between two networks, before and after alignment."""

import json
from pathlib import Path

import pytest
import torch
from compared import moved, network, norm_cnn, save, train
from torch import nn

import fastws.compare.evaluating as evaluating
from fastws.cli import main
from fastws.compare.barrier import Config, barrier
from fastws.compare.evaluating import Data, Scores, load_examples, measure
from fastws.compare.lines import barrier_of
from fastws.compare.merge import Config as Merge
from fastws.compare.merge import merge_files
from fastws.compare.modules import Network
from fastws.compare.repair import Moments, between, layers_to_repair, moments_of, repair
from fastws.data.images import load
from fastws.zoo.making.measuring import in_batches

DIGITS = {"architecture": "digits-cnn", "activation": "relu", "data": "digits"}


def curves(results):
    return {(one["alignment"], one["statistics"], one["part"]): one for one in results["curves"]}


def test_barrier_by_hand():
    losses, accuracies = (1.0, 2.5, 1.0, 1.5, 2.0), (0.9, 0.5, 0.9, 0.8, 0.7)
    found = barrier_of([Scores(*pair) for pair in zip(losses, accuracies, strict=True)])
    assert found == pytest.approx((1.25, -0.5, 0.35, -0.1))  # line of losses: 1, 1.25, 1.5, 1.75, 2


@pytest.fixture(scope="module")
def trained():
    return train(network())


@pytest.fixture(scope="module")
def ends(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    return save(trained.state_dict(), folder / "a.safetensors"), save(moved(trained), folder / "b.safetensors")


def test_moved_copy_has_no_barrier_after_alignment(ends):
    results = barrier(Config(a=ends[0], b=ends[1], points=5, parts="both", statistics=200, **DIGITS))
    found = curves(results)
    for part in ("test", "train"):
        assert found["as they are", "stored", part]["barrier"]["loss"] > 0.3
        assert abs(found["permuted", "stored", part]["barrier"]["loss"]) < 1e-6
        assert found["permuted", "stored", part]["barrier"]["accuracy"] == pytest.approx(0, abs=1e-9)
    assert results["cosine"]["permuted"] == pytest.approx(1) and results["images"]["test"] == 359
    assert abs(found["permuted", "repaired", "test"]["barrier"]["loss"]) < 0.02


def test_networks_side_by_side_and_one_by_one_have_the_same_figures(ends, monkeypatch):
    config = Config(a=ends[0], b=ends[1], points=5, statistics=100, **DIGITS)
    together = curves(barrier(config))
    monkeypatch.setattr(evaluating, "table_of", lambda network, part: (None, 0))
    for key, one in curves(barrier(config)).items():
        assert one["loss"] == pytest.approx(together[key]["loss"], rel=1e-4)
        assert one["accuracy"] == pytest.approx(together[key]["accuracy"], abs=0.006)  # two images


def test_batch_norms_are_reset(tmp_path):
    torch.manual_seed(0)
    states = [train(norm_cnn()[0], seed=seed).state_dict() for seed in (0, 1)]
    paths = [save(state, tmp_path / f"{k}.safetensors") for k, state in enumerate(states)]
    options = {"architecture": "compared:norm_cnn", "data": "digits", "points": 5, "statistics": 1000}
    found = curves(barrier(Config(a=paths[0], b=paths[1], **options)))
    assert {statistics for _, statistics, _ in found} == {"stored", "reset"}  # all convolutions have a norm
    stored, reset = (found["permuted", name, "test"] for name in ("stored", "reset"))
    assert reset["barrier"]["loss"] < stored["barrier"]["loss"]
    assert reset["loss"][0] == pytest.approx(stored["loss"][0], abs=0.1) and reset["loss"][0] != stored["loss"][0]


# --- REPAIR


def test_repaired_layers_have_the_moments_of_the_goal():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(196, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(400, 1, 8, 8)
    names = layers_to_repair(module, x[:1])
    assert names == ["0", "2", "5"]  # the last one gives the outputs
    goals = {
        name: Moments(torch.randn(size).double(), torch.rand(size).double() + 0.5)
        for name, size in zip(names, (6, 4, 5), strict=True)
    }
    repair(module, goals, x)
    for name, found in moments_of(module, names, x).items():
        torch.testing.assert_close(found.mean, goals[name].mean, atol=2e-3, rtol=0)
        torch.testing.assert_close(found.std, goals[name].std, atol=5e-3, rtol=5e-3)


def test_no_batch_is_of_one_image_and_large_inputs_come_in_small_ones():
    sizes = {(501, 1, 8, 8): [501], (1000, 3, 32, 32): [500, 500], (60, 3, 224, 224): [30, 30], (3, 3, 2000, 2000): [3]}
    for shape, expected in sizes.items():
        x = torch.empty(shape, device="meta")
        assert [len(part) for part, _ in in_batches(x, torch.empty(len(x)))] == expected
    assert len([*in_batches(torch.empty(64, 1024, dtype=torch.int64, device="meta"))]) == 16
    module, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.randn(501, 4)
    expected = module(x)
    repair(module, moments_of(module, ["0"], x), x)
    torch.testing.assert_close(module(x), expected, atol=1e-2, rtol=1e-2)


def test_repair_of_an_end_changes_nothing(trained):
    x = torch.randn(300, 1, 8, 8)
    names, expected = layers_to_repair(trained, x[:1]), trained(x)
    moments = moments_of(trained, names, x)
    found = between([moments, moments], [0.25, 0.75])
    for name in names:
        torch.testing.assert_close(found[name].std, moments[name].std)
    copy = network()
    copy.load_state_dict(trained.state_dict())
    repair(copy, found, x)
    torch.testing.assert_close(copy(x), expected, atol=1e-2, rtol=1e-2)


def test_layers_before_a_batch_norm_are_left_to_it():
    module, x = norm_cnn()
    assert layers_to_repair(module.eval(), x) == []


# --- the command


def test_report_and_resume(ends, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    words = ["barrier", *ends, "--architecture", "digits-cnn", "--activation", "relu", "--data", "digits"]
    words += ["--points", "5", "--statistics", "100", "--out", str(tmp_path / "out")]
    main(words)
    shown = capsys.readouterr().out
    assert "permuted" in shown and "midpoint" in shown and "report.html" in shown
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 1 and "REPAIR" in page
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    monkeypatch.setattr("fastws.compare.lines.measure", None)  # all was done before
    main([*words, "--json"])
    assert json.loads(capsys.readouterr().out) == before
    with pytest.raises(SystemExit, match="points must be 5, with which .* was begun, got 7; give another --out"):
        main([*words, "--points", "7"])


def test_sequences_by_a_function(tmp_path, monkeypatch):
    (tmp_path / "own_text.py").write_text(
        """
import torch

def model():
    torch.manual_seed(1)
    layers = [torch.nn.Embedding(7, 6), torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 7)]
    return torch.nn.Sequential(*layers), torch.arange(7)[None]

def text():
    x = torch.arange(60).view(6, 10) % 7
    y = (x + 1) % 7
    y[:, 0] = -100
    return x, y, x[:2], y[:2]

def wrong():
    return torch.ones(3)
"""
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("own_text").model()[0]
    paths = [save(module.state_dict(), tmp_path / "a.safetensors")]
    paths += [save({name: -x for name, x in module.state_dict().items()}, tmp_path / "b.safetensors")]
    options = {"a": paths[0], "b": paths[1], "architecture": "own_text:model", "points": 3}
    found = curves(barrier(Config(**options, data="own_text:text")))
    x, y = __import__("own_text").text()[2:]
    expected = nn.functional.cross_entropy(module(x).flatten(0, 1), y.flatten())
    assert found["as they are", "stored", "test"]["loss"][0] == pytest.approx(float(expected.detach()), rel=1e-5)
    with pytest.raises(ValueError, match="own_text:wrong must return training inputs"):
        barrier(Config(**options, data="own_text:wrong"))


def test_targets_of_a_function(trained, monkeypatch):
    images = load("digits")
    x, y = images.test_x[:60], images.test_y[:60]
    network = Network(trained, x[:1], "digits-cnn")

    def scores(targets):
        monkeypatch.setattr(evaluating, "find_function", lambda *names: lambda: (x, targets, x, targets))
        (found,) = measure(network, [lambda module: None], load_examples("barrier", Data(data="own:data")).test)
        return found

    half = y.clone()
    half[:30] = -100  # do not count
    assert scores(half).loss == pytest.approx(
        2 * scores(y).loss - scores(torch.cat([y[:30], half[:30]])).loss, rel=1e-4
    )
    assert scores(y.int()) == scores(y)
    for targets, said in (
        (y + 1, r"targets must be -100 or in \[0, 10\), the logits, got 10"),
        (y - 1, r"targets must be -100 or in \[0, 10\), the logits, got -1"),
        (half[:1].expand(60), "some targets must count, got -100 in all of them"),
        (y.double(), "own:data must return integers as targets, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=said):
            scores(targets)
    x, y = x[:1], y[:1]
    with pytest.raises(ValueError, match="two training inputs and one test input at least, got 1 and 1"):
        scores(y)


def test_limit_of_a_function_takes_evenly_spaced_samples(monkeypatch):
    x, y = torch.arange(100.0)[:, None], torch.arange(100)
    monkeypatch.setattr(evaluating, "find_function", lambda *names: lambda: (x, y, x[:3], y[:3]))
    found = load_examples("barrier", Data(data="own:data", limit=4))
    assert found.train.y.tolist() == [0, 25, 50, 75] and found.test.y.tolist() == [0, 1, 2]


def wrong():
    return torch.zeros(4, 3), torch.arange(4), torch.zeros(4, 3), torch.arange(4)


def words():
    return torch.ones(4, 1, 8, 8).long(), torch.arange(4), torch.ones(4, 1, 8, 8).long(), torch.arange(4)


def infinite():
    return torch.ones(4, 1, 8, 8) / 0, torch.arange(4), torch.ones(4, 1, 8, 8), torch.arange(4)


def test_bad_input_is_one_sentence(ends, tmp_path):
    other = save(network(classes=7).state_dict(), tmp_path / "seven.safetensors")
    with pytest.raises(ValueError, match="seven.safetensors: checkpoint must fit digits-cnn"):
        barrier(Config(a=ends[0], b=other, **DIGITS))
    with pytest.raises(ValueError, match="--data must be given"):
        barrier(Config(a=ends[0], b=ends[1], **DIGITS | {"data": None}))
    with pytest.raises(FileNotFoundError, match="data must be 'digits'"):
        barrier(Config(a=ends[0], b=ends[1], **DIGITS | {"data": str(tmp_path)}))
    for data, said in (
        ("wrong", r"inputs of .* must be what digits-cnn takes, got \[2, 3\] torch.float32, for it says: "),
        ("words", r"inputs of .* must be what digits-cnn takes, got \[2, 1, 8, 8\] torch.int64"),
        ("infinite", "must return finite inputs, got NaN or infinity in some"),
    ):
        given = DIGITS | {"data": f"{__name__}:{data}"}
        with pytest.raises(ValueError, match=f"barrier: .*{said}"):
            barrier(Config(a=ends[0], b=ends[1], **given))
        with pytest.raises(ValueError, match=f"merge: .*{said}"):
            merge_files(Merge(models=ends, out=str(tmp_path / "merged.safetensors"), **given))
    assert not [*tmp_path.glob("merged*")]
    with pytest.raises(ValueError, match="points must be at least 3, got 2"):
        Config(a=ends[0], b=ends[1], points=2, **DIGITS)
    assert Path(ends[0]).exists()
