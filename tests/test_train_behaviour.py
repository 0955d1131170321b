"""The behavioural loss of SANE, and networks that are sampled while it is trained."""

import json

import numpy
import pytest
import torch

from fastws.commands import train_sane
from fastws.layout.layout import Layout
from fastws.train.sane import behaviour
from fastws.train.sane import train as sane
from fastws.zoo import Zoo, make
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import config_of, prepare
from fastws.zoo.making.measuring import load_networks
from fastws.zoo.making.recipes import Plan

pytestmark = pytest.mark.usefixtures("in_one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("zoo"))
    torch.set_num_threads(1)
    options = {"activations": ("tanh", "relu"), "optimizers": ("momentum",), "lrs": (0.1,), "validation": 50}
    options |= {"inits": ("xavier_uniform",), "weight_decays": (0.01,)}
    make(MakeConfig(out=path, networks=16, epochs=2, limit=200, threads=1, **options))
    return Zoo.open(path)


def config(zoo, out, **options):
    size = {"size": "tiny", "window": zoo.layout.with_tokens(None, "skip").num_tokens, "batch_size": 4, "steps": 4}
    options = {"behaviour": 0.9, "queries": 20, "val_batches": 1, "log_every": 1} | options
    return sane.Config(zoo=str(zoo.path), out=str(out), device="cpu", **size | options)


def read(out, split="train"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if f"{split}/loss" in line or f"{split}/accuracy" in line]


@pytest.mark.parametrize("name, shape", [("digits-cnn", (1, 8, 8)), ("cnn-deep-skip", (1, 28, 28))])
def test_many_networks_compute_what_each_does_alone_with_its_gradient(name, shape):
    plan = Plan(name, shape, 10, 1, 1)
    torch.manual_seed(0)
    networks = [plan.build(activation) for activation in ("tanh", "relu", "tanh")]
    layout = Layout.from_checkpoint(networks[0])
    flat = torch.stack([layout.flatten(network) for network in networks]).detach().requires_grad_()
    x, pull = torch.randn(5, *shape), torch.randn(3, 5, 10)
    found = behaviour.Networks.of(plan, layout)
    assert (found.rows is None) == (name == "cnn-deep-skip")
    logits = found.logits(flat, ["tanh", "relu", "tanh"], x)
    (gradient,) = torch.autograd.grad(logits, flat, pull)
    for row, network in enumerate(networks):
        network.requires_grad_()
        torch.testing.assert_close(logits[row], network(x), rtol=1e-4, atol=1e-5)
        own = torch.autograd.grad((network(x) * pull[row]).sum(), list(network.parameters()))
        expected = torch.cat([one.flatten() for one in own])  # in the order of the state dict
        torch.testing.assert_close(gradient[row], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("permute", ["none", "second", "both"])
def test_perfect_reconstructions_behave_alike_in_whatever_order(zoo, tmp_path, permute):
    """Targets are computed once, of networks as they are stored, and hold for permuted views with flipped signs."""
    settings = config(zoo, tmp_path, permute=permute, noise=0.0)
    source = sane.make_source(settings, zoo, CPU)
    judge = sane.make_behaviour(settings, [zoo], source)
    batch = sane.draw(settings, source, "train", 3)
    found = judge.compare(batch.values, batch.networks, batch.stream)
    assert found["behaviour"] < 1e-8
    with torch.no_grad():
        found = judge.compare(batch.values, batch.networks, batch.stream)
    assert found["agreement"] == 1 and found["disagreement"] == pytest.approx(1)
    assert found["spread"] == pytest.approx(1, abs=1e-4) or permute == "both"


def test_loss_by_hand(zoo, tmp_path):
    settings = config(zoo, tmp_path, permute="none")
    source = sane.make_source(settings, zoo, CPU)
    judge = sane.make_behaviour(settings, [zoo], source)
    batch = sane.draw(settings, source, "train", 0)
    prediction = batch.values + 0.3 * torch.randn_like(batch.values)
    found = judge.compare(prediction, batch.networks, batch.stream)["behaviour"]
    job, x = prepare(config_of(zoo.path, zoo.provenance)), judge.draw(batch.stream)
    (kind,) = source.population.kinds
    layer = kind.layout.positions[:, 1].long()
    made = kind.layout.detokenize(prediction * kind.std[layer, None] + kind.mean[layer, None])
    names = [judge.activations[row] for row in batch.networks]
    own = load_networks(zoo.rows(judge.chosen[list(batch.networks)]), job.plan, names)
    expected = []
    for view in made:
        for network, other in zip(load_networks(view, job.plan, names), own, strict=True):
            with torch.no_grad():
                expected.append((network(x).softmax(1) - other(x).softmax(1)).square().mean())
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-4, atol=1e-7)


def test_terms_are_in_units_of_their_running_means(zoo, tmp_path, monkeypatch):
    settings = config(zoo, tmp_path)
    judge = sane.make_behaviour(settings, [zoo], sane.make_source(settings, zoo, CPU))
    terms = {name: torch.tensor(value) for name, value in {"structure": 4.0, "behaviour": 0.5, "contrast": 8.0}.items()}
    assert judge.combine(0.2, terms, True) == pytest.approx(1.0)
    half = {name: value / 2 for name, value in terms.items()}
    unit = 0.99 + 0.01 / 2
    assert judge.combine(0.2, half, True) == pytest.approx(0.5 / unit)
    assert judge.combine(0.2, terms, False) == pytest.approx(1 / unit)
    assert judge.combine(0.2, terms | {"behaviour": torch.tensor(0.0)}, False) == pytest.approx(0.28 / unit)


@pytest.mark.parametrize("queries_from", ["images", "pixels", "both"])
def test_queries_are_training_images(zoo, tmp_path, queries_from):
    settings = config(zoo, tmp_path, queries_from=queries_from, queries=30)
    judge = sane.make_behaviour(settings, [zoo], sane.make_source(settings, zoo, CPU))
    drawn = judge.draw(5)
    assert torch.equal(drawn, judge.draw(5)) and not torch.equal(drawn, judge.draw(6))
    held = prepare(config_of(zoo.path, zoo.provenance)).data.train.x.flatten(1)
    known = (drawn.flatten(1)[:, None] == held).all(2).any(1).sum()
    assert known == {"images": 30, "pixels": 0, "both": 15}[queries_from]


def test_run_is_resumed_with_its_means(zoo, tmp_path, monkeypatch):
    sane.train(config(zoo, tmp_path / "whole"), zoo, CPU)
    draw = sane.draw

    def interrupted(settings, source, split, step, rows=None):
        if split == "train" and step == 2:
            raise KeyboardInterrupt
        return draw(settings, source, split, step, rows)

    settings = config(zoo, tmp_path / "parts", save_every=1)
    monkeypatch.setattr(sane, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sane.train(settings, zoo, CPU)
    monkeypatch.setattr(sane, "draw", draw)
    sane.train(settings, zoo, CPU)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert torch.equal(whole["carried"]["term_means"], parts["carried"]["term_means"])
    assert (whole["carried"]["term_means"] > 0).all()


def test_tokens_follow_the_gradient_of_behaviour(zoo, tmp_path):
    """From the mean network to networks that compute what others do, on images that are drawn anew at each step."""
    settings = config(zoo, tmp_path, permute="none", queries=50)
    source = sane.make_source(settings, zoo, CPU)
    judge = sane.make_behaviour(settings, [zoo], source)
    batch = sane.draw(settings, source, "train", 0)
    tokens = torch.zeros_like(batch.values, requires_grad=True)
    optimizer = torch.optim.Adam([tokens], lr=0.05)
    errors = []
    for step in range(60):
        found = judge.compare(tokens, batch.networks, step)["behaviour"]
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        errors.append(found.item())
    assert numpy.mean(errors[-5:]) < 0.7 * errors[0]


def test_what_is_found_of_reconstructions_is_logged(zoo, tmp_path):
    sane.train(config(zoo, tmp_path), zoo, CPU)
    (val,) = read(tmp_path, "val")
    assert {"val/behaviour", "val/agreement", "val/spread", "val/disagreement"} <= set(val)
    assert all("train/behaviour" in line for line in read(tmp_path))


def test_samples_are_looked_at_while_a_model_is_trained(zoo, tmp_path, monkeypatch):
    settings = config(zoo, tmp_path / "looked", behaviour=0.0, sample_every=2)
    train_sane.run(settings)
    looks = read(tmp_path / "looked", "sample")
    assert [line["step"] for line in looks] == [2, 4]
    assert set(looks[0]) >= {f"sample/{name}" for name in ("accuracy", "accuracy_std", "accuracy_best", "spread")}
    assert 0 <= looks[0]["sample/accuracy"] <= looks[0]["sample/accuracy_best"] <= 1
    sane.train(config(zoo, tmp_path / "plain", behaviour=0.0), zoo, CPU)
    looked, plain = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("looked", "plain"))
    assert all(torch.equal(looked[name], plain[name]) for name in plain)  # looking changes nothing


def test_what_cannot_be_compared_or_sampled(zoo, tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            sane.train(config(zoo, tmp_path / "out", **options), zoo, CPU)
        assert not (tmp_path / "out").exists()

    refused("window must be the .* tokens of a whole network for behaviour, got 8; give --window", window=8)
    refused("sample_every must be None where nothing is given that samples", sample_every=2)
    for options in ({"behaviour": 1.5}, {"queries": 0}):
        with pytest.raises(ValueError, match=r"behaviour must be in \[0, 1\] and queries at least 1, got"):
            config(zoo, tmp_path, **options)
