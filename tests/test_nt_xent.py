import math
from importlib import import_module

import pytest
import torch

import fastws
from fastws import _native
from fastws.ops.nt_xent import nt_xent_backward_reference, nt_xent_reference
from fastws.testing import assert_as_accurate, devices, implementations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CASES = [(1, 1), (1, 3), (5, 8), (33, 50), (70, 33)]  # B, E
TEMPERATURES = [1.0, 0.1, 0.001]


def example(B, E, dtype=torch.float32, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    anchors = torch.randn(B, 2 * E, generator=rng)
    z_i, z_j = (anchors + torch.randn(2, B, 2 * E, generator=rng)).to(device, dtype)[..., ::2]  # not contiguous
    return z_i, z_j


def published(z_i, z_j, temperature):
    """The [2B, 2B, E] form: all pairs side by side, the positives in front of the negatives, class 0 for all rows."""
    B, z = len(z_i), torch.cat([z_i, z_j])
    s = torch.nn.functional.cosine_similarity(z[:, None, :], z[None, :, :], dim=2) / temperature
    positives = torch.cat([s.diagonal(B), s.diagonal(-B)])
    is_negative = torch.ones(2 * B, 2 * B, dtype=torch.bool, device=z.device)
    for offset in (0, B, -B):
        is_negative.diagonal(offset).fill_(False)
    logits = torch.cat([positives[:, None], s[is_negative].view(2 * B, -1)], dim=1)
    classes = torch.zeros(2 * B, dtype=torch.long, device=z.device)
    return torch.nn.functional.cross_entropy(logits, classes, reduction="sum") / (2 * B)


def nth(function, output):
    return lambda *args: function(*args)[output]


@pytest.mark.parametrize("name, function, device", implementations("nt_xent"))
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, E", CASES)
def test_nt_xent_is_the_reference(name, function, device, temperature, dtype, B, E):
    args = *example(B, E, dtype, device), temperature
    for output, actual in enumerate(function(*args)):
        assert_as_accurate(actual, nth(nt_xent_reference, output), *args)


@pytest.mark.parametrize("name, function, device", implementations("nt_xent_backward"))
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, E", [case for case in CASES if min(case) > 1])
def test_nt_xent_backward_is_the_reference(name, function, device, temperature, dtype, B, E):
    z_i, z_j = example(B, E, dtype, device)
    _, logsumexp = nt_xent_reference(z_i.double(), z_j.double(), temperature)
    grad = torch.tensor(0.7, dtype=dtype, device=device)
    args = grad, z_i, z_j, logsumexp.to(torch.promote_types(dtype, torch.float32)), temperature
    for output, actual in enumerate(function(*args)):
        assert_as_accurate(actual, nth(nt_xent_backward_reference, output), *args)


TRITON = [found for op in ("nt_xent", "nt_xent_backward") for found in implementations(op) if found[0] == "triton"]


@pytest.mark.parametrize("name, function, device", TRITON)
@pytest.mark.parametrize("programs", [1, 5])
def test_nt_xent_of_wide_rows_and_few_programs(name, function, device, programs, monkeypatch):
    for constant, value in {"BLOCK": 16, "CHUNK": 16, "WIDEST": 16, "PROGRAMS": programs}.items():
        monkeypatch.setattr(import_module(function.__module__), constant, value)
    z_i, z_j = example(20, 40, device=device)
    if function.__name__ == "nt_xent":
        assert_as_accurate(function(z_i, z_j, 0.1)[0], nth(nt_xent_reference, 0), z_i, z_j, 0.1)
        return
    args = torch.tensor(0.7, device=device), z_i, z_j, nt_xent_reference(z_i, z_j, 0.1)[1], 0.1
    for output, actual in enumerate(function(*args)):
        assert_as_accurate(actual, nth(nt_xent_backward_reference, output), *args)


@pytest.mark.parametrize("name, function, device", implementations("nt_xent"))
def test_nt_xent_by_hand(name, function, device):
    z = torch.tensor([[3.0, 0.0], [0.0, 0.5]], device=device)
    loss, logsumexp = function(z, 2 * z, 1.0)  # each row: cosine 1 with its other view, 0 with the two negatives
    assert logsumexp.tolist() == pytest.approx([math.log(math.e + 2)] * 4)
    assert loss.item() == pytest.approx(math.log(math.e + 2) - 1)


@pytest.mark.parametrize("name, function, device", implementations("nt_xent"))
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_without_negatives_is_zero(name, function, device, temperature):
    assert function(*example(1, 7, device=device), temperature)[0] == 0


@pytest.mark.parametrize("name, function, device", implementations("nt_xent_backward"))
@pytest.mark.parametrize("B, E", [(1, 7), (6, 1)])
def test_nt_xent_backward_is_zero_without_negatives_or_directions(name, function, device, B, E):
    z_i, z_j = example(B, E, device=device)
    _, logsumexp = nt_xent_reference(z_i, z_j, 0.1)
    for grad_z in function(torch.tensor(1.0, device=device), z_i, z_j, logsumexp, 0.1):
        torch.testing.assert_close(grad_z, torch.zeros_like(grad_z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, function, device", implementations("nt_xent"))
def test_nt_xent_of_rows_far_from_all_others_does_not_underflow(name, function, device):
    z_i = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
    loss, logsumexp = function(z_i, -z_i, 0.001)  # the positive is 2000 below the largest similarity
    assert logsumexp.tolist() == pytest.approx([1000.0] * 4) and loss.item() == pytest.approx(2000.0)


@pytest.mark.parametrize("name, function, device", implementations("nt_xent"))
def test_nt_xent_of_nan_is_nan(name, function, device):
    z_i, z_j = (z.clone() for z in example(70, 33, device=device))
    z_j[50, 3] = float("nan")
    assert function(z_i, z_j, 0.1)[0].isnan()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_of_zeros_is_finite(device, temperature):
    z_i, z_j = (z.clone() for z in example(5, 8, device=device))
    z_i[2] = 0
    z_j[4] = 0
    inputs = z_i.requires_grad_(), z_j.requires_grad_()
    loss = fastws.nt_xent(*inputs, temperature)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(loss, inputs))
    exact = published(z_i.double(), z_j.double(), temperature)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_is_the_published_loss(device, temperature):
    inputs = [z.clone().requires_grad_() for z in example(40, 9, torch.float64, device)]
    losses = [loss(*inputs, temperature) for loss in (fastws.nt_xent, published)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    for grads in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", devices())
def test_nt_xent_does_not_depend_on_the_order_of_views_and_pairs(device):
    z_i, z_j = example(70, 9, torch.float64, device)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    loss = fastws.nt_xent(z_i, z_j, 0.1)
    torch.testing.assert_close(fastws.nt_xent(z_j[order], z_i[order], 0.1), loss)
    assert (fastws.nt_xent(z_i, z_j[order], 0.1) - loss).abs() > 0.1  # other pairs, another loss


@pytest.mark.skipif("nt_xent" not in _native.COMPILED["cpu"], reason="PyTorch's own sums depend on the threads")
def test_nt_xent_does_not_depend_on_the_threads():
    z_i, z_j = example(150, 20)
    grad, threads = torch.tensor(1.0), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss, logsumexp = torch.ops.fastws.nt_xent(z_i, z_j, 0.1)
        results.append((loss, logsumexp, *torch.ops.fastws.nt_xent_backward(grad, z_i, z_j, logsumexp, 0.1)))
    torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("device", devices())
def test_nt_xent_gradients(device):
    inputs = [z.clone().requires_grad_() for z in example(4, 3, torch.float64, device)]
    assert torch.autograd.gradcheck(lambda *z: fastws.nt_xent(*z, 0.5), inputs)
    (grad,) = torch.autograd.grad(fastws.nt_xent(*inputs, 0.5), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="nt_xent: differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("device", devices())
def test_nt_xent_opcheck(device):
    z_i, z_j = example(5, 8, device=device)
    _, logsumexp = nt_xent_reference(z_i, z_j, 0.1)
    grad = torch.tensor(0.7, device=device)
    torch.library.opcheck(torch.ops.fastws.nt_xent_backward.default, (grad, z_i, z_j, logsumexp, 0.1))
    inputs = z_i.clone().requires_grad_(), z_j.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastws.nt_xent.default, (*inputs, 0.1))


@pytest.mark.parametrize("device", devices())
def test_nt_xent_compiles(device):
    inputs = [z.clone().requires_grad_() for z in example(5, 8, device=device)]
    compiled = torch.compile(fastws.nt_xent, fullgraph=True, backend="aot_eager")
    losses = [loss(*inputs, 0.1) for loss in (fastws.nt_xent, compiled)]
    assert losses[0] == losses[1]
    for grads in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert torch.equal(*grads)


def test_nt_xent_names_the_wrong_argument():
    z_i, z_j = example(5, 8)
    with pytest.raises(ValueError, match=r"nt_xent: z_i must be \[B, E\], not empty and floating point, got \[0, 8\]"):
        fastws.nt_xent(z_i[:0], z_j[:0], 0.1)
    with pytest.raises(ValueError, match=r"nt_xent: z_j must be \[5, 8\] torch.float32 on cpu, got \[4, 8\]"):
        fastws.nt_xent(z_i, z_j[1:], 0.1)
    with pytest.raises(ValueError, match="nt_xent: temperature must be positive and finite, got 0"):
        fastws.nt_xent(z_i, z_j, 0)
