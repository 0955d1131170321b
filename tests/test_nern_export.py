import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from fastws.nern.export import (
    PRECISIONS,
    Config,
    answers,
    compare,
    compress,
    decompress,
    measure,
    order_bytes,
    reconstruct,
    relative_error,
    run,
    write,
)
from fastws.nern.layers import StoredLayers, find_layers, rows_of
from fastws.nern.orders import network_orders
from fastws.nern.prune import prune
from fastws.nern.teachers import load_teacher
from fastws.nn import CIFARResNet
from fastws.nn.nern import NeRN, NeRNConfig
from fastws.train.nern import train as nern

SHAPES = [(4, 3, 3, 3), (6, 4, 3, 3), (6, 4, 1, 1)]


def layers(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# --- pruning, as a direct statement: a list of units, sorted


def units(shape, unit):
    """Indices of the units of a layer."""
    axes = {"weight": 4, "kernel": 2, "filter": 1}[unit]
    return list(torch.cartesian_prod(*[torch.arange(size) for size in shape[:axes]]).view(-1, axes).tolist())


def expected(original, reconstructed, share, unit, criterion):
    scored = []
    for number, (x, y) in enumerate(zip(original, reconstructed, strict=True)):
        error = x.abs() if criterion == "magnitude" else -((x - y).abs() / x.abs())
        scored.append([(error[tuple(place)].mean().item(), number, tuple(place)) for place in units(x.shape, unit)])
    groups = scored if unit == "filter" else [sum(scored, [])]
    pruned = [x.clone() for x in original]
    for group in groups:
        for _, number, place in sorted(group)[: int(share * len(group))]:
            pruned[number][place] = 0
    return pruned


@pytest.mark.parametrize("unit", ["weight", "kernel", "filter"])
@pytest.mark.parametrize("criterion", ["reconstruction", "magnitude"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_prune_takes_the_worst(unit, criterion, share):
    original, reconstructed = layers(0), layers(1)
    found = prune(original, share, criterion, reconstructed=reconstructed, unit=unit)
    for x, y in zip(found, expected(original, reconstructed, share, unit, criterion), strict=True):
        assert torch.equal(x, y)


def test_share_of_a_hundred_is_a_whole_number():
    original = [torch.arange(1.0, 101).view(10, 10)]
    for share in (0.29, 0.57, 0.58):
        assert (prune(original, share, "magnitude")[0] == 0).sum() == round(100 * share)


def test_random_pruning_is_uniform_and_repeats():
    original = [torch.ones(40, 25, 3, 3)]
    (first,), (again,), (other,) = (prune(original, 0.25, "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first == 0).sum() == 2250 and 150 < (first == 0)[:10, :, 0].sum() < 225
    (kernels,) = prune(original, 0.5, "random", unit="kernel")
    assert (kernels == 0).all((2, 3)).sum() == 500 and (kernels == 0).any((2, 3)).sum() == 500


def test_weights_that_are_zero_go_first():
    original = [torch.tensor([[0.0, 1.0, 2.0, 0.0]])]
    pruned = prune(original, 0.75, reconstructed=[torch.tensor([[0.0, 1.5, 2.1, 1.0]])])
    assert pruned[0].tolist() == [[0.0, 0.0, 2.0, 0.0]]


def test_linear_layers_can_be_pruned():
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    assert (prune([x], 0.5, reconstructed=[y], unit="kernel")[0] == 0).sum() == 12
    assert ((prune([x], 0.5, "magnitude", unit="filter")[0] == 0).all(1)).sum() == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"unit": "layer"}, "unit must be one of .* got 'layer'"),
        ({"criterion": "taylor"}, "criterion must be reconstruction, magnitude or random, got 'taylor'"),
        ({}, "reconstructed must be there for the criterion reconstruction, got None"),
        ({"reconstructed": layers(0)[:2]}, "both lists must hold tensors of the same shapes, got 2 and 3 tensors"),
    ],
)
def test_prune_refuses(options, message):
    with pytest.raises(ValueError, match=f"prune: {message}"):
        prune(layers(0), **{"share": 0.5, **options})


# --- size and precision


SOME = ("layer3.*", "layer2.[12].*", "layer2.0.conv2")  # are left out: orders of all take long without C++


def store(network, mode=None, hidden=16, exclude=SOME):
    """A NeRN, untrained, for convolutions of a network in an order."""
    layers = tuple(find_layers(network, exclude=exclude))
    weights = [network.get_parameter(layer.name) for layer in layers]
    orders = network_orders(weights, mode) if mode else None
    stored = StoredLayers(layers, 3, "center", rows_of(layers, orders))
    torch.manual_seed(1)
    return NeRN(NeRNConfig(hidden=hidden), stored.grid), stored


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CIFARResNet(20, "b").eval()


def test_precisions_keep_what_they_can(network):
    nern, _ = store(network)
    state = nern.state_dict()
    errors = {}
    for precision in PRECISIONS:
        found = decompress(compress(state, precision))
        assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in state.items()}
        errors[precision] = max(float((found[name] - x).abs().max() / x.abs().max()) for name, x in state.items())
    assert errors["fp32"] == 0 and 0 < errors["fp16"] < 2**-11 and 0 < errors["int8"] <= 0.5001 / 127
    for name, x in state.items():
        if x.dim() == 2:
            kept = compress(state, "int8")
            assert kept[name].dtype == torch.int8 and (kept[name].abs().amax(1) == 127).all()
            rounding = (decompress(kept)[name] - x).abs().amax(1)
            assert (rounding <= 0.5001 * x.abs().amax(1) / 127).all()


def test_rows_of_zeros_stay_zero():
    state = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    assert all(not x.any() for x in decompress(compress(state, "int8")).values())


def test_predictors_have_their_published_sizes(network):  # 142,749 parameters at h = 180
    nern, stored = store(network, hidden=180, exclude=())
    assert len(stored.rows) == 32_304 and stored.num_weights == 270_256
    sizes = {precision: measure(nern, stored, precision) for precision in PRECISIONS}
    assert sizes["fp32"] == (4 * 142_749, 0, 4 * 270_256)
    assert sizes["fp16"].predictor == 2 * 142_749
    biases, rows = 4 * 180 + 9, 4 * 180 + 9
    assert sizes["int8"].predictor == 142_749 - biases + 2 * biases + 4 * rows


@pytest.mark.parametrize("mode", [None, "crossfilter", "infilter"])
def test_orders_take_as_many_bits_as_numbers_need(network, mode):
    _, stored = store(network, mode)
    bits = 0
    for layer in stored.layers:
        filters, channels = layer.shape[:2]
        if mode == "crossfilter":
            bits += layer.kernels * math.ceil(math.log2(layer.kernels))
        if mode == "infilter":
            bits += layer.kernels * math.ceil(math.log2(channels)) + filters * math.ceil(math.log2(filters))
    assert order_bytes(stored) == math.ceil(bits / 8)


# --- the network


@pytest.mark.parametrize("mode", [None, "crossfilter", "infilter"])
def test_reconstructed_networks_have_the_predicted_kernels(network, mode):
    nern, stored = store(network, mode)
    found = reconstruct(nern, stored, network).state_dict()
    with torch.no_grad():
        predictions = nern()[stored.rows]
    first = 0
    for layer in stored.layers:
        kernels = predictions[first : first + layer.kernels].view(*layer.shape[:2], 3, 3)
        kernels = kernels if layer.kernel == (3, 3) else kernels[:, :, 1:2, 1:2]
        assert torch.equal(found[layer.name], kernels)
        first += layer.kernels
    names = {layer.name for layer in stored.layers}
    for name, x in network.state_dict().items():
        assert name in names or torch.equal(found[name], x)
    assert relative_error(network, network, stored) == 0


def test_relative_error(network):
    _, stored = store(network)
    halved = CIFARResNet(20, "b")
    halved.load_state_dict({name: x / 2 if x.dim() == 4 else x for name, x in network.state_dict().items()})
    assert relative_error(halved, network, stored) == pytest.approx(0.5)


def test_compare_counts():
    class Says(torch.nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.answers = torch.tensor(answers)

        def forward(self, x):
            return torch.nn.functional.one_hot(self.answers[x.long()], 3).float()

    images, labels = torch.arange(5.0), torch.tensor([0, 1, 2, 0, 1])
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    found = compare(answers(Says([0, 1, 2, 1, 2]), batches), answers(Says([0, 1, 0, 1, 0]), batches), labels)
    assert found == pytest.approx({"accuracy": 0.6, "original_accuracy": 0.4, "agreement": 0.6})


# --- the command


@pytest.fixture(scope="module")
def trained(network, tmp_path_factory):
    """A NeRN of the first stage of a network, two steps old, and images of two classes."""
    folder = tmp_path_factory.mktemp("trained")
    random = numpy.random.default_rng(0)
    for part, count in {"train": 16, "test": 24}.items():
        for number in range(count):
            path = folder / "images" / part / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)).save(path)
    save_file(network.state_dict(), folder / "original.safetensors")
    config = nern.Config(
        weights=str(folder / "original.safetensors"),
        architecture="cifar-resnet20-b",
        images=str(folder / "images"),
        out=str(folder / "run"),
        exclude=("layer[23].*",),
        hidden=8,
        steps=2,
        batch_size=4,
        kernel_batch=64,
        learn_classifier=True,
        device="cpu",
    )
    nern.run(config)
    return folder


def export(trained, tmp_path, **fields):
    fields = {
        "model": str(trained / "run/best.pt"),
        "out": str(tmp_path / "stored.safetensors"),
        "device": "cpu",
    } | fields
    run(Config(**fields))
    return json.loads((tmp_path / "stored.safetensors.json").read_text())


def test_exported_networks_are_as_good_as_in_training(trained, tmp_path):
    report = export(trained, tmp_path, images=str(trained / "images"), batch_size=5)
    best = json.loads((trained / "run/results.json").read_text())["best"]
    row = report["precisions"]["fp32"]
    for name in ("accuracy", "original_accuracy", "agreement", "relative_error"):
        assert row[name] == pytest.approx(best[name], rel=1e-5)
    assert row["share"] > report["precisions"]["fp16"]["share"] > report["precisions"]["int8"]["share"]
    state, before = load_file(tmp_path / "stored.safetensors"), load_file(trained / "original.safetensors")
    changed = {name for name, x in state.items() if not torch.equal(x, before[name])}
    assert changed == {"conv1.weight", "linear.weight"} | {
        f"layer1.{block}.conv{number}.weight" for block in range(3) for number in (1, 2)
    }
    load_teacher("cifar-resnet20-b", tmp_path / "stored.safetensors")


def test_the_precision_that_is_asked_for_is_written(trained, tmp_path):
    states = {}
    for precision in PRECISIONS:
        report = export(trained, tmp_path, precision=precision)
        states[precision] = load_file(tmp_path / "stored.safetensors")
    assert "accuracy" not in report["precisions"]["fp32"]
    errors = [(states[one]["conv1.weight"] - states["fp32"]["conv1.weight"]).abs().max() for one in PRECISIONS]
    assert 0 == errors[0] < errors[1] < errors[2] < 0.1


def test_what_cannot_be_exported_is_refused(trained, tmp_path, network):
    with pytest.raises(ValueError, match="out must end in .safetensors, got 'x.pt'"):
        Config(model="x", out="x.pt")
    other = CIFARResNet(20, "b", num_classes=10)
    state = other.state_dict()
    save_file({name: x for name, x in state.items() if name != "conv1.weight"}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'conv1.weight' must be"):
        export(trained, tmp_path, weights=str(tmp_path / "other.safetensors"))
    others = {name: x + 1e-3 if name == "conv1.weight" else x for name, x in network.state_dict().items()}
    save_file(others, tmp_path / "others.safetensors")
    with pytest.raises(ValueError, match="nern export: weights must be those that .*best.pt stores, got others in"):
        export(trained, tmp_path, weights=str(tmp_path / "others.safetensors"))
    original = (trained / "original.safetensors").read_bytes()
    with pytest.raises(ValueError, match="nern export: out must not be the original network, got .*original.safetens"):
        export(trained, tmp_path, out=str(trained / "run/../original.safetensors"))
    assert (trained / "original.safetensors").read_bytes() == original
    grey = tmp_path / "grey"
    for number in range(20):
        path = grey / ("train", "test")[number // 10] / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), number).save(path)
    with pytest.raises(ValueError, match=r"nern: network must take images \[1, 32, 32\], got .* to have 3 channels"):
        export(trained, tmp_path, images=str(grey))
    assert not (tmp_path / "stored.safetensors").exists()
    predictor, stored = store(network)
    with pytest.raises(
        ValueError, match=r"nern export: layer2.0.shortcut.0.weight of the original must be .* got nothing"
    ):
        reconstruct(predictor, stored, CIFARResNet(20, "a"))
    with pytest.raises(ValueError, match="nern export: bias must be below 65,504 for fp16, got 1e\\+06"):
        compress({"bias": torch.tensor([1e6])}, "fp16")
    with pytest.raises(ValueError, match="nern export: precision must be one of .* got 'int4'"):
        compress({}, "int4")


def test_numbers_too_large_for_fp16_are_exported_in_fp32(trained, tmp_path):
    content = torch.load(trained / "run/best.pt", weights_only=True)
    content["model"]["layers.0.bias"][0] = 1e6
    torch.save(content, tmp_path / "large.pt")
    assert list(export(trained, tmp_path, model=str(tmp_path / "large.pt"))["precisions"]) == ["fp32"]
    with pytest.raises(ValueError, match="layers.0.bias must be below 65,504 for fp16"):
        export(trained, tmp_path, model=str(tmp_path / "large.pt"), precision="fp16")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda x: x["model"]["layers.0.weight"].fill_(torch.nan), "file must be .* got layers.0.weight that is not f"),
        (lambda x: x["extra"]["rows"].zero_(), "file must be a checkpoint of .*, got rows that are no order of 1584 k"),
        (lambda x: x["extra"].update(rows=x["extra"]["rows"][1:]), "got rows that are no order of 1584 kernels"),
        (lambda x: x["extra"].update(rows=x["extra"]["rows"].double()), "file must be a checkpoint of fastws train n"),
        (lambda x: x["extra"]["stored"].update(reduction="all"), "got nern: reduction must be one of .* got 'all'"),
        (lambda x: x["config"].pop("weights"), "config must be that of fastws train nern, got no weights"),
        (lambda x: x.pop("config"), "config must be that of fastws train nern, got no architecture"),
    ],
)
def test_damaged_checkpoints_are_refused(trained, tmp_path, damage, message):
    content = torch.load(trained / "run/best.pt", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=f"damaged.pt: .*{message}"):
        export(trained, tmp_path, model=str(tmp_path / "damaged.pt"))


def test_what_cannot_be_written_is_said():
    with pytest.raises(OSError, match="nern export: out must be a file that can be written, got '/proc/x.safetensors'"):
        write(Path("/proc/x.safetensors"), CIFARResNet(20, "b"))
    with pytest.raises(OSError, match="nern export: out must be a file that can be written, got '/dev/null/x.safetens"):
        write(Path("/dev/null/x.safetensors"), CIFARResNet(20, "b"))
    with pytest.raises(ValueError, match="nern export: image_size must be at least 1, got -2"):
        Config(model="x", out="x.safetensors", image_size=-2)


def test_tied_weights_are_stored_under_all_their_names(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)).eval()
    network[2].weight = network[0].weight
    predictor, stored = store(network)
    found = reconstruct(predictor, stored, network)
    write(tmp_path / "tied.safetensors", found)
    state, expected = load_file(tmp_path / "tied.safetensors"), stored.weights(predictor(stored.rows))["0.weight"]
    assert torch.equal(state["0.weight"], expected) and torch.equal(state["2.weight"], expected)
