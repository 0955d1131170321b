"""fastws.attention, forward and backward, against torch's fused attention and its reference, eager and compiled.

Predicted for 32 windows of 256 tokens in 8 heads of 8 entries in fp32, with vectors of 8 numbers: each of 16.8 M
similarities takes 16 fused multiply-adds forward and 40 backward, and an exponential of about a dozen operations each
time. At two operations a cycle that is (16 + 12 + 40 + 14) / 2 / 8 = 5.1 cycles, at 3 GHz 29 ms, if all of them were
issued without a gap; at two thirds of that 43 ms. Bytes (50 MB) do not matter. Torch's kernel multiplies such thin
matrices at some GFLOP/s.

``step`` is one of SANE at width 64 and depth 2 with 8 windows of 256 tokens in two views. Attention was two thirds of
it, so a kernel three times as fast takes it to a bit more than half.

Run: fastws bench attention
"""

from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch.nn.functional import scaled_dot_product_attention

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.nn import sane
from fastws.ops.attention import attention_reference, merge, split

CASES = {  # B, W, H, d, dtype
    "heads of 8": (32, 256, 8, 8, torch.float32),
    "heads of 16": (64, 50, 4, 16, torch.float32),
    "heads of 32": (16, 256, 8, 32, torch.float32),
    "heads of 8 bf16": (32, 256, 8, 8, torch.bfloat16),
    "heads of 32 bf16": (16, 256, 8, 32, torch.bfloat16),
    "heads of 64 bf16": (8, 256, 8, 64, torch.bfloat16),
}


def fused(qkv, heads):
    return merge(scaled_dot_product_attention(*split(qkv, heads)))


def check(actual, reference, qkv, heads):
    tolerance = 3e-2 if qkv.dtype == torch.bfloat16 else 1e-5
    exact = reference(qkv.detach().double().requires_grad_(), heads)
    for output, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def step(model, values, positions):
    """Loss and gradients of a batch of windows."""
    _, prediction, projection = model(values, positions)
    loss = (prediction - values).square().mean() + projection.square().mean()
    return loss, *torch.autograd.grad(loss, [*model.parameters()])


def step_with_torch(*args):
    with patch.object(sane, "attention", fused):
        return step(*args)


def check_step(actual, truth, *args):
    for output, expected in zip(actual, truth(*args), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-5)


def make_model():
    torch.manual_seed(0)
    sizes = {"token_size": 288, "max_positions": (1000, 100, 100), "width": 64, "depth": 2, "heads": 8, "window": 256}
    model = sane.SANE(sane.SANEConfig(**sizes)).to(DEVICE)
    return model, torch.randn(2, 8, 256, 288, device=DEVICE), torch.zeros(8, 256, 3, dtype=torch.int32, device=DEVICE)


def cases(options: Options) -> Iterator[Case]:
    for name, (B, W, H, d, dtype) in options.pick(CASES).items():

        def make_args(B=B, W=W, H=H, d=d, dtype=dtype):
            return torch.randn(B, W, 3 * H * d, device=DEVICE, dtype=dtype).requires_grad_(), H

        yield operator_case(
            "attention",
            name,
            attention_reference,
            check,
            make_args,
            lambda qkv, heads: 4 * qkv.nbytes,  # read, written as a third and read again as a gradient, twice
            {"torch": fused},
            gradients=True,
        )
    runs = {"kernel": step, "torch": step_with_torch}
    yield Case(op="attention", name="step", make_args=make_model, runs=runs, truth=step_with_torch, check=check_step)
