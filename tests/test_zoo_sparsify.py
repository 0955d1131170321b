"""fastws zoo sparsify: twins, their properties, kills."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from running import keep_moments

import fastws
from fastws.cli import main
from fastws.data.images import load
from fastws.ops.variational_cnn_step import kl_divergence, sparse_weights
from fastws.small_cnn.table import ACTIVATIONS
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.architectures import build
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import make
from fastws.zoo.making.measuring import side_by_side, tally
from fastws.zoo.making.recipes import TrainingData
from fastws.zoo.making.sparsify import VARIATIONAL, Config, choose, kl_weight, published_names, sparsify
from fastws.zoo.survey.diversity import draw_sample, measure_functions
from fastws.zoo.survey.figures import measured_figures

DENSE = {"networks": 6, "epochs": 2, "limit": 96, "seed": 1, "threads": 1, "inits": ("kaiming_uniform",)}
DENSE |= {"activations": ("tanh", "relu"), "dropouts": (0.0, 0.2), "optimizers": ("adam", "momentum"), "lrs": (0.003,)}


pytestmark = pytest.mark.usefixtures("in_one_thread")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make(MakeConfig(out=str(tmp_path_factory.mktemp("dense") / "zoo"), **DENSE))


def tiny(dense, path, **options):
    return Config(zoo=str(dense.path), out=str(path), **{"models": 4, "epochs": 2, "wave": 3, "threads": 1} | options)


def last_of(dense):
    return {model: row for row, model in enumerate(dense.properties["model"].to_pylist())}


def test_twins_are_sparse_states_of_their_networks(dense, tmp_path):
    twins = sparsify(tiny(dense, tmp_path / "twins", variational=True))
    table, parents = twins.properties.to_pydict(), dense.properties.to_pydict()
    assert sorted(set(table["model"])) == [f"{number:06}" for number in range(4)]
    assert table["parent"] == table["model"]
    assert table["epoch"] == [0] * 3 + [1] * 3 + [2] * 3 + [0, 1, 2] and len(twins) == 12
    assert table["kl_weight"] == pytest.approx([0] * 6 + [0.005] * 3 + [0, 0, 0.005])
    for model, row in last_of(dense).items():
        for twin in range(len(twins)):
            if table["model"][twin] == model:
                for name in ("seed", "activation", "dropout", "init", "optimizer", "lr", "weight_decay"):
                    assert table[name][twin] == parents[name][row]
                if table["epoch"][twin] == 0:
                    weights, sparse = dense.rows([row])[0], twins.rows([twin])[0]
                    dropped = weights.abs() < torch.exp(torch.tensor(-6.5))  # log alpha >= 3 where log sigma^2 is -10
                    torch.testing.assert_close(sparse, weights.where(~dropped | (sparse != 0), 0), rtol=0, atol=0)
                    assert table["test_loss"][twin] == pytest.approx(parents["test_loss"][row], rel=1e-3)
    assert {model for models in twins.splits.values() for model in models} == set(table["model"])
    for name, models in twins.splits.items():
        assert set(models) <= set(dense.splits[name])
    assert twins.layout == dense.layout and twins.symmetry == dense.symmetry
    assert twins.provenance["parent"]["provenance"] == dense.provenance


def test_report_of_twins_compares_what_they_compute(dense, tmp_path):
    twins = sparsify(tiny(dense, tmp_path / "twins", variational=True))
    sample = draw_sample(twins, 4, seed=0)
    found = measure_functions(twins, sample)
    recorded = torch.tensor(twins.properties["test_accuracy"].to_pylist())[sample.last()]
    torch.testing.assert_close(found.accuracy.float(), recorded.float())
    titles = [axis.get_title() for drawn, _ in measured_figures(twins, sample) for axis in drawn.axes]
    assert titles[1:] == ["test accuracy", "generalisation gap", "sparsity", "train loss", "test loss"]
    with pytest.raises(ValueError, match="layers must use all weights"):  # theta and log sigma^2 are no network
        measure_functions(Zoo.open(twins.path / VARIATIONAL), sample)
    for parent in ("elsewhere", {}, {"provenance": "lost"}):
        stranger = SimpleNamespace(path=twins.path, provenance=dense.provenance | {"parent": parent})
        with pytest.raises(ValueError, match="twins: provenance must be that of fastws zoo make"):
            measure_functions(stranger, sample)


def test_properties_are_those_of_the_states(dense, tmp_path):
    twins = sparsify(tiny(dense, tmp_path / "twins", models=2, variational=True))
    table, data = twins.properties.to_pydict(), TrainingData.of(load("digits", limit=96, validation=287))
    full = Zoo.open(tmp_path / "twins/variational")
    layers = fastws.layer_table(build("digits-cnn", (1, 8, 8), dropout=0.5), (1, 8, 8))
    for row in range(len(twins)):
        checkpoint = full.checkpoint(row)
        theta = torch.cat([checkpoint[name].flatten() for name in twins.checkpoint(row)])
        logs = [checkpoint[new] for _, kind, new in published_names(list(twins.checkpoint(row))) if kind]
        weights = torch.stack([theta, torch.cat([x.flatten() for x in logs])])[None]
        sparse, sparsity = sparse_weights(weights, layers)
        assert torch.equal(sparse[0], twins.rows([row])[0])
        assert table["sparsity"][row] == pytest.approx(sparsity.item())
        assert table["kl_divergence"][row] == pytest.approx(kl_divergence(weights, layers).item(), rel=1e-5)
        activation = torch.tensor([list(ACTIVATIONS).index(table["activation"][row])], dtype=torch.int32)
        loss, accuracy = tally(side_by_side(sparse, layers, activation), data.test)[:2]
        assert table["test_loss"][row] == pytest.approx(loss.item(), rel=1e-5)
        assert table["test_accuracy"][row] == pytest.approx(accuracy.item(), abs=1e-6)
    assert table["kl_divergence"][-1] < table["kl_divergence"][0]


def test_published_names():
    names = ["a.0.weight", "a.0.bias", "a.3.weight", "a.3.bias"]
    published = [new for _, _, new in published_names(names)]
    assert published[:4] == ["a.0.weight", "a.0.bias", "a.0.log_sigma2", "a.0.log_sigma2_bias"]
    assert published[4:] == ["a.3.weight", "a.3.bias", "a.3.log_sigma2", "a.3.log_sigma2_bias"]


def test_schedule_is_the_published_one():
    assert [kl_weight(epoch, 25) for epoch in (1, 2, 25)] == pytest.approx([0, 0.0004, 0.0096])


def test_training_makes_networks_sparse(dense, tmp_path):
    twins = sparsify(tiny(dense, tmp_path, epochs=12, models=2))
    table = twins.properties.to_pydict()
    by_epoch = [[s for s, e in zip(table["sparsity"], table["epoch"], strict=True) if e == epoch] for epoch in (0, 12)]
    assert max(by_epoch[0]) < 0.05 and min(by_epoch[1]) > 2 * max(by_epoch[0])
    for row in range(len(twins)):
        zeros = (twins.rows([row])[0] == 0).float().mean().item()
        assert zeros == pytest.approx(table["sparsity"][row], abs=0.02)


def test_network_that_dropping_changes_is_left_out(dense, tmp_path):
    copy = tmp_path / "dense"
    with ZooWriter(copy, dense.layout, dense.symmetry, dense.provenance) as writer:
        states = dense.rows(range(len(dense))).clone()
        row = last_of(dense)["000001"]
        first, bias, second = slice(0, 128), slice(128, 136), slice(136, 520)
        scale = 1e-3 / states[row, first].abs().max()  # all weights of the first layer are small, but they matter
        states[row, first] *= scale
        states[row, bias] = 0
        states[row, second] /= scale
        writer.append(states, {name: dense.properties[name].to_pylist() for name in dense.properties.column_names})
    changed = Zoo.open(copy)
    recipes, weights = choose(changed, 0, 2, {})
    assert len(recipes) == 6
    twins = sparsify(tiny(changed, tmp_path / "twins"))
    assert twins.provenance["left_out"] == ["000001"] and "000001" not in twins.properties["model"].to_pylist()


@pytest.mark.parametrize("variational", [False, True])
def test_run_that_dies_at_any_moment_resumes_to_the_same_twins(dense, tmp_path, variational):
    options = {"models": 2, "epochs": 1, "wave": 1, "variational": variational}
    with keep_moments(tmp_path / "twins", tmp_path) as moments:
        expected = sparsify(tiny(dense, tmp_path / "twins", **options))
    assert len(moments) > 20
    for moment in moments[:: 11 if variational else 7]:
        zoo = sparsify(tiny(dense, moment, **options))
        assert torch.equal(zoo.weights, expected.weights) and zoo.properties.equals(expected.properties)
        if variational:
            kept, wanted = (Zoo.open(folder / "variational") for folder in (moment, expected.path))
            assert torch.equal(kept.weights, wanted.weights) and kept.properties.equals(wanted.properties)


def test_errors(dense, tmp_path):
    sparsify(tiny(dense, tmp_path / "twins", models=1, epochs=0))
    with pytest.raises(
        ValueError, match="zoo sparsify: epochs must be 0, with which .* was begun, got 1; give another --out"
    ):
        sparsify(tiny(dense, tmp_path / "twins", models=1, epochs=1))
    with pytest.raises(ValueError, match="models must be at least 0, got -1"):
        tiny(dense, tmp_path, models=-1)
    with ZooWriter(tmp_path / "other", dense.layout) as writer:
        writer.append(dense.rows([0]), {"model": ["a"], "epoch": [0]})
    with pytest.raises(ValueError, match="other: provenance must be that of fastws zoo make"):
        sparsify(tiny(Zoo.open(tmp_path / "other"), tmp_path / "twins of other"))
    with ZooWriter(tmp_path / "begun", dense.layout, None, dense.provenance) as writer:
        first = {name: dense.properties[name].to_pylist()[:1] for name in dense.properties.column_names}
        writer.append(dense.rows([0]), first)
    with pytest.raises(ValueError, match="begun must hold networks of epoch 2, got none; finish it first"):
        sparsify(tiny(Zoo.open(tmp_path / "begun"), tmp_path / "twins of begun"))
    assert not (tmp_path / "twins of begun").exists()


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda table: table.pop("epoch"), "must have the properties of a recipe, got no epoch"),
        (lambda table: table.update(activation=["swish"]), "activation must be one of tanh, .*, got 'swish'"),
        (lambda table: table.update(optimizer=[None]), "optimizer must be one of sgd, .*, got None"),
    ],
)
def test_networks_without_a_recipe_are_refused(dense, tmp_path, change, sentence):
    table = {name: dense.properties[name].to_pylist()[-1:] for name in dense.properties.column_names}
    change(table)
    with ZooWriter(tmp_path / "other", dense.layout, None, dense.provenance) as writer:
        writer.append(dense.rows([-1 % len(dense)]), table)
    with pytest.raises(ValueError, match=f"other.* {sentence}"):
        sparsify(tiny(Zoo.open(tmp_path / "other"), tmp_path / "twins"))
    assert not (tmp_path / "twins").exists()


def test_another_zoo_is_refused_and_a_moved_one_is_not(dense, tmp_path):
    sparsify(tiny(dense, tmp_path / "twins", models=1, epochs=0))
    moved = Zoo.open(shutil.copytree(dense.path, tmp_path / "moved"))
    sparsify(tiny(moved, tmp_path / "twins", models=1, epochs=0))
    other = make(MakeConfig(out=str(tmp_path / "other"), **DENSE | {"seed": 2}))
    with pytest.raises(ValueError, match="zoo sparsify: zoo must be .*, with which .*twins was begun, or a copy of it"):
        sparsify(tiny(other, tmp_path / "twins", models=1, epochs=0))


def digits_cnn():
    return build("digits-cnn", (1, 8, 8), num_classes=10, activation="tanh")


def test_zoos_that_were_read_from_files_are_sparsified(dense, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for model, row in last_of(dense).items():
        torch.save(dense.checkpoint(row), folder / f"{model}.pt")
    read = fastws.zoo.read_checkpoints(sorted(folder.iterdir()), tmp_path / "read")
    function = f"{digits_cnn.__module__}:digits_cnn"
    twins = sparsify(tiny(read, tmp_path / "twins", architecture=function, models=2, epochs=1))
    models = twins.properties["model"].to_pylist()
    assert len(set(models)) == 2 and set(models) <= set(read.properties["model"].to_pylist())
    assert twins.layout == read.layout and set(twins.properties["activation"].to_pylist()) == {"tanh"}
    start = (twins.numbers("epoch") == 0).nonzero()[0][0]
    original = read.rows([read.properties["model"].to_pylist().index(models[start])])[0]
    kept = twins.rows([int(start)])[0] != 0
    assert torch.equal(twins.rows([int(start)])[0][kept], original[kept]) and kept.float().mean() > 0.5
    with pytest.raises(ValueError, match="provenance must be that of fastws zoo make"):
        sparsify(tiny(read, tmp_path / "other"))
    with pytest.raises(ValueError, match="must have the properties of a recipe, got no activation"):
        sparsify(tiny(read, tmp_path / "named", architecture="digits-cnn"))
    with pytest.raises(ValueError, match="cnn-s"):
        sparsify(tiny(read, tmp_path / "another", architecture="cnn-s"))


def test_command(dense, tmp_path, capsys):
    options = ["--models", "2", "--epochs", "1", "--threads", "1"]
    main(["zoo", "sparsify", "--zoo", str(dense.path), "--out", str(tmp_path / "twins"), *options])
    out = capsys.readouterr().out
    assert "twins: 4 states of 2 sparse networks, 0 left out as not finite" in out and "mean sparsity 0.0" in out
