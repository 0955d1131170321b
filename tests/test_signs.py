"""Signs of units: traced, drawn, composed, permuted and matched."""

import json

import pytest
import torch
from small_zoo import make_small_zoo
from torch import nn

from fastws.layout.layout import Layout
from fastws.matching.canonical import canonical
from fastws.matching.match import match, objective
from fastws.matching.mean import match_to_mean
from fastws.symmetry.symmetry import Symmetry
from fastws.symmetry.verify import randomise
from fastws.zoo.align import Config, align
from fastws.zoo.alignment import Alignment, aligned_rows
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo


class Function(nn.Module):
    """A network of layers and a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def perceptron(activation, widths=(4, 8, 6, 3)):
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[part for layer in layers for part in (layer, activation())][:-1])


def recurrent(kind, **options):
    network = kind(3, 5, batch_first=True, **options)
    width = 10 if options.get("bidirectional") else 5
    return Function(lambda self, x: self.head(self.cells(x)[0][:, -1]), cells=network, head=nn.Linear(width, 2))


def convolutions(*between):
    """Two convolutions, what is between them, and a head."""
    layers = [nn.Conv2d(1, 5, 3, padding=1), *between, nn.Conv2d(5, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))


def residual():
    layers = {"first": nn.Linear(3, 6), "a": nn.Linear(6, 7), "b": nn.Linear(7, 6), "head": nn.Linear(6, 2)}

    def run(self, x):
        x = self.first(x).tanh()
        return self.head(x + self.b(self.a(x).sin()))

    return Function(run, **layers)


def of_two(function):
    layers = {"a": nn.Linear(3, 6), "b": nn.Linear(3, 6), "head": nn.Linear(6, 2)}
    return Function(lambda self, x: self.head(function(self.a(x), self.b(x))), **layers)


def of_one(function):
    layers = {"a": nn.Linear(3, 1), "head": nn.Linear(1, 2)}
    return Function(lambda self, x: self.head(function(self.a(x))), **layers)


VECTORS, IMAGES, SERIES = torch.randn(2, 4), torch.randn(2, 1, 8, 8), torch.randn(2, 4, 3)
TANH = nn.Tanh
CASES = {  # network, inputs, whether units of each group may be negated
    "tanh": (perceptron(TANH), VECTORS, (True, True)),
    "softsign": (perceptron(nn.Softsign), VECTORS, (True, True)),
    "hardtanh": (perceptron(nn.Hardtanh), VECTORS, (True, True)),
    "hardtanh of other bounds": (perceptron(lambda: nn.Hardtanh(-1, 2)), VECTORS, (False, False)),
    "bounded above alone": (of_two(lambda a, b: (a + b).clamp(max=1)), SERIES[:, 0], (False,)),
    "bounded": (of_two(lambda a, b: (a + b).clamp(-2, 2)), SERIES[:, 0], (True,)),
    "cubed": (of_two(lambda a, b: (a + b) ** 3), SERIES[:, 0], (True,)),
    "to a broken power": (of_two(lambda a, b: (a + b).abs() ** 1.5 + b), SERIES[:, 0], (False,)),
    "copied": (of_two(lambda a, b: torch.zeros_like(a).copy_((a + b).tanh())), SERIES[:, 0], (True,)),
    "softshrink": (perceptron(nn.Softshrink), VECTORS, (True, True)),
    "identity": (perceptron(nn.Identity), VECTORS, (True, True)),
    "layers of one unit": (perceptron(TANH, (4, 1, 1, 3)), VECTORS, (True, True)),
    "one unit of one layer": (perceptron(TANH, (4, 1, 6, 3)), VECTORS, (True, True)),
    "one unit of relu": (perceptron(nn.ReLU, (4, 1, 3)), VECTORS, ()),
    "one channel": (
        nn.Sequential(nn.Conv2d(1, 1, 3), TANH(), nn.Conv2d(1, 4, 1), TANH(), nn.AvgPool2d(6), nn.Flatten()),
        IMAGES,
        (True,),
    ),
    "one channel behind a norm": (
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), TANH(), nn.Conv2d(1, 2, 1), nn.Flatten()),
        IMAGES,
        (True,),
    ),
    "one unit plus a constant": (of_one(lambda x: x.tanh() + 1), SERIES[:, 0], ()),
    "one unit squared": (of_one(lambda x: x.square()), SERIES[:, 0], (True,)),
    "relu": (perceptron(nn.ReLU), VECTORS, (False, False)),
    "gelu": (perceptron(nn.GELU), VECTORS, (False, False)),
    "layer norm": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), VECTORS, (False,)),
    "dropout": (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)), VECTORS, (True,)),
    "average pooling": (convolutions(TANH(), nn.AvgPool2d(2)), IMAGES, (True, True)),
    "max pooling": (convolutions(nn.MaxPool2d(2), TANH()), IMAGES, (False, True)),
    "zero padding": (convolutions(TANH(), nn.ZeroPad2d(1)), IMAGES, (True, True)),
    "padding by one": (convolutions(TANH(), nn.ConstantPad2d(1, 1.0)), IMAGES, (False, True)),
    "reflection": (convolutions(TANH(), nn.ReflectionPad2d(1)), IMAGES, (True, True)),
    "batch norm": (convolutions(nn.BatchNorm2d(5), TANH()), IMAGES, (True, True)),
    "batch norm without gain": (convolutions(nn.BatchNorm2d(5, affine=False), TANH()), IMAGES, (False, True)),
    "depthwise": (convolutions(TANH(), nn.Conv2d(5, 5, 3, padding=1, groups=5), TANH()), IMAGES, (True, True)),
    "residual": (residual(), SERIES[:, 0], (True, True)),
    "gated": (of_two(lambda a, b: a.tanh() * b.sigmoid()), SERIES[:, 0], (True,)),
    "product": (of_two(lambda a, b: a.tanh() * b.tanh()), SERIES[:, 0], (True,)),
    "square": (of_two(lambda a, b: a.square() + b), SERIES[:, 0], (True,)),  # a may be negated
    "absolute": (of_two(lambda a, b: (a + b).abs()), SERIES[:, 0], (True,)),
    "a constant added": (of_two(lambda a, b: (a + b).tanh() + 1), SERIES[:, 0], (False,)),
    "softmax": (of_two(lambda a, b: (a + b).softmax(-1)), SERIES[:, 0], (False,)),
    "concatenated": (
        Function(
            lambda self, x: self.head(torch.cat([self.a(x).tanh(), self.b(x).relu()], 1)),
            a=nn.Linear(3, 6),
            b=nn.Linear(3, 4),
            head=nn.Linear(10, 2),
        ),
        SERIES[:, 0],
        (True, False),
    ),
    "rnn": (recurrent(nn.RNN, num_layers=2), SERIES, (True, True)),
    "rnn of relu": (recurrent(nn.RNN, nonlinearity="relu"), SERIES, (False,)),
    "lstm": (recurrent(nn.LSTM), SERIES, (True,)),
    "lstm of two directions": (recurrent(nn.LSTM, bidirectional=True), SERIES, (True, True)),
    "gru": (recurrent(nn.GRU), SERIES, (True,)),
}


@pytest.mark.parametrize("name", CASES)
def test_signs_are_found_and_keep_the_function(name):
    module, inputs, flips = CASES[name]
    symmetry = Symmetry.trace(module, inputs)
    assert symmetry.flips == flips
    assert symmetry.verify(module, inputs, trials=3) < 1e-12
    if any(flips):
        drawn = symmetry.random(4, seed=1, flips=True)
        negated = (drawn[:, : sum(symmetry.sizes)] < 0).split(list(symmetry.sizes), 1)
        assert [bool(part.any()) for part in negated] == list(flips)


def test_gates_of_recurrent_layers_keep_their_sign():
    symmetry = Symmetry.trace(*CASES["lstm"][:2])
    rows = [negated for _, _, _, negated in symmetry.axes["cells.weight_ih_l0"][0]]
    assert rows == [False, False, True, False]  # input, forget, cell, output
    symmetry = Symmetry.trace(*CASES["batch norm"][:2])
    assert symmetry.axes["1.running_var"] == (((0, 5, 1, False),),)
    assert symmetry.axes["0.weight"][0] == ((0, 5, 1, False),)  # B3: what is normalised keeps its sign
    assert symmetry.axes["1.weight"] == (((0, 5, 1, True),),)


@pytest.fixture(scope="module")
def traced():
    module, inputs, _ = CASES["lstm"]
    return module, inputs, Symmetry.trace(module, inputs), Layout.from_checkpoint(module)


def test_flips_are_a_draw_of_their_own(traced):
    symmetry = traced[2]
    plain, signed = symmetry.random(8, 3, 5), symmetry.random(8, 3, 5, flips=True)
    assert torch.equal(torch.where(signed < 0, ~signed, signed), plain) and (plain >= 0).all()
    chosen = torch.tensor([True, False] * 4)
    some = symmetry.random(8, 3, 5, flips=chosen)
    assert torch.equal(some[::2], signed[::2]) and torch.equal(some[1::2], plain[1::2])
    many = symmetry.random(2000, 0, flips=True)[:, : sum(symmetry.sizes)]
    assert abs((many < 0).double().mean().item() - 0.5) < 0.02


def test_signed_permutations_are_a_group(traced):
    _, _, symmetry, layout = traced
    flat = torch.randn(4, layout.num_weights)
    first, second = symmetry.random(4, 1, flips=True), symmetry.random(4, 2, flips=True)
    assert torch.equal(symmetry.compose(first, symmetry.inverse(first)), symmetry.identity(4))
    assert torch.equal(symmetry.compose(symmetry.inverse(first), first), symmetry.identity(4))
    twice = symmetry.permute(symmetry.permute(flat, first, layout), second, layout)
    assert torch.equal(symmetry.permute(flat, symmetry.compose(first, second), layout), twice)
    for row, weights in zip(first, flat, strict=True):
        state = symmetry.permute_state(layout.unflatten(weights), row)
        assert torch.equal(layout.flatten(state), symmetry.permute(weights, row, layout))


def test_signs_that_are_not_allowed_are_refused():
    symmetry = Symmetry.trace(*CASES["max pooling"][:2])
    row = symmetry.identity(1)
    row[0, 1] = ~row[0, 1]
    with pytest.raises(ValueError, match=r"symmetry: units of group 0.weight must keep their sign, got -2"):
        symmetry.expand(row)


def test_descriptions_without_signs_are_read(traced):
    symmetry = traced[2]
    described = json.loads(json.dumps(symmetry.to_dict()))
    assert Symmetry.from_dict(described) == symmetry and described.pop("format") == 2
    with pytest.raises(ValueError, match="got ValueError.*format 3, of a newer version of fastws"):
        Symmetry.from_dict(described | {"format": 3})
    for found in described["axes"].values():
        for segments in found:
            for segment in segments or ():
                segment.pop()
    old = Symmetry.from_dict(described)
    assert old == symmetry.unsigned() and not any(old.flips) and old.sizes == symmetry.sizes


# --- matching


@pytest.mark.parametrize("name", ["tanh", "lstm", "gru", "batch norm", "residual", "concatenated", "depthwise"])
def test_signed_copies_are_recovered(name):
    module, inputs, _ = CASES[name]
    symmetry, layout = Symmetry.trace(module, inputs), Layout.from_checkpoint(module)
    with torch.no_grad():
        randomise(module, 3)
    reference = layout.flatten(module).detach()
    may_flip = torch.arange(20) % 4 > 0
    generator = torch.Generator().manual_seed(0)
    moved = symmetry.permute(reference, symmetry.random(20, 1, flips=may_flip), layout)
    moved += 1e-3 * torch.randn(moved.shape, generator=generator)
    found = match(moved, reference, symmetry, layout, flips=may_flip, restarts=5)
    assert not (found[~may_flip] < 0).any()
    after = symmetry.permute(moved, found, layout)
    near = (after - reference).norm(dim=1) < 0.02 * reference.norm()
    assert near.double().mean() > 0.8  # coordinate descent may end elsewhere in networks as small as these
    unsigned = symmetry.permute(moved, match(moved, reference, symmetry, layout, restarts=5), layout)
    gained = (objective(x, reference, symmetry, layout) for x in (after, unsigned))
    assert torch.stack([*gained]).diff(dim=0).mean() < 0


def test_every_network_may_have_its_own_reference():
    module, inputs, _ = CASES["tanh"]
    symmetry, layout = Symmetry.trace(module, inputs), Layout.from_checkpoint(module)
    flat, references = torch.randn(2, 7, layout.num_weights)
    flips = torch.arange(7) % 2 == 0
    together = match(flat, references, symmetry, layout, flips=flips)
    for n in range(7):
        alone = match(flat[n : n + 1], references[n], symmetry, layout, flips=bool(flips[n]))
        assert torch.equal(together[n : n + 1], alone)
    moved = symmetry.permute(flat, together, layout)
    pairs = objective(moved, references, symmetry, layout)
    torch.testing.assert_close(pairs, (moved.double() * references.double()).sum(1))


def test_networks_are_matched_to_their_mean():
    module, inputs, _ = CASES["tanh"]
    symmetry, layout = Symmetry.trace(module, inputs), Layout.from_checkpoint(module)
    generator = torch.Generator().manual_seed(0)
    template = torch.randn(layout.num_weights, generator=generator)
    flat = symmetry.permute(template, symmetry.random(30, 1, flips=True), layout)
    flat += 0.5 * torch.randn(flat.shape, generator=generator)
    flips = torch.ones(30, dtype=torch.bool)
    found = match_to_mean(lambda n: flat[n], 30, flat[0], symmetry, layout, flips=flips)
    aligned = symmetry.permute(flat, found.permutations, layout).double()
    torch.testing.assert_close(found.mean, aligned.mean(0))
    once = symmetry.permute(flat, match(flat, flat[0], symmetry, layout, flips=flips), layout).double()
    assert found.rounds > 0 and aligned.mean(0).norm() > once.mean(0).norm()


# --- zoos


def write_zoo(path, activations):
    module, inputs, _ = CASES["tanh"]
    symmetry, layout = Symmetry.trace(module, inputs), Layout.from_checkpoint(module)
    generator = torch.Generator().manual_seed(0)
    template = torch.randn(layout.num_weights, generator=generator)
    flips = torch.tensor([name == "tanh" for name in activations])
    rows = symmetry.random(len(activations), 1, flips=flips)
    flat = symmetry.permute(template, rows, layout) + 0.1 * torch.randn(len(rows), len(template), generator=generator)
    names = [f"m{n}" for n in range(len(activations))]
    properties = {"model": names, "epoch": [1] * len(names), "test_accuracy": torch.linspace(0, 1, len(names))}
    splits = {"train": names[:-2], "val": names[-2:-1], "test": names[-1:]}
    with ZooWriter(path, layout, symmetry, splits=splits) as writer:
        writer.append(flat, properties | {"activation": activations})
    return Zoo.open(path)


def test_zoo_is_aligned_with_signs_where_activations_are_odd(tmp_path, capsys):
    zoo = write_zoo(tmp_path, ["tanh", "relu"] * 10)
    assert zoo.may_flip.tolist() == [True, False] * 10
    alignment = align(Config(zoo=str(tmp_path)))
    assert alignment.method == "mean" and alignment.chosen == "highest last test_accuracy of the train split"
    read = Alignment.open(zoo)
    assert torch.equal(read.permutations, alignment.permutations) and read.rounds == alignment.rounds
    assert (read.permutations < 0).any(1).tolist() == [True, False] * 10 or not (read.permutations[1::2] < 0).any()
    assert (read.after >= read.before).all()
    spread = [rows[::2].std(0).norm() for rows in (aligned_rows(zoo, range(20)), zoo.rows(range(20)))]
    assert spread[0] < 0.5 * spread[1]
    plain = align(Config(zoo=str(tmp_path), signs=False))
    assert not (plain.permutations < 0).any() and plain.after.mean() < alignment.after.mean()


def test_best_is_by_validation_where_it_is_known(tmp_path):
    zoo = make_small_zoo(tmp_path)
    assert align(Config(zoo=str(tmp_path))).chosen == "highest last test_accuracy of the train split"
    assert not zoo.may_flip.any()


def test_alignments_with_signs_that_are_not_allowed_are_refused(tmp_path):
    zoo = make_small_zoo(tmp_path)
    alignment = align(Config(zoo=str(tmp_path)))
    alignment.permutations[0] = ~alignment.permutations[0]
    alignment.save(zoo, tmp_path / "alignment.safetensors")
    with pytest.raises(ValueError, match="got another thing than permutations of group 0; run fastws zoo align again"):
        Alignment.open(zoo)


def test_a_layer_of_one_unit_is_drawn_stored_and_brought_into_canonical_form():
    module = perceptron(TANH, (4, 1, 6, 3))
    symmetry, layout = Symmetry.trace(module, VECTORS), Layout.from_checkpoint(module)
    assert sorted(symmetry.sizes) == [1, 6] and "1 unit of either sign, 0.weight" in symmetry.describe()
    assert Symmetry.from_dict(json.loads(json.dumps(symmetry.to_dict()))) == symmetry
    flat = layout.flatten(module).detach()
    rows = symmetry.random(16, 1, flips=True)
    moved = symmetry.permute(flat, rows, layout)
    assert {float(network[0].sign()) for network in moved} == {-1.0, 1.0}
    for network in moved:
        outputs = torch.func.functional_call(module, layout.unflatten(network), VECTORS)
        torch.testing.assert_close(outputs, module(VECTORS))
    forms = [symmetry.permute(x, canonical(x, symmetry, layout, flips=True), layout) for x in (flat[None], moved)]
    assert torch.equal(forms[1], forms[0].expand_as(forms[1]))
