import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastws.cli import main
from fastws.data.images import load
from fastws.symmetry import Symmetry
from fastws.zoo import Zoo
from fastws.zoo.architectures import ACTIVATIONS, BIAS, INITS, build, initialize
from fastws.zoo.make import MAY_CHANGE, Config, draw_recipes, make
from fastws.zoo.stacked import evaluate, stacked_forward
from fastws.zoo.training import Plan, Recipe, Stack, TrainingData, Wave, fit_stack

SHAPES = {
    "digits-cnn": (1, 8, 8),
    "cnn-s": (1, 28, 28),
    "cnn2": (1, 28, 28),
    "cnn-l": (3, 32, 32),
    "mlp": (1, 8, 8),
}
WEIGHTS = {"digits-cnn": 1486, "cnn-s": 2464, "cnn2": 3047, "cnn-l": 10853, "mlp": 1930}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- architectures


@pytest.mark.parametrize("name", SHAPES)
def test_architectures_are_the_published_ones(name):
    network = build(name, SHAPES[name], activation="relu", dropout=0.3)
    assert sum(parameter.numel() for parameter in network.parameters()) == WEIGHTS[name]
    assert network(torch.zeros(2, *SHAPES[name])).shape == (2, 10)
    dropouts = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and set(dropouts) == {0.3}
    keys = list(build(name, SHAPES[name]).state_dict())
    assert keys == list(network.state_dict())
    places = {"cnn-s": (0, 3, 6, 9, 11), "cnn-l": (0, 4, 8, 13, 16)}
    if name in places:
        assert keys[::2] == [f"module_list.{place}.weight" for place in places[name]]


def test_published_vector_of_cnn_s():
    """The offsets of the published index of CNN-s for MNIST."""
    sizes = [parameter.numel() for parameter in build("cnn-s", (1, 28, 28)).parameters()]
    starts = numpy.cumsum([0, *sizes])[:-2:2].tolist()
    assert starts == [0, 208, 1414, 1514, 2254]


@pytest.mark.parametrize("init", INITS)
def test_inits(init):
    network = build("cnn-l", (3, 32, 32))
    initialize(network, init, seed=3)
    weight = network.module_list[8].weight.detach()  # [15, 32, 3, 3]
    fan_in, fan_out = 32 * 9, 15 * 9
    std = {
        "uniform": 12**-0.5,
        "normal": 1.0,
        "kaiming_uniform": (2 / fan_in) ** 0.5,
        "kaiming_normal": (2 / fan_in) ** 0.5,
        "xavier_uniform": (2 / (fan_in + fan_out)) ** 0.5,
        "xavier_normal": (2 / (fan_in + fan_out)) ** 0.5,
    }[init]
    assert abs(weight.std().item() / std - 1) < 0.05
    assert abs(weight.mean().item() - (0.5 if init == "uniform" else 0)) < 0.1 * std
    assert all((parameter == BIAS).all() for parameter in network.parameters() if parameter.dim() == 1)
    again = build("cnn-l", (3, 32, 32))
    initialize(again, init, seed=3)
    assert torch.equal(parameters_to_vector(again.parameters()), parameters_to_vector(network.parameters()))
    initialize(again, init, seed=4)
    assert not torch.equal(again.module_list[8].weight, network.module_list[8].weight)


def test_architecture_errors():
    with pytest.raises(ValueError, match="architecture must be one of digits-cnn, .*, got 'cnn'"):
        build("cnn", (1, 8, 8))
    with pytest.raises(ValueError, match=r"images must be larger for 'cnn-s', got \[1, 8, 8\]"):
        build("cnn-s", (1, 8, 8))
    with pytest.raises(ValueError, match="activation must be one of tanh, relu, sigmoid, gelu, got 'silu'"):
        build("mlp", (1, 8, 8), activation="silu")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        build("mlp", (1, 8, 8), dropout=1.0)
    with pytest.raises(ValueError, match="init must be one of uniform, .*, got 'zeros'"):
        initialize(build("mlp", (1, 8, 8)), "zeros", 0)
    with pytest.raises(ValueError, match="layer must be one that zoos are made of, got LayerNorm"):
        stacked_forward(torch.nn.LayerNorm(4), torch.zeros(1, 8), torch.zeros(1, 4, 1))


# --- stacked networks are networks


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_stacked_forward_is_that_of_each_network(name, activation):
    network = build(name, SHAPES[name], activation=activation).double()
    flats = []
    for seed in range(3):
        initialize(network, "kaiming_uniform", seed)
        flats.append(parameters_to_vector(network.parameters()).detach())
    flat = torch.stack(flats).requires_grad_()
    images = torch.randn(3, 4, *SHAPES[name], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[:, :, :, :3] = 0  # equal entries in one pooling block
    logits = stacked_forward(network, flat, images.permute(0, 2, 3, 4, 1))
    seen_by_all = stacked_forward(network, flat, images[:1].permute(0, 2, 3, 4, 1))
    weight = torch.randn_like(logits)
    (grad,) = torch.autograd.grad((logits * weight).sum(), flat)
    for g in range(3):
        vector_to_parameters(flat[g].detach(), network.parameters())
        expected = network(images[g])
        torch.testing.assert_close(logits[g].T, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(seen_by_all[g].T, network(images[0]), rtol=1e-10, atol=1e-12)
        grads = torch.autograd.grad((expected * weight[g].T).sum(), list(network.parameters()))
        torch.testing.assert_close(grad[g], parameters_to_vector(grads), rtol=1e-9, atol=1e-12)


def test_evaluate_is_that_of_each_network():
    network, images = build("digits-cnn", (1, 8, 8)), load("digits", limit=600)
    flat = torch.randn(2, WEIGHTS["digits-cnn"]) / 3
    data = TrainingData.of(images, "cpu")
    loss, accuracy = evaluate(network, flat, data.train_x, data.train_y)
    for g in range(2):
        vector_to_parameters(flat[g], network.parameters())
        logits = network(images.train_x)
        torch.testing.assert_close(loss[g], cross_entropy(logits, images.train_y))
        torch.testing.assert_close(accuracy[g], (logits.argmax(1) == images.train_y).float().mean())


# --- stacked training is training


def digits_plan(stack=32, batch_size=32):
    return Plan("digits-cnn", (1, 8, 8), 10, batch_size, stack)


def recipe(number, **options):
    default = {"activation": "tanh", "dropout": 0.0, "init": "kaiming_uniform", "optimizer": "adam"}
    return Recipe(**{"model": str(number), "seed": number, "lr": 3e-3, "weight_decay": 0.0} | default | options)


def train_alone(recipe, images, dtype, steps, batch_size):
    network = build("digits-cnn", (1, 8, 8), activation=recipe.activation)
    initialize(network, recipe.init, recipe.seed)
    network.to(dtype)
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, **options),
        "momentum": lambda p: torch.optim.SGD(p, momentum=0.9, **options),
        "adam": lambda p: torch.optim.Adam(p, **options),
        "adamw": lambda p: torch.optim.AdamW(p, **options),
    }[recipe.optimizer](network.parameters())
    per_epoch = len(images.train_y) // batch_size
    for step in range(steps):
        epoch, place = 1 + step // per_epoch, step % per_epoch
        order = numpy.random.default_rng([recipe.seed, epoch]).permutation(len(images.train_y))
        batch = torch.from_numpy(order[place * batch_size : (place + 1) * batch_size])
        optimizer.zero_grad()
        cross_entropy(network(images.train_x[batch].to(dtype)), images.train_y[batch]).backward()
        optimizer.step()
    return parameters_to_vector(network.parameters()).detach()


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_training_is_that_of_each_network_alone(dtype, atol):
    images = load("digits", limit=320)  # 10 steps per epoch
    cases = [
        ("sgd", 0.1, 0.01),
        ("adam", 0.01, 0.1),
        ("momentum", 0.03, 0.0),
        ("adamw", 3e-3, 0.3),
        ("adam", 1e-3, 0.0),
    ]
    recipes = [
        recipe(1 + number, activation=activation, optimizer=optimizer, lr=lr, weight_decay=weight_decay)
        for number, (optimizer, lr, weight_decay) in enumerate(cases)
        for activation in ("tanh", "relu")
    ]
    wave = Wave(digits_plan(), recipes)
    wave.state = wave.state.to(dtype)
    data = TrainingData.of(images, "cpu")
    data = data._replace(train_x=data.train_x.to(dtype), test_x=data.test_x.to(dtype))
    wave.load(data)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(3):  # measures the initial weights, then two epochs
            wave.advance(data, pool)
    for row, alone in zip(wave.state[0], recipes, strict=True):
        expected = train_alone(alone, images, dtype, steps=20, batch_size=32)
        torch.testing.assert_close(row, expected, rtol=0, atol=atol)


def train_stack(recipes, epochs=2, **options):
    wave = Wave(digits_plan(**options), recipes)
    data = TrainingData.of(load("digits", limit=320), "cpu")
    wave.load(data)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(epochs + 1):
            properties = wave.advance(data, pool)
    return wave.state, properties


def test_network_does_not_depend_on_its_neighbours():
    recipes = [recipe(number, dropout=0.1 * (number + 1), lr=1e-3 * (number + 1)) for number in range(5)]
    together, _ = train_stack(recipes)
    apart, _ = train_stack(recipes, stack=2)
    reverse, _ = train_stack(recipes[::-1])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(reverse.flip(1), together, rtol=0, atol=1e-5)
    other = [one._replace(seed=one.seed + 100) for one in recipes]
    assert (train_stack(other)[0][0] - together[0]).abs().amax(1).min() > 1e-2


def test_dropout_has_each_networks_rate():
    stack = Stack(digits_plan(), [recipe(0, dropout=0.5), recipe(1, dropout=0.1)], [0, 1])
    stack.load(torch.zeros(3, 2, 1486), 0)
    x = torch.ones(2, 8, 9, 9, 32)
    dropped = stack._drop(x, [numpy.random.default_rng(seed) for seed in range(2)])
    kept = (dropped != 0).float().mean((1, 2, 3, 4))
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.9]), atol=0.01, rtol=0)
    torch.testing.assert_close(dropped.mean((1, 2, 3, 4)), torch.ones(2), atol=0.02, rtol=0)
    assert dropped[1].unique().tolist() == pytest.approx([0, 1 / 0.9])


def test_network_that_diverges_harms_nobody(tmp_path):
    wild = recipe(1, optimizer="sgd", lr=0.1, weight_decay=1e9)
    tame = recipe(2, optimizer="sgd", lr=0.1)
    together, properties = train_stack([wild, tame], epochs=3)
    alone, _ = train_stack([tame], epochs=3)
    assert not together[0, 0].isfinite().all()
    torch.testing.assert_close(together[:, 1], alone[:, 0], rtol=0, atol=1e-5)
    zoo = make(tiny(tmp_path, optimizers=("sgd",), lrs=(0.1,), weight_decays=(1e9, 0.0), sampling="grid"))
    decays, epochs = (zoo.properties[name].to_pylist() for name in ("weight_decay", "epoch"))
    assert zoo.dropped == 3 and len(zoo) == 6 * 3 - 3 and zoo.weights.isfinite().all()
    assert [epochs.count(epoch) for epoch in range(3)] == [6, 6, 3] and decays.count(1e9) == 6


def test_stacks_fit_the_cache():
    for name, most in [("digits-cnn", 32), ("cnn-s", 8), ("mlp", 32)]:
        stack = fit_stack(build(name, SHAPES[name]), SHAPES[name], 32, "cpu")
        assert 1 <= stack <= most and (stack == 32 or name == "cnn-s")
    plan = digits_plan(stack=3)
    stacks = Wave(plan, [recipe(number, optimizer=("adam", "sgd")[number % 2]) for number in range(8)]).stacks
    assert sorted(len(stack.members) for stack in stacks) == [2, 2, 2, 2]
    assert sorted(int(member) for stack in stacks for member in stack.members) == [*range(8)]


def test_good_recipes_learn_the_digits():
    recipes = [recipe(1), recipe(2, activation="gelu")]
    wave, data = Wave(digits_plan(), recipes), TrainingData.of(load("digits"), "cpu")
    wave.load(data)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(11):
            properties = wave.advance(data, pool)
    assert properties["test_accuracy"].min() > 0.93
    gap = properties["train_accuracy"] - properties["test_accuracy"]
    torch.testing.assert_close(properties["generalisation_gap"], gap)


# --- recipes


def test_random_recipes_use_all_choices_and_do_not_depend_on_their_number():
    config = Config(zoo="", networks=200, dropouts=(0.0, 0.5), seed=3)
    recipes = draw_recipes(config)
    for name, choices in [("activation", config.activations), ("dropout", config.dropouts), ("lr", config.lrs)]:
        assert {getattr(one, name) for one in recipes} == set(choices)
    assert len({one.seed for one in recipes}) == 200 == len({one.model for one in recipes})
    assert draw_recipes(Config(zoo="", networks=20, dropouts=(0.0, 0.5), seed=3)) == recipes[:20]
    assert draw_recipes(Config(zoo="", networks=20, dropouts=(0.0, 0.5), seed=4)) != recipes[:20]


def test_grid_recipes_are_all_combinations_then_the_next_seed():
    choices = {"activations": ("tanh", "relu"), "inits": ("normal",), "optimizers": ("adam",), "lrs": (0.1, 0.2)}
    config = Config(zoo="", networks=8, sampling="grid", weight_decays=(0.0,), seed=5, **choices)
    recipes = draw_recipes(config)
    assert [one.seed for one in recipes] == [5] * 4 + [6] * 4
    assert [(one.activation, one.lr) for one in recipes[4:]] == [
        ("tanh", 0.1),
        ("tanh", 0.2),
        ("relu", 0.1),
        ("relu", 0.2),
    ]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"networks": 0}, "networks must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"lrs": ()}, "lrs must name at least one choice"),
        ({"dropouts": (1.0,)}, r"dropouts must be in \[0, 1\)"),
    ],
)
def test_config_errors(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(zoo="", **options)


# --- zoos


def tiny(path, **options):
    default = {"networks": 6, "epochs": 2, "limit": 96, "wave": 4, "threads": 1, "seed": 1}
    default |= {"activations": ("tanh", "relu"), "dropouts": (0.0, 0.2), "optimizers": ("adam",)}
    return Config(zoo=str(path), **default | options)


def assert_same(zoo, expected):
    assert torch.equal(zoo.weights, expected.weights)
    assert zoo.properties.equals(expected.properties) and zoo.splits == expected.splits
    assert not (zoo.path / "resume.safetensors").exists()


def test_zoo_holds_every_epoch_of_every_network(tmp_path):
    zoo = make(tiny(tmp_path))
    table = zoo.properties.to_pydict()
    assert table["model"] == [f"{number:06}" for number in [*range(4)] * 3 + [4, 5] * 3]
    assert table["epoch"] == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 2 + [1] * 2 + [2] * 2
    data = TrainingData.of(load("digits", limit=96), "cpu")
    for row in range(len(zoo)):
        network = build("digits-cnn", (1, 8, 8), activation=table["activation"][row])
        network.load_state_dict(zoo.checkpoint(row))
        loss, accuracy = evaluate(network, zoo.rows([row]), data.test_x, data.test_y)
        assert table["test_loss"][row] == pytest.approx(float(loss), rel=1e-5)
        assert table["test_accuracy"][row] == pytest.approx(float(accuracy), abs=1e-6)
    initial = build("digits-cnn", (1, 8, 8))
    initialize(initial, table["init"][1], table["seed"][1])
    assert torch.equal(parameters_to_vector(initial.parameters()), zoo.weights[1])
    assert zoo.symmetry == Symmetry.trace(initial, torch.zeros(1, 1, 8, 8))
    assert zoo.provenance["config"] == json.loads(json.dumps(asdict(tiny(tmp_path))))


def test_finished_zoo_is_not_made_again(tmp_path):
    zoo = make(tiny(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("weights-*")}
    assert_same(make(tiny(tmp_path)), zoo)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("weights-*")} == before
    with pytest.raises(ValueError, match=f"epochs must be 2, with which {tmp_path} was begun, got 3; take another"):
        make(tiny(tmp_path, epochs=3))
    assert set(MAY_CHANGE) == {"zoo", "threads"}


def test_zoo_is_the_same_on_two_threads_and_in_bf16(tmp_path):
    zoo = make(tiny(tmp_path / "one"))
    assert_same(make(tiny(tmp_path / "two", threads=2)), zoo)
    half = make(tiny(tmp_path / "half", dtype="bf16"))
    assert half.dtype == torch.bfloat16 and torch.equal(half.weights, zoo.weights.bfloat16())


def test_run_that_dies_at_any_moment_resumes_to_the_same_zoo(tmp_path, monkeypatch):
    """The folder is copied whenever anything reaches the disk, as a power cut would leave it."""
    path, moments, fsync = tmp_path / "zoo", [], os.fsync

    def fsync_and_copy(file):
        fsync(file)
        if (path / "zoo.json").exists():
            moments.append(shutil.copytree(path, tmp_path / f"moment {len(moments)}"))

    monkeypatch.setattr(os, "fsync", fsync_and_copy)
    expected = make(tiny(path))
    monkeypatch.undo()
    assert len(moments) > 30
    for moment in moments[::3]:
        assert_same(make(tiny(moment)), expected)


def test_killed_command_resumes_to_the_same_zoo(tmp_path):
    config = tiny(tmp_path / "zoo", epochs=12, dropouts=(0.1,))
    options = ["--networks", "6", "--epochs", "12", "--limit", "96", "--threads", "1", "--wave", "4", "--seed", "1"]
    options += ["--activations", "tanh", "relu", "--dropouts", "0.1", "--optimizers", "adam"]
    command = [sys.executable, "-m", "fastws", "zoo", "make", "--zoo", config.zoo, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        log = tmp_path / "zoo/log.jsonl"
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 4):
            time.sleep(0.005)
        process.kill()
    assert process.returncode < 0, "the command was over before it was killed"
    done = len(Zoo.open(config.zoo))
    assert 12 <= done < 6 * 13
    assert_same(make(config), make(tiny(tmp_path / "whole", epochs=12, dropouts=(0.1,))))


def test_commands(tmp_path, capsys):
    options = ["--networks", "4", "--epochs", "1", "--limit", "64", "--lrs", "1e-2", "1e-3", "--threads", "1"]
    main(["zoo", "make", "--zoo", str(tmp_path), *options])
    out = capsys.readouterr().out
    assert f"{tmp_path}: 8 states of 4 networks, 0 left out as not finite" in out
    main(["zoo", "info", "--zoo", str(tmp_path)])
    out = capsys.readouterr().out
    assert "models: 4, states: 8" in out and "module_list.5.weight  [16, 48]" in out
    accuracy = Zoo.open(tmp_path).properties["test_accuracy"].to_numpy()
    (line,) = [line for line in out.splitlines() if line.startswith("test_accuracy")]
    assert [float(value) for value in line.split()[1:]] == pytest.approx(
        numpy.quantile(accuracy, [0, 0.25, 0.5, 0.75, 1]).tolist(), rel=1e-3
    )
