"""fastws merge: the mean of networks after alignment, as an ordinary checkpoint."""

import doctest
import json
import sys

import pytest
import torch
from compared import moved, network, norm_cnn, save, train
from safetensors.torch import load_file
from torch import nn

import fastws
from fastws.cli import main
from fastws.compare import merge as merge_command
from fastws.compare import merging
from fastws.compare.evaluating import score
from fastws.compare.merge import Config, merge_files
from fastws.data.images import load
from fastws.files.checkpoints import load_checkpoint
from fastws.zoo.making.recipes import Part

DIGITS = {"architecture": "digits-cnn", "activation": "relu"}


def perturbed(state, scale, seed):
    random = torch.Generator().manual_seed(seed)
    return {name: x + scale * x.std() * torch.randn(x.shape, generator=random) for name, x in state.items()}


@pytest.fixture(scope="module")
def trained():
    return train(network())


def test_docstring_example_runs():
    result = doctest.testmod(merging, extraglobs={"fastws": fastws, "torch": torch})
    assert result.attempted > 3 and result.failed == 0


def test_three_relatives_in_other_orders_are_averaged_entry_by_entry(trained):
    torch.manual_seed(0)
    relatives = [perturbed(trained.state_dict(), 0.05, seed) for seed in range(3)]
    copies = []
    for seed, state in enumerate(relatives):
        module = network()
        module.load_state_dict(state)
        copies.append(moved(module, seed) if seed else state)
    merged = fastws.merge(copies, trained, torch.randn(1, 1, 8, 8), weights=[1, 2, 1])
    assert merged.statistics == "stored" and merged.scores == {} and len(merged.aligned) == 3
    for name, tensor in merged.state.items():
        expected = sum(w * state[name] for w, state in zip((0.25, 0.5, 0.25), relatives, strict=True))
        torch.testing.assert_close(tensor, expected)


def test_strangers_merge_better_with_repair_and_loss_is_measured(trained, tmp_path):
    other = train(network(seed=5), seed=5)
    paths = [save(x.state_dict(), tmp_path / f"{k}.safetensors") for k, x in enumerate((trained, other))]
    config = Config(models=tuple(paths), out=str(tmp_path / "merged.safetensors"), data="digits", **DIGITS)
    report = merge_files(config)
    scores = report["test"]["scores"]
    assert scores["merged"]["loss"] < scores["mean without alignment"]["loss"]
    assert report["training"]["repaired"]["loss"] < report["training"]["stored"]["loss"]
    assert report["statistics"] == "repaired"
    found = load_file(tmp_path / "merged.safetensors")
    module = network()
    module.load_state_dict(found)
    images = load("digits")
    expected = score(module, Part(images.test_x, images.test_y))
    assert expected == pytest.approx(tuple(scores["merged"].values()), rel=1e-4)
    assert scores[paths[0]]["accuracy"] > 0.9
    assert json.loads((tmp_path / "merged.safetensors.merged.json").read_text())["report"] == report


def test_models_of_one_name_and_folders_full_of_them_are_all_drawn(trained, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name in ("zoo/one.pth", "zoo/two.pth", "other/one.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(trained.state_dict(), tmp_path / name)
    drawn = []
    monkeypatch.setattr(merge_command.pages, "figure", lambda figure, caption: drawn.append(figure) or "")
    models = (str(tmp_path / "zoo"), str(tmp_path / "other/one.pth"))
    report = merge_files(Config(models=models, out=str(tmp_path / "out"), data="digits", statistics=100, **DIGITS))
    scores = report["test"]["scores"]
    assert [*scores][2:] == [str(tmp_path / name) for name in ("zoo/one.pth", "zoo/two.pth", "other/one.pth")]
    bars = {(bar.get_y(), bar.get_width()) for bar in drawn[0].axes[0].patches}
    assert len({place for place, _ in bars}) == 5 and {loss for _, loss in bars} == {x["loss"] for x in scores.values()}


def test_batch_norms_of_a_merged_network_are_reset(tmp_path):
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(train(norm_cnn()[0], seed=seed).state_dict())
    images = load("digits")
    module, x = norm_cnn()
    data = images.train_x[:500], images.train_y[:500]
    merged = fastws.merge(states, module, x, data=data)
    assert merged.statistics == "reset" and set(merged.scores) == {"stored", "reset"}
    assert merged.scores["reset"].loss < merged.scores["stored"].loss
    module.load_state_dict(merged.state)
    assert module.bn1.num_batches_tracked > 0
    found = score(module.eval(), Part(*data))
    assert found.loss == pytest.approx(merged.scores["reset"].loss, rel=1e-5)
    with pytest.raises(ValueError, match="statistics must be one of stored, reset, .*got 'repaired'"):
        fastws.merge(states, module, x, data=data, statistics="repaired")


def test_half_precision_folder_without_data_is_not_evaluated(trained, tmp_path, capsys):
    folders = []
    for number, state in enumerate((trained.state_dict(), moved(trained))):
        folders.append(tmp_path / f"model{number}")
        folders[-1].mkdir()
        save({name: x.bfloat16() for name, x in state.items()}, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text("{}")
    words = ["merge", *map(str, folders), "--out", str(tmp_path / "out"), "--architecture", "digits-cnn"]
    main([*words, "--activation", "relu"])
    shown = capsys.readouterr().out
    assert "loss of the merged network: not evaluated; give --data" in shown
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    found = load_checkpoint(tmp_path / "out")
    assert all(torch.equal(found[name], x.bfloat16()) for name, x in trained.state_dict().items())
    main([*words, "--activation", "relu", "--json"])  # done before: only said again
    assert json.loads(capsys.readouterr().out)["test"] == "not evaluated"


def test_tied_tensors_stay_tied(tmp_path, monkeypatch):
    (tmp_path / "own_tied.py").write_text(
        """
import torch

class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embed(x))))

def make():
    return Tied(), torch.arange(9)[None]
"""
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = __import__("own_tied").make()[0]
    one = {name: x for name, x in module.state_dict().items() if name != "head.weight"}
    two = {name: x + 0.01 for name, x in one.items()}
    paths = tuple(save(x, tmp_path / f"{k}.safetensors") for k, x in enumerate((one, two)))
    merge_files(Config(models=paths, architecture="own_tied:make", out=str(tmp_path / "out")))
    found = load_file(tmp_path / "out" / "0.safetensors")
    assert found.keys() == one.keys()
    torch.testing.assert_close(found["embed.weight"], one["embed.weight"] + 0.005)


def test_bad_input_is_one_sentence(trained, tmp_path):
    one = save(trained.state_dict(), tmp_path / "one.safetensors")
    seven = save(network(classes=7).state_dict(), tmp_path / "seven.safetensors")
    options = {"out": str(tmp_path / "out"), **DIGITS}
    with pytest.raises(ValueError, match="networks must be at least 2, got 1"):
        Config(models=(one,), **options)
    with pytest.raises(ValueError, match="weights must be 2 with a sum that is not 0, got"):
        Config(models=(one, seven), weights=(1.0,), **options)
    with pytest.raises(ValueError, match="seven.safetensors: checkpoint must fit digits-cnn"):
        merge_files(Config(models=(one, seven), **options))
    with pytest.raises(ValueError, match="weights of the mean must be finite"):
        huge = {name: torch.full_like(x, 6e4).half() for name, x in trained.state_dict().items()}
        module = nn.Module()
        merging.as_first({name: 2 * x.float() for name, x in huge.items()}, huge)
    assert not (tmp_path / "out").exists() and not list(module.parameters())
