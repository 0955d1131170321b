import pytest
import torch
from test_nern_train import make_teacher, prepare, published_gradients
from torch import nn
from torch.func import functional_call

from fastws.nern import convolutions
from fastws.nern.convolutions import LearnKernels, chosen_kernels
from fastws.nern.layers import find_layers
from fastws.ops.kernel_gradients import kernel_gradients
from fastws.train.nern import train as nern

CPU = torch.device("cpu")


def gradients(network, kernels, dtype=torch.float32, inputs=None):
    """Of the weight of the first layer and of the inputs, all of them and those inside of LearnKernels."""
    torch.manual_seed(0)
    x = torch.randn(5, 16, 8, 8, dtype=inputs or dtype, requires_grad=True)
    weight = torch.randn_like(network[0].weight, requires_grad=True)
    found = []
    for chosen in ({}, {"0.weight": kernels}):
        with LearnKernels({"0.weight": weight}, chosen):
            y = functional_call(network, {"0.weight": weight}, x)
        found.append(torch.autograd.grad(y.square().sum(), [weight, x]))
    return found


def convolution(**changes):
    network = nn.Sequential(
        nn.Conv2d(**({"in_channels": 16, "out_channels": 8, "kernel_size": 3, "padding": 1} | changes))
    )
    return network.requires_grad_(False)


@pytest.mark.parametrize("changes", [{}, {"stride": 2}, {"bias": False}], ids=str)
def test_chosen_kernels_have_their_gradients(changes):
    kernels = torch.tensor([3, 40, 127, 0])
    (whole, x), (some, same_x) = gradients(convolution(**changes), kernels)
    expected = torch.zeros_like(whole.flatten(0, 1))
    expected[kernels] = whole.flatten(0, 1)[kernels]
    torch.testing.assert_close(some.flatten(0, 1), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(same_x, x)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_bfloat16(first):
    kernels = torch.tensor([3, 40, 127, 0])
    network = convolution()
    with torch.autocast("cpu", torch.bfloat16):
        (_, x), (some, same_x) = gradients(network, kernels, inputs=first)
        torch.manual_seed(0)
        inputs = torch.randn(5, 16, 8, 8, dtype=first).bfloat16()
        weight = torch.randn_like(network[0].weight)
        grad = 2 * torch.conv2d(inputs, weight, network[0].bias, padding=1)  # of the sum of squares
    assert some.dtype == torch.float32 and same_x.dtype == first and grad.dtype == torch.bfloat16
    expected = torch.nn.grad.conv2d_weight(inputs.double(), weight.shape, grad.double(), padding=1).flatten(0, 1)
    torch.testing.assert_close(some.flatten(0, 1)[kernels].double(), expected[kernels], rtol=1e-5, atol=1e-3)
    assert some.count_nonzero() == 9 * len(kernels)
    torch.testing.assert_close(same_x, x)


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_size": 1, "padding": 0},
        {"padding": 0},
        {"padding": "same"},
        {"groups": 4},
        {"dilation": 2},
        {"stride": 3},
    ],
    ids=str,
)
def test_other_convolutions_have_all_gradients(changes):
    (whole, x), (some, same_x) = gradients(convolution(**changes), torch.tensor([3]))
    assert some.equal(whole) and same_x.equal(x)


def test_many_kernels_and_float64_have_all_gradients():
    for found in (
        gradients(convolution(), torch.arange(100)),
        gradients(convolution().double(), torch.tensor([3]), torch.float64),
    ):
        assert found[0][0].equal(found[1][0])


def test_kernels_are_counted_layer_by_layer():
    layers = find_layers(make_teacher())
    sizes = [layer.kernels for layer in layers]
    chosen = torch.tensor([sizes[0], 2, sizes[0] + sizes[1] - 1, 2, sum(sizes) - 1])
    found = chosen_kernels(layers, chosen)
    assert list(found) == [layer.name for layer in layers]
    wanted = [[2], [0, sizes[1] - 1], *[[]] * (len(sizes) - 3), [sizes[-1] - 1]]
    assert [part.tolist() for part in found.values()] == wanted
    assert chosen_kernels(layers, None) == {}


@pytest.mark.parametrize("maps", ["clean", "doubled"])
def test_step_is_the_published_one(tmp_path, monkeypatch, maps):
    """That of a network which is too small for it, and so computes all gradients if it may."""
    monkeypatch.setattr(convolutions, "WIDE", 1)
    monkeypatch.setattr(convolutions, "FEW", 1)
    config, teacher, job, model = prepare(tmp_path, maps=maps, kernel_batch=30)
    calls = []

    def count(*args, **options):
        calls.append(args)
        return kernel_gradients(*args, **options)

    monkeypatch.setattr(convolutions, "kernel_gradients", count)
    batch = nern.draw(config, job, 3, CPU)
    loss = nern.compute_losses(config, job, model, batch)["loss"]
    _, expected = published_gradients(config, job, model, teacher, batch)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert len(calls) == 5
