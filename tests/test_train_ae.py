"""Training of autoencoders of whole networks. ``python tests/test_train_ae.py OUT`` runs ten steps."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from running import run_two_processes
from small_zoo import make_small_zoo

from fastws.nn.hyper_representation import HyperRepresentation, HyperRepresentationConfig
from fastws.nn.weight_tokens import Rows
from fastws.runs import processes
from fastws.testing import devices
from fastws.train.ae import train as ae
from fastws.train.ae.plateau import Plateau
from fastws.train.ae.presets import PRESETS
from fastws.train.ae.views import PERMUTATION, Augmentation, choose, view

pytestmark = pytest.mark.usefixtures("in_one_thread")
CPU = torch.device("cpu")
CONFIG = ae.Config(
    out="unset", zoo="small", preset="mnist-seed", width=16, heads=2, depth=1, feed_forward=24, latent=8, head_depth=1,
    head_width=10, projection=6, dropout=0.0, layerwise=True, noise=0.05, additive=0.05, code_noise=0.1, batch_size=8,
    steps=10, lr=3e-3, log_every=1, eval_every=5, device="cpu",
)  # fmt: skip
# without what each process computes of its own share: batch norm, and the spread of the code
ALONE = replace(CONFIG, head_depth=0, code_noise=0.0)
GOLDEN = Path(__file__).parent / "golden/ae.txt"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_small_zoo(tmp_path_factory.mktemp("zoo"))


def read_log(out, name):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()[1:]]
    return [record[name] for record in records if name in record]


def load_weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory, zoo):
    out = str(tmp_path_factory.mktemp("ten_steps"))
    torch.set_num_threads(1)
    ae.train(replace(CONFIG, out=out), zoo, CPU)
    return out


def test_training_learns(zoo, tmp_path):
    config = replace(CONFIG, out=str(tmp_path), preset="cpu", steps=None, passes=60, batch_size=16, log_every=10)
    metrics = ae.train(replace(config, encoding="vector", permute=False, standardize="center"), zoo, CPU)
    assert metrics["val/r2"] > 0.1 and metrics["val/r2_of_train"] > 0.5  # of 12 networks: .12 to .36 by the seed
    assert len(read_log(tmp_path, "train/loss")) == 60 * (48 // 16) // 10


@pytest.mark.parametrize("schedule", ["plateau", "one-cycle", "constant"])
def test_resumed_run_is_the_same(zoo, tmp_path, monkeypatch, schedule):
    """Also the sums that the plateau is judged by, which reach back to the beginning of a pass."""
    config = replace(CONFIG, schedule=schedule, lr=0.3 if schedule == "plateau" else 3e-3, clip=1.0, steps=9)
    whole_run, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    monkeypatch.setattr("fastws.train.ae.plateau.PATIENCE", 0)
    ae.train(replace(config, out=whole_run), zoo, CPU)
    choose, calls = ae.choose, []

    def interrupt(source, split, batch, seed, step):
        calls.append(step)
        if step == 3 and calls.count(3) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return choose(source, split, batch, seed, step)

    monkeypatch.setattr(ae, "choose", interrupt)
    with pytest.raises(SystemExit, match="stopped after step 4 of 9"):
        ae.train(replace(config, out=broken), zoo, CPU)
    ae.train(replace(config, out=broken), zoo, CPU)
    for name in ("checkpoint.pt", ae.BEST):
        torch.testing.assert_close(
            load_weights(Path(broken) / name), load_weights(Path(whole_run) / name), rtol=0, atol=0
        )
    for name in ("train/loss", "val/loss", "val/r2_layer1"):
        assert read_log(broken, name) == read_log(whole_run, name)


def test_ten_steps_are_the_golden_ones(ten_steps):
    expected = [float(line) for line in GOLDEN.read_text().split()]
    assert len(expected) == 10
    assert read_log(ten_steps, "train/loss") == pytest.approx(expected, rel=1e-4)


def test_two_processes_equal_one(zoo, tmp_path):
    run_two_processes(__file__, tmp_path / "two")
    ae.train(replace(ALONE, out=str(tmp_path / "one")), zoo, CPU)
    for name in ("train/loss", "val/loss"):
        assert read_log(tmp_path / "two", name) == pytest.approx(read_log(tmp_path / "one", name), rel=1e-5)


@pytest.mark.parametrize("device", devices())
def test_bf16_trains_everywhere(zoo, ten_steps, tmp_path, device):
    ae.train(replace(CONFIG, out=str(tmp_path), device=device, precision="bf16"), zoo, torch.device(device))
    losses, exact = (read_log(out, "train/loss") for out in (tmp_path, ten_steps))
    assert losses[:2] == pytest.approx(exact[:2], rel=0.1)  # later rounding has led each its own way
    assert all(map(math.isfinite, losses))


def test_best_and_last_are_different_files(zoo, tmp_path):
    ae.train(replace(CONFIG, out=str(tmp_path), lr=0.1, eval_every=1, steps=4), zoo, CPU)
    losses = read_log(tmp_path, "val/loss")
    assert min(losses) < losses[-1]
    saved = torch.load(tmp_path / ae.BEST, weights_only=True)
    model = HyperRepresentation(HyperRepresentationConfig.from_dict(saved["extra"]["hyper_representation"])).eval()
    model.load_state_dict(saved["model"])
    config = replace(CONFIG, out=str(tmp_path), steps=4)
    with torch.no_grad():
        found = ae.Objective(config, ae.make_source(config, zoo, CPU)).evaluate(model)
    assert found["loss"].item() == pytest.approx(min(losses), rel=1e-6)


def test_loss_is_what_the_paper_says(zoo):
    """Gamma times NT-Xent plus the rest times the error in units of each layer's std, from plain formulas."""
    config = replace(CONFIG, gamma=0.3, code_noise=0.0, code_variance=0.2, code_norm=0.1)
    source = ae.make_source(config, zoo, CPU)
    objective = ae.Objective(config, source)
    model = HyperRepresentation(ae.model_config(config, source)).train()
    batch = objective.draw(0)
    z, prediction, projection = model(batch.views, None, 2)
    layers = [(0, 56), (56, 101), (101, 119)]  # 8 x 6, 5 x 8 and 3 x 5 weights and their biases
    training = source.weights[: len(source.rows["train"])]
    assert objective.offsets.tolist() == [list(layer) for layer in layers]
    error = sum((((prediction - batch.target)[:, a:b] / training[:, a:b].std()) ** 2).sum() for a, b in layers)
    unit = torch.nn.functional.normalize(projection, dim=1)
    logits = (unit @ unit.T / 0.1).fill_diagonal_(-torch.inf)
    pairs = torch.arange(16).roll(8)
    expected = 0.3 * torch.nn.functional.cross_entropy(logits, pairs) + 0.7 * error / prediction.numel()
    expected = expected + 0.2 * z[:8].var(0).mean() + 0.1 * z[:8].norm(dim=1).mean()
    assert objective.losses(model, batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_positive_contrast_pulls_together_and_the_published_one_apart():
    z = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    same, apart = torch.cat([z, z]), torch.cat([z, z.roll(3, 1) - (z.roll(3, 1) * z).sum(1, keepdim=True) * z])
    for kind, better in (("positive", same), ("positive-reference", apart), ("simclr", same)):
        worse = apart if better is same else same
        assert ae.contrast(better, kind, 0.1) < ae.contrast(worse, kind, 0.1)
    assert ae.contrast(same, "positive", 0.1).item() == pytest.approx(0, abs=1e-10)
    assert ae.contrast(same, "positive-reference", 0.1).item() == pytest.approx(100 / 8, rel=1e-5)


# --- views


def source_of(zoo, **options):
    return ae.make_source(replace(CONFIG, **options), zoo, CPU)


def test_permuted_views_are_the_same_functions(zoo):
    source = source_of(zoo)
    model = source.rows["train"][:5]
    views = view(source, model, Augmentation(permute=True), seed=0, step=3)
    x = torch.randn(4, 6)

    def outputs(flat):
        for name in ("0", "2", "4"):
            state = zoo.layout.unflatten(flat)
            yield state[f"{name}.weight"], state[f"{name}.bias"]

    def function(flat):
        y = x
        for number, (weight, bias) in enumerate(outputs(flat)):
            y = torch.nn.functional.linear(y if number == 0 else y.relu(), weight, bias)
        return y

    assert not torch.equal(views[:5], views[5:])
    assert torch.equal(
        view(source, model, Augmentation(permute=False), seed=0, step=3), source.weights[model].repeat(2, 1)
    )
    for number in range(10):
        torch.testing.assert_close(function(views[number]), function(source.weights[model[number % 5]]))
    permutations = source.symmetry.random(10, 0, PERMUTATION + 3)
    assert torch.equal(views, source.symmetry.permute(source.weights[model].repeat(2, 1), permutations, zoo.layout))


def test_signs_are_drawn_for_networks_that_may_flip_and_leave_the_others_their_views(tmp_path):
    """Half of the networks are of tanh; the others have the views that they had without signs, bit for bit."""
    zoo = make_small_zoo(tmp_path, activation="tanh")
    source = source_of(zoo)
    model = source.rows["train"][:8]
    assert any(source.symmetry.flips)
    signed, unsigned = (
        view(source, model, Augmentation(permute=True, noise=0.1, flips=flips), 0, 3) for flips in (True, False)
    )
    unknown = view(source._replace(may_flip=None), model, Augmentation(permute=True, noise=0.1), 0, 3)
    assert torch.equal(unsigned, unknown) and torch.equal(signed.abs(), unsigned.abs())
    changed = (signed != unsigned).any(1)
    assert torch.equal(changed, source.may_flip[model].repeat(2)) and 0 < changed.sum() < 16
    share = (signed != unsigned)[changed].double().mean()
    assert 0.3 < share < 0.7


def test_views_are_functions_of_seed_and_step(zoo):
    source = source_of(zoo)
    every = Augmentation(permute=True, noise=0.1, additive=0.1, erase=0.1, block_erase=0.5)
    model, streams = source.rows["train"][:8], [(0, 0), (0, 0), (0, 1), (1, 0)]
    draws = [view(source, model, every, seed, step) for seed, step in streams]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def test_noise_has_the_scale_that_was_asked_for(zoo):
    source = source_of(zoo)
    model = source.rows["train"].repeat(20)
    clean, layers = source.weights[model].repeat(2, 1), [(0, 56), (56, 101), (101, 119)]
    std = [source.weights[: len(source.rows["train"]), a:b].std() for a, b in layers]
    added = view(source, model, Augmentation(False, additive=0.3), 0, 0) - clean
    for (a, b), spread in zip(layers, std, strict=True):
        assert (added[:, a:b] / spread).std().item() == pytest.approx(0.3, rel=0.02)
    assert (view(source, model, Augmentation(False, noise=0.3), 0, 0) / clean).std().item() == pytest.approx(
        0.3, rel=0.02
    )
    erased = view(source, model, Augmentation(False, erase=0.3, erase_value=0.5), 0, 0) == 0.5
    assert erased.double().mean().item() == pytest.approx(0.3, rel=0.05)


def test_the_target_is_what_the_encoder_saw_or_that_without_noise(zoo):
    for target in ("view", "clean"):
        config = replace(CONFIG, target=target, block_erase=1.0)
        source = ae.make_source(config, zoo, CPU)
        batch = ae.Objective(config, source).draw(3)
        model = choose(source, "train", config.batch_size, config.seed, 3)
        plain = view(source, model, Augmentation(permute=True), config.seed, 3)
        assert torch.equal(batch.target, plain if target == "clean" else batch.views)
        assert (batch.views == 0).any(1).all() and not torch.equal(batch.views, plain)


def test_published_presets_erase_blocks():
    for name, preset in PRESETS.items():
        published = not name.startswith("cpu")
        assert not published or preset["block_erase"] == 0.5


# --- schedules and presets


def test_plateau_is_that_of_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    ours, theirs = (torch.optim.SGD([weight], lr=1.0) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=0.3, patience=10)
    plateau, config = Plateau(2, CPU), replace(CONFIG, lr=1.0)
    generator = torch.Generator().manual_seed(0)
    losses = [1 / (1 + n) + 0.3 * torch.rand((), generator=generator).item() for n in range(80)]
    for number, loss in enumerate(losses):
        for half in range(2):
            plateau.set_rates(ours, config, 2 * number + half)
            plateau.see(torch.tensor(loss))
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        scheduler.step(loss)
    assert plateau.carried["rate"] < 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_give_every_option(preset):
    config = ae.Config(out="unset", zoo="small", preset=preset)
    assert config.passes > 0 and config.lr > 0 and config.latent > 0 and config.gamma is not None
    assert ae.Config(out="unset", zoo="small", preset=preset, latent=3).latent == 3


def test_published_sizes():
    """44.1 million weights of the largest model for MNIST's zoo, 2.26 of that for Tetris', without the heads."""
    cnn = [(0, 200, 8, 25), (208, 1408, 6, 200), (1414, 1510, 4, 24), (1514, 2234, 20, 36), (2254, 2454, 10, 20)]
    tetris = [(0, -1, 5, 16), (80, -1, 4, 5)]
    for preset, rows, size, millions in (("mnist-seed", cnn, 2464, 44.1), ("tetris-seed", tetris, 100, 2.26)):
        config = ae.Config(out="unset", zoo="small", preset=preset)
        names = {"encoding", "latent", "bounded", "dropout", "width", "heads", "depth", "feed_forward", "compression"}
        options = {name: getattr(config, name) for name in names}
        layers = tuple(Rows(*row) for row in rows)
        with torch.device("meta"):
            model = HyperRepresentation(HyperRepresentationConfig(size=size, layers=layers, head_depth=0, **options))
        count = sum(math.prod(parameter.shape) for parameter in model.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.05)


# --- bad input


def test_zoos_that_cannot_be_learned(zoo, tmp_path):
    with pytest.raises(ValueError, match="zoo must have 2 networks to train on, got 0"):
        ae.train(replace(CONFIG, out=str(tmp_path), epochs=(7, 8)), zoo, CPU)
    bare = make_small_zoo(tmp_path / "bare", symmetry=False)
    with pytest.raises(ValueError, match="zoo must have a symmetry to permute by, got none in small; use --no-permute"):
        ae.train(replace(CONFIG, out=str(tmp_path)), bare, CPU)
    with pytest.raises(FileNotFoundError, match="run fastws zoo align"):
        ae.train(replace(CONFIG, out=str(tmp_path), aligned=True), zoo, CPU)
    with pytest.raises(ValueError, match="gamma must be in"):
        replace(CONFIG, gamma=2.0)
    assert list(tmp_path.glob("*.pt")) == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes.join("cpu"), TemporaryDirectory() as temporary:
        out = f"{temporary}/run" if sys.argv[1] == "golden" else sys.argv[1]
        config = CONFIG if sys.argv[1] == "golden" else ALONE
        ae.train(replace(config, out=out), make_small_zoo(f"{temporary}/zoo"), CPU)
        if sys.argv[1] == "golden":
            GOLDEN.write_text("".join(f"{loss:.8f}\n" for loss in read_log(out, "train/loss")))
