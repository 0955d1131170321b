"""Zoos that begin with the networks of another zoo: fine-tuning and transfer."""

import numpy
import pytest
import torch
from test_data_formats import write_idx

from fastws.downstream import evaluate, make_zoo
from fastws.downstream.representation import load
from fastws.downstream.sampling.sample import Config as SampleConfig
from fastws.downstream.sampling.sample import sample
from fastws.train.ae import train as ae
from fastws.zoo import Zoo, make
from fastws.zoo.making.architectures import build
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
    with pytest.raises(ValueError, match="architecture must be an architecture with layers of digits-cnn, .* got mlp"):
        make(other)
    assert not (tmp_path / "z").exists()


# --- other architectures


@pytest.fixture(scope="module")
def cnn_s(tmp_path_factory):
    """Networks of cnn-s for images of 28 x 28, and their images."""
    folder = tmp_path_factory.mktemp("cnn-s")
    torch.set_num_threads(1)
    options = {"resize": 28, "activations": ("tanh",), "inits": ("xavier_uniform",), "optimizers": ("adam",)}
    options |= {"lrs": (0.003,), "weight_decays": (0.0,), "batch_size": 10, "threads": 1}
    make(Config(out=str(folder), architecture="cnn-s", networks=2, epochs=0, limit=300, **options))
    return Zoo.open(folder)


@pytest.mark.parametrize(
    "architecture, weights, carried",
    [
        ("res-cnn", 2464 + 16 + 54 + 28, 2464),
        ("cnn-deep", 2464, 208),
        ("cnn-skip", 2464, 2432),
        ("cnn-deep-skip", 2464, 208),
    ],
)
def test_weights_that_fit_are_carried_over(cnn_s, tmp_path, capsys, architecture, weights, carried):
    zoo = make(Config(out=str(tmp_path), start=str(cnn_s.path), architecture=architecture, epochs=2, threads=1))
    assert f"{carried:,} of {weights:,} weights are carried over from cnn-s" in capsys.readouterr().out
    assert zoo.layout.num_weights == weights and len(zoo) == 6
    first, source = zoo.checkpoint(0), cnn_s.checkpoint(0)
    key = "module_list.0.weight" if architecture == "res-cnn" else "stages.0.0.weight"
    assert torch.equal(first[key], source["module_list.0.weight"])
    if architecture == "res-cnn":
        assert all(torch.equal(first[name], tensor) for name, tensor in source.items())
        assert (first["branches.1.1.bias"] == 0.01).all() and first["branches.1.1.weight"].std() > 0.05
    assert zoo.numbers("train_loss")[4:].mean() < zoo.numbers("train_loss")[:2].mean()
    done, columns, _ = evaluate.evaluate(evaluate.Config(zoo=str(zoo.path), device="cpu"))
    assert columns["test_accuracy"] == pytest.approx(zoo.numbers("test_accuracy"), abs=1e-6)


def test_heads_for_other_classes_begin_anew(tmp_path, capsys):
    """Of networks with batch norm all but the head is carried over, statistics included."""
    torch.set_num_threads(1)
    random = numpy.random.default_rng(0)
    for part, count in {"train": 60, "t10k": 20}.items():
        pixels = random.integers(0, 256, (count, 8, 8), dtype=numpy.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", pixels, False)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", (numpy.arange(count) % 3).astype(numpy.uint8), False)
    recipe = {"activations": ("relu",), "optimizers": ("adam",), "lrs": (0.01,), "weight_decays": (0.0,)}
    recipe |= {"inits": ("kaiming_uniform",), "dropouts": (0.0,), "batch_size": 20, "threads": 1}
    source = make(
        Config(out=str(tmp_path / "s"), architecture="cifar-resnet8-b-half", networks=2, epochs=1, limit=60, **recipe)
    )
    options = {"data": str(tmp_path), "validation": 0, "limit": None, "mean": (0.5,), "std": (0.5,)}
    made = make(Config(out=str(tmp_path / "t"), start=str(source.path), epochs=0, threads=1, **options))
    head = 32 * 3 + 3
    assert f"{made.layout.num_weights - head:,} of {made.layout.num_weights:,} weights" in capsys.readouterr().out
    first, last = made.checkpoint(0), source.checkpoint(1)
    assert first["linear.weight"].shape == (3, 32) and (first["linear.bias"] == 0.01).all()
    assert all(torch.equal(tensor, last[name]) for name, tensor in first.items() if not name.startswith("linear"))
    assert first["layer1.0.bn1.running_mean"].abs().max() > 0


def test_branches_begin_where_the_published_ones_do(cnn_s):
    """A branch whose weights are zero leaves cnn-s as it is; its maps are as large as those it is added to."""
    from_cnn, plain = build("res-cnn", (1, 28, 28)), build("cnn-s", (1, 28, 28))
    from_cnn.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        for branch, layer in zip(from_cnn.branches, (0, 3, 6), strict=True):
            branch[1].weight.zero_(), branch[1].bias.zero_()
            before = torch.nn.Sequential(*plain.module_list[:layer])(x)
            after = torch.nn.Sequential(*plain.module_list[: {0: 3, 3: 6, 6: 8}[layer]])(x)
            assert branch(before).shape == after.shape
        torch.testing.assert_close(from_cnn(x), plain(x))
    deep = build("cnn-deep-skip", (1, 28, 28))
    kept = deep.stages[1](deep.stages[0](x))
    torch.testing.assert_close(
        deep.convolve(x), deep.stages[3](deep.stages[2](kept)) + kept[:, :, 1:-1, 1:-1][:, :, ::2, ::2]
    )
    short = build("cnn-skip", (1, 28, 28))
    kept = short.stages[0](x)
    torch.testing.assert_close(
        short.convolve(x), short.stages[2](short.stages[1](kept)) + short.shortcut(kept)[:, :, 1::4, 1::4][:, :, :3, :3]
    )
    with pytest.raises(ValueError, match="res-cnn must have no dropout"):
        build("res-cnn", (1, 28, 28), dropout=0.5)
    with pytest.raises(ValueError, match="images must be larger for 'cnn-deep'"):
        build("cnn-deep", (1, 8, 8))


# --- passing through a model


def test_networks_pass_through_a_model_on_the_way(source, tmp_path):
    model = str(tmp_path / "ae/checkpoint.pt")
    options = {"steps": 2, "batch_size": 4, "device": "cpu"}
    ae.train(ae.Config(zoo=str(source.path), out=str(tmp_path / "ae"), **options), source, torch.device("cpu"))
    common = {"start": str(source.path), "epochs": 2, "threads": 1}
    config = Config(out=str(tmp_path / "z"), regularise=model, regularise_at=(1,), **common)
    make_zoo.run(config)
    zoo, plain = Zoo.open(tmp_path / "z"), make(Config(out=str(tmp_path / "plain"), **common))
    representation, epoch = load(model), torch.from_numpy(zoo.numbers("epoch"))
    assert torch.equal(zoo.rows((epoch == 0).nonzero()[:, 0]), plain.rows((epoch == 0).nonzero()[:, 0]))
    trained = plain.rows((epoch == 1).nonzero()[:, 0])
    expected = representation.decode(representation.encode(trained))
    torch.testing.assert_close(zoo.rows((epoch == 1).nonzero()[:, 0]), expected, rtol=1e-4, atol=1e-5)
    _, columns, _ = evaluate.evaluate(evaluate.Config(zoo=str(zoo.path), device="cpu"))
    assert columns["test_accuracy"] == pytest.approx(zoo.numbers("test_accuracy"), abs=1e-6)
    assert len(evaluate.job_of(plain).recipes) == 1  # a zoo is told apart from one whose start is gone
    with pytest.raises(ValueError, match="regularise must be given with the function that it stands for"):
        make(config)
    with pytest.raises(ValueError, match="regularise must be given with regularise_at and start"):
        Config(out="x", regularise=model, start=str(source.path))
    with pytest.raises(ValueError, match=r"regularise_at must be epochs in \[0, 2\], got \(3,\)"):
        Config(out="x", regularise=model, regularise_at=(3,), **common)
