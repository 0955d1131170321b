"""Zoos that begin with the networks of another zoo: fine-tuning and transfer."""

import pytest
import torch

from fastws.downstream import evaluate
from fastws.downstream.sample import Config as SampleConfig
from fastws.downstream.sample import sample
from fastws.zoo import Zoo, make
from fastws.zoo.making.make import Config

pytestmark = pytest.mark.usefixtures("in_one_thread")
OPTIONS = {"limit": 200, "validation": 40, "threads": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("source"))
    torch.set_num_threads(1)
    choices = {"activations": ("tanh", "relu"), "optimizers": ("adam",), "lrs": (0.01,), "weight_decays": (0.0,)}
    make(Config(out=path, networks=6, epochs=2, **choices, **OPTIONS))
    return Zoo.open(path)


def test_training_goes_on_from_the_networks_of_another_zoo(source, tmp_path):
    zoo = make(Config(out=str(tmp_path), start=str(source.path), epochs=1, threads=1))
    assert len(zoo) == 12
    epoch, last = zoo.numbers("epoch"), source.numbers("epoch") == 2
    first = torch.from_numpy(epoch == 0).nonzero().flatten()
    assert torch.equal(zoo.rows(first), source.rows(torch.from_numpy(last).nonzero().flatten()))
    for name in ("model", "activation"):
        assert zoo.properties[name].take(first.numpy()).to_pylist() == source.properties[name].filter(last).to_pylist()
    assert zoo.numbers("test_accuracy")[epoch == 0] == pytest.approx(source.numbers("test_accuracy")[last], abs=1e-6)
    assert zoo.provenance["config"]["data"] == source.provenance["config"]["data"]
    assert zoo.provenance["config"]["limit"] == 200  # images as those that the networks know
    better = zoo.numbers("train_loss")[epoch == 1] < zoo.numbers("train_loss")[epoch == 0]
    assert better.mean() > 0.5


def test_samples_are_trained_and_evaluated(source, tmp_path):
    drawn = sample(SampleConfig(zoo=str(source.path), out=str(tmp_path / "s"), method="noise", count=4, device="cpu"))
    trained = make(
        Config(out=str(tmp_path / "t"), start=str(drawn.path), epochs=1, lrs=(0.003,), networks=3, threads=1)
    )
    assert trained.properties["model"].unique().to_pylist() == [f"noise-{n:06}" for n in range(3)]
    assert set(trained.properties["lr"].to_pylist()) == {0.003}
    again, columns, _ = evaluate.evaluate(evaluate.Config(zoo=str(trained.path), device="cpu"))
    assert columns["test_accuracy"] == pytest.approx(trained.numbers("test_accuracy"), abs=1e-6)
    assert len(again) == 6


def test_what_cannot_begin(source, tmp_path):
    with pytest.raises(FileNotFoundError):
        Config(out=str(tmp_path / "z"), start=str(tmp_path / "nothing"))
    several = Config(out=str(tmp_path / "z"), start=str(source.path), lrs=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"lrs must name one choice for the networks of start, .* give --lrs"):
        make(several)
    other = Config(out=str(tmp_path / "z"), start=str(source.path), architecture="mlp")
    with pytest.raises(ValueError, match="zoo make: start"):
        make(other)
    assert not (tmp_path / "z").exists()
