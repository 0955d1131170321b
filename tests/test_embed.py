"""Embeddings of any architecture, what is kept of them and in what files; nearest neighbours by embedding."""

import json
from importlib import import_module

import numpy
import pyarrow.parquet
import pytest
import torch
from small_zoo import make_small_zoo

from fastws.downstream import encoder as encoders
from fastws.downstream import neighbors, predict
from fastws.layout.moments import layer_moments
from fastws.nn.hyper_representation import HyperRepresentation, HyperRepresentationConfig
from fastws.nn.sane import SANE, SANEConfig

embed = import_module("fastws.downstream.embed")  # the package has a function of that name


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_small_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def encoder(zoo):
    torch.manual_seed(0)
    layout = zoo.layout.with_tokens(5)
    sizes = {"window": 8, "width": 16, "heads": 2, "depth": 1, "latent": 6}
    model = SANE(SANEConfig(token_size=5, max_positions=(80, 4, 20), **sizes))
    layers = len(layout.table)
    return encoders.Encoder(model, layout, torch.rand(layers) + 0.5, torch.randn(layers))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, encoder):
    """What a run of the trainer leaves."""
    std = 1 / encoder.scale
    sizes = vars(encoder.model.config)
    extra = {"sane": sizes, "layout": encoder.layout.to_dict(), "mean": -encoder.shift * std, "std": std}
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    torch.save({"model": encoder.model.state_dict(), "extra": extra}, path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Networks of four layers, where the encoder knows three."""
    return make_small_zoo(tmp_path_factory.mktemp("other"), widths=(6, 9, 7, 5, 3))


def test_what_is_kept_of_tokens(zoo, encoder):
    z = encoders.encode(encoder, zoo.rows(range(4)), halo=2)
    layer = encoder.layout.positions[:, 1]
    of_layers = [z[:, layer == number] for number in range(len(encoder.layout.table))]
    kept = {pool: embed.embed(encoder, zoo, halo=2, pool=pool)[:4] for pool in ("layers", "tokens", "spread")}
    torch.testing.assert_close(kept["layers"], torch.cat([part.mean(1) for part in of_layers], 1))
    torch.testing.assert_close(kept["tokens"], z.flatten(1))
    spread = [part.detach().double().numpy().std(1).mean(1) for part in of_layers]
    torch.testing.assert_close(kept["spread"].double(), torch.from_numpy(numpy.stack(spread, 1)), rtol=1e-4, atol=1e-6)
    for pool, found in kept.items():
        assert found.shape[1] == numpy.prod(encoders.pool_shape(encoder, pool))


@pytest.mark.parametrize("halo", [None, 2])
def test_another_architecture_is_standardised_by_itself(encoder, other, halo):
    suited = encoders.suit(encoder, other)
    layout = other.layout.with_tokens(5)
    mean, std = layer_moments(other.rows(other.split("train")), layout)
    torch.testing.assert_close(suited.scale, 1 / std)
    torch.testing.assert_close(suited.shift, -mean / std)
    found = embed.embed(encoder, other, halo=halo)
    expected = encoders.encode(suited, other.rows(range(len(other))), halo=halo).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    raw = encoder._replace(scale=torch.ones(3), shift=torch.zeros(3))
    assert (encoders.suit(raw, other).scale == 1).all()


def test_the_same_architecture_keeps_the_moments_of_training(encoder, zoo):
    assert encoders.suit(encoder, zoo) is encoder


def test_more_layers_than_positions_are_refused(encoder, tmp_path):
    deep = make_small_zoo(tmp_path / "deep", widths=(6, 5, 5, 5, 5, 3))
    with pytest.raises(ValueError, match=r"embed: zoo .* must have at most \(80, 4, 20\) tokens, layers"):
        embed.embed(encoder, deep, halo=None)


def test_codes_of_whole_networks(zoo, tmp_path, monkeypatch):
    sizes = {"size": zoo.layout.num_weights, "layers": (), "encoding": "vector", "latent": 7}
    config = HyperRepresentationConfig(**sizes)
    model = HyperRepresentation(config)
    extra = {"layout": zoo.layout.to_dict(), "hyper_representation": config.to_dict(), "aligned": False}
    torch.save({"model": model.state_dict(), "extra": extra}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(embed.Zoo, "open", lambda path: zoo)
    options = {"model": str(tmp_path / "checkpoint.pt"), "zoo": "small", "device": "cpu"}
    embed.run(embed.Config(out=str(tmp_path / "e.safetensors"), **options))
    found = embed.load_embeddings(tmp_path / "e.safetensors", len(zoo), zoo.layout)
    torch.testing.assert_close(found, model.eval().encode(zoo.weights))
    with pytest.raises(ValueError, match="embed: pool must be mean for .* whose networks have one code each"):
        embed.run(embed.Config(out=str(tmp_path / "e.safetensors"), pool="layers", **options))
    predict.run(predict.Config(out=str(tmp_path), features=(), **options))
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {line["features"] for line in results} == {"embedding"}


@pytest.mark.parametrize("pool, vectors", [("mean", 1), ("layers", 3), ("spread", 3), ("tokens", 25)])
def test_parquet_has_a_row_for_every_vector(checkpoint, encoder, zoo, tmp_path, monkeypatch, pool, vectors):
    monkeypatch.setattr(embed.Zoo, "open", lambda path: zoo)
    out = tmp_path / "e.parquet"
    vectors = encoders.pool_shape(encoder, pool)[0]
    embed.run(embed.Config(model=str(checkpoint), zoo="small", out=str(out), pool=pool, device="cpu"))
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["model", "epoch", "layer", "token", "vector"] and len(table) == vectors * len(zoo)
    expected = embed.embed(encoder, zoo, halo=2, pool=pool).view(len(zoo) * vectors, -1)
    torch.testing.assert_close(torch.tensor(table["vector"].to_pylist()), expected, rtol=1e-4, atol=1e-5)
    assert table["model"].to_pylist() == [m for m in zoo.properties["model"].to_pylist() for _ in range(vectors)]
    names = [name for name, _ in encoder.layout.layers]
    layers = table["layer"].to_pylist()[:vectors]
    assert layers == {"mean": [None]}.get(pool, names if vectors == 3 else layers) and set(layers) <= {None, *names}
    assert table["token"].to_pylist()[:vectors] == (list(range(vectors)) if pool == "tokens" else [None] * vectors)


# --- neighbours


def test_neighbours_by_hand():
    points = torch.tensor([[1.0, 0], [2, 0.1], [0, 3], [0.1, 1], [0, 0]])
    owners = ["a", "b", "c", "d", "e"]
    cosine = neighbors.nearest(points, owners, torch.tensor([0, 2]), 2)
    assert cosine.index.tolist() == [[1, 3], [3, 1]]
    assert cosine.distance[0, 0].item() == pytest.approx(1 - 2 / (4 + 0.01) ** 0.5, rel=1e-5)
    l2 = neighbors.nearest(points, owners, torch.tensor([0]), 9, "l2")
    assert l2.index.tolist() == [[4, 1, 3, 2, -1]] and l2.distance[0, :2].tolist() == pytest.approx([1, 1.01**0.5])


def test_states_of_one_network_are_no_neighbours(monkeypatch):
    monkeypatch.setattr(neighbors, "AT_ONCE", 2)
    points = torch.randn(9, 4)
    found = neighbors.nearest(points, list("aaabbbccc"), torch.arange(9), 6, "l2")
    assert all((index // 3 != query // 3).all() for query, index in enumerate(found.index))
    everything = neighbors.nearest(points, list("abcdefghi"), torch.arange(9), 8, "l2")
    assert torch.equal(everything.distance.sort(1).values, everything.distance)


def test_command_prints_a_table_or_json(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(neighbors.Zoo, "open", lambda path: zoo)
    gain = torch.from_numpy(zoo.numbers("test_accuracy"))
    embed.save_embeddings(tmp_path / "e.safetensors", torch.stack([gain, 0 * gain], 1).float(), zoo.layout)
    options = {"embeddings": str(tmp_path / "e.safetensors"), "zoo": "small", "metric": "l2", "model": ("m3",)}
    neighbors.run(neighbors.Config(count=2, **options))
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.startswith("network") and line.startswith("m3 @ 2 ") and line.count("@") == 3
    neighbors.run(neighbors.Config(count=3, json=True, every=True, **options))
    first, second = json.loads(capsys.readouterr().out)["networks"]
    assert (first["model"], first["epoch"], second["epoch"]) == ("m3", 1, 2)
    others = [abs(float(x - gain[6])) for row, x in enumerate(gain) if row // 2 != 3]
    assert [near["distance"] for near in first["neighbors"]] == pytest.approx(sorted(others)[:3], abs=1e-6)
    with pytest.raises(ValueError, match="neighbors: model must be of those of the zoo, .* got 'x'"):
        neighbors.run(neighbors.Config(**options | {"model": ("x",)}))
    with pytest.raises(ValueError, match="neighbors: count must be at least 1, got 0"):
        neighbors.Config(count=0, **options)
