import math

import pytest
import torch
from small_cnn_on_host import H100, NONE, logits_on_host, step_on_host
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastws
from fastws import _native
from fastws.ops.small_cnn_step import small_cnn_logits_reference, small_cnn_step_reference
from fastws.random.philox import philox_reference
from fastws.small_cnn.steps import OPTIMIZERS
from fastws.small_cnn.table import ACTIVATIONS, DROPOUT, rows_of
from fastws.testing import assert_as_accurate, devices, implementations
from fastws.zoo.making.architectures import build

SHAPES = {"cnn-s": (1, 28, 28), "cnn2": (1, 28, 28), "cnn-l": (3, 32, 32), "mlp": (1, 16, 16), "digits-cnn": (1, 8, 8)}
ODD = {  # name: layers and image shape; corner cases of kernels, strides, pooling and order
    "wide": ([nn.Conv2d(2, 5, (3, 1), (2, 3)), nn.MaxPool2d((1, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(60, 3)], 13),
    "bare": ([nn.Conv2d(2, 7, 3), nn.Flatten(), nn.Dropout(), nn.Linear(343, 2)], 9),
    "last": ([nn.Tanh(), nn.MaxPool2d(3), nn.Conv2d(2, 4, 2, bias=False), nn.Flatten(), nn.Linear(16, 5, False)], 10),
    "late": ([nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Dropout(), nn.MaxPool2d((3, 2)), nn.Flatten(), nn.Linear(18, 4)], 9),
    "deep": ([nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 1, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 4)], 10),
    "twice": ([nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)], 15),
}


pytestmark = pytest.mark.usefixtures("in_one_thread")


def make_network(name, activation="tanh"):
    if name in SHAPES:
        return build(name, SHAPES[name], activation=activation, dropout=0.5), SHAPES[name]
    layers, size = ODD[name]
    layers = [ACTIVATIONS[activation]() if isinstance(layer, nn.Tanh) else layer for layer in layers]
    return nn.Sequential(*layers), (2, size, size)


def example(name, G, S, B=10, dtype=torch.float32, device="cpu", num_images=40):
    """Arguments of ``small_cnn_step``: every activation, optimizer and dropout in one call."""
    rng = torch.Generator().manual_seed(0)
    network, shape = make_network(name)
    layers = fastws.layer_table(network, shape)
    weights = []
    for seed in range(G):
        torch.manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        weights.append(parameters_to_vector(network.parameters()).detach())
    weights = torch.stack(weights).to(dtype)
    images = torch.randn(num_images, *shape, generator=rng, dtype=torch.float64).to(dtype)
    images[: num_images // 4, :, :4] = 0  # equal entries in pooling blocks
    *_, last = rows_of(layers)
    labels = torch.randint(last.out_channels, (num_images,), generator=rng)
    batches = torch.randint(num_images, (G, S, B), generator=rng, dtype=torch.int32)
    g = torch.arange(G)
    optimizer = ((g + g // 4) % 4).int()
    recipe = {
        "activation": (g % 4).int(),
        "dropout": torch.tensor([0.0, 0.5, 0.3], dtype=torch.float64)[g % 3],
        "optimizer": optimizer,
        "lr": torch.tensor([0.05, 0.02, 0.001, 0.001], dtype=torch.float64)[optimizer.long()] * (1 + g % 2),
        "weight_decay": torch.tensor([0.01, 0.0, 0.1], dtype=torch.float64)[g % 3],
        "seed": g * 2**33 + 5,
    }
    zeros = torch.zeros_like(weights)
    args = (weights, zeros, zeros, images, labels, batches, layers)
    return [x.to(device) for x in args], {name: x.to(device) for name, x in recipe.items()}


def flat_call(args, recipe, step=0):
    return [*args, *recipe.values(), step]


class MaskedDropout(nn.Module):
    """Dropout with the mask that the operator documents, for the units from ``first`` on."""

    def __init__(self, probability, first):
        super().__init__()
        self.probability, self.first = probability, first

    def forward(self, x):
        kept = self.words[:, self.first : self.first + x[0].numel()] >= self.probability * 2**32
        return x * kept.view(x.shape) / (1 - self.probability)


def mask_dropout(network, layers, probability):
    """Replaces each dropout layer; returns the replacements and the units of all of them."""
    rows = [row for row in rows_of(layers) if row.kind == DROPOUT]
    firsts, sizes = [row.first_unit for row in rows], [math.prod(row.out_shape) for row in rows]
    found = []
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Dropout):
                found.append(MaskedDropout(probability, firsts[len(found)]))
                setattr(parent, name, found[-1])
    assert len(found) == len(firsts) and firsts == [sum(sizes[:i]) for i in range(len(sizes))]
    return found, sum(sizes)


def train_alone(name, args, recipe, g):
    """One ordinary network, trained by PyTorch."""
    weights, _, _, images, labels, batches, layers = args
    network = make_network(name, list(ACTIVATIONS)[recipe["activation"][g]])[0].to(weights)
    vector_to_parameters(weights[g].clone(), network.parameters())
    dropouts, units = mask_dropout(network, layers, recipe["dropout"][g].item())
    options = {"lr": recipe["lr"][g].item(), "weight_decay": recipe["weight_decay"][g].item()}
    optimizer = {
        "sgd": lambda x: torch.optim.SGD(x, **options),
        "momentum": lambda x: torch.optim.SGD(x, momentum=0.9, **options),
        "adam": lambda x: torch.optim.Adam(x, **options),
        "adamw": lambda x: torch.optim.AdamW(x, **options),
    }[OPTIMIZERS[recipe["optimizer"][g]]](network.parameters())
    losses, correct, size = [], [], batches.shape[2]
    for s, batch in enumerate(batches[g].long()):
        words = philox_reference(recipe["seed"][g].item(), s, size * units, images.device).view(size, -1)
        for layer in dropouts:
            layer.words = words
        logits = network(images[batch])
        loss = cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        correct.append((logits.argmax(1) == labels[batch]).sum())
    return parameters_to_vector(network.parameters()).detach(), torch.stack(losses), torch.stack(correct)


def take(args, recipe, g):
    """The arguments of some of the networks."""
    weights, first, second, images, labels, batches, layers = args
    args = weights[g], first[g], second[g], images, labels, batches[g], layers
    return args, {name: x[g] for name, x in recipe.items()}


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", [*SHAPES, *ODD])
def test_small_cnn_step_is_training_of_each_network_alone(name, dtype, tolerance, device):
    args, recipe = example(name, G=13, S=50, dtype=dtype, device=device)
    weights, _, _, losses, correct = fastws.small_cnn_step(*args, **recipe)
    errors = []
    for g in range(0, 13, 6 if name == "cnn-l" else 3):
        expected = train_alone(name, args, recipe, g)
        errors.append(max((weights[g] - expected[0]).abs().max(), (losses[g] - expected[1]).abs().max()).item())
        assert (weights[g] - args[0][g]).abs().max() > 1e-2
        assert dtype == torch.float32 or torch.equal(correct[g], expected[2])
    # where rounding decides which of two equal entries a pooling takes, or the sign of a gradient that is almost 0 and
    # that Adam divides by its size, two right ways to compute in fp32 go apart; they seldom do, and never in fp64
    errors = sorted(errors)
    assert errors[len(errors) // 2] < tolerance and errors[-1] < (0.05 if dtype == torch.float32 else tolerance), errors


@pytest.mark.parametrize("name, function, device", implementations("small_cnn_step"))
@pytest.mark.parametrize("G", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_cnn_step_is_the_reference(name, function, device, dtype, G):
    args = flat_call(*example("digits-cnn", G, S=3, B=7, dtype=dtype, device=device), 4)
    for output, actual in enumerate(function(*args)[:4]):
        assert_as_accurate(actual, lambda *args, output=output: small_cnn_step_reference(*args)[output], *args)
    assert torch.equal(function(*args)[4], small_cnn_step_reference(*args)[4])


# tiles of all samples of a batch, of one, and of half of them where there is no shared memory
@pytest.mark.parametrize("shared, samples", [(H100, 10), ((19_000, 19_000), 1), (NONE, 5)])
def test_small_cnn_step_on_host_in_tiles(shared, samples):
    args, recipe = example("digits-cnn", G=4, S=2, dtype=torch.float32)
    args[5] = args[5].long()
    args = flat_call(args, recipe, 2**33)
    outputs, tile = step_on_host(args, shared, step=2**33)
    assert tile == samples
    for output, actual in enumerate(outputs[:4]):
        assert_as_accurate(actual, lambda *args, output=output: small_cnn_step_reference(*args)[output], *args)
    assert torch.equal(outputs[4], small_cnn_step_reference(*args)[4])


@pytest.mark.parametrize("name, dtype", [(name, torch.float64) for name in ODD] + [("cnn-s", torch.float32)])
def test_small_cnn_step_on_host_is_the_reference(name, dtype):
    args = flat_call(*example(name, G=5, S=2, B=3, dtype=dtype), 4)
    outputs, _ = step_on_host(args, step=4)
    for output, actual in enumerate(outputs[:4]):
        assert_as_accurate(actual, lambda *args, output=output: small_cnn_step_reference(*args)[output], *args)
    assert torch.equal(outputs[4], small_cnn_step_reference(*args)[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture, shared", [*((name, H100) for name in ("digits-cnn", *ODD)), ("cnn-s", NONE)])
def test_small_cnn_logits_on_host_are_the_reference(architecture, shared, dtype):
    (weights, _, _, images, _, _, layers), recipe = example(architecture, G=4, S=1, dtype=dtype, num_images=21)
    args = weights, images, layers, recipe["activation"]
    assert_as_accurate(logits_on_host(*args, shared), small_cnn_logits_reference, *args)


@pytest.mark.parametrize("name, function, device", implementations("small_cnn_logits"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", [*SHAPES, *ODD])
def test_small_cnn_logits_are_those_of_each_network(name, function, device, architecture, dtype):
    (weights, _, _, images, _, _, layers), recipe = example(architecture, G=9, S=1, dtype=dtype, device=device)
    activation = recipe["activation"]
    logits = function(weights, images, layers, activation)
    assert_as_accurate(logits, small_cnn_logits_reference, weights, images, layers, activation)
    for g in range(4):
        network = make_network(architecture, list(ACTIVATIONS)[activation[g]])[0].to(weights).eval()
        vector_to_parameters(weights[g], network.parameters())
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(logits[g], network(images), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name, function, device", implementations("small_cnn_step"))
def test_small_cnn_step_by_hand(name, function, device):
    layers = fastws.layer_table(nn.Linear(1, 2), (1,)).to(device)
    weights = torch.zeros(4, 4, device=device)
    images, labels = torch.tensor([[[[-1.0]]], [[[1.0]]]], device=device), torch.tensor([0, 1], device=device)
    zeros, lr = torch.zeros(4, dtype=torch.float64), torch.full((4,), 0.1, dtype=torch.float64)
    recipe = [x.to(device) for x in (zeros.int(), zeros, torch.arange(4).int(), lr, zeros, zeros.long())]
    batches = torch.tensor([[[0, 1]]], device=device).expand(4, 1, 2)
    new, first, second, losses, correct = function(
        weights, weights, weights, images, labels, batches, layers, *recipe, 0
    )
    # the gradient is +-1/2 for the weights and 0 for the biases; Adam's first step is the learning rate
    step = torch.tensor([0.05, 0.05, 0.1, 0.1], device=device)[:, None]
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0], device=device)
    torch.testing.assert_close(new, step * expected)
    torch.testing.assert_close(first, torch.tensor([0, 0.5, 0.05, 0.05], device=device)[:, None] * -expected)
    torch.testing.assert_close(second, torch.tensor([0, 0, 2.5e-4, 2.5e-4], device=device)[:, None] * expected.abs())
    torch.testing.assert_close(losses, torch.full((4, 1), 2.0, device=device).log())
    assert correct.tolist() == [[1]] * 4 and (weights == 0).all()


@pytest.mark.parametrize("device", devices())
def test_small_cnn_step_may_be_cut_into_calls(device):
    args, recipe = example("digits-cnn", G=9, S=20, device=device)
    whole = fastws.small_cnn_step(*args, **recipe)
    half = fastws.small_cnn_step(*args[:5], args[5][:, :8], args[6], **recipe)
    rest = fastws.small_cnn_step(*half[:3], *args[3:5], args[5][:, 8:], args[6], **recipe, step=8)
    for actual, expected in zip(rest[:3], whole[:3], strict=True):
        assert torch.equal(actual, expected)
    for i in (3, 4):
        assert torch.equal(torch.cat([half[i], rest[i]], 1), whole[i])


@pytest.mark.parametrize("device", [d for d in devices() if "small_cnn_step" in _native.COMPILED[d]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_cnn_step_does_not_depend_on_neighbours_or_threads(dtype, device):
    args, recipe = example("digits-cnn", G=21, S=10, dtype=dtype, device=device)
    together = fastws.small_cnn_step(*args, **recipe)
    chosen = torch.tensor([20, 3, 7, 8])
    some_args, some_recipe = take(args, recipe, chosen.to(device))
    for actual, expected in zip(fastws.small_cnn_step(*some_args, **some_recipe), together, strict=True):
        assert torch.equal(actual, expected[chosen])
    torch.set_num_threads(3)
    for actual, expected in zip(fastws.small_cnn_step(*args, **recipe), together, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("device", devices())
def test_small_cnn_step_of_a_diverged_network_is_not_finite_and_harms_no_other(device):
    args, recipe = example("digits-cnn", G=9, S=4, device=device)
    expected = fastws.small_cnn_step(*args, **recipe)
    args[0] = args[0].clone()
    args[0][2:4, 5] = float("nan")
    weights, _, _, losses, _ = fastws.small_cnn_step(*args, **recipe)
    others = [0, 1, *range(4, 9)]
    assert not losses[2:4].isfinite().any() and not weights[2:4].isfinite().all(1).any()
    torch.testing.assert_close(weights[others], expected[0][others], rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("G, S", [(0, 3), (2, 0)])
def test_small_cnn_step_of_nothing(G, S, device):
    args, recipe = example("digits-cnn", 2, S, device=device)
    args, recipe = take(args, recipe, slice(0, G))
    outputs = fastws.small_cnn_step(*args, **recipe)
    assert torch.equal(outputs[0], args[0]) and outputs[3].shape == outputs[4].shape == (G, S)
    assert fastws.small_cnn_logits(args[0], args[3][:0], args[6], recipe["activation"]).shape == (G, 0, 10)


@pytest.mark.parametrize("device", devices())
def test_small_cnn_step_opcheck(device):
    args, recipe = example("digits-cnn", G=3, S=2, device=device)
    torch.library.opcheck(torch.ops.fastws.small_cnn_step.default, tuple(flat_call(args, recipe, 3)))
    logits_args = args[0], args[3], args[6], recipe["activation"]
    torch.library.opcheck(torch.ops.fastws.small_cnn_logits.default, logits_args)


def test_small_cnn_step_refuses_gradients():
    args, recipe = example("digits-cnn", G=2, S=1)
    args[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="small_cnn_step: not differentiable"):
        fastws.small_cnn_step(*args, **recipe)[0].sum().backward()
    with pytest.raises(NotImplementedError, match="small_cnn_logits: not differentiable"):
        fastws.small_cnn_logits(args[0], args[3], args[6], recipe["activation"]).sum().backward()


def test_small_cnn_step_compiles():
    args, recipe = example("digits-cnn", G=3, S=2)

    def train_and_evaluate(weights, step):
        state = fastws.small_cnn_step(weights + 0, *args[1:], **recipe, step=step)
        return *state, fastws.small_cnn_logits(state[0], args[3], args[6], recipe["activation"]).sum(1)

    compiled = torch.compile(train_and_evaluate, fullgraph=True, backend="aot_eager")
    for step in (0, 5):
        for actual, expected in zip(compiled(args[0], step), train_and_evaluate(args[0], step), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "layers, shape, message",
    [
        ([nn.Conv2d(1, 2, 3, padding=1)], (1, 8, 8), r"layer '0' must be one that the kernel runs .* got Conv2d"),
        ([nn.Conv2d(1, 2, 9)], (1, 8, 8), "layer '0' .* got Conv2d"),
        ([nn.Conv2d(2, 2, 3)], (1, 8, 8), r"got Conv2d\(2, .* on \[1, 8, 8\]"),
        ([nn.MaxPool2d(3, 2)], (1, 8, 8), "got MaxPool2d"),
        ([nn.Flatten(), nn.GELU("tanh")], (1, 8, 8), "layer '1' .* torch.func .* got GELU"),
        ([nn.Linear(8, 2)], (1, 8, 8), r"got Linear\(.* on \[1, 8, 8\]"),
        ([nn.BatchNorm2d(1)], (1, 8, 8), "got BatchNorm2d"),
        ([nn.Flatten(), nn.Linear(64, 2), nn.ReLU()], (1, 8, 8), "the last layer must be Linear"),
        (
            [nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)],
            (1, 8, 8),
            "activations must be of one kind, for operators take one per network, got ReLU, Tanh",
        ),
        (
            [nn.Flatten(), nn.Linear(64, 2000)],
            (1, 8, 8),
            "must together be at most 131072 numbers, got 130000 and 2064",
        ),
    ],
)
def test_layer_table_refuses(layers, shape, message):
    with pytest.raises(ValueError, match=f"layer_table: .*{message}"):
        fastws.layer_table(nn.Sequential(*layers), shape)


def test_layer_table_refuses_shared_and_foreign_weights():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="layer_table: layer '1' must be one that the kernel runs .* once"):
        fastws.layer_table(nn.Sequential(layer, layer), (4,))
    network = nn.Sequential(nn.Linear(4, 4))
    network.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="layer_table: all parameters must belong to layers"):
        fastws.layer_table(network, (4,))


@pytest.mark.parametrize(
    "name, place, value, message",
    [
        ("labels", 4, 10, r"labels must be in \[0, 10\), got .*\.\.10"),
        ("batches", 5, 40, r"batches must be in \[0, 40\), got .*\.\.40"),
        ("batches", 5, -1, r"batches must be in \[0, 40\), got -1\.\."),
        ("table", 6, 10**6, r"layers\[0\] must fit an input of shape \[1, 8, 8\] and 1486 weights"),
    ],
)
def test_small_cnn_step_refuses_values(name, place, value, message):
    args, recipe = example("digits-cnn", G=2, S=2)
    args[place] = args[place].clone()
    args[place].view(-1)[1] = value
    with pytest.raises(ValueError, match=f"small_cnn_step: {message}"):
        fastws.small_cnn_step(*args, **recipe)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("activation", torch.tensor([0, 4]).int(), r"activation must be in \[0, 4\), got 0\.\.4"),
        ("optimizer", torch.tensor([0, 1]), r"optimizer must be \[2\] torch.int32 on cpu, got \[2\] torch.int64"),
        ("dropout", torch.tensor([0.0, 1.0]).double(), r"dropout must be in \[0, 1\), got 0.0\.\.1.0"),
        ("seed", torch.tensor([0, -1]), r"seed must be in \[0, "),
        ("lr", 0.1, r"lr must be \[2\] torch.float64 on cpu, got 0.1"),
    ],
)
def test_small_cnn_step_refuses_recipes(name, value, message):
    args, recipe = example("digits-cnn", G=2, S=2)
    with pytest.raises(ValueError, match=f"small_cnn_step: {message}"):
        fastws.small_cnn_step(*args, **recipe | {name: value})


def test_small_cnn_step_refuses_shapes():
    args, recipe = example("digits-cnn", G=2, S=2)
    for place, value, message in [
        (0, args[0].half(), r"weights must be \[G, P\] float32 or float64, got \[2, 1486\] torch.float16"),
        (1, args[1][:1], r"first must be \[2, 1486\] torch.float32 on cpu, got \[1, 1486\]"),
        (3, args[3].double(), r"images must be \[n, C, H, W\] torch.float32 on cpu"),
        (5, args[5][:1], r"batches must be \[2, S, B\], B at least 1, got \[1, 2, 10\]"),
        (5, args[5].float(), "batches must be int32 or int64 on cpu, got torch.float32"),
        (6, args[6][:, :11], r"layers must be a table of fastws.layer_table, got \[10, 11\]"),
        (6, args[6][:-1], "layers must use all weights and end in a dense layer"),
    ]:
        with pytest.raises(ValueError, match=f"small_cnn_step: {message}"):
            fastws.small_cnn_step(*args[:place], value, *args[place + 1 :], **recipe)
