"""Storing networks in NeRNs. ``python tests/test_nern_train.py OUT`` takes ten steps; ``... golden`` writes losses."""

import json
import os
import shutil
import signal
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from running import finish, run_script, run_two_processes, start
from test_nern import encode_position
from torch import nn
from torch.nn import functional as F

from fastws.nern.checkpoint import load_nern
from fastws.nern.images import ImageSet, Pixels
from fastws.nern.layers import find_layers
from fastws.nern.orders import network_orders, save_orders
from fastws.nern.teachers import load_teacher
from fastws.nn.resnet import CIFARBlock, CIFARResNet
from fastws.testing import devices
from fastws.train.nern import train as nern

pytestmark = pytest.mark.usefixtures("in_one_thread")
GOLDEN = Path(__file__).parent / "golden/nern.txt"
CPU = torch.device("cpu")
CONFIG = nern.Config(
    out="unset", weights="given", architecture="small", images="given", hidden=24, steps=10, batch_size=8,
    kernel_batch=64, feature_weight=1e-2, distillation_weight=1e-2, log_every=1, eval_every=5, device="cpu",
)  # fmt: skip
NOTHING = {"feature_weight": 0.0, "distillation_weight": 0.0}


class Small(nn.Module):
    """A ResNet with two blocks, the second with a 1x1 convolution in its shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = CIFARBlock(4, 4, "b"), CIFARBlock(4, 8, "b")
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


def make_teacher():
    torch.manual_seed(0)
    teacher = Small().eval().requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return teacher


def make_images():
    """Images of random pixels; most labels are what the teacher says."""
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for name, count in (("train", 60), ("val", 24), ("test", 16)):
        parts[name] = Pixels(
            torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(count) % 5
        )
    images = ImageSet(parts, (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    for name, part in parts.items():
        said = torch.cat([make_teacher()(batch).argmax(1) for batch, _ in images.batches(name, 8)])
        said[::7] = (said[::7] + 1) % 5
        images.parts[name] = Pixels(part.images, said)
    return images


def train(out, **changes):
    return nern.train(replace(CONFIG, out=str(out), **changes), make_teacher(), make_images(), CPU)


def read_log(out, name):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()[1:]]
    return [record[name] for record in records if name in record]


def load_weights(out, name="checkpoint.pt"):
    return torch.load(Path(out) / name, weights_only=True)["model"]


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("ten_steps")
    torch.set_num_threads(1)
    train(out)
    return out


def test_ten_steps_are_the_golden_ones(ten_steps):
    expected = [float(line) for line in GOLDEN.read_text().split()]
    assert len(expected) == 10
    assert read_log(ten_steps, "train/loss") == pytest.approx(expected, rel=1e-4)


def test_training_stores_the_network(tmp_path):
    changes = {"steps": 600, "warmup": 550, "lr": 0.02, "batching": "all", "hidden": 64}
    _, metrics = train(tmp_path, log_every=100, eval_every=200, **changes)
    assert metrics["val/relative_error"] < 0.05 and metrics["val/agreement"] > 0.95
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best"]["agreement"] > 0.9 and results["best"]["original_accuracy"] == pytest.approx(13 / 16)


# --- one step, in the published way


def published_gradients(config, job, model, teacher, batch):
    """The published step: all kernels from encoded coordinates, two copies of the network, two backward passes.

    Both networks run whether or not their losses count.
    """
    layers = job.stored.layers
    coordinates = [
        (i, f, c) for i, layer in enumerate(layers) for f in range(layer.shape[0]) for c in range(layer.shape[1])
    ]
    encodings = torch.stack([torch.cat([encode_position(p) for p in coordinate]) for coordinate in coordinates])
    x = encodings[job.stored.rows]
    for layer in model.layers:
        x = F.relu(layer(x))
    predictions = model.final_linear_layer(x)
    learned = predictions[batch.chosen]
    everything = predictions.detach().clone()
    student, first, leaves = deepcopy(teacher), 0, []
    for layer in layers:
        weight = everything[first : first + layer.kernels].reshape(*layer.shape[:2], 3, 3)
        weight = weight[..., 1:2, 1:2] if layer.kernel == (1, 1) else weight
        parameter = student.get_parameter(layer.name)
        parameter.data, parameter.requires_grad = weight.clone(), True
        leaves.append(parameter)
        first += layer.kernels
    error = sum((x - y).square().sum() for x, y in zip(leaves, job.originals, strict=True)) / job.stored.num_weights
    maps, logits = zip(*(feature_maps(network, batch.images) for network in (student, teacher)), strict=True)
    normalised = [[x / (x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-3) for x in some] for some in maps]
    distances = [(x - y).square().sum() for x, y in zip(*normalised, strict=True)]
    if config.maps == "doubled":  # sums of blocks
        distances += distances[2::2]
    features = sum(distances) / len(batch.images)
    p, q = logits[1].softmax(1), logits[0].softmax(1)
    distillation = (p * (p.log() - (q + 1e-4).log())).sum(1).mean()
    terms = error.sqrt(), features, distillation
    loss = sum(weight * term for weight, term in zip(batch.weights, terms, strict=True))
    grads = torch.autograd.grad(loss, leaves)
    grads = [F.pad(x, (1, 1, 1, 1)) if x.shape[2:] == (1, 1) else x for x in grads]
    grad = torch.cat([x.reshape(-1, 9) for x in grads])[batch.chosen]
    return terms, torch.autograd.grad(learned, list(model.parameters()), grad)


def feature_maps(network, images):
    x = network.bn1(network.conv1(images))
    maps = [x]
    for block in (network.layer1, network.layer2):
        x = torch.relu(x)
        y = block.bn1(block.conv1(x))
        x = block.bn2(block.conv2(torch.relu(y))) + block.shortcut(x)
        maps += [y, x]
    return maps, network.linear(torch.relu(x).mean((2, 3)))


def prepare(tmp_path, **changes):
    config = replace(CONFIG, out=str(tmp_path), **changes)
    teacher = make_teacher()
    job = nern.make_job(config, teacher, make_images(), CPU)
    torch.manual_seed(0)
    return config, teacher, job, nern.make_model(config, job, teacher)


@pytest.mark.parametrize("maps", ["clean", "doubled"])
@pytest.mark.parametrize("order", ["none", "infilter", "crossfilter"])
def test_step_is_the_published_one(tmp_path, order, maps):
    config, teacher, job, model = prepare(tmp_path, order=order, maps=maps, kernel_batch=30)
    batch = nern.draw(config, job, 3, CPU)
    metrics = nern.compute_losses(config, job, model, batch)
    terms, expected = published_gradients(config, job, model, teacher, batch)
    for name, term in zip(("reconstruction", "features", "distillation"), terms, strict=True):
        if name in metrics:
            torch.testing.assert_close(metrics[name], term, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(metrics["loss"], list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_published_maps_count_sums_twice(tmp_path):
    config, _, job, model = prepare(tmp_path, maps="doubled")
    batch = nern.draw(config, job, 0, CPU)
    outputs = nern.run_network(config, job.teacher, {}, batch.images, maps=True)
    assert outputs.weights == [1, 1, 2, 1, 2] and min(x.min() for x in outputs.maps) < 0
    behind = nern.run_network(replace(config, maps="doubled_after"), job.teacher, {}, batch.images, maps=True)
    assert behind.weights == outputs.weights and min(x.min() for x in behind.maps) == 0


def test_networks_rest_while_they_do_not_count(tmp_path, monkeypatch):
    """The published code runs both in its warm-up, which changes no gradient."""
    config, teacher, job, model = prepare(tmp_path, warmup=5)
    batch = nern.draw(config, job, 4, CPU)
    assert batch.images is None and batch.weights == (1.0, 0.0, 0.0)
    with_images = nern.draw(config, job, 5, CPU)
    expected = published_gradients(
        config, job, model, teacher, with_images._replace(chosen=batch.chosen, weights=batch.weights)
    )[1]
    monkeypatch.setattr(nern, "functional_call", None)  # would be called
    metrics = nern.compute_losses(config, job, model, batch)
    assert set(metrics) == {"loss", "reconstruction"}
    for ours, theirs in zip(torch.autograd.grad(metrics["loss"], list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_all_kernels_learn_with_all(tmp_path):
    config, teacher, job, model = prepare(tmp_path, batching="all")
    batch = nern.draw(config, job, 0, CPU)
    assert batch.chosen is None
    loss = nern.compute_losses(config, job, model, batch)["loss"]
    everything = batch._replace(chosen=torch.arange(sum(job.kernels.kernels)))
    _, expected = published_gradients(config, job, model, teacher, everything)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_phases():
    config = replace(CONFIG, warmup=4)
    assert [nern.loss_weights(config, step) for step in (3, 4)] == [(1, 0, 0), (1, 1e-2, 1e-2)]
    config = replace(config, objective="phases", feature_weight=0.0)
    assert [nern.loss_weights(config, step) for step in (3, 4)] == [(1, 0, 0), (0, 0, 1e-2)]


def test_distillation_alone_does_without_maps(tmp_path, monkeypatch):
    config, _, job, model = prepare(tmp_path, objective="phases", feature_weight=0.0)
    monkeypatch.setattr(nern, "FeatureTaps", None)  # would be called
    metrics = nern.compute_losses(config, job, model, nern.draw(config, job, 0, CPU))
    assert set(metrics) == {"loss", "distillation"} and metrics["loss"].requires_grad


# --- runs


def test_resumed_run_is_the_same(ten_steps, tmp_path, monkeypatch):
    draw = nern.draw

    def interrupt(config, job, step, device):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(config, job, step, device)

    monkeypatch.setattr(nern, "draw", interrupt)
    with pytest.raises(SystemExit, match="stopped after step 4 of 10"):
        train(tmp_path)
    monkeypatch.undo()
    train(tmp_path)
    assert_same_runs(tmp_path, ten_steps)


def test_killed_run_is_the_same(ten_steps, tmp_path):
    """SIGKILL behind an evaluation that wrote best.pt, of which checkpoint.pt does not know yet."""
    assert finish(start(run_script, __file__, tmp_path, "kill")) == [-signal.SIGKILL]
    assert (tmp_path / "best.pt").exists() and len(read_log(tmp_path, "train/loss")) > 4
    train(tmp_path, save_every=4)
    assert_same_runs(tmp_path, ten_steps)


def assert_same_runs(out, other):
    for name in ("checkpoint.pt", "best.pt"):
        torch.testing.assert_close(load_weights(out, name), load_weights(other, name), rtol=0, atol=0)
    for name in ("train/loss", "val/accuracy", "val/relative_error"):
        assert read_log(out, name) == read_log(other, name)
    assert (Path(out) / "results.json").read_text() == (Path(other) / "results.json").read_text()


def test_two_processes_equal_one(ten_steps, tmp_path):
    run_two_processes(__file__, tmp_path)
    for name in ("train/loss", "val/accuracy", "val/relative_error"):
        assert read_log(tmp_path, name) == pytest.approx(read_log(ten_steps, name), rel=1e-5)
    torch.testing.assert_close(load_weights(tmp_path), load_weights(ten_steps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", devices())
def test_bf16_trains_everywhere(tmp_path, device):
    config = replace(CONFIG, out=str(tmp_path), device=device, precision="bf16")
    nern.train(config, make_teacher(), make_images(), torch.device(device))
    exact = [float(line) for line in GOLDEN.read_text().split()]
    assert read_log(tmp_path, "train/loss") == pytest.approx(exact, rel=0.1)
    assert {weight.dtype for weight in load_weights(tmp_path).values()} == {torch.float32}


def test_best_weights_are_those_of_the_best_evaluation(tmp_path):
    train(tmp_path, steps=30, eval_every=3, lr=0.05)
    accuracy = read_log(tmp_path, "val/accuracy")
    best, last = load_weights(tmp_path, "best.pt"), load_weights(tmp_path)
    config = replace(CONFIG, out=str(tmp_path))
    job = nern.make_job(config, make_teacher(), make_images(), CPU)
    model = load_nern(tmp_path / "best.pt")[0]
    with torch.no_grad():
        found = nern.evaluate_part(job, model, "val", 8)
    assert found["accuracy"].item() == pytest.approx(max(accuracy)) and max(accuracy) > min(accuracy)
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("accuracy", [0.8, 0.9])  # of which float32 has one below and one above
def test_equal_evaluations_keep_the_first(tmp_path, accuracy):
    watch, model = nern.Watch(replace(CONFIG, out=str(tmp_path)), CPU), torch.nn.Linear(1, 1)
    found = {"accuracy": torch.tensor(accuracy, dtype=torch.float64), "relative_error": torch.tensor(1.0)}
    for bias in (1.0, 2.0, 3.0):
        torch.nn.init.constant_(model.bias, bias)
        watch.keep(found, model=model, extra={})
    assert torch.load(tmp_path / "best.pt", weights_only=True)["model"]["bias"] == 1


def test_weights_can_be_chosen_on_the_test_images_as_published(tmp_path):
    train(tmp_path, select="test")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["select"] == "test" and results["best"]["accuracy"] == pytest.approx(
        max(read_log(tmp_path, "val/accuracy"))
    )


def test_greedy_evaluations(tmp_path):
    config = replace(CONFIG, greedy_window=3, greedy_every=2)
    watch = nern.Watch(config, CPU)
    values = [5.0, 9, 4, 9, 6, 9, 4, 9, 3, 9]  # looked at in steps 1, 3, 5, 7, 9: 5 4 6 4 3
    found = [watch.improves(done, {"distillation": torch.tensor(x)}) for done, x in enumerate(values, 1)]
    assert found == [False, False, False, False, False, False, True, False, True, False]
    assert not nern.Watch(replace(config, greedy_window=0), CPU).improves(1, {"distillation": torch.tensor(0.0)})
    assert not watch.improves(11, {"reconstruction": torch.tensor(0.0)})


def test_run_without_images_keeps_the_best_weights(tmp_path):
    config = replace(CONFIG, out=str(tmp_path), images=None, **NOTHING)
    _, metrics = nern.train(config, make_teacher(), None, CPU)
    assert set(metrics) == {"train/loss", "train/reconstruction", "val/relative_error"}
    assert (tmp_path / "best.pt").exists() and not (tmp_path / "results.json").exists()


def test_distillation_on_noise_keeps_the_latest_weights(tmp_path):
    config = replace(CONFIG, out=str(tmp_path), images=None, data_free=True, objective="phases", warmup=5, lr=0.02)
    _, metrics = nern.train(config, make_teacher(), None, CPU)
    errors = read_log(tmp_path, "val/relative_error")
    assert errors[-1] > errors[0] and metrics["val/skipped"] == 0  # the weights are no longer what is learned
    torch.testing.assert_close(load_weights(tmp_path, "best.pt"), load_weights(tmp_path), rtol=0, atol=0)


def test_data_free_training_leaves_out_what_is_not_finite(tmp_path, monkeypatch):
    draw = nern.uniform_images

    def sometimes_bad(shape, size, seed, step, device):
        images = draw(shape, size, seed, step, device)
        assert shape == (3, 8, 8) and -2 <= images.min() < -1.9 and 1.9 < images.max() <= 2
        return images * torch.nan if step in (2, 5) else images

    monkeypatch.setattr(nern, "uniform_images", sometimes_bad)
    train(tmp_path, data_free=True)
    assert len(read_log(tmp_path, "train/loss")) == 8 and len(read_log(tmp_path, "val/accuracy")) == 2
    assert read_log(tmp_path, "val/skipped") == [1, 2]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["carried"]["skipped"] == 2 and all(x.isfinite().all() for x in state["model"].values())


def test_data_free_training_leaves_out_gradients_that_are_not_finite(tmp_path, monkeypatch):
    compute = nern.compute_losses

    def sometimes_bad(config, job, model, batch):
        metrics = compute(config, job, model, batch)
        sometimes_bad.calls += 1
        factor = torch.inf if sometimes_bad.calls in (3, 10) else 1.0
        metrics["loss"].register_hook(lambda gradient: gradient * factor)
        return metrics

    sometimes_bad.calls = 0
    monkeypatch.setattr(nern, "compute_losses", sometimes_bad)
    train(tmp_path, data_free=True)
    assert len(read_log(tmp_path, "train/loss")) == 8
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["carried"]["skipped"] == 2 and all(x.isfinite().all() for x in state["model"].values())


def test_weights_that_predict_no_numbers_are_never_the_best(tmp_path):
    watch = nern.Watch(replace(CONFIG, out=str(tmp_path)), CPU)
    found = {"accuracy": torch.tensor(0.9), "relative_error": torch.tensor(torch.nan)}
    watch.keep(found, model=nn.Linear(1, 1), extra={})
    assert not (tmp_path / "best.pt").exists() and watch.carried["best"] == -torch.inf


def test_data_free_training_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(nern, "MOST_SKIPPED", 4)
    monkeypatch.setattr(nern, "uniform_images", lambda shape, size, *_: torch.full((size, *shape), torch.nan))
    with pytest.raises(
        FloatingPointError, match="loss and gradients must be finite, got 4 batches in a row where they"
    ):
        train(tmp_path, data_free=True)


def test_classifier_can_be_learned(tmp_path):
    model, _ = train(tmp_path, learn_classifier=True)
    _, _, learned = load_nern(tmp_path / "checkpoint.pt")
    assert list(learned) == ["linear.weight"] and torch.equal(learned["linear.weight"], model.classifier)
    assert not torch.equal(model.classifier, make_teacher().linear.weight)


class Squeeze(nn.Sequential):
    """A network whose classifier is a convolution with a batch norm behind it."""

    def __init__(self):
        head = nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *head)


def test_convolutions_can_be_the_classifier(tmp_path):
    teacher = Squeeze().eval()
    teacher[3].running_var.fill_(4.0)
    config = replace(CONFIG, out=str(tmp_path), steps=2, exclude=("2",), learn_classifier=True)
    model, _ = nern.train(config, teacher, make_images(), CPU)
    assert list(load_nern(tmp_path / "checkpoint.pt")[2]) == ["2.weight"]
    assert model.classifier.shape == (5, 4, 1, 1) and not torch.equal(model.classifier, teacher[2].weight)
    job = nern.make_job(config, teacher, make_images(), CPU)
    model.classifier.data.copy_(teacher[2].weight)
    student = nern.student_weights(job, model, {name: teacher.get_parameter(name) for name in ("0.weight",)})
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.func.functional_call(job.teacher, student, images), teacher(images))


def test_checkpoint_says_what_is_stored(ten_steps):
    model, stored, learned = load_nern(ten_steps / "checkpoint.pt")
    assert [layer.name for layer in stored.layers] == [layer.name for layer in find_layers(make_teacher())]
    assert learned == {} and model.config.hidden == 24
    weights = stored.weights(model(stored.rows))
    assert weights["layer2.shortcut.0.weight"].shape == (8, 4, 1, 1)


def test_orders_can_be_given_and_training_begun_from_a_checkpoint(ten_steps, tmp_path):
    weights = [make_teacher().get_parameter(layer.name) for layer in find_layers(make_teacher())]
    save_orders(tmp_path / "orders", network_orders(weights, "crossfilter"), weights, "crossfilter")
    torch.save(load_weights(ten_steps), tmp_path / "init.pth")
    changes = {"orders": str(tmp_path / "orders"), "init": str(tmp_path / "init.pth"), "steps": 1}
    config, _, job, model = prepare(tmp_path, **changes)
    assert torch.equal(job.stored.rows, load_nern(ten_steps / "checkpoint.pt")[1].rows)
    assert torch.equal(model.layers[0].weight, load_weights(ten_steps)["layers.0.weight"])


def test_other_orders_of_the_same_weights_are_not_resumed(tmp_path):
    weights = [make_teacher().get_parameter(layer.name) for layer in find_layers(make_teacher())]
    folder = tmp_path / "orders"
    save_orders(folder, network_orders(weights, "crossfilter"), weights, "crossfilter")
    train(tmp_path / "run", orders=str(folder), steps=1)
    shutil.rmtree(folder)
    save_orders(folder, network_orders(weights, "crossfilter", improve=True), weights, "crossfilter")
    with pytest.raises(ValueError, match="train: rows must be what it was to resume .*, got another"):
        train(tmp_path / "run", orders=str(folder), steps=1)


def test_gradients_are_clipped_one_by_one(tmp_path, monkeypatch):
    clip, norms = nern.clip_each, []

    def record(parameters, norm, value):
        clip(parameters, norm, value)
        norms.append([parameter.grad.norm().item() for parameter in parameters])

    monkeypatch.setattr(nern, "clip_each", record)
    train(tmp_path, steps=2, clip_each=1e-3)
    assert norms[0][1:] == pytest.approx([1e-3] * (len(norms[0]) - 1), rel=1e-2)


def test_command_can_be_repeated(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(CIFARResNet(20, "a").state_dict(), tmp_path / "teacher.pt")
    config = nern.Config(
        out=str(tmp_path / "run"), weights=str(tmp_path / "teacher.pt"), device="cpu", steps=2, hidden=8,
        preset="cifar10-resnet20-180-infilter", architecture="cifar-resnet20-a", kernel_batch=256, **NOTHING,
    )  # fmt: skip
    assert config.order == "infilter" and config.maps == "doubled" and config.hidden == 8
    nern.run(config)
    first = capsys.readouterr().out
    assert "val/relative_error" in first and f"best.pt: {tmp_path}/run/best.pt" in first
    nern.run(config)
    assert "all 2 steps were done before" in capsys.readouterr().out
    other = load_teacher("cifar-resnet20-a", tmp_path / "teacher.pt")
    other.conv1.weight.data[0] += 1
    with pytest.raises(ValueError, match="train: key must be what it was to resume"):
        nern.train(config, other, None, CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_dtypes_are_stored(tmp_path, dtype):
    config = replace(CONFIG, out=str(tmp_path), steps=1, learn_classifier=True)
    _, metrics = nern.train(config, make_teacher().to(dtype), make_images(), CPU)
    assert metrics["train/loss"] == pytest.approx(float(GOLDEN.read_text().split()[0]), rel=1e-2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "golden":
        with TemporaryDirectory() as folder:
            train(folder)
            GOLDEN.write_text("".join(f"{loss:.9g}\n" for loss in read_log(folder, "train/loss")))
    elif sys.argv[2:] == ["kill"]:
        save, evaluate = nern.Watch.keep, []

        def keep_and_die(self, *args, **kwargs):
            save(self, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        nern.Watch.keep = keep_and_die
        train(sys.argv[1], save_every=4)
    else:
        with nern.processes.join("cpu"):
            train(sys.argv[1])
