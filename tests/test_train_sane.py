"""Pretraining of SANE. ``python tests/test_train_sane.py OUT`` runs ten steps; ``... golden`` writes their losses."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import pytest
import torch
from running import run_two_processes
from small_zoo import make_small_zoo

import fastws
from fastws.layout.moments import layer_moments
from fastws.random.integers import epoch_rows
from fastws.runs import processes
from fastws.table import table_rows
from fastws.testing import devices
from fastws.train.sane import batches
from fastws.train.sane import train as sane
from fastws.zoo import Zoo, ZooWriter

pytestmark = pytest.mark.usefixtures("in_one_thread")
GOLDEN = Path(__file__).parent / "golden/sane.txt"
CPU = torch.device("cpu")
CONFIG = sane.Config(
    out="unset", zoo="small", size="tiny", window=8, batch_size=8, steps=10, lr=3e-3, log_every=1, eval_every=5,
    val_batches=2, device="cpu",
)  # fmt: skip
SPLIT = replace(CONFIG, shard=True, keep_every=4, clip=100.0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_small_zoo(tmp_path_factory.mktemp("zoo"))


def read_losses(out, split="train", name="loss"):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()[1:]]
    return [record[f"{split}/{name}"] for record in records if f"{split}/{name}" in record]


def load_weights(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory, zoo):
    out = str(tmp_path_factory.mktemp("ten_steps"))
    torch.set_num_threads(1)
    sane.train(replace(CONFIG, out=out), zoo, CPU)
    return out


def test_ten_steps_are_the_golden_ones(ten_steps):
    expected = [float(line) for line in GOLDEN.read_text().split()]
    assert len(expected) == 10
    assert read_losses(ten_steps) == pytest.approx(expected, rel=1e-4)


def test_signs_are_drawn_for_networks_that_may_flip_and_leave_the_others_their_windows(zoo, tmp_path):
    signed_zoo = make_small_zoo(tmp_path, activation="tanh")
    plain, signed = (sane.make_source(CONFIG, z, CPU) for z in (zoo, signed_zoo))
    assert plain.population.may_flip is None
    assert signed.population.may_flip.any() and not signed.population.may_flip.all()
    config, some = replace(CONFIG, standardize=False, batch_size=24), set()
    unflipped = signed._replace(population=signed.population._replace(may_flip=None))
    for step in range(2):
        unsigned, drawn = (sane.draw(replace(config, flips=f), signed, "train", step).values for f in (False, True))
        old = sane.draw(config, unflipped, "train", step).values
        assert torch.equal(unsigned, old) and torch.equal(drawn[0], old[0])
        rows = signed.rows("train")
        model = rows[epoch_rows(len(rows), 24, config.seed, batches.ORDER, step)]
        changed = (drawn[1] != unsigned[1]).flatten(1).any(1)
        assert torch.equal(changed, signed.population.may_flip[model])
        some |= set(changed.tolist())
    assert some == {True, False}


def test_training_takes_dense_tokens(zoo, tmp_path):
    config = replace(CONFIG, out=str(tmp_path), span="layer", token_size=9, window=6, steps=3)
    assert torch.isfinite(torch.tensor(sane.train(config, zoo, CPU)["val/loss"]))
    source = sane.make_source(config, zoo, CPU)
    assert source.population.kinds[0].layout.num_tokens == 7 + 5 + 2  # 56, 45 and 18 numbers
    batch = sane.draw(replace(config, noise=0.0, standardize=False, permute="none"), source, "train", 0)
    assert batch.lengths.shape == (8, 6) and (batch.values[0] == batch.values[1]).all()


def test_training_learns(zoo, tmp_path):
    config = replace(CONFIG, out=str(tmp_path), steps=150, log_every=10, eval_every=150)
    metrics = sane.train(config, zoo, CPU)
    losses = read_losses(tmp_path)
    assert losses[-1] < losses[0] / 3 and metrics["val/r2"] > 0.5


def test_resumed_run_is_the_same(zoo, ten_steps, tmp_path, monkeypatch):
    draw = sane.draw

    def interrupt(config, source, split, step, rows=None):
        if split == "train" and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(config, source, split, step, rows)

    monkeypatch.setattr(sane, "draw", interrupt)
    with pytest.raises(SystemExit, match="stopped after step 4 of 10"):
        sane.train(replace(CONFIG, out=str(tmp_path)), zoo, CPU)
    monkeypatch.undo()
    sane.train(replace(CONFIG, out=str(tmp_path)), zoo, CPU)
    torch.testing.assert_close(load_weights(tmp_path), load_weights(ten_steps), rtol=0, atol=0)
    for split in ("train", "val"):
        assert read_losses(tmp_path, split) == read_losses(ten_steps, split)


def test_two_processes_equal_one(ten_steps, tmp_path):
    run_two_processes(__file__, tmp_path)
    for split in ("train", "val"):
        assert read_losses(tmp_path, split) == pytest.approx(read_losses(ten_steps, split), rel=1e-5)
    assert read_losses(tmp_path, "val", "r2") == pytest.approx(read_losses(ten_steps, "val", "r2"), rel=1e-4)
    # Adam divides by the root of tiny second moments, which magnifies rounding
    torch.testing.assert_close(load_weights(tmp_path), load_weights(ten_steps), rtol=1e-3, atol=1e-4)


def test_a_model_may_be_split_over_processes(zoo, ten_steps, tmp_path):
    run_two_processes(__file__, tmp_path / "whole", "shard")
    (tmp_path / "one").mkdir()
    # one process goes on from the middle, as if the run of two had been killed there
    shutil.copy(tmp_path / "whole/checkpoint-4.pt", tmp_path / "one/checkpoint.pt")
    sane.train(replace(SPLIT, out=str(tmp_path / "one")), zoo, CPU)
    for run in ("whole", "one"):
        *_, last = read_losses(tmp_path / run)
        assert last == pytest.approx(read_losses(ten_steps)[-1], rel=1e-5)
        torch.testing.assert_close(load_weights(tmp_path / run), load_weights(ten_steps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", devices())
def test_bf16_trains_everywhere(zoo, tmp_path, device):
    config = replace(CONFIG, out=str(tmp_path), device=device, precision="bf16", clip=1.0)
    sane.train(config, zoo, torch.device(device))
    exact = [float(line) for line in GOLDEN.read_text().split()]
    assert read_losses(tmp_path) == pytest.approx(exact, rel=0.1)
    assert {weight.dtype for weight in load_weights(tmp_path).values()} == {torch.float32}


def test_command_can_be_repeated(zoo, tmp_path, capsys):
    config = replace(CONFIG, zoo=str(zoo.path), out=str(tmp_path), steps=2)
    sane.run(config)
    first = capsys.readouterr().out
    assert "val/r2" in first and f"model and log: {tmp_path}/checkpoint.pt, {tmp_path}/log.jsonl" in first
    sane.run(config)
    assert "all 2 steps were done before" in capsys.readouterr().out


# --- windows


def weights_of(source):
    width = source.population.kinds[0].layout.num_weights
    return source.population.weights[0][: len(source.population.kind) * width].view(-1, width)


def standardise(source, flat):
    """Windows' whole sequences, by the plain way: standardise every layer, then tokenize."""
    flat = flat.clone()
    for layer, row in enumerate(table_rows(source.population.kinds[0].layout.table)):
        for begin, count in ((row.weight_offset, row.rows * row.row_length), (row.bias_offset, row.rows)):
            flat[..., begin : begin + count] -= source.population.kinds[0].mean[layer]
            flat[..., begin : begin + count] /= source.population.kinds[0].std[layer]
    return source.population.kinds[0].layout.tokenize(flat).values


@pytest.mark.parametrize("permute", ["none", "second", "both"])
def test_views_are_windows_of_permuted_networks(zoo, permute):
    config = replace(CONFIG, noise=0.0, permute=permute)
    source = sane.make_source(config, zoo, CPU)
    batch = sane.draw(config, source, "train", 5)
    rows = source.rows("train")[epoch_rows(len(source.rows("train")), 8, config.seed, batches.ORDER, 5)]
    start = batch.positions[:, 0, 0]
    permutations = zoo.symmetry.random(16, config.seed, batches.PERMUTATION + 5).unflatten(0, (2, 8))
    for view in (0, 1):
        networks = weights_of(source)[rows]
        if (permute, view) in {("second", 1), ("both", 0), ("both", 1)}:
            networks = zoo.symmetry.permute(networks, permutations[view], zoo.layout)
        tokens = standardise(source, networks)
        expected = torch.stack([tokens[b, n : n + 8] for b, n in enumerate(start)])
        torch.testing.assert_close(batch.values[view], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(batch.values[0], batch.values[1]) == (permute == "none")
    assert torch.equal(batch.target, batch.values)
    layout = source.population.kinds[0].layout
    places = torch.stack([layout.positions[n : n + 8] for n in start])
    assert torch.equal(batch.positions, places) and torch.equal(batch.lengths, layout.lengths[places[..., 0]])


def test_noise_multiplies(zoo):
    config = replace(CONFIG, batch_size=64, permute="none", target="clean")
    batch = sane.draw(config, sane.make_source(config, zoo, CPU), "train", 0)
    assert ((batch.values == 0) == (batch.target == 0)).all()  # padding stays padding
    factors = (batch.values / batch.target)[batch.target != 0]
    assert factors.mean().item() == pytest.approx(1, abs=0.01) and factors.std().item() == pytest.approx(0.1, rel=0.1)
    first, second = (batch.values / batch.target)[:, batch.target[0] != 0]
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1


def test_validation_is_not_noised(zoo):
    config = replace(CONFIG, permute="none", erase=0.5)
    source = sane.make_source(config, zoo, CPU)
    batch = sane.draw(config, source, "val", 0)
    assert torch.equal(*batch.values)
    assert all(torch.equal(*pair) for pair in zip(batch[:4], sane.draw(config, source, "val", 0)[:4], strict=True))


def test_moments_are_those_of_the_training_split(zoo):
    source = sane.make_source(CONFIG, zoo, CPU)
    networks = zoo.rows(zoo.split("train")).double().numpy()
    for layer, row in enumerate(table_rows(source.population.kinds[0].layout.table)):
        weights = networks[:, row.weight_offset : row.weight_offset + row.rows * row.row_length]
        entries = numpy.concatenate([weights, networks[:, row.bias_offset : row.bias_offset + row.rows]], 1)
        kind = source.population.kinds[0]
        assert kind.mean[layer].item() == pytest.approx(entries.mean(1).mean(), rel=1e-5)
        assert kind.std[layer].item() == pytest.approx(entries.var(1, ddof=1).mean() ** 0.5, rel=1e-5)


def test_moments_of_layers_that_do_not_vary():
    layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(1, 1), "b.weight": torch.zeros(2, 2)})
    mean, std = layer_moments(torch.tensor([[2.0, 5, 5, 5, 5], [4.0, 5, 5, 5, 5]]), layout)
    assert mean.tolist() == [3, 5] and std.tolist() == [1, 1]


def test_every_epoch_visits_every_row_once():
    rows = torch.arange(100, 110)
    chosen = torch.cat([rows[epoch_rows(len(rows), 4, 0, batches.ORDER, step)] for step in range(10)]).view(4, 10)
    assert all(sorted(epoch.tolist()) == rows.tolist() for epoch in chosen)
    assert len({tuple(epoch.tolist()) for epoch in chosen}) == 4
    assert epoch_rows(len(rows), 25, 0, batches.ORDER, 3).shape == (25,)


@pytest.mark.parametrize("shared", [False, True])
def test_windows_start_anywhere(zoo, shared):
    config = replace(CONFIG, batch_size=16, shared_window=shared)
    source = sane.make_source(config, zoo, CPU)
    batches = [sane.draw(config, source, "train", step) for step in range(30)]
    starts = [batch.positions[..., 0, 0].unique().tolist() for batch in batches]
    assert {start for some in starts for start in some} == set(
        range(source.population.kinds[0].layout.num_tokens - 8 + 1)
    )
    assert (max(map(len, starts)) == 1) == shared


def test_processes_share_a_batch(zoo, monkeypatch):
    source = sane.make_source(CONFIG, zoo, CPU)
    whole = sane.draw(CONFIG, source, "train", 2)
    parts = []
    monkeypatch.setattr(processes, "world", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(sane.draw(CONFIG, source, "train", 2))
    for field, axis in [("values", 1), ("target", 1), ("lengths", 0), ("positions", 0)]:
        together = torch.cat([getattr(part, field) for part in parts], axis)
        assert torch.equal(together, getattr(whole, field))


def test_losses_by_hand():
    class Model(torch.nn.Module):
        def forward(self, values, positions):
            projection = torch.tensor([[[1.0, 0], [0, 1]], [[1.0, 0], [0, 1]]])  # views agree, networks do not
            return None, values + 1, projection

    values = torch.arange(16.0).view(2, 2, 2, 2)
    lengths = torch.tensor([[2, 1], [0, 1]], dtype=torch.int32)  # 4 of 8 entries
    metrics = sane.losses(CONFIG, Model(), sane.Batch(values, values, lengths, None))
    contrast = numpy.log(numpy.exp(10) + 2) - 10
    assert metrics["reconstruction"].item() == 0.5
    assert metrics["contrast"].item() == pytest.approx(contrast, rel=1e-2, abs=1e-6)
    assert metrics["loss"].item() == pytest.approx(0.05 * metrics["contrast"].item() + 0.95 * 0.5)


def test_epochs_choose_states(zoo):
    source = sane.make_source(replace(CONFIG, epochs=(2, 2)), zoo, CPU)
    expected = [zoo.split(split)[1::2] for split in ("train", "val")]
    assert torch.equal(weights_of(source), zoo.rows(torch.cat(expected)))
    assert [len(source.rows(split)) for split in ("train", "val")] == [len(rows) for rows in expected]


# --- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window": 17}, "train sane: window must be at most the 16 tokens of a network, got 17"),
        ({"max_positions": (16, 3, 7)}, r"train sane: max_positions must be at least \(16, 3, 8\), got \(16, 3, 7\)"),
        ({"epochs": (7, 9)}, "train sane: zoo must have 2 networks to train on, got 0 in .*"),
    ],
)
def test_config_must_fit_the_zoo(zoo, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        sane.train(replace(CONFIG, out=str(tmp_path), **fields), zoo, CPU)


def test_permuting_needs_a_symmetry(tmp_path):
    with pytest.raises(ValueError, match="zoo must have a symmetry to permute by, got none in .*zoo; permute none"):
        sane.train(replace(CONFIG, out=str(tmp_path)), make_small_zoo(tmp_path / "zoo", symmetry=False), CPU)


def test_epochs_must_be_known(zoo, tmp_path):
    with ZooWriter(tmp_path / "zoo", zoo.layout, zoo.symmetry) as writer:
        writer.append(zoo.weights, {"model": [str(row) for row in range(len(zoo))]})
    with pytest.raises(ValueError, match="train sane: epochs must be left out for .*zoo, which does not know them"):
        sane.train(replace(CONFIG, out=str(tmp_path), epochs=(1, 2)), Zoo.open(tmp_path / "zoo"), CPU)


@pytest.mark.parametrize("field, value", [("gamma", 1.5), ("batch_size", 1), ("steps", -1), ("val_batches", 0)])
def test_config_is_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        replace(CONFIG, **{field: value})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes.join("cpu"), TemporaryDirectory() as temporary:
        out = f"{temporary}/run" if sys.argv[1] == "golden" else sys.argv[1]
        config = SPLIT if "shard" in sys.argv else CONFIG
        sane.train(replace(config, out=out), make_small_zoo(f"{temporary}/zoo"), CPU)
        if sys.argv[1] == "golden":
            GOLDEN.write_text("".join(f"{loss:.8f}\n" for loss in read_losses(out)))
