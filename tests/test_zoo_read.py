"""Readers of other people's zoos, on synthetic ones."""

import collections
import errno
import json
import os
import pickle
import re
import subprocess
import sys
import traceback
import types
import warnings
import zipfile
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from fastws.cli import main
from fastws.files.checkpoints import load_checkpoint
from fastws.files.torch_file import TorchFile
from fastws.files.torch_records import find_many_records, find_records
from fastws.files.values import ALLOWED
from fastws.zoo import (
    ReadOptions,
    Zoo,
    read_checkpoints,
    read_hub,
    read_pickle,
    read_ray,
    read_unterthiner,
    sequence_pairs,
)
from fastws.zoo.alignment import Alignment
from fastws.zoo.making.architectures import build
from fastws.zoo.readers import collect, record, states
from fastws.zoo.readers.read import Config
from fastws.zoo.readers.record import read_report
from fastws.zoo.readers.unterthiner import PUBLISHED_STARTS, fixed_order, reference_order

PLAIN, DROPOUT = (0, 3, 6), (0, 4, 8)  # module numbers of the layers, without and with dropout layers between them
CONFIG = {"model::nlin": "tanh", "optim::lr": 1e-3, "optim::wd": 0, "training": {"batchsize": 10}, "layers": [1, 2]}
FIX = "; save the state_dict of the network alone"  # for torch files that are refused
WHOLE = "file must be a whole torch file, got "
ONLY = "file must hold tensors, numbers, strings and containers only, got "


def make_state(seed, modules=PLAIN):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 1, 2, 2), (2, 3, 1, 1), (4, 2))
    state = collections.OrderedDict()
    for module, shape in zip(modules, shapes, strict=True):
        state[f"module_list.{module}.weight"] = torch.randn(shape, generator=generator)
        state[f"module_list.{module}.bias"] = torch.randn(shape[0], generator=generator)
    return state


def to_row(state):
    return torch.cat([tensor.flatten() for name, tensor in state.items() if "log_sigma" not in name])


def write_trial(folder, seed, *, epochs=range(4), modules=PLAIN, padded=True, evaluated=True, config=CONFIG):
    """A network as Ray Tune leaves it; its test accuracy is seed + epoch / 100."""
    for epoch in epochs:
        path = folder / (f"checkpoint_{epoch:06}" if padded else f"checkpoint_{epoch}")
        path.mkdir(parents=True)
        torch.save(make_state(100 * seed + epoch, modules), path / "checkpoints")
        torch.save({"state": {}}, path / "optimizer")
    with open(folder / "result.json", "w") as file:
        for epoch in range(0 if evaluated else 1, max(epochs) + 1):
            line = {"training_iteration": epoch, "train_acc": seed + epoch / 50, "test_acc": seed + epoch / 100}
            line |= {"pid": 7, "trial_id": "x", "config": config | {"seed": seed}}
            file.write(json.dumps(line) + "\n")
    return folder


def read_quietly(reader, *args, **options):
    """A zoo, without the warning that states were left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return reader(*args, **options)


def reasons(zoo):
    return [(Path(entry.state).parts[-3], entry.reason.partition(":")[0]) for entry in read_report(zoo.path).bad]


# --- raw zoos


def test_raw_zoo(tmp_path):
    """Both name styles, with and without evaluation before training, with and without dropout, in one zoo."""
    write_trial(tmp_path / "raw/c", 3, modules=DROPOUT, config=CONFIG | {"model::dropout": 0.5})
    write_trial(tmp_path / "raw/a", 1, padded=False)
    write_trial(tmp_path / "raw/b", 2, evaluated=False, epochs=range(1, 4))
    (tmp_path / "raw/config.json").write_text("{}")
    (tmp_path / "raw/logs").mkdir()
    zoo = read_ray(tmp_path / "raw", tmp_path / "zoo")
    expected = [("a", 1, e) for e in range(4)] + [("b", 2, e) for e in (1, 2, 3)] + [("c", 3, e) for e in range(4)]
    assert zoo.properties["model"].to_pylist() == [model for model, _, _ in expected]
    assert zoo.properties["epoch"].to_pylist() == [epoch for _, _, epoch in expected]
    rows = [to_row(make_state(100 * seed + epoch)) for _, seed, epoch in expected]
    assert torch.equal(zoo.weights, torch.stack(rows))
    accuracy = zoo.properties["test_accuracy"].to_numpy()
    numpy.testing.assert_array_equal(accuracy, [seed + epoch / 100 for _, seed, epoch in expected])
    gap = zoo.properties["generalisation_gap"].to_numpy()
    numpy.testing.assert_array_equal(gap, zoo.properties["train_accuracy"].to_numpy() - accuracy)
    assert zoo.properties["dropout"].to_pylist() == [None] * 7 + [0.5] * 4
    columns = {"model", "epoch", "train_accuracy", "test_accuracy", "generalisation_gap", "activation", "dropout"}
    assert set(zoo.properties.column_names) == columns | {"lr", "weight_decay", "seed", "training::batchsize"}
    assert [Path(entry.path).name for entry in read_report(zoo.path).skipped] == ["logs"]
    assert sorted(sum(zoo.splits.values(), [])) == ["a", "b", "c"] and not read_report(zoo.path).bad
    assert list(zoo.checkpoint(0)) == list(make_state(0))


def test_raw_zoos_of_several_roots_and_in_any_order(tmp_path):
    for root in ("one", "two"):
        for name in ("a", "b"):
            write_trial(tmp_path / root / name, len(root + name), epochs=[2])
    zoo = read_ray([tmp_path / "two", tmp_path / "one"], tmp_path / "zoo")
    assert zoo.properties["model"].to_pylist() == ["two/a", "two/b", "one/a", "one/b"]
    zoo = read_ray([tmp_path / "one/b", tmp_path / "one", tmp_path / "one/b"], tmp_path / "listed")
    assert zoo.properties["model"].to_pylist() == ["b", "a"]
    zoo = read_ray(tmp_path / "one", tmp_path / "skipped", skip=lambda folder: folder.name == "a")
    assert zoo.properties["model"].to_pylist() == ["b"]
    splits = {"train": ["b"], "test": ["a"]}
    zoo = read_ray(tmp_path / "one", tmp_path / "split", options=ReadOptions(splits=splits))
    assert zoo.splits == splits and zoo.split("train").tolist() == [1]


def test_chosen_epochs_and_properties(tmp_path):
    write_trial(tmp_path / "raw/a", 1)
    zoo = read_quietly(read_ray, tmp_path / "raw", tmp_path / "zoo", epochs=[3, 1, 9], properties=["test_acc", "lr"])
    assert zoo.properties["epoch"].to_pylist() == [3, 1]
    assert zoo.properties.column_names == ["model", "epoch", "test_accuracy", "lr"]
    assert reasons(zoo) == [("a", "missing")]
    with pytest.raises(ValueError, match=r"properties must be some of model, epoch, .*, got 'loss'"):
        read_ray(tmp_path / "raw", tmp_path / "other", properties=["loss"])


def test_properties_are_not_the_identity_of_a_state(tmp_path):
    folder = write_trial(tmp_path / "raw/a", 1, epochs=[1, 2], config={"model": "CNN", "epoch": 50, "lr": 0.1})
    lines = [{"training_iteration": epoch, "epoch": epoch + 100, "model": "CNN", "lr": epoch} for epoch in (1, 2)]
    with open(folder / "result.json", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    zoo = read_ray(tmp_path / "raw", tmp_path / "zoo")
    assert zoo.properties["model"].to_pylist() == ["a", "a"] and zoo.properties["epoch"].to_pylist() == [1, 2]
    assert zoo.properties["lr"].to_pylist() == [1, 2]
    dataset = make_dataset([1, 2])
    dataset.properties |= {"model": ["CNN"] * 4, "epoch": [7] * 4}
    write_pickle(tmp_path / "dataset.pt", {"trainset": dataset})
    zoo = read_pickle(tmp_path / "dataset.pt", tmp_path / "pickled")
    assert zoo.properties["model"].to_pylist() == ["net_1", "net_1", "net_2", "net_2"]
    assert zoo.properties["epoch"].to_pylist() == [1, 2, 1, 2]
    write_unterthiner(tmp_path / "raw2", [unterthiner_network()] * 2)
    text = (tmp_path / "raw2/metrics.csv").read_text()
    text = text.replace("config.activation", "config.model").replace("config.w_init", "config.step")
    (tmp_path / "raw2/metrics.csv").write_text(text)
    zoo = read_unterthiner(tmp_path / "raw2", tmp_path / "unterthiner")
    assert zoo.properties["model"].to_pylist() == ["/dir/0"] * 2 and zoo.properties["epoch"].to_pylist() == [0, 86]


def test_other_properties_are_another_call(tmp_path):
    write_trial(tmp_path / "raw/NN_0", 0)
    read_ray(tmp_path / "raw", tmp_path / "zoo", properties=["test_acc"])
    with pytest.raises(ValueError, match="folder must be new or empty, got what another call has read"):
        read_ray(tmp_path / "raw", tmp_path / "zoo", properties=["train_acc"])


def test_results_without_iterations_or_without_an_end(tmp_path):
    for name, first in (("a", 0), ("b", 1)):
        folder = write_trial(tmp_path / "raw" / name, 1, epochs=range(first, 4))
        lines = [json.dumps({"test_acc": epoch / 8}) for epoch in range(first, 4)]
        (folder / "result.json").write_text("\n".join([*lines[:-1], lines[-1][:5]]))
    write_trial(tmp_path / "raw/c", 1, epochs=[2])
    (tmp_path / "raw/c/result.json").unlink()
    zoo = read_ray(tmp_path / "raw", tmp_path / "zoo")
    assert zoo.properties["test_accuracy"].to_pylist() == [0, 0.125, 0.25, None, 0.125, 0.25, None, None]


def test_bad_states_are_named_by_reason(tmp_path):
    for number, name in enumerate("abcdefghi"):
        write_trial(tmp_path / "raw" / name, number, epochs=[2])
    raw = {name: tmp_path / "raw" / name / "checkpoint_000002/checkpoints" for name in "abcdefghi"}
    content = raw["b"].read_bytes()
    raw["b"].write_bytes(content[: len(content) // 2])
    raw["c"].write_bytes(b"")
    raw["d"].unlink()
    for name, value in (("e", float("nan")), ("f", float("-inf")), ("g", -7.5)):
        state = make_state(0)
        state["module_list.3.bias"][1] = value
        torch.save(state, raw[name])
    torch.save({**make_state(0), "module_list.6.weight": torch.zeros(4, 3)}, raw["h"])
    torch.save({name: tensor for name, tensor in make_state(0).items() if name != "module_list.6.bias"}, raw["i"])
    with pytest.warns(UserWarning, match=r"8 of 9 states left out: .*2 unreadable.*; read.json names them"):
        zoo = read_ray(tmp_path / "raw", tmp_path / "zoo", options=ReadOptions(threshold=5))
    expected = ["unreadable"] * 2 + ["missing"] + ["not finite"] * 2
    expected += ["above threshold", "other architecture", "tensors missing"]
    assert reasons(zoo) == list(zip("bcdefghi", expected, strict=True))
    assert zoo.properties["model"].to_pylist() == ["a"] and torch.equal(zoo.weights[0], to_row(make_state(2)))
    with pytest.raises(ValueError, match=r"raw/b.*state must be usable, got unreadable.*say --on-bad drop to leave"):
        read_ray(tmp_path / "raw", tmp_path / "strict", options=ReadOptions("raise"))


def test_every_truncation_of_a_checkpoint_is_noticed(tmp_path):
    """None gives other numbers: it is unreadable, or only an unused end is missing."""
    file = write_trial(tmp_path / "raw/a", 1, epochs=[2]) / "checkpoint_000002/checkpoints"
    content, layout = file.read_bytes(), states.make_layout(make_state(0))
    for size in range(0, len(content), 97):
        file.write_bytes(content[:size])
        row = torch.zeros(layout.num_weights)
        with pytest.raises(states.BadState, match="unreadable"):
            states.StateReader(layout)(str(file), row)


def test_sparse_twins(tmp_path):
    """The variances are no part of the network, and may be anything."""
    folder = write_trial(tmp_path / "raw/a", 1, epochs=[1, 2])
    for epoch in (1, 2):
        state = make_state(epoch)
        for module in PLAIN:
            state[f"module_list.{module}.log_sigma2"] = torch.full_like(state[f"module_list.{module}.weight"], -10)
            state[f"module_list.{module}.log_sigma2_bias"] = torch.tensor([float("nan"), 1e35])
        torch.save(state, folder / f"checkpoint_{epoch:06}/checkpoints")
    lines = [{"training_iteration": epoch, "test_acc": 0.5, "sparsity_ratio": epoch / 4} for epoch in (1, 2)]
    (folder / "result.json").write_text("\n".join(map(json.dumps, lines)))
    with pytest.warns(UserWarning, match="states with 6 tensors named log_sigma.* are not in the zoo: 2"):
        zoo = read_ray(tmp_path / "raw", tmp_path / "zoo")
    assert torch.equal(zoo.weights, torch.stack([to_row(make_state(epoch)) for epoch in (1, 2)]))
    assert zoo.properties["sparsity_ratio"].to_pylist() == [0.25, 0.5]


def test_killed_reader_goes_on(tmp_path, monkeypatch):
    for number in range(5):
        write_trial(tmp_path / "raw" / f"{number}", number)
    (tmp_path / "raw/1/checkpoint_000002/checkpoints").write_bytes(b"damaged")
    monkeypatch.setattr(collect, "BATCH", 3 * 4 * 33)  # three states at once
    whole = read_quietly(read_ray, tmp_path / "raw", tmp_path / "whole")
    for deaths, function in ((4, "append"), (3, "append"), (5, "write_json")):
        out = tmp_path / f"{function}-{deaths}"
        with monkeypatch.context() as patch:
            target = collect.ZooWriter if function == "append" else record
            original, calls = getattr(target, function), iter(range(deaths))

            def die_after(*args, original=original, calls=calls, deaths=deaths):
                if next(calls) == deaths - 1:
                    raise KeyboardInterrupt
                return original(*args)

            patch.setattr(target, function, die_after)
            with pytest.raises(KeyboardInterrupt):
                read_ray(tmp_path / "raw", out)
        assert len(Zoo.open(out)) < len(whole)
        zoo = read_quietly(read_ray, tmp_path / "raw", out)
        assert torch.equal(zoo.weights, whole.weights) and zoo.properties.equals(whole.properties)
        assert zoo.splits == whole.splits and read_report(out) == read_report(whole.path)
    again = read_quietly(read_ray, tmp_path / "raw", whole.path)  # a finished one stays as it is
    assert len(again) == len(whole) == 19
    with pytest.raises(ValueError, match="folder must be new or empty, got what another call has read"):
        read_ray(tmp_path / "raw", whole.path, epochs=[1])


def test_reader_goes_on_that_wrote_no_state(tmp_path, monkeypatch):
    """Killed at the begin, before or behind the manifest, or refused a state that is mended."""
    write_trial(tmp_path / "raw/a", 1)

    def die(*_, **__):
        raise KeyboardInterrupt

    for name in ("ZooWriter", "read_batches"):
        with monkeypatch.context() as patch:
            patch.setattr(collect, name, die)
            with pytest.raises(KeyboardInterrupt):
                read_ray(tmp_path / "raw", tmp_path / name)
        assert len(read_ray(tmp_path / "raw", tmp_path / name)) == 4
    file = tmp_path / "raw/a/checkpoint_000002/checkpoints"
    content = file.read_bytes()
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="state must be usable"):
        read_ray(tmp_path / "raw", tmp_path / "strict", options=ReadOptions("raise"))
    file.write_bytes(content)
    assert len(read_ray(tmp_path / "raw", tmp_path / "strict", options=ReadOptions("raise"))) == 4
    with pytest.raises(ValueError, match="got what another call has read"):
        read_ray(tmp_path / "raw", tmp_path / "strict", epochs=[1])


def test_a_source_that_has_changed_is_said_so(tmp_path):
    for name, change in {
        "weights": lambda raw: torch.save(make_state(7, PLAIN), raw / "a/checkpoint_000002/checkpoints"),
        "results": lambda raw: write_results(raw / "a/result.json", [{"training_iteration": 1, "test_acc": 0.7}]),
        "another": lambda raw: write_trial(raw / "b", 2),
    }.items():
        raw, zoo = tmp_path / name, tmp_path / f"{name}-zoo"
        write_trial(raw / "a", 1)
        before = read_ray(raw, zoo).properties
        assert read_ray(raw, zoo).properties == before  # nothing has changed
        change(raw)
        with pytest.raises(ValueError, match="source must be what it was when it was read, got files or results"):
            read_ray(raw, zoo)
        assert Zoo.open(zoo).properties == before


def write_results(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_all_lines_of_results_count_for_the_columns(tmp_path):
    write_trial(tmp_path / "raw/a", 1)
    lines = [{"training_iteration": epoch, "test_acc": 0.1} for epoch in range(4)]
    lines[1]["seldom"] = 5
    write_results(tmp_path / "raw/a/result.json", lines)
    assert read_ray(tmp_path / "raw", tmp_path / "zoo").properties["seldom"].to_pylist() == [None, 5, None, None]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_of_results_are_no_damage(tmp_path, encoding):
    write_trial(tmp_path / "raw/a", 1)
    file = tmp_path / "raw/a/result.json"
    file.write_text(file.read_text(), encoding=encoding)
    accuracy = read_ray(tmp_path / "raw", tmp_path / "zoo").numbers("test_accuracy")
    assert accuracy.tolist() == [1, 1.01, 1.02, 1.03]


def test_bytes_that_are_no_text_cost_their_line_only(tmp_path):
    write_trial(tmp_path / "raw/a", 1)
    file = tmp_path / "raw/a/result.json"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"x"', b'"\xff\xfe"')
    file.write_bytes(b"".join(lines))
    accuracy = read_ray(tmp_path / "raw", tmp_path / "zoo").numbers("test_accuracy")
    assert accuracy[[0, 2, 3]].tolist() == [1, 1.02, 1.03] and numpy.isnan(accuracy[1])


def test_a_configuration_that_changes_is_that_of_each_state(tmp_path):
    write_trial(tmp_path / "raw/a", 1)
    rates = [0.1, 0.1, 0.2, 0.1]
    lines = [
        {"training_iteration": epoch, "config": {"optim::lr": rate, "deep": {"depth": 3}}}
        for epoch, rate in enumerate(rates)
    ]
    write_results(tmp_path / "raw/a/result.json", lines)
    zoo = read_ray(tmp_path / "raw", tmp_path / "zoo")
    assert zoo.numbers("lr").tolist() == rates and zoo.numbers("deep::depth").tolist() == [3] * 4


def test_networks_are_found_or_missed_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="raw zoo must be a folder, got nothing"):
        read_ray(tmp_path / "nowhere", tmp_path / "zoo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="source must hold checkpoints, got none"):
        read_ray(tmp_path / "empty", tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
    with pytest.raises(ValueError, match="threshold must be more than 0, got -1"):
        ReadOptions(threshold=-1)


def test_sequence_pairs(tmp_path):
    write_trial(tmp_path / "raw/a", 1)
    write_trial(tmp_path / "raw/b", 2, epochs=[0, 1, 3])
    zoo = read_ray(tmp_path / "raw", tmp_path / "zoo")
    assert sequence_pairs(zoo).tolist() == [[0, 1], [1, 2], [2, 3], [4, 5]]
    assert sequence_pairs(zoo, [1, 3]).tolist() == [[1, 3], [5, 6]]
    assert sequence_pairs(zoo, [7]).shape == (0, 2)


# --- pickled data sets


class ModelDatasetBase:
    """Stands in for the published class: what it holds is what matters, and its module is gone when it is read."""

    def __init__(self, **attributes):
        self.__dict__ |= attributes


def write_pickle(path, content, legacy=False):
    """Saves a file as a program would that has the published classes."""
    name = "checkpoints_to_datasets.dataset_base"
    ModelDatasetBase.__module__, before = name, dict(sys.modules)
    sys.modules |= {
        "checkpoints_to_datasets": types.ModuleType("c"),
        name: types.SimpleNamespace(ModelDatasetBase=ModelDatasetBase),
    }
    try:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        ModelDatasetBase.__module__ = __name__
        for name in set(sys.modules) - set(before):
            del sys.modules[name]


def make_dataset(seeds, epochs=(1, 2)):
    places = [(seed, epoch) for seed in seeds for epoch in epochs]
    checkpoints = [make_state(100 * seed + epoch) for seed, epoch in places]
    labels = [f"/zoo/net_{seed}#_#epoch_{epoch}#_#layer_[(0, 'conv2d')]" for seed, epoch in places]
    accuracy = [seed + epoch / 100 for seed, epoch in places]
    return ModelDatasetBase(
        data_in=checkpoints,
        data_out=[{name: tensor.clone() for name, tensor in state.items()} for state in checkpoints],
        labels_in=labels,
        labels_out=list(labels),
        paths=[Path(f"/zoo/net_{seed}") for seed, _ in places],
        epochs=[epoch for _, epoch in places],
        properties={
            "test_acc": accuracy,
            "train_acc": numpy.array(accuracy) + 0.5,
            "optim::optimizer": ["adam"] * len(places),
            "odd": {"not": "a column"},
        },
        permutations_index=[(1, 2), (2, 1)],
        threshold=numpy.float64(5.0),
        kinds={"reconstruction", "sequence"},
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_data_sets(tmp_path, legacy):
    content = {"trainset": make_dataset([1, 2, 3]), "valset": make_dataset([4]), "testset": make_dataset([5])}
    write_pickle(tmp_path / "dataset.pt", content, legacy)
    zoo = read_pickle(tmp_path / "dataset.pt", tmp_path / "zoo")
    places = [(seed, epoch) for seed in (1, 2, 3, 4, 5) for epoch in (1, 2)]
    assert torch.equal(zoo.weights, torch.stack([to_row(make_state(100 * s + e)) for s, e in places]))
    assert zoo.properties["model"].to_pylist() == [f"net_{seed}" for seed, _ in places]
    assert zoo.properties["epoch"].to_pylist() == [epoch for _, epoch in places]
    assert zoo.properties["test_accuracy"].to_pylist() == [seed + epoch / 100 for seed, epoch in places]
    numpy.testing.assert_allclose(zoo.properties["generalisation_gap"].to_numpy(), 0.5)
    assert zoo.properties["optimizer"].to_pylist() == ["adam"] * 10 and "odd" not in zoo.properties.column_names
    assert zoo.splits == {"train": ["net_1", "net_2", "net_3"], "val": ["net_4"], "test": ["net_5"]}


def test_pickled_sequences_vectors_and_matrices(tmp_path):
    dataset = make_dataset([1], epochs=(1, 2))
    dataset.data_out = [make_state(102), make_state(103)]
    dataset.labels_out = [f"/zoo/net_1 epoch {epoch} layer [(0, 'conv2d')]" for epoch in (2, 3)]
    write_pickle(tmp_path / "sequence.pt", dataset)
    zoo = read_pickle(tmp_path / "sequence.pt", tmp_path / "sequence")
    assert torch.equal(zoo.weights, torch.stack([to_row(make_state(seed)) for seed in (101, 102, 103)]))
    assert zoo.properties["test_accuracy"].to_pylist() == [1.01, 1.02, None]
    vectors = torch.stack([to_row(state) for state in make_dataset([1, 2]).data_in])
    torch.save(make_state(0), tmp_path / "like.pt")
    for number, data_in in enumerate((vectors, list(vectors))):
        dataset = make_dataset([1, 2])
        dataset.data_in, dataset.checkpoint_base = data_in, make_state(9)
        dataset.layer_lst, dataset.use_bias = [(module, "fc") for module in PLAIN], True
        write_pickle(tmp_path / f"{number}.pt", {"trainset": dataset})
        zoo = read_pickle(tmp_path / f"{number}.pt", tmp_path / f"{number}")
        assert torch.equal(zoo.weights, vectors) and list(zoo.checkpoint(0)) == list(make_state(0))
        del dataset.checkpoint_base
        write_pickle(tmp_path / f"{number}.pt", {"trainset": dataset})
        with pytest.raises(ValueError, match=r"file must hold checkpoints, got vectors; say --like <"):
            read_pickle(tmp_path / f"{number}.pt", tmp_path / "none")
        zoo = read_pickle(tmp_path / f"{number}.pt", tmp_path / f"{number}-like", like=tmp_path / "like.pt")
        assert torch.equal(zoo.weights, vectors)


class Malicious:
    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


ATTACKS = {
    "os.system|posix.system": lambda mark: Malicious(os.system, f"touch {mark}"),
    "builtins.eval|__builtin__.eval": lambda mark: Malicious(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr|__builtin__.getattr": lambda mark: Malicious(getattr, ModelDatasetBase, "__init__"),
    "commands.Popen|subprocess.Popen": lambda mark: Malicious(subprocess.Popen, ["touch", str(mark)]),
    "pathlib.Path.touch|builtins.getattr|__builtin__.getattr": lambda mark: Malicious(Path.touch, mark),
    "torch.hub.load|torch.hub.load": lambda mark: Malicious(torch.hub.load, "nobody/nothing"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_malicious_pickles_are_refused_by_name_and_not_run(tmp_path, name, legacy):
    mark = tmp_path / "mark"
    dataset = make_dataset([1])
    dataset.properties["attack"] = ATTACKS[name](mark)
    write_pickle(tmp_path / "bad.pt", {"trainset": dataset}, legacy)
    with pytest.raises(ValueError, match=f"bad.pt: file must hold tensors.*got ({name}); it is refused"):
        read_pickle(tmp_path / "bad.pt", tmp_path / "zoo")
    torch.save({"a": torch.zeros(2), "b": ATTACKS[name](mark)}, tmp_path / "checkpoint.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    files = [tmp_path / "good.pt", tmp_path / "checkpoint.pt"]
    assert len(read_quietly(read_checkpoints, files, tmp_path / "other")) == 1
    assert not mark.exists() and not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_command_names_what_it_refuses(tmp_path, name):
    """Never with torch's advice to load the file unsafely, not even in a traceback."""
    mark = tmp_path / "mark"
    dataset = make_dataset([1])
    dataset.properties["attack"] = ATTACKS[name](mark)
    write_pickle(tmp_path / "dataset.pt", {"trainset": dataset})
    torch.save({"a": torch.zeros(2), "b": ATTACKS[name](mark)}, tmp_path / "checkpoint.pt")
    for file, fix in (("dataset.pt", ""), ("checkpoint.pt", FIX)):
        last = name.rpartition(".")[2]  # torch leaves out that a function is built in
        with pytest.raises(SystemExit, match=rf"{file}: file must hold .*, got \S*\b{last}\b.* is refused{fix}$"):
            main(["zoo", "read", "--paths", str(tmp_path / file), "--out", str(tmp_path / "zoo")])
    with pytest.raises(ValueError, match="is refused") as raised:
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert "weights_only" not in "".join(traceback.format_exception(raised.value))
    assert not mark.exists()


def write_foreign(path, kind):
    if kind == "script":
        torch.jit.script(nn.Linear(3, 2)).save(path)
    elif kind == "module":
        torch.save(nn.Linear(3, 2), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    elif kind == "text":
        path.write_text("hello")
    else:
        torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=kind == "zip")
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    "kind, got",
    [
        ("script", f"{WHOLE}a TorchScript program; save torch.jit.load(<file>).state_dict() with torch.save"),
        ("module", f"{ONLY}torch.nn.modules.linear.Linear; it is refused{FIX}"),
        ("pickle", f"{WHOLE}a pickle that torch did not write"),
        ("text", f"{WHOLE}a pickle that recalls its value 101, which it has not made; it is damaged"),
        ("zip", f"{WHOLE}a zip file without its end; copy it again"),
        ("legacy", f"{WHOLE}a pickle without its end; copy it again"),
    ],
)
def test_foreign_files_are_named_in_one_sentence(tmp_path, kind, got, recwarn):
    (tmp_path / "files").mkdir()
    write_foreign(tmp_path / "files/b.pt", kind)
    command = ["zoo", "read", "--out", str(tmp_path / "zoo"), "--paths"]
    recwarn.clear()  # scripts are of another time
    with pytest.raises(SystemExit, match=rf"got \S+b.pt: {re.escape(got)}$"):
        main([*command, str(tmp_path / "files/b.pt")])
    torch.save({"a": torch.zeros(2)}, tmp_path / "files/a.pt")
    read_quietly(main, [*command, str(tmp_path / "files")])
    assert not recwarn.list
    assert [entry.reason for entry in read_report(tmp_path / "zoo").bad] == [f"unreadable: {got}"]


def test_files_that_make_no_layout_are_named(tmp_path):
    for tensor in (torch.arange(3), torch.zeros(3, dtype=torch.complex64)):
        torch.save({"a": tensor}, tmp_path / "a.pt")
        for like in (None, tmp_path / "a.pt"):
            with pytest.raises(ValueError, match="a.pt: layout: "):
                read_checkpoints(tmp_path / "a.pt", tmp_path / "zoo", like=like)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: source must be a torch file, got a folder"):
        read_pickle(tmp_path, tmp_path / "zoo")


def write_raw_pickle(path, pickled):
    """A torch file around hand-made pickle codes."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "codes",
    [
        b"cnumpy\nndarray\n)\x81K\x01b.",  # an array that is none
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.",  # a tensor without storage
        b"X\x01\x00\x00\x00aQ.",  # a persistent value that is none
        b"\x80\x02}(",
        b"Vfastws.zoo\nVread\n\x93.",
    ],
)
def test_senseless_pickles(tmp_path, codes):
    write_raw_pickle(tmp_path / "bad.pt", b"\x80\x02" + codes)
    with pytest.raises(ValueError, match="bad.pt"):
        TorchFile(tmp_path / "bad.pt")


def test_refused_names_are_printable(tmp_path):
    write_raw_pickle(tmp_path / "bad.pt", b"c\x1b[31mos\n" + 1000 * b"x" + b"\n.")
    with pytest.raises(ValueError, match=r"only, got \\x1b\[31mos\.x{1,250}\.\.\.; it is refused"):
        TorchFile(tmp_path / "bad.pt")


@pytest.mark.parametrize("name", [*ALLOWED, "torch.utils.data.dataset.TensorDataset"])
def test_pickles_cannot_change_what_they_may_call(tmp_path, name):
    """By a dictionary of attributes, or by slots."""
    module, _, name = name.rpartition(".")
    attribute = b"}X\x08\x00\x00\x00functionK\x01s"
    for state in (attribute, b"(N" + attribute + b"t"):
        write_raw_pickle(tmp_path / "bad.pt", f"c{module}\n{name}\n".encode() + state + b"b.")
        with pytest.raises(ValueError, match="bad.pt"):
            TorchFile(tmp_path / "bad.pt")


def test_tensors_stay_inside_their_storage(tmp_path):
    torch.save({"a": torch.arange(6.0).view(2, 3).T}, tmp_path / "good.pt")
    file = TorchFile(tmp_path / "good.pt")
    stored = file.content["a"]
    assert torch.equal(file.tensor(stored), torch.arange(6.0).view(2, 3).T) and not stored.is_contiguous
    assert find_many_records(file.buffer) == find_records(file.buffer)[0]
    for change in ({"offset": 1}, {"offset": -1}, {"shape": (3, 3)}, {"stride": (1, -3)}):
        with pytest.raises(ValueError, match="tensor must lie in its storage '0' of 24 bytes"):
            file.tensor(stored._replace(**change))
    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(content[:-30])
    with pytest.raises(ValueError, match="part.pt: file must be a whole torch file, got"):
        TorchFile(tmp_path / "part.pt")
    with pytest.raises(ValueError, match="file must hold data sets under trainset, valset, testset, got a dictionary"):
        read_pickle(tmp_path / "good.pt", tmp_path / "zoo")


# --- folders of checkpoints


def test_checkpoints_of_all_kinds(tmp_path):
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    wrapped = {f"module.{name}": tensor for name, tensor in make_state(2).items()}
    torch.save(make_state(1), folder / "a.pt")
    torch.save({"state_dict": wrapped, "epoch": 3, "loss": 0.5}, folder / "b.pth")
    torch.save(make_state(3), folder / "c.th", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(dict(make_state(4)), folder / "deep/d.safetensors")
    torch.save({name: tensor.half() for name, tensor in make_state(5).items()}, folder / "e.pt")
    strided = {name: tensor.mT if tensor.dim() == 2 else tensor for name, tensor in make_state(6).items()}
    strided = {name: tensor.contiguous().mT if tensor.dim() == 2 else tensor for name, tensor in strided.items()}
    torch.save(strided, folder / "f.pt")
    (folder / "g.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(2, 2)}, folder / "h.pt")
    (folder / "notes.txt").write_text("no checkpoint either")
    zoo = read_quietly(read_checkpoints, folder, tmp_path / "zoo")
    assert zoo.properties["model"].to_pylist() == ["a.pt", "b.pth", "c.th", "deep/d.safetensors", "e.pt", "f.pt"]
    rows = [to_row(make_state(seed)) for seed in (1, 2, 3, 4, 5, 6)]
    rows[4] = rows[4].half().float()
    assert torch.equal(zoo.weights, torch.stack(rows))
    found = [entry.reason.partition(":")[0] for entry in read_report(zoo.path).bad]
    assert found == ["unreadable", "other architecture"]
    with pytest.raises(ValueError, match="one checkpoint at least must be readable, got .*g.pt"):
        read_checkpoints(folder / "g.pt", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="source must be a folder or a file, got nothing"):
        read_checkpoints(tmp_path / "nowhere", tmp_path / "none")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "first, second", [("float16", "float32"), ("bfloat16", "float16"), ("float32", "float64"), ("float16", "bfloat16")]
)
def test_no_weight_is_cast_to_a_narrower_dtype(tmp_path, suffix, first, second):
    (tmp_path / "files").mkdir()
    states = [{"fc.weight": torch.full((2, 2), 1 / 3, dtype=getattr(torch, name))} for name in (first, second)]
    files = [tmp_path / f"files/{name}.{suffix}" for name in "ab"]
    for file, state in zip(files, states, strict=True):
        torch.save(state, file) if suffix == "pt" else safetensors.torch.save_file(state, file)
    zoo = read_quietly(read_checkpoints, tmp_path / "files", tmp_path / "zoo")
    assert zoo.weights.dtype == getattr(torch, first) and zoo.properties["file"].to_pylist() == [files[0].name]
    expected = (
        f"other dtype: 'fc.weight' must be torch.{first} or narrower as in {files[0]}, got torch.{second}; say --like"
    )
    assert [entry.reason.startswith(expected) for entry in read_report(zoo.path).bad] == [True]
    if "16" not in second:  # which holds all numbers of the first
        zoo = read_checkpoints(tmp_path / "files", tmp_path / "wide", like=files[1])
        assert zoo.weights.dtype == getattr(torch, second)
        assert torch.equal(zoo.weights, torch.stack([to_row(state).to(zoo.weights.dtype) for state in states]))


def test_tensors_keep_dtypes_of_their_own(tmp_path):
    """The vector of a checkpoint of two dtypes would hold what its tensors cannot."""
    (tmp_path / "files").mkdir()
    state = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2)}
    torch.save(state, tmp_path / "files/a.pt")
    torch.save({"a": torch.full((2,), 1e5), "b": torch.ones(2)}, tmp_path / "files/b.pt")
    zoo = read_quietly(read_checkpoints, tmp_path / "files", tmp_path / "zoo")
    assert "'a' must be torch.float16 or narrower as in" in read_report(zoo.path).bad[0].reason
    assert zoo.checkpoint(0)["a"].dtype == torch.float16


def test_files_that_hold_more_than_tensors(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    torch.save({number: torch.zeros(2) for number in range(3)}, folder / "a.pt")
    torch.save({"weight": torch.eye(2).to_sparse()}, folder / "b.pt")
    torch.save({"encoder": make_state(1), "decoder": make_state(2)}, folder / "b2.pt")
    torch.save({"encoder": make_state(3), "temperature": torch.tensor(0.1)}, folder / "b3.pt")
    torch.save(make_state(1) | {"epoch": 3, "note": "x", "model": {"name": "a"}}, folder / "c.pt")
    torch.save({"epoch": 3, "state_dict": make_state(2), "best_acc1": torch.tensor(0.9)}, folder / "d.pt")
    zoo = read_quietly(read_checkpoints, folder, tmp_path / "zoo")
    assert torch.equal(zoo.weights, torch.stack([to_row(make_state(seed)) for seed in (3, 1, 2)]))
    reasons = [entry.reason for entry in read_report(zoo.path).bad]
    assert "names of tensors must be strings, got 0" in reasons[0] and "must be a dense tensor" in reasons[1]
    assert "checkpoint must hold one network, got several under 'encoder', 'decoder'; say which" in reasons[2]


def test_paths_may_be_mixed_and_named_twice(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    torch.save(make_state(1), tmp_path / "files/a.pt")
    with open(os.fsencode(tmp_path / "files") + b"/x\xff.pt", "wb") as file:
        torch.save(make_state(2), file)
    monkeypatch.chdir(tmp_path)
    paths = ["files", tmp_path / "files/a.pt", "files"]
    zoo = read_checkpoints(paths, tmp_path / "zoo")
    assert zoo.properties["model"].to_pylist() == ["a.pt", "x\\xff.pt"]


def test_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "files/closed").mkdir(parents=True)
    torch.save(make_state(1), tmp_path / "files/a.pt")
    look = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="closed: folder must be readable, got Permission denied"):
        read_checkpoints(tmp_path / "files", tmp_path / "zoo")


def test_states_of_which_none_can_be_used(tmp_path):
    torch.save({name: tensor * torch.nan for name, tensor in make_state(1).items()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="source must hold states that can be used, got none: 1 of 1 states left out"):
        read_quietly(read_checkpoints, tmp_path / "a.pt", tmp_path / "zoo")


@pytest.mark.parametrize("content", ["[]", '{"digest": "', '{"digest": ""}'])
def test_damaged_report_is_named(tmp_path, content):
    torch.save(make_state(1), tmp_path / "a.pt")
    read_checkpoints(tmp_path / "a.pt", tmp_path / "zoo")
    (tmp_path / "zoo/read.json").write_text(content)
    with pytest.raises(ValueError, match="read.json: file must be that of zoo read, got .*; remove"):
        read_checkpoints(tmp_path / "a.pt", tmp_path / "zoo")


def test_folders_of_epochs_are_networks(tmp_path):
    for name in ("x", "y"):
        (tmp_path / "files" / name).mkdir(parents=True)
        for epoch in (2, 10):
            torch.save(make_state(epoch), tmp_path / "files" / name / f"epoch_{epoch:02}.pt")
    zoo = read_checkpoints(tmp_path / "files", tmp_path / "zoo", model="folder")
    assert zoo.properties["model"].to_pylist() == ["x", "x", "y", "y"]
    assert zoo.properties["epoch"].to_pylist() == [2, 10] * 2


def test_hub_folder_of_torch_files_named_twice(tmp_path):
    for number, name in enumerate("ab"):
        (tmp_path / "hub" / name).mkdir(parents=True)
        (tmp_path / "hub" / name / "config.json").write_text("{}")
        torch.save(make_state(number), tmp_path / "hub" / name / "pytorch_model.bin")
    torch.save(make_state(7), tmp_path / "hub/b/training_args.bin")
    safetensors.torch.save_file(dict(make_state(2)), tmp_path / "hub/b/model.safetensors")
    zoo = read_hub([tmp_path / "hub", tmp_path / "hub/a"], tmp_path / "zoo")
    assert zoo.properties["model"].to_pylist() == ["a", "b"]
    assert torch.equal(zoo.weights, torch.stack([to_row(make_state(seed)) for seed in (0, 2)]))


def test_torch_checkpoint_in_parts_is_one_state(tmp_path):
    state, folder = dict(make_state(3)), tmp_path / "hub/a"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    places = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for number, read in enumerate((read_hub, read_checkpoints)):
        zoo = read(tmp_path / "hub", tmp_path / f"zoo{number}")
        assert torch.equal(zoo.weights, to_row(make_state(3))[None])


def test_hub_folder(tmp_path):
    cache = tmp_path / "hub"
    for number, name in enumerate(("models--org--net/snapshots/abc", "models--org--net/snapshots/def", "plain/model")):
        (cache / name).mkdir(parents=True)
        (cache / name / "config.json").write_text(json.dumps({"model_type": "mlp", "hidden": 3 + number, "ids": [1]}))
        parts = [dict(list(make_state(number).items())[part]) for part in (slice(0, 3), slice(3, 6))]
        if number == 1:
            names = [f"model-{part:05}-of-00002.safetensors" for part in (1, 2)]
            for part, file in zip(parts, names, strict=True):
                safetensors.torch.save_file(part, cache / name / file)
            places = {key: file for part, file in zip(parts, names, strict=True) for key in part}
            index = {"weight_map": places}
            (cache / name / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            safetensors.torch.save_file(parts[0] | parts[1], cache / name / "model.safetensors")
    (cache / "models--org--data").mkdir()
    zoo = read_hub(cache, tmp_path / "zoo")
    assert zoo.properties["model"].to_pylist() == ["org/net", "org/net", "plain/model"]
    assert zoo.properties["revision"].to_pylist() == ["abc", "def", None]
    assert zoo.properties["hidden"].to_pylist() == [3, 4, 5] and "ids" not in zoo.properties.column_names
    by_name = {name: tensor for name, tensor in sorted(make_state(1).items())}
    assert torch.equal(zoo.rows([1])[0], torch.cat([zoo.checkpoint(1)[name].flatten() for name in zoo.checkpoint(1)]))
    for name, tensor in by_name.items():
        assert torch.equal(zoo.checkpoint(1)[name], tensor)


# --- Unterthiner


def unterthiner_network():
    convolutions = [nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def write_unterthiner(folder, networks):
    """As TensorFlow keeps them: bias first, kernels [height, width, in, out] and [in, out]."""
    folder.mkdir()
    rows = []
    for network in networks:
        layers = [module for module in network if hasattr(module, "weight")]
        kernels = [m.weight.permute(2, 3, 1, 0) if m.weight.dim() == 4 else m.weight.T for m in layers]
        pairs = zip(layers, kernels, strict=True)
        rows.append(torch.cat([part.flatten() for m, kernel in pairs for part in (m.bias, kernel)]))
    numpy.save(folder / "weights.npy", torch.stack(rows).detach().numpy())
    header = ",config.activation,config.w_init,config.learning_rate,modeldir,step,test_accuracy,train_accuracy"
    lines = [f"{i},tanh,normal,0.01,/dir/{i // 2},{i % 2 * 86},0.5,0.75" for i in range(len(networks))]
    (folder / "metrics.csv").write_text("\n".join([header, *lines]))


def test_unterthiner_gives_networks_that_compute_the_same(tmp_path):
    networks = [unterthiner_network() for _ in range(3)]
    write_unterthiner(tmp_path / "raw", networks)
    zoo = read_unterthiner(tmp_path / "raw", tmp_path / "zoo")
    for row, network in enumerate(networks):
        for ours, theirs in zip(zoo.checkpoint(row).values(), network.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert zoo.properties["model"].to_pylist() == ["/dir/0", "/dir/0", "/dir/1"]
    assert zoo.properties["epoch"].to_pylist() == [0, 86, 0]
    assert zoo.properties["generalisation_gap"].to_pylist() == [0.25] * 3
    assert {"lr", "init", "activation"} <= set(zoo.properties.column_names)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_unterthiner_keeps_the_dtype(tmp_path, dtype):
    write_unterthiner(tmp_path / "raw", [unterthiner_network() for _ in range(2)])
    weights = numpy.load(tmp_path / "raw/weights.npy").astype(dtype)
    weights += weights.dtype.type(1 / 3)
    numpy.save(tmp_path / "raw/weights.npy", weights)
    zoo = read_unterthiner(tmp_path / "raw", tmp_path / "zoo")
    numpy.testing.assert_array_equal(zoo.weights.numpy(), weights[:, fixed_order()])


def test_unterthiner_published_offsets(tmp_path):
    """The published assignment, restated: bias and weights of each layer to where its table says, later ones last."""
    write_unterthiner(tmp_path / "raw", [unterthiner_network() for _ in range(2)])
    raw = numpy.load(tmp_path / "raw/weights.npy")
    targets = []
    for start, length, rows in zip(PUBLISHED_STARTS, (160, 2320, 2320, 170), (16, 16, 16, 10), strict=True):
        targets += [*range(start + length - rows, start + length), *range(start, start + length - rows)]
    expected = raw.copy()
    for source, target in enumerate(targets):
        expected[:, target] = raw[:, source]
    zoo = read_unterthiner(tmp_path / "raw", tmp_path / "zoo", layout="reference")
    numpy.testing.assert_array_equal(zoo.weights.numpy(), expected)
    assert len(set(fixed_order().tolist())) == 4970 and len(set(reference_order().tolist())) == 4970 - 160
    for array, got in ((numpy.zeros((2, 4971), "f4"), r"\[2, 4971\] <f4"), (raw.astype(">f4"), r"\[2, 4970\] >f4")):
        numpy.save(tmp_path / "raw/weights.npy", array)
        with pytest.raises(ValueError, match=rf"weights.npy: array must be \[n, 4970\] of <f2, <f4, <f8, got {got}"):
            read_unterthiner(tmp_path / "raw", tmp_path / "other")
    numpy.save(tmp_path / "raw/weights.npy", numpy.array([Malicious(os.system, "false")], object))
    with pytest.raises(ValueError, match="file must be a whole numpy file"):
        read_unterthiner(tmp_path / "raw", tmp_path / "other")


# --- the command


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_zoo_of_a_known_architecture_can_be_aligned(tmp_path, suffix):
    (tmp_path / "files").mkdir()
    networks = [build("digits-cnn", (1, 8, 8)) for _ in range(3)]
    for number, network in enumerate(networks):
        state, file = network.state_dict(), tmp_path / f"files/{number}.{suffix}"
        torch.save(state, file) if suffix == "pt" else safetensors.torch.save_file(state, file)
    command = ["zoo", "read", "--paths", str(tmp_path / "files"), "--architecture", "digits-cnn", "--image-shape"]
    main([*command, "1", "8", "8", "--out", str(tmp_path / "zoo")])
    zoo = Zoo.open(tmp_path / "zoo")
    for number, network in enumerate(networks):
        assert torch.equal(zoo.weights[number], zoo.layout.flatten(network))
    main(["zoo", "align", "--zoo", str(tmp_path / "zoo"), "--reference", f"1.{suffix}"])
    aligned = Alignment.open(zoo)
    assert (aligned.after > aligned.before).tolist() == [True, False, True]
    with pytest.raises(SystemExit, match=r"none: .*; \S*0\.\w+: other .* --architecture digits-cnn, got"):
        read_quietly(main, [*command, "1", "10", "10", "--out", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="--like must be left out where --architecture is given, got 'x'"):
        Config(paths=("files",), out="zoo", architecture="digits-cnn", like="x")
    write_unterthiner(tmp_path / "raw", [unterthiner_network()])
    with pytest.raises(ValueError, match="symmetry: layout must hold module_list.0.weight .*, got module_list.0"):
        read_unterthiner(tmp_path / "raw", tmp_path / "other-kind", options=ReadOptions(symmetry=zoo.symmetry))


def test_command_recognises_what_it_is_given(tmp_path, capsys):
    write_trial(tmp_path / "ray/a", 1)
    (tmp_path / "ray/a/checkpoint_000001/checkpoints").write_bytes(b"PK\x03\x04 damaged")
    write_pickle(tmp_path / "dataset.pt", {"trainset": make_dataset([1])})
    (tmp_path / "files").mkdir()
    torch.save(make_state(1), tmp_path / "files/a.pt")
    (tmp_path / "hub/org/net").mkdir(parents=True)
    (tmp_path / "hub/org/net/config.json").write_text("{}")
    safetensors.torch.save_file(dict(make_state(4)), tmp_path / "hub/org/net/model.safetensors")
    write_unterthiner(tmp_path / "unterthiner", [unterthiner_network()])
    sources = {"ray": "ray", "pickle": "dataset.pt", "checkpoints": "files", "hub": "hub", "unterthiner": "unterthiner"}
    for kind, source in sources.items():
        out = tmp_path / f"zoo-{kind}"
        read_quietly(main, ["zoo", "read", "--paths", str(tmp_path / source), "--out", str(out)])
        assert Zoo.open(out).provenance["source"]["kind"] == kind
    printed = capsys.readouterr().out
    assert "1 of 4 states left out: 1 unreadable" in printed and "checkpoint_000001" in printed
    with pytest.raises(SystemExit, match="fastws: .*nowhere: source must be a folder or a file, got nothing"):
        main(["zoo", "read", "--paths", str(tmp_path / "nowhere"), "--out", str(tmp_path / "zoo")])
    with pytest.raises(SystemExit, match="paths must be one for pickle, got 2"):
        paths = [str(tmp_path / "dataset.pt")] * 2
        main(["zoo", "read", "--paths", *paths, "--out", str(tmp_path / "zoo")])
