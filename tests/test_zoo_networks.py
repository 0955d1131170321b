"""The networks that zoos are made of, and the grids of the published collection."""

import re

import numpy
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from fastws.ops.small_cnn_step import small_cnn_logits
from fastws.small_cnn.table import layer_table
from fastws.zoo.making.architectures import BIAS, INITS, build, initialize
from fastws.zoo.making.grids import PRESETS
from fastws.zoo.making.make import Config, draw_recipes

SHAPES = {
    "digits-cnn": (1, 8, 8),
    "cnn-s": (1, 28, 28),
    "cnn2": (1, 28, 28),
    "cnn-l": (3, 32, 32),
    "mlp": (1, 8, 8),
}
WEIGHTS = {"digits-cnn": 1486, "cnn-s": 2464, "cnn2": 3047, "cnn-l": 10853, "mlp": 1930}


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
    with pytest.raises(ValueError, match="resnet18 must have relu and no dropout, got tanh and dropout 0.0"):
        build("resnet18", (3, 32, 32))


def test_networks_that_train_one_by_one_take_images_of_any_channels():
    sizes = {"cifar-resnet8-b-half": 19_954, "cifar-resnet8-b": 78_042, "cifar-resnet20-b": 272_474}
    sizes |= {"mini-alexnet": 1_873_930, "resnet34": 21_282_122}
    for name, expected in sizes.items():
        with torch.device("meta"):
            network = build(name, (3, 32, 32), activation="relu")
            assert sum(parameter.numel() for parameter in network.parameters()) == expected, name
            gray = build(name, (1, 28, 28), activation="relu", num_classes=7)
            assert gray(torch.zeros(2, 1, 28, 28, device="meta")).shape == (2, 7), name
    with pytest.raises(ValueError, match=r"mini-alexnet: images must be at least 14 x 14, got \[3, 13, 32\]"):
        build("mini-alexnet", (3, 13, 32), activation="relu")


def test_the_published_mlp_runs_side_by_side_under_its_names():
    network = build("mlp-30-15", (1, 4, 4), dropout=0.2)
    assert list(network.state_dict())[::2] == [f"module_list.{n}.weight" for n in (0, 2, 4)]
    weights = parameters_to_vector(network.parameters())[None]
    x, activation = torch.randn(5, 1, 4, 4), torch.zeros(1, dtype=torch.int32)  # tanh
    logits = small_cnn_logits(weights, x, layer_table(network, (1, 4, 4)), activation)
    torch.testing.assert_close(logits[0], network.eval()(x), rtol=1e-5, atol=1e-6)


def test_resnet_has_the_published_init():
    """Convolutions and the dense layer are drawn, in the order in which they run; norms stay as they are."""
    network = build("resnet18", (3, 32, 32), activation="relu")
    initialize(network, "kaiming_uniform", 5)
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            expected = torch.nn.init.kaiming_uniform_(torch.empty_like(module.weight), generator=generator)
            assert torch.equal(module.weight, expected)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (network.fc.bias == BIAS).all()


# --- the published collection

PUBLISHED = {name: grid for name, grid in PRESETS.items() if name != "digits"}
ACTIVATION, INIT = ("tanh", "relu", "sigmoid", "gelu"), ("uniform", "normal", "kaiming_uniform", "kaiming_normal")


def test_counts_are_those_of_the_published_collection():
    networks = [grid["networks"] for grid in PUBLISHED.values()]
    assert len(networks) == 27 and sum(networks) == 50_360
    # the published ResNets have no state before the first epoch
    states = {name: g["networks"] * (g["epochs"] + ("resnet" not in name)) for name, g in PUBLISHED.items()}
    assert sum(states.values()) == 2_585_360
    assert sum(states.values()) + 25 * sum(networks) == 3_844_360  # with the sparsified twins, 25 epochs each


@pytest.mark.parametrize(
    "name, networks, combinations",
    [("mnist-s", 2560, 256), ("fmnist-s", 2560, 256), ("svhn-s", 4320, 432), ("usps-s", 2560, 256)]
    + [("cifar10-s", 1280, 128), ("cifar10-l", 1280, 128), ("stl10-s", 2560, 256), ("stl10-l", 2560, 256)],
)
def test_hyp_zoos_have_ten_seeds_of_each_combination(name, networks, combinations):
    for kind in ("fix", "rand"):
        recipes = draw_recipes(Config(out="", preset=f"{name}-hyp-{kind}"))
        assert len(recipes) == networks == 10 * combinations
        chosen = [one[2:] for one in recipes]
        assert len(set(chosen)) == combinations and all(chosen.count(one) == 10 for one in chosen[:3])
        assert {one.activation for one in recipes} == set(ACTIVATION) and {one.init for one in recipes} == set(INIT)
        seeds = [one.seed for one in recipes]
        if kind == "fix":
            assert sorted(seeds) == sorted([*range(1, 11)] * combinations)
        else:
            assert len(set(seeds)) > 0.99 * networks and min(seeds) >= 0 and 9e5 < max(seeds) < 1e6


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mnist-s", ("tanh", 0.0, "uniform", "adam", 3e-4, 0.0)),
        ("svhn-s", ("tanh", 0.0, "uniform", "adam", 3e-3, 0.0)),
        ("usps-s", ("tanh", 0.0, "uniform", "adam", 3e-4, 1e-3)),
        ("cifar10-l", ("gelu", 0.0, "kaiming_uniform", "adam", 1e-4, 1e-2)),
        ("stl10-s", ("tanh", 0.0, "kaiming_uniform", "adam", 1e-4, 1e-3)),
        ("cifar100-resnet18", ("relu", 0.0, "kaiming_uniform", "momentum", 0.1, 5e-4)),
    ],
)
def test_seed_zoos_differ_by_their_seeds(name, expected):
    recipes = draw_recipes(Config(out="", preset=f"{name}-seed"))
    assert [one.seed for one in recipes] == [*range(1, 1001)]
    assert {one[2:] for one in recipes} == {expected}


def test_pictures_are_those_that_the_networks_take():
    for name, grid in PUBLISHED.items():
        pixels = grid["resize"] or grid["crop"] or {"mnist": 28, "fmnist": 28}.get(name.split("-")[0], 32)
        shape = (1 if re.match("mnist|fmnist|svhn|usps", name) else 3, pixels, pixels)
        if grid["architecture"] in WEIGHTS:
            network = build(grid["architecture"], shape)
            weights = sum(parameter.numel() for parameter in network.parameters())
            assert weights == {"cnn-s": 2464 + 200 * (shape[0] - 1), "cnn-l": 10853}[grid["architecture"]]


def test_given_options_override_the_preset():
    config = Config(out="", preset="mnist-s-hyp-fix", epochs=3, lrs=(0.5,), networks=256)
    assert (config.epochs, config.lrs, config.networks) == (3, (0.5,), 256)
    assert (config.batch_size, config.validation, config.mean) == (10, 10_000, (0.1307,))
    assert Config(out="").networks == 240
