import math

import pytest
import torch

import fastws
from fastws import _native
from fastws.ops.layerwise_mse import REDUCTIONS, layerwise_mse_backward_reference, layerwise_mse_reference
from fastws.testing import assert_as_accurate, devices, implementations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CASES = {  # B, P, layers
    "one": (1, 1, [(0, 1)]),
    "whole": (3, 40, [(0, 7), (7, 7), (7, 40)]),
    "gaps": (2, 300, [(3, 20), (25, 260), (260, 291)]),
    "long": (5, 5000, [(0, 17), (17, 4321), (4321, 5000)]),
    "none": (2, 6, []),
    "empty": (0, 6, [(0, 6)]),
}
CLIPS = [math.inf, 1.0]


def example(case, dtype=torch.float32, device="cpu"):
    """The arguments of the operator below fastws.layerwise_mse, by name, without clip."""
    B, P, layers = CASES[case]
    rng = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, B, 2 * P, generator=rng).to(device, dtype)[..., ::2]  # not contiguous
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "prediction": prediction,
        "target": target + 0.5,
        "offsets": torch.tensor(layers, dtype=torch.int64).reshape(-1, 2).to(device),
        "sigma": (torch.rand(len(layers), generator=rng) + 0.5).to(device, wide),
        "share": (torch.rand(len(layers), generator=rng) / 100).to(device, wide),
    }


def published(prediction, target, layers, sigma, reduction, weights, clip):
    """A loop over layers that are cut out of both vectors, after dividing these by a vector of scales."""
    koefficients = torch.ones(target.shape[1], dtype=target.dtype)
    for (begin, end), scale in zip(layers, sigma, strict=True):
        koefficients[begin:end] = scale
    prediction, target = prediction / koefficients, target / koefficients
    loss, count = 0, sum(end - begin for begin, end in layers)
    for (begin, end), weight in zip(layers, weights, strict=True):
        error = (prediction[:, begin:end] - target[:, begin:end]) ** 2
        error = error if clip is None else error.clamp(max=clip)
        loss = loss + weight * error.sum() / (len(target) * (count if reduction == "global_mean" else end - begin))
    return loss


@pytest.mark.parametrize("name, function, device", implementations("layerwise_mse"))
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_layerwise_mse_is_the_reference(name, function, device, clip, dtype, case):
    args = *example(case, dtype, device).values(), clip
    for output, actual in enumerate(function(*args)):
        expected = layerwise_mse_reference(*args)[output]
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        if actual.numel():
            assert_as_accurate(actual, lambda *x, output=output: layerwise_mse_reference(*x)[output], *args)


@pytest.mark.parametrize("name, function, device", implementations("layerwise_mse_backward"))
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "empty"])
def test_layerwise_mse_backward_is_the_reference(name, function, device, clip, dtype, case):
    args = example(case, dtype, device)
    grad = torch.tensor(0.7, dtype=args["sigma"].dtype, device=device)
    args = grad, *args.values(), clip
    assert_as_accurate(function(*args), layerwise_mse_backward_reference, *args)


@pytest.mark.parametrize("name, function, device", implementations("layerwise_mse"))
def test_layerwise_mse_by_hand(name, function, device):
    prediction = torch.tensor([[1.0, 2.0, 9.0, 8.0], [0.0, -1.0, 9.0, 0.0]], device=device)
    args = torch.zeros_like(prediction), torch.tensor([[0, 2], [3, 4]], device=device)
    sigma, share = torch.tensor([1.0, 4.0], device=device), torch.tensor([0.5, 2.0], device=device)
    loss, sums = function(prediction, *args, sigma, share, math.inf)
    assert sums.tolist() == [6.0, 4.0] and loss.item() == 11.0
    loss, sums = function(prediction, *args, sigma, share, 2.0)
    assert sums.tolist() == [4.0, 2.0] and loss.item() == 6.0


@pytest.mark.parametrize("name, function, device", implementations("layerwise_mse_backward"))
def test_layerwise_mse_gradient_is_zero_between_layers(name, function, device):
    nan = float("nan")
    prediction = torch.tensor([[nan, 1.0, nan, 2.0, nan]], device=device)
    offsets = torch.tensor([[1, 2], [3, 4]], device=device)
    ones = torch.ones(2, device=device)
    one = torch.ones((), device=device)
    grad = function(one, prediction, torch.zeros_like(prediction), offsets, ones, ones, math.inf)
    assert grad.tolist() == [[0.0, 2.0, 0.0, 4.0, 0.0]]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layerwise_mse_is_the_published_loss(reduction, weighted, clip):
    args = example("whole", torch.float64)
    prediction, layers = args["prediction"].clone().requires_grad_(), [(0, 7), (7, 40)]
    sigma = args["sigma"][:2]
    weights = torch.tensor([0.25, 3.0], dtype=torch.float64) if weighted else None
    loss, sums = fastws.layerwise_mse(
        prediction, args["target"], torch.tensor(layers), sigma, weights=weights, clip=clip, reduction=reduction
    )
    counted = [1, 1] if weights is None else weights.tolist()
    expected = published(prediction, args["target"], layers, sigma.tolist(), reduction, counted, clip)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x, prediction)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert sums.shape == (2,) and not sums.requires_grad


@pytest.mark.skipif("layerwise_mse" not in _native.COMPILED["cpu"], reason="PyTorch's own sums depend on the threads")
def test_layerwise_mse_does_not_depend_on_the_threads():
    args, threads = (*example("long").values(), math.inf), torch.get_num_threads()
    losses = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        losses.append(torch.ops.fastws.layerwise_mse(*args)[0])
    torch.set_num_threads(threads)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("clip", [None, 1.0])
def test_layerwise_mse_gradients(device, clip):
    args = example("gaps", torch.float64, device)
    inputs = args["prediction"].clone().requires_grad_(), args["target"].clone().requires_grad_()

    def loss(*x):
        return fastws.layerwise_mse(*x, args["offsets"], args["sigma"], clip=clip)[0]

    assert torch.autograd.gradcheck(loss, inputs)
    (grad,) = torch.autograd.grad(loss(*inputs), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="layerwise_mse: differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layerwise_mse_opcheck(device, dtype):
    args = example("gaps", dtype, device)
    grad = torch.tensor(0.7, device=device)
    torch.library.opcheck(torch.ops.fastws.layerwise_mse_backward.default, (grad, *args.values(), 1.0))
    args |= {name: args[name].clone().requires_grad_() for name in ("prediction", "target")}
    torch.library.opcheck(torch.ops.fastws.layerwise_mse.default, (*args.values(), 1.0))


@pytest.mark.parametrize("device", devices())
def test_layerwise_mse_compiles(device):
    args = example("gaps", device=device)
    prediction = args["prediction"].clone().requires_grad_()
    compiled = torch.compile(fastws.layerwise_mse, fullgraph=True, backend="aot_eager")
    rest = args["target"], args["offsets"], args["sigma"]
    losses = [f(prediction, *rest, reduction="layer_mean")[0] for f in (fastws.layerwise_mse, compiled)]
    assert losses[0] == losses[1]
    assert torch.equal(*(torch.autograd.grad(loss, prediction)[0] for loss in losses))


def test_layerwise_mse_names_the_wrong_argument():
    args = example("gaps")
    good = args["prediction"], args["target"], args["offsets"], args["sigma"]

    def refused(message, *, at=None, value=None, **options):
        wrong = [value if at == i else x for i, x in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            fastws.layerwise_mse(*wrong, **options)

    refused(r"prediction must be \[B, P\] and floating point, got \[300\]", at=0, value=good[0][0])
    refused(r"target must be \[2, 300\] torch.float32 on cpu, got", at=1, value=good[1].half())
    refused(r"offsets must be \[L, 2\] int64 on cpu, got \[3, 2\] torch.int32", at=2, value=good[2].int())
    refused(r"offsets\[1\] must have 25 <= begin", at=2, value=torch.tensor([[3, 25], [20, 260], [260, 291]]))
    refused(
        r"offsets\[2\] must have 260 <= begin <= end <= 300", at=2, value=torch.tensor([[3, 20], [25, 260], [260, 301]])
    )
    refused(r"sigma must be \[3\] float32 or float64 on cpu, got \[2\]", at=3, value=good[3][:2])
    refused(r"sigma\[1\] must be positive, got 0.0", at=3, value=torch.tensor([1.0, 0.0, 1.0]))
    refused(r"weights must be \[3\]", weights=torch.ones(4))
    refused(r"clip must be positive", clip=0.0)
    refused(r"reduction must be one of \['global_mean', 'layer_mean'\], got 'mean'", reduction="mean")


@pytest.mark.skipif("layerwise_mse" not in _native.COMPILED["cpu"], reason="references slice, which forgives")
def test_layerwise_mse_kernel_refuses_layers_that_lie_outside():
    args = example("gaps")
    args["offsets"] = torch.tensor([[3, 20], [25, 260], [260, 2**40]])
    with pytest.raises(RuntimeError, match=r"layerwise_mse: offsets\[2\] must have"):
        torch.ops.fastws.layerwise_mse(*args.values(), math.inf)
