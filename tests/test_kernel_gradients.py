import pytest
import torch

import fastws
from fastws import _native
from fastws.ops.kernel_gradients import DTYPES, kernel_gradients_reference
from fastws.testing import assert_as_accurate, devices, implementations

SHAPES = [  # B, H, W, C, F
    (1, 1, 1, 1, 1),
    (3, 5, 7, 3, 2),
    (2, 8, 8, 16, 8),
    (5, 9, 17, 9, 10),
    (40, 8, 8, 24, 17),
]


def example(shape, stride, dtype=torch.float32, device="cpu"):
    B, H, W, C, F = shape
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(B, H, W, 2 * C, generator=rng)[..., ::2]  # not contiguous
    grad = torch.randn(B, (H - 1) // stride + 1, (W - 1) // stride + 1, F, generator=rng)
    kernels = torch.randint(F * C, (1 + F * C // 3,), generator=rng)
    return inputs.to(device, dtype), grad.to(device, dtype), kernels.to(device), stride


@pytest.mark.parametrize("name, function, device", implementations("kernel_gradients"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gradients_are_the_reference(name, function, device, dtype, stride, shape):
    args = example(shape, stride, dtype, device)
    # the reference sums in another order, of which neither is the better
    assert_as_accurate(function(*args), kernel_gradients_reference, *args, factor=4.0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_kernel_gradients_are_those_of_autograd(format, device):
    inputs, grad, kernels, stride = example((4, 10, 12, 9, 8), 2, device=device)
    inputs, grad = (x.permute(0, 3, 1, 2).contiguous(memory_format=format) for x in (inputs, grad))
    weight = torch.zeros(8, 9, 3, 3, device=device, requires_grad=True)
    torch.conv2d(inputs, weight, None, stride, 1).backward(grad)
    actual = fastws.kernel_gradients(inputs, grad, kernels, stride=stride)
    torch.testing.assert_close(actual, weight.grad.flatten(0, 1)[kernels], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("kernel_gradients" not in _native.COMPILED["cpu"], reason="PyTorch's sums depend on the threads")
def test_kernel_gradients_do_not_depend_on_the_threads():
    args, threads = example((40, 8, 8, 24, 17), 1), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(torch.ops.fastws.kernel_gradients(*args))
    torch.set_num_threads(threads)
    assert results[0].equal(results[1])


@pytest.mark.parametrize("device", devices())
def test_kernel_gradients_of_no_kernels_are_empty(device):
    inputs, grad, _, stride = example((2, 4, 4, 3, 2), 1, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    assert torch.ops.fastws.kernel_gradients(inputs, grad, nothing, stride).shape == (0, 3, 3)


@pytest.mark.parametrize("device", devices())
def test_kernel_gradients_opcheck(device):
    args = example((2, 5, 7, 3, 2), 2, device=device)
    torch.library.opcheck(torch.ops.fastws.kernel_gradients.default, args)
    with pytest.raises(NotImplementedError, match="no gradients"):
        inputs = args[0].clone().requires_grad_()
        torch.ops.fastws.kernel_gradients(inputs, *args[1:]).sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"inputs": torch.zeros(2, 3, 4)},
            r"inputs must be \[B, C, H, W\] float32, float64 or bfloat16, .*, got \[2, 3, 4\]",
        ),
        ({"inputs": torch.zeros(2, 3, 4, 4).half()}, "inputs must be .* got .*float16"),
        ({"inputs": torch.zeros(2, 0, 4, 4)}, r"inputs must be .*, not empty, got \[2, 0, 4, 4\]"),
        ({"grad": torch.zeros(2, 5, 3, 4)}, r"grad must be \[2, 5, 4, 4\] .*, got \[2, 5, 3, 4\]"),
        ({"grad": torch.zeros(2, 5, 4)}, r"grad must be \[2, 'F', 4, 4\] .*, got \[2, 5, 4\]"),
        ({"grad": torch.zeros(2, 5, 4, 4).double()}, "grad must be .*float32 .*, got .*float64"),
        ({"kernels": torch.tensor([15])}, r"kernels must be in \[0, 15\), got 15 to 15"),
        ({"kernels": torch.tensor([-1, 3])}, r"kernels must be in \[0, 15\), got -1 to 3"),
        ({"kernels": torch.tensor([0.0])}, r"kernels must be \[n\] int64 on cpu, got \[1\] torch.float32 on cpu"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
    ],
)
def test_bad_arguments_are_one_sentence(change, message):
    arguments = {"inputs": torch.zeros(2, 3, 4, 4), "grad": torch.zeros(2, 5, 4, 4), "kernels": torch.tensor([0])}
    with pytest.raises(ValueError, match=f"^kernel_gradients: {message}"):
        fastws.kernel_gradients(**(arguments | change))
