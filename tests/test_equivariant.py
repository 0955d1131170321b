"""Equivariance of layers and invariance of networks, on a perceptron, a CNN with flatten and a ResNet."""

import json

import pytest
import torch
from small_zoo import make_small_zoo
from torch import nn

from fastws.downstream import predict
from fastws.downstream.probes import equivariant
from fastws.layout.layout import Layout
from fastws.nn.equivariant import EquivariantLinear, EquivariantNetwork, pieces_of
from fastws.symmetry.symmetry import Symmetry


def perceptron(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 3)), (2, 5)


def convolutions():
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(5, 3)), (2, 2, 5, 5)


class Concatenation(nn.Module):
    """Two branches side by side, one of which is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.last = nn.Linear(10, 3)

    def forward(self, x):
        a, b = self.first(x).relu().mean((2, 3)), self.second(x).relu().mean((2, 3))
        return self.last(torch.cat([a, b, a], 1))


class Residual(nn.Module):
    """A stem, a block with a shortcut of its own size and one that changes it, batch norms, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.first, self.second = self.block(4, 4), self.block(4, 6)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.last = nn.Linear(6, 3)

    def block(self, inputs, outputs):
        first = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.first(x)).relu()
        x = (self.shortcut(x) + self.second(x)).relu()
        return self.last(x.mean((2, 3)))


CASES = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "concatenation": lambda: (Concatenation(), (2, 2, 4, 4)),
    "resnet": lambda: (Residual(), (2, 2, 6, 6)),
}


@pytest.fixture(scope="module", params=CASES)
def architecture(request):
    module, shape = CASES[request.param]()
    module = module.double()
    layout = Layout.from_checkpoint(module)
    return layout, Symmetry.trace(module, torch.randn(shape, dtype=torch.float64))


def scatter(layout, pieces, features):
    """Features of pieces with as many channels as numbers, back at the places of their numbers: ``[B, P, D]``."""
    first = features[0]
    channels = first.shape[3] // pieces[0].index.shape[2]
    flat = first.new_zeros(len(first), layout.num_weights, channels)
    for piece, x in zip(pieces, features, strict=True):
        flat[:, piece.index.flatten()] = x.unflatten(3, (channels, -1)).movedim(3, 4).flatten(1, 3)
    return flat


def test_pieces_hold_every_number_once(architecture):
    layout, symmetry = architecture
    index = torch.cat([piece.index.flatten() for piece in pieces_of(layout, symmetry)])
    assert torch.equal(index.sort().values, torch.arange(layout.num_weights))


def test_layer_commutes_with_permutations(architecture):
    layout, symmetry = architecture
    pieces = pieces_of(layout, symmetry)
    layer = EquivariantLinear(pieces, 1, 2).double()
    flat = torch.randn(3, layout.num_weights, dtype=torch.float64)
    rows = symmetry.random(3, seed=1)

    def apply(flat):
        return scatter(layout, pieces, layer([flat[:, piece.index] for piece in pieces]))

    once, moved = apply(flat), apply(symmetry.permute(flat, rows, layout))
    for channel in range(2):
        expected = symmetry.permute(once[..., channel].contiguous(), rows, layout)
        assert (moved[..., channel] - expected).abs().max() < 1e-10
    assert (moved - once).abs().max() > 0.1 and once.std() > 0.1


def test_network_is_invariant_and_not_constant(architecture):
    layout, symmetry = architecture
    network = EquivariantNetwork(layout, symmetry, 2, known=3, channels=(3, 4), head=16).double()
    flat = torch.randn(6, layout.num_weights, dtype=torch.float64)
    known = torch.randn(6, 3, dtype=torch.float64)
    network.set_scales(flat, known)
    with torch.no_grad():
        outputs = network(flat, known)
        moved = network(symmetry.permute(flat, symmetry.random(6, seed=2), layout), known)
        other = network(flat[:, torch.randperm(layout.num_weights)], known)
    assert outputs.std(0).min() > 1e-3
    assert (outputs - moved).abs().max() < 1e-10
    assert (outputs - other).abs().max() > 1e-3  # only the permutations of the symmetry leave it as it is


def test_inputs_and_outputs_are_told_apart():
    """Permuting what a symmetry does not move changes features: without codes, units of an axis would be alike."""
    layout, symmetry = Layout.from_checkpoint(perceptron()[0]), Symmetry.trace(perceptron()[0], torch.randn(2, 5))
    network = EquivariantNetwork(layout, symmetry, channels=(3, 3), head=16).double()
    flat = torch.randn(1, layout.num_weights, dtype=torch.float64)
    state = layout.unflatten(flat[0])
    swapped = layout.flatten(state | {"0.weight": state["0.weight"].flip(1)})[None]
    turned = layout.flatten({k: v.flip(0) if k.startswith("4") else v for k, v in state.items()})[None]
    with torch.no_grad():
        outputs = [network(x) for x in (flat, swapped, turned)]
    assert all((outputs[0] - other).abs().max() > 1e-4 for other in outputs[1:])


def test_odd_activations_bring_sizes():
    module, shape = perceptron(nn.Tanh)
    layout, symmetry = Layout.from_checkpoint(module), Symmetry.trace(module, torch.randn(shape))
    network = EquivariantNetwork(layout, symmetry, channels=(3,), head=8)
    assert network.signed and network.layers[0].own[0].in_features == 2
    assert not EquivariantNetwork(layout, symmetry.unsigned(), channels=(3,), head=8).signed


def test_scales_make_units_of_measure_the_same():
    layout, symmetry = Layout.from_checkpoint(perceptron()[0]), Symmetry.trace(perceptron()[0], torch.randn(2, 5))
    network = EquivariantNetwork(layout, symmetry, known=2, channels=(3,), head=8).double()
    flat, known = torch.randn(9, layout.num_weights).double(), torch.randn(9, 2).double()
    network.set_scales(flat, known)
    outputs = network(flat, known)
    network.set_scales(10 * flat, 3 * known - 7)
    torch.testing.assert_close(network(10 * flat, 3 * known - 7), outputs)
    network.set_scales(torch.zeros(9, layout.num_weights).double(), torch.ones(9, 2).double())
    assert network(flat, known).isfinite().all()


def test_gradients_reach_every_parameter(architecture):
    layout, symmetry = architecture
    network = EquivariantNetwork(layout, symmetry, channels=(2, 2), head=8).double()
    network(torch.randn(8, layout.num_weights, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_another_symmetry_is_refused():
    layout = Layout.from_checkpoint(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="symmetry: layout must hold"):
        EquivariantNetwork(layout, Symmetry.trace(perceptron()[0], torch.randn(2, 5)))


# --- the probe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_small_zoo(tmp_path_factory.mktemp("zoo"))


def fit(zoo, targets, **options):
    rows = {split: zoo.split(split) for split in ("train", "val", "test")}
    features = {split: zoo.rows(found) for split, found in rows.items()}
    wanted = {split: targets[found] for split, found in rows.items()}
    own = {"layout": zoo.layout, "symmetry": zoo.symmetry, "device": torch.device("cpu")}
    training = equivariant.Training(channels=(4, 4), head=32, **options)
    may_flip = torch.zeros(len(rows["train"]), dtype=torch.bool)
    return equivariant.fit_equivariant(features, wanted, may_flip=may_flip, training=training, **own), features, wanted


def test_probe_learns_and_predicts(zoo):
    accuracy = torch.from_numpy(zoo.numbers("test_accuracy"))
    targets = torch.stack([accuracy, 100 * accuracy - 7], 1)
    targets[zoo.split("train")[3], 0] = torch.inf
    targets[zoo.split("test")[1], 0] = torch.nan
    (share, number), features, wanted = fit(zoo, targets, epochs=40, batch_size=8)
    assert share.test_r2 > 0.8 and number.test_r2 > 0.8 and share.test_tau > 0.7
    assert len(share.test_prediction) == len(number.test_prediction) - 1
    torch.testing.assert_close(number.predict(features["test"]), number.test_prediction)
    assert share.scores()["penalty"] is None
    again = fit(zoo, targets, epochs=40, batch_size=8)[0][0]
    torch.testing.assert_close(again.test_prediction, share.test_prediction)


def test_bounds_are_those_of_shares_or_of_the_training_split():
    targets = torch.tensor([[0.2, 5.0, 3.0], [0.9, -2.0, 3.0], [torch.nan, torch.inf, 3.0]])
    low, high = equivariant.bounds_of(targets)
    assert low.tolist() == [0, -2, 3] and high.tolist() == [1, 5, 4]


def test_probe_stops_when_the_validation_split_says_so(zoo, monkeypatch):
    monkeypatch.setattr(equivariant, "PATIENCE", 2)
    taus = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(equivariant, "mean_tau", lambda *args: next(taus))
    fit(zoo, torch.from_numpy(zoo.numbers("test_accuracy"))[:, None], epochs=40)
    assert next(taus) == 0.9  # four epochs were looked at: two since the best one


def test_command_of_the_equivariant_probe(zoo, tmp_path, monkeypatch, capsys):
    blind = make_small_zoo(tmp_path / "blind", symmetry=False)
    monkeypatch.setattr(predict.Zoo, "open", lambda path: zoo)
    options = {"targets": ("test_accuracy",), "ood": ("b",), "epochs": 3, "channels": (2,), "head": 8}
    predict.run(predict.Config(zoo="a", out=str(tmp_path), probe=("equivariant",), device="cpu", **options))
    here, there = json.loads((tmp_path / "results.json").read_text())["results"]
    assert here["probe"] == "equivariant" and here["test_r2"] == pytest.approx(there["test_r2"])
    monkeypatch.setattr(predict.Zoo, "open", lambda path: blind)
    with pytest.raises(ValueError, match="must know its symmetry for the equivariant probe, got none"):
        predict.run(predict.Config(zoo="a", out=str(tmp_path), probe=("equivariant",)))
    for wrong in ({"epochs": 0}, {"lr": -1.0}, {"channels": ()}):
        with pytest.raises(ValueError, match=f"predict: {next(iter(wrong))} must be positive"):
            predict.Config(zoo="a", out="b", **wrong)


def test_signs_are_drawn_for_networks_that_may_flip():
    """A probe that is trained with random signs is nearly blind to them; one that is not need not be."""
    module, shape = perceptron(nn.Tanh)
    layout, symmetry = Layout.from_checkpoint(module), Symmetry.trace(module, torch.randn(shape))
    drawn = []

    class Watched(EquivariantNetwork):
        def forward(self, flat, known=None):
            drawn.append(flat)
            return super().forward(flat, known)

    flat, wanted = torch.randn(6, layout.num_weights), torch.rand(6, 1)
    network = Watched(layout, symmetry, known=42, channels=(2,), head=8)
    may_flip = torch.tensor([True, True, True, True, True, False])
    next(equivariant.train(network, flat, wanted, may_flip, layout, symmetry, equivariant.Training(batch_size=6)))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    x, before = drawn[0], flat[order]
    still = may_flip[order].logical_not()
    changed = (x.sort().values - before.sort().values).abs().amax(1)
    assert (changed[~still] > 0.01).all() and (changed[still] < 1e-6).all()
    torch.testing.assert_close(x.abs().sort().values, before.abs().sort().values)
