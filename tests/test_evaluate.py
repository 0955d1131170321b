"""Accuracy of zoos of any architecture: read from files, with batch norms, with activations that nobody tells."""

import pytest
import torch

import fastws
from fastws.downstream import evaluate, populations
from fastws.zoo import ZooWriter, make
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.measuring import condition_batch_norm

pytestmark = pytest.mark.usefixtures("in_one_thread")
ONE = {"epochs": 1, "optimizers": ("adam",), "lrs": (0.01,), "weight_decays": (0.0,)}
MODULE = """
from torch import nn

def build():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    return nn.Sequential(*layers)
"""


@pytest.fixture
def normed(tmp_path, monkeypatch):
    """A zoo of networks with batch norm that were read from elsewhere, and the function that builds one."""
    (tmp_path / "normed_network.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    build = __import__("normed_network").build
    layout = fastws.Layout.from_checkpoint(build())
    with ZooWriter(tmp_path / "zoo", layout) as writer:
        flat = torch.stack([layout.flatten(build()) for _ in range(5)])
        writer.append(flat, {"model": [f"n{n}" for n in range(5)]})
    return fastws.Zoo.open(tmp_path / "zoo"), build


def config(zoo, **options):
    return evaluate.Config(
        zoo=str(zoo.path), data="digits", architecture="normed_network:build", device="cpu", **options
    )


def test_networks_of_any_architecture_are_evaluated(normed):
    zoo, build = normed
    done, columns, _ = evaluate.evaluate(config(zoo))
    x, y = evaluate.job_of(zoo, data="digits", architecture="normed_network:build", device="cpu").data.test
    for row in range(len(zoo)):
        network = build().eval()
        network.load_state_dict(zoo.checkpoint(row) | {"1.num_batches_tracked": torch.tensor(0)})
        with torch.no_grad():
            accuracy = (network(x).argmax(1) == y).double().mean().item()
        assert columns["test_accuracy"][row] == pytest.approx(accuracy)
    assert done.numbers("test_accuracy") == pytest.approx(columns["test_accuracy"])


def test_batch_norms_are_conditioned_on_training_images(normed):
    """As if all images were one batch of a network in training mode, but without dropout."""
    zoo, build = normed
    evaluate.evaluate(config(zoo))
    done, columns, _ = evaluate.evaluate(config(zoo, condition=60))
    job = evaluate.job_of(zoo, data="digits", architecture="normed_network:build", device="cpu")
    images = evaluate.conditioning_images(zoo, job, 60)
    x, y = job.data.test
    for row in range(len(zoo)):
        network = build()
        network.load_state_dict(zoo.checkpoint(row) | {"1.num_batches_tracked": torch.tensor(0)})
        with torch.no_grad():
            maps = network[0](images)
            network[1].running_mean.copy_(maps.mean((0, 2, 3)))
            network[1].running_var.copy_(maps.var((0, 2, 3)))
            accuracy = (network.eval()(x).argmax(1) == y).double().mean().item()
        assert columns["conditioned_60_test_accuracy"][row] == pytest.approx(accuracy, abs=0.004)
    assert {"test_accuracy", "conditioned_60_test_accuracy"} <= set(done.properties.column_names)
    assert (done.numbers("test_accuracy") != done.numbers("conditioned_60_test_accuracy")).any()
    assert torch.equal(done.weights, zoo.weights)


def test_conditioning_leaves_the_network_in_eval_mode_and_averages_batches(normed, monkeypatch):
    network = normed[1]().eval()
    monkeypatch.setattr("fastws.zoo.making.measuring.ALONE", 20)
    images = torch.randn(60, 1, 8, 8)
    condition_batch_norm(network, images)
    assert not any(layer.training for layer in network.modules()) and network[1].momentum == 0.1
    variances = [network[0](part).var((0, 2, 3)) for part in images.split(20)]
    torch.testing.assert_close(network[1].running_var, torch.stack(variances).mean(0))


def test_what_cannot_be_conditioned(normed, tmp_path):
    zoo, _ = normed
    with pytest.raises(ValueError, match="condition must be at most 1,?[0-9]*, the training images, got 99999"):
        evaluate.evaluate(config(zoo, condition=99_999))
    with pytest.raises(ValueError, match="condition must be 0, or at least 2 images, got 1"):
        config(zoo, condition=1)
    with pytest.raises(ValueError, match="data must be given with architecture"):
        evaluate.Config(zoo="x", architecture="normed_network:build")
    made = make(MakeConfig(out=str(tmp_path / "made"), networks=2, epochs=0, limit=40, threads=1))
    with pytest.raises(ValueError, match="condition must be left out for .*made, whose networks have no batch norm"):
        evaluate.evaluate(evaluate.Config(zoo=str(made.path), condition=10, device="cpu"))
    with pytest.raises(ValueError, match="zoo evaluate: zoo .*made"):
        evaluate.evaluate(config(made))


def test_activations_are_never_guessed(tmp_path):
    source = make(
        MakeConfig(out=str(tmp_path / "made"), networks=2, epochs=1, limit=60, activations=("relu",), threads=1)
    )
    with ZooWriter(tmp_path / "silent", source.layout, source.symmetry, source.provenance) as writer:
        writer.append(source.weights, {"model": ["a", "b", "c", "d"]})
    silent = fastws.Zoo.open(tmp_path / "silent")
    with pytest.raises(ValueError, match="activation must be given for .* got 4 such networks of"):
        evaluate.evaluate(evaluate.Config(zoo=str(silent.path), device="cpu"))
    options = {"zoo": str(silent.path), "device": "cpu"}
    _, columns, _ = evaluate.evaluate(evaluate.Config(activation="relu", **options))
    assert columns["test_accuracy"] == pytest.approx(source.numbers("test_accuracy"), abs=1e-6)
    _, others, _ = evaluate.evaluate(evaluate.Config(activation="tanh", **options))
    assert (others["test_loss"] != columns["test_loss"]).all()
    with pytest.raises(ValueError, match="activation must be left out for .*made, whose networks say theirs"):
        evaluate.evaluate(evaluate.Config(zoo=str(source.path), activation="tanh", device="cpu"))
    started = MakeConfig(out=str(tmp_path / "z"), start=str(silent.path), activations=("tanh", "relu"), **ONE)
    with pytest.raises(ValueError, match="activations must name one choice for networks of start that do not say"):
        make(started)


def test_threads_are_given_back_when_networks_cannot_be_evaluated(normed):
    zoo, _ = normed
    job = evaluate.job_of(zoo, data="digits", architecture="normed_network:build", device="cpu")
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        populations.measure(zoo.weights[:, :5], job.plan, ["relu"] * 5, job.data.test, progress=False)
    assert torch.get_num_threads() == before


def test_intervals_are_those_of_networks_not_of_states(tmp_path, capsys):
    """Twelve states of two networks, each six times the same: the interval reaches from the one to the other."""
    one = make(MakeConfig(out=str(tmp_path / "one"), networks=2, limit=60, activations=("tanh",), threads=1, **ONE))
    first, last = one.weights[0], one.weights[-1]
    with ZooWriter(tmp_path / "twelve", one.layout, one.symmetry, one.provenance) as writer:
        models = {"model": ["a"] * 6 + ["b"] * 6, "epoch": [*range(6)] * 2, "activation": ["tanh"] * 12}
        writer.append(torch.stack([first] * 6 + [last] * 6), models)
    evaluate.run(evaluate.Config(zoo=str(tmp_path / "twelve"), device="cpu"))
    values = fastws.Zoo.open(tmp_path / "twelve").numbers("test_accuracy")
    low, high = sorted((values[0], values[-1]))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test_accuracy")]
    assert f"{values.mean():.4f} [{low:.4f}, {high:.4f}]" in said[0]
