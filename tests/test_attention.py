import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import fastws
from fastws import _native
from fastws.ops.attention import attention_backward_reference, attention_reference, merge, serves, split
from fastws.testing import assert_as_accurate, devices, implementations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# B, W, H, d: below, at and above the sizes of vectors, blocks of rows and rows that are kept apart
CASES = [(1, 1, 1, 1), (2, 7, 3, 5), (1, 16, 2, 8), (3, 33, 1, 16), (1, 70, 2, 33), (2, 32, 1, 64), (1, 40, 1, 130)]


def example(B, W, H, d, dtype=torch.float32, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, W, 6 * H * d, generator=rng)[..., ::2]  # not contiguous
    return qkv.to(device, dtype), torch.randn(B, W, H * d, generator=rng).to(device, dtype)


@pytest.mark.parametrize("name, function, device", implementations("attention"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, W, H, d", CASES)
def test_attention_is_the_reference(name, function, device, dtype, B, W, H, d):
    qkv, _ = example(B, W, H, d, dtype, device)
    for output, actual in enumerate(function(qkv, H)):
        assert_as_accurate(actual, lambda *x, output=output: attention_reference(*x)[output], qkv, H)


@pytest.mark.parametrize("name, function, device", implementations("attention_backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, W, H, d", CASES)
def test_attention_backward_is_the_reference(name, function, device, dtype, B, W, H, d):
    qkv, grad = example(B, W, H, d, dtype, device)
    logsumexp = attention_reference(qkv, H)[1]
    # sums of gradients of several hundred tokens are rounded in another order
    assert_as_accurate(
        function(grad, qkv, logsumexp, H), attention_backward_reference, grad, qkv, logsumexp, H, factor=4
    )


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("B, W, H, d", CASES)
def test_attention_is_that_of_torch(device, B, W, H, d):
    qkv, grad = example(B, W, H, d, torch.float64, device)
    qkv = qkv.requires_grad_()
    expected = merge(scaled_dot_product_attention(*split(qkv, H)))
    actual = fastws.attention(qkv, H)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(out, qkv, grad)[0] for out in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, function, device", implementations("attention"))
def test_attention_of_large_similarities_picks_one_token(name, function, device):
    qkv = torch.tensor([[[30.0, 30.0, 1.0], [30.0, -30.0, 2.0]]], device=device)
    out, logsumexp = function(qkv, 1)
    assert out.tolist() == [[[1.0], [1.0]]] and logsumexp.tolist() == [[[900.0, 900.0]]]
    # exponentials of a kernel may end above 0
    grad = torch.ops.fastws.attention_backward(torch.ones_like(out), qkv, logsumexp, 1)
    assert torch.allclose(grad, torch.tensor([[[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]], device=device), rtol=0, atol=1e-30)


@pytest.mark.parametrize("name, function, device", implementations("attention"))
def test_nan_reaches_the_rows_that_see_it(name, function, device):
    qkv, _ = example(1, 5, 2, 3, device=device)
    qkv = qkv.clone()
    qkv[0, 1, 6] = torch.nan  # of a key of the first head
    out = function(qkv, 2)[0]
    assert out[..., :3].isnan().all() and not out[..., 3:].isnan().any()


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6)])
def test_attention_of_nothing_is_nothing(shape):
    qkv = torch.randn(shape).requires_grad_()
    out = fastws.attention(qkv, 2)
    assert out.shape == (*shape[:2], 2)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == shape


@pytest.mark.skipif("attention" not in _native.COMPILED["cpu"], reason="needs the compiled kernel")
def test_attention_does_not_depend_on_the_threads_and_is_taken_where_it_is_faster():
    (qkv, grad), threads = example(3, 40, 2, 8), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out, logsumexp = torch.ops.fastws.attention(qkv, 2)
        found.append((out, torch.ops.fastws.attention_backward(grad, qkv, logsumexp, 2)))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    assert serves(qkv, 2) and serves(torch.zeros(1, 1024, 3 * 128, dtype=torch.bfloat16), 1)
    assert not serves(torch.zeros(1, 1025, 3), 1) and not serves(torch.zeros(1, 2, 3 * 25), 1)


@pytest.mark.parametrize("device", devices())
def test_attention_gradients(device):
    qkv = example(2, 5, 2, 3, torch.float64, device)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.ops.fastws.attention(x, 2)[0], qkv)
    out = torch.ops.fastws.attention(qkv, 2)[0].sum()
    (grad,) = torch.autograd.grad(out, qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: differentiable once"):
        grad.sum().backward()


def test_attention_passes_opcheck():
    qkv, grad = example(2, 5, 2, 3)
    torch.library.opcheck(torch.ops.fastws.attention.default, (qkv.clone().requires_grad_(), 2))
    arguments = (grad, qkv, attention_reference(qkv, 2)[1], 2)
    torch.library.opcheck(torch.ops.fastws.attention_backward.default, arguments)


@pytest.mark.parametrize(
    "shape, dtype, heads, sentence",
    [
        ((2, 12), torch.float32, 2, r"qkv must be \[B, W, 3 \* H \* d\] floating point with entries, got \[2, 12\]"),
        ((1, 2, 0), torch.float32, 2, r"qkv must be .* got \[1, 2, 0\] torch.float32"),
        ((1, 2, 12), torch.int64, 2, r"qkv must be .* got \[1, 2, 12\] torch.int64"),
        ((1, 2, 12), torch.float32, 3, "heads must be a positive number that divides a third of 12 entries, got 3"),
        ((1, 2, 12), torch.float32, 0, "heads must be a positive number that divides a third of 12 entries, got 0"),
    ],
)
def test_attention_errors(shape, dtype, heads, sentence):
    with pytest.raises(ValueError, match=f"attention: {sentence}"):
        fastws.attention(torch.zeros(shape, dtype=dtype), heads)
