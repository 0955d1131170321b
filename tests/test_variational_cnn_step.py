"""Against training by autograd of one ordinary network, whose layers state variational dropout on their own."""

import pytest
import torch
from small_cnn_on_host import H100, NONE, step_on_host
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, linear
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastws
from fastws.ops.variational_cnn_step import sparse_weights, variational_cnn_step_reference
from fastws.random.philox import normal_reference, philox_reference
from fastws.small_cnn.steps import OPTIMIZERS
from fastws.small_cnn.table import ACTIVATIONS, CONVOLUTION, rows_of
from fastws.testing import assert_as_accurate, devices, implementations
from fastws.zoo.making.architectures import build

SHAPES = {"cnn-s": (1, 28, 28), "cnn2": (1, 28, 28), "cnn-l": (3, 32, 32), "mlp": (1, 16, 16), "digits-cnn": (1, 8, 8)}
KL_WEIGHT = 0.004


pytestmark = pytest.mark.usefixtures("in_one_thread")


class Variational(nn.Module):
    """A convolution or dense layer with normal weights, local reparametrisation, and noise that is given."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.bound = 8.0 if isinstance(layer, nn.Conv2d) else 10.0
        names = ("weight", "bias") if isinstance(layer, nn.Conv2d) else ("weight",)
        self.theta = [getattr(layer, name) for name in names]
        self.log_sigma = nn.ParameterList([nn.Parameter(torch.full_like(x, -10.0)) for x in self.theta])

    def log_alpha(self):
        pairs = zip(self.theta, self.log_sigma, strict=True)
        return [(s - 2 * torch.log(x.abs() + 1e-15)).clamp(-self.bound, self.bound) for x, s in pairs]

    def forward(self, x):
        variances = [a.exp() * theta * theta for a, theta in zip(self.log_alpha(), self.theta, strict=True)]
        if isinstance(self.layer, nn.Conv2d):
            variance = conv2d(x * x, *variances, stride=self.layer.stride)
        else:
            variance = linear(x * x, *variances)
        mean = self.layer(x)
        noise = self.noise[:, : mean[0].numel()].view(mean.shape)
        return mean + (variance + 1e-15).sqrt() * noise

    def divergence(self):
        k1, k2, k3 = 0.63576, 1.8732, 1.48695
        terms = [k1 * (k2 + k3 * a).sigmoid() - 0.5 * torch.log1p((-a).exp()) - k1 for a in self.log_alpha()]
        return -sum(term.sum() for term in terms)

    def clipped(self):
        """Weights without what is dropped, and how many weights that are."""
        keep = [a < 3 for a in self.log_alpha()]
        return [theta * kept for theta, kept in zip(self.theta, keep, strict=True)], int((~keep[0]).sum())


class MaskedDropout(nn.Module):
    """Dropout by given words."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        words = self.words[:, : x[0].numel()].view(x.shape)
        return x * (words >= self.probability * 2**32) / (1 - self.probability)


class Alone:
    """One network and its optimizer."""

    def __init__(self, name, weights, activation, dropout, optimizer, lr, weight_decay):
        network = build(name, SHAPES[name], activation=list(ACTIVATIONS)[activation], dropout=dropout).to(weights)
        vector_to_parameters(weights[0].clone(), network.parameters())
        layers = [layer for layer in network.modules() if not any(layer.children())]
        self.layers = [self.replace(layer, dropout) for layer in layers]
        logs = weights[1].split([parameter.numel() for parameter in network.parameters()])
        theta = list(network.parameters())
        for layer in self.noisy():
            for log_sigma, mine in zip(layer.log_sigma, layer.theta, strict=True):
                place = next(n for n, parameter in enumerate(theta) if parameter is mine)
                log_sigma.data.copy_(logs[place].view_as(log_sigma))
        options = {"lr": lr, "weight_decay": weight_decay}
        make = {"sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "adam": torch.optim.Adam}
        options |= {"momentum": 0.9} if OPTIMIZERS[optimizer] == "momentum" else {}
        parameters = [parameter for layer in self.layers for parameter in layer.parameters()]
        self.optimizer = make.get(OPTIMIZERS[optimizer], torch.optim.AdamW)(parameters, **options)
        self.theta, self.logs = theta, logs

    @staticmethod
    def replace(layer, dropout):
        if isinstance(layer, nn.Dropout):
            return MaskedDropout(dropout)
        return Variational(layer) if isinstance(layer, nn.Conv2d | nn.Linear) else layer

    def noisy(self):
        return [layer for layer in self.layers if isinstance(layer, Variational)]

    def draw(self, x, seed, update):
        """Hands out the random numbers of a step, as the operator documents them."""
        with torch.no_grad():
            sizes, units = [], []
            for layer in self.layers:
                if isinstance(layer, Variational):
                    x = layer.layer(x)
                    sizes.append(-(-x[0].numel() // 8) * 8)
                else:
                    if isinstance(layer, MaskedDropout):
                        units.append(x[0].numel())
                    else:
                        x = layer(x)
        words = philox_reference(seed, 2 * update, len(x) * sum(units), x.device).view(len(x), -1)
        normals = normal_reference(seed, 2 * update + 1, len(x) * sum(sizes), x.device, x.dtype).view(len(x), -1)
        for layer, part in zip(self.noisy(), normals.split(sizes, 1), strict=True):
            layer.noise = part
        dropouts = [layer for layer in self.layers if isinstance(layer, MaskedDropout)]
        for layer, part in zip(dropouts, words.split(units, 1) if units else [], strict=True):
            layer.words = part

    def train(self, x, y, kl_weight, seed, update):
        self.draw(x, seed, update)
        for layer in self.layers:
            x = layer(x)
        loss = cross_entropy(x, y)
        divergence = sum(layer.divergence() for layer in self.noisy())
        self.optimizer.zero_grad()
        (loss + kl_weight * divergence).backward()
        self.optimizer.step()
        return loss.detach(), (x.argmax(1) == y).sum(), divergence.detach()

    def weights(self):
        logs = dict(zip(map(id, self.theta), self.logs, strict=True))
        for layer in self.noisy():
            logs |= {id(theta): s.detach() for theta, s in zip(layer.theta, layer.log_sigma, strict=True)}
        logs = torch.cat([logs[id(theta)].flatten() for theta in self.theta])
        return torch.stack([parameters_to_vector(self.theta).detach(), logs])


def example(name, G, S, B=10, dtype=torch.float32, device="cpu", num_images=40):
    """Arguments of ``variational_cnn_step``: every activation, optimizer and dropout, alpha in and out of bounds."""
    rng = torch.Generator().manual_seed(0)
    network = build(name, SHAPES[name], dropout=0.5)
    layers = fastws.layer_table(network, SHAPES[name])
    weights = []
    for seed in range(G):
        torch.manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        weights.append(parameters_to_vector(network.parameters()).detach())
    theta = torch.stack(weights).double()
    log_sigma = -10 + 4 * torch.randn(theta.shape, generator=rng, dtype=torch.float64)
    log_sigma[:, ::7] = 5  # at the upper bound
    weights = torch.stack([theta, log_sigma], 1).to(dtype)
    images = torch.randn(num_images, *SHAPES[name], generator=rng, dtype=torch.float64).to(dtype)
    images[: num_images // 4, :, :4] = 0
    labels = torch.randint(10, (num_images,), generator=rng)
    batches = torch.randint(num_images, (G, S, B), generator=rng, dtype=torch.int32)
    g = torch.arange(G)
    optimizer = ((g + g // 4) % 4).int()
    recipe = {
        "activation": (g % 4).int(),
        "dropout": torch.tensor([0.0, 0.5, 0.3], dtype=torch.float64)[g % 3],
        "optimizer": optimizer,
        "lr": torch.tensor([1e-4, 1e-5, 3e-4, 3e-4], dtype=torch.float64)[optimizer.long()] * (1 + g % 2),
        "weight_decay": torch.tensor([0.01, 0.0, 0.1], dtype=torch.float64)[g % 3],
        "seed": g * 2**33 + 5,
    }
    args = (weights, torch.zeros_like(weights), torch.zeros_like(weights), images, labels, batches, layers)
    return [x.to(device) for x in args], {key: x.to(device) for key, x in recipe.items()}


def flat_call(args, recipe, step=0, kl_weight=KL_WEIGHT):
    return [*args, *recipe.values(), kl_weight, step]


def train_alone(name, args, recipe, g, step=0):
    weights, _, _, images, labels, batches, _ = args
    hyper = {key: recipe[key][g].item() for key in ("activation", "dropout", "optimizer", "lr", "weight_decay")}
    alone, seed = Alone(name, weights[g], **hyper), recipe["seed"][g].item()
    steps = [
        alone.train(images[batch], labels[batch], KL_WEIGHT, seed, step + s)
        for s, batch in enumerate(batches[g].long())
    ]
    return alone, *(torch.stack(column) for column in zip(*steps, strict=True))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", SHAPES)
def test_one_step_has_the_gradients_of_autograd(name, device):
    args, recipe = example(name, G=12, S=1, dtype=torch.float64, device=device)
    recipe["optimizer"], recipe["lr"] = recipe["optimizer"] * 0, recipe["lr"] * 0 + 1
    weights, _, _, losses, correct, divergence = fastws.variational_cnn_step(*args, **recipe, kl_weight=KL_WEIGHT)
    for g in range(0, 12, 1 if name == "digits-cnn" else 5):
        alone, *expected = train_alone(name, args, recipe, g)
        torch.testing.assert_close(weights[g], alone.weights(), rtol=1e-9, atol=1e-9)
        for actual, value in zip((losses, correct, divergence), expected, strict=True):
            torch.testing.assert_close(actual[g], value, rtol=1e-12, atol=1e-12)
    assert (weights - args[0]).abs().amax((0, 2)).min() > 0.1


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name, steps", [("digits-cnn", 50), ("cnn-s", 5), ("cnn-l", 2)])
def test_steps_are_those_of_each_network_alone(name, steps, dtype, tolerance, device):
    args, recipe = example(name, G=9, S=steps, dtype=dtype, device=device)
    theta, log_sigma = args[0].unbind(1)
    # the divergence pushes weights near zero to and fro; these stay where rounding does not decide
    theta.copy_(torch.where(theta.abs() < 0.05, theta.sign() * (0.05 + theta.abs()), theta))
    log_sigma.clamp_(max=-4)
    weights, _, _, losses, correct, divergence = fastws.variational_cnn_step(*args, **recipe, kl_weight=KL_WEIGHT)
    for g in (0, 1, 2, 3, 7) if name == "digits-cnn" else (1, 8):
        alone, *expected = train_alone(name, args, recipe, g)
        torch.testing.assert_close(weights[g], alone.weights(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(losses[g], expected[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(divergence[g], expected[2], rtol=tolerance, atol=tolerance)
        assert torch.equal(correct[g], expected[1])


@pytest.mark.parametrize("name, function, device", implementations("variational_cnn_step"))
@pytest.mark.parametrize("G", [1, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variational_cnn_step_is_the_reference(name, function, device, dtype, G):
    args = flat_call(*example("digits-cnn", G, S=2, B=3, dtype=dtype, device=device), 4)
    for output, actual in enumerate(function(*args)):
        if output == 4:
            assert torch.equal(actual, variational_cnn_step_reference(*args)[output])
        else:
            assert_as_accurate(
                actual, lambda *args, output=output: variational_cnn_step_reference(*args)[output], *args
            )


@pytest.mark.parametrize("name, shared", [("digits-cnn", H100), ("digits-cnn", NONE), ("mlp", H100), ("cnn-s", H100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variational_cnn_step_on_host_is_the_reference(name, shared, dtype):
    """The device code of CUDA, threads of which are fibers."""
    args = flat_call(*example(name, 4, S=2, B=3, dtype=dtype), 4)
    outputs, _ = step_on_host(args, shared, step=4, kl_weight=KL_WEIGHT)
    for output, actual in enumerate(outputs):
        if output == 4:
            assert torch.equal(actual, variational_cnn_step_reference(*args)[output])
        else:
            assert_as_accurate(
                actual, lambda *args, output=output: variational_cnn_step_reference(*args)[output], *args
            )


@pytest.mark.parametrize("device", devices())
def test_steps_do_not_depend_on_how_they_are_cut_nor_on_neighbours(device):
    args, recipe = example("digits-cnn", G=9, S=6, device=device)
    whole = fastws.variational_cnn_step(*args, **recipe, kl_weight=KL_WEIGHT)
    state, data, batches, layers = args[:3], args[3:5], args[5], args[6]
    for step in (0, 2):
        part = batches[:, step : step + 2] if step == 0 else batches[:, step:]
        *state, losses, correct, divergence = fastws.variational_cnn_step(
            *state, *data, part, layers, **recipe, kl_weight=KL_WEIGHT, step=step
        )
    for actual, expected in zip(state, whole, strict=False):
        assert torch.equal(actual, expected)
    assert torch.equal(losses, whole[3][:, 2:]) and torch.equal(divergence, whole[5][:, 2:])
    some = torch.tensor([7, 2])
    few = [x[some] for x in args[:3]] + args[3:5] + [args[5][some], args[6]]
    alone = fastws.variational_cnn_step(*few, **{key: x[some] for key, x in recipe.items()}, kl_weight=KL_WEIGHT)
    torch.testing.assert_close(alone[0], whole[0][some], rtol=0, atol=1e-6)


def test_divergence_of_known_weights():
    """-k1 sigmoid(k2 + k3 a) + log(1 + exp(-a)) / 2 + k1 at a = 0, 3 and 20, which is clamped."""
    layers = fastws.layer_table(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(1, 2)), (1, 1, 1))
    assert layers[:, 10].tolist() == [-1, 3]
    for log_sigma, expected in [(0.0, 0.4309463), (3.0, 0.0254051), (20.0, 2.27335e-05)]:
        weights = torch.ones(1, 2, 5, dtype=torch.float64)
        weights[:, 1] = log_sigma
        zero, recipe = torch.zeros(1, dtype=torch.float64), {}
        recipe = {"activation": zero.int(), "dropout": zero, "optimizer": zero.int(), "lr": zero, "weight_decay": zero}
        images, batches = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.int64)
        args = weights, weights, weights, images, torch.tensor([0]), batches, layers
        state = fastws.variational_cnn_step(*args, **recipe, seed=zero.long(), kl_weight=0.0)
        assert state[5].item() == pytest.approx(3 * expected, rel=1e-3)


def test_bias_of_a_dense_layer_has_no_log_sigma():
    args, recipe = example("digits-cnn", G=8, S=3)
    args[0] = args[0].contiguous()
    dense = [row for row in rows_of(args[6]) if row.kind == CONVOLUTION and row.in_height == row.in_width == 1]
    biases = [slice(row.bias_offset, row.bias_offset + row.out_channels) for row in dense]
    assert len(biases) == 2
    expected = fastws.variational_cnn_step(*args, **recipe, kl_weight=KL_WEIGHT)
    changed = args[0].clone()
    for bias in biases:
        changed[:, 1, bias] = 1e35  # as published checkpoints have it
    actual = fastws.variational_cnn_step(changed, *args[1:], **recipe, kl_weight=KL_WEIGHT)
    assert torch.equal(actual[0][:, 0], expected[0][:, 0]) and torch.equal(actual[5], expected[5])
    for bias in biases:
        assert (actual[0][:, 1, bias] == 1e35).all()
        assert (expected[0][:, 0, bias] != args[0][:, 0, bias]).any(1).all()  # theta is trained
    convolution = slice(*args[6][0, [10, 10]].add(torch.tensor([0, 1])).tolist())
    assert (expected[0][:, 1, convolution] != args[0][:, 1, convolution]).any()


def test_sparse_weights_are_those_of_layers_in_evaluation():
    args, recipe = example("digits-cnn", G=3, S=1, dtype=torch.float64)
    sparse, sparsity = sparse_weights(args[0], args[6])
    for g in range(3):
        alone = Alone("digits-cnn", args[0][g], 0, 0.5, 0, 1.0, 0.0)
        clipped = [layer.clipped() for layer in alone.noisy()]
        weights = {id(x): y for layer, (kept, _) in zip(alone.noisy(), clipped, strict=True)
                   for x, y in zip(layer.theta, kept, strict=True)}  # fmt: skip
        expected = torch.cat([weights.get(id(x), x).flatten() for x in alone.theta])
        assert torch.equal(sparse[g], expected)
        total = sum(layer.layer.weight.numel() for layer in alone.noisy())
        assert sparsity[g].item() == pytest.approx(sum(count for _, count in clipped) / total)
        assert 0.05 < sparsity[g] < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    args = flat_call(*example("digits-cnn", 2, S=1, B=2, dtype=dtype))
    torch.library.opcheck(torch.ops.fastws.variational_cnn_step.default, args)


def test_compiles_whole():
    args, recipe = example("digits-cnn", 2, S=1, B=2)
    compiled = torch.compile(fastws.variational_cnn_step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        compiled(*args, **recipe, kl_weight=0.1),
        fastws.variational_cnn_step(*args, **recipe, kl_weight=0.1),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_refuses_gradients():
    args, recipe = example("digits-cnn", 1, S=1, B=2)
    args[0].requires_grad_()
    outputs = fastws.variational_cnn_step(*args, **recipe, kl_weight=0.1)
    with pytest.raises(NotImplementedError, match="variational_cnn_step: not differentiable"):
        outputs[3].sum().backward()


def test_errors():
    args, recipe = example("digits-cnn", 2, S=1)
    step = fastws.variational_cnn_step
    with pytest.raises(ValueError, match=r"weights must be \[G, 2, P\] float32 or float64, got \[2, 1486\]"):
        step(args[0][:, 0], *args[1:], **recipe, kl_weight=0.1)
    with pytest.raises(ValueError, match=r"weights must be \[G, 2, P\], theta and log sigma\^2, got \[2, 1, 1486\]"):
        step(*(x[:, :1] for x in args[:3]), *args[3:], **recipe, kl_weight=0.1)
    with pytest.raises(ValueError, match="kl_weight must be at least 0 and finite, got nan"):
        step(*args, **recipe, kl_weight=float("nan"))
    with pytest.raises(ValueError, match=r"variational_cnn_step: second must be \[2, 2, 1486\]"):
        step(*args[:2], args[2][:, 0], *args[3:], **recipe, kl_weight=0.1)
    with pytest.raises(ValueError, match=r"variational_cnn_step: batches must be in \[0, 40\), got .*\.\.40"):
        step(*args[:5], args[5].clone().fill_(40), args[6], **recipe, kl_weight=0.1)
    with pytest.raises(ValueError, match="variational_cnn_step: layers must be a table of fastws.layer_table"):
        step(*args[:6], args[6][:, :11], **recipe, kl_weight=0.1)
