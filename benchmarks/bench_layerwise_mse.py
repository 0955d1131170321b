"""fastws.layerwise_mse, forward and backward, against the published loop over layers and the fused formula, compiled.

Predicted for 1,000 CNN-s of 2,464 weights in fp32: the forward pass reads 19.7 MB, the backward pass reads them again
and writes 9.9, which the processor reads before it writes: 59 MB, at 15 GB/s of one core 4 ms. The arithmetic is free.
The published form copies and divides both vectors and cuts them into slices: some 12 passes forward, as many backward.

Run: fastws bench layerwise_mse
"""

import math
from collections.abc import Iterator
from functools import cache

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.ops.layerwise_mse import layerwise_mse_reference

LAYERS = [(0, 208), (208, 1414), (1414, 1514), (1514, 2254), (2254, 2464)]  # of a CNN-s, biases behind their weights
CASES = {"cnn-s": 1000, "batch": 64}  # networks


@cache
def koefficients(sigma, device):
    scales = torch.ones(LAYERS[-1][1], device=device)
    for (begin, end), scale in zip(LAYERS, sigma, strict=True):
        scales[begin:end] = scale
    return scales


def published(prediction, target, offsets, sigma, share, clip):
    """Both vectors divided by a vector of scales, then a loop over layers, with the layers' values for the log."""
    scales = koefficients(tuple(sigma.tolist()), prediction.device)
    prediction, target = torch.clone(prediction) / scales, torch.clone(target) / scales
    loss, logged = torch.tensor(0.0, device=prediction.device), {}
    for layer, (begin, end) in enumerate(LAYERS):
        part = torch.nn.functional.mse_loss(prediction[:, begin:end], target[:, begin:end], reduction="sum")
        part = part / prediction.numel()
        loss = loss + part
        logged[layer] = part.detach().item()
    return loss


def fused(prediction, target, offsets, sigma, share, clip):
    scales = koefficients(SIGMA, prediction.device)
    return ((prediction - target) / scales).square().mean()


SIGMA = (0.5, 0.75, 1.0, 1.25, 1.5)


def check(actual, reference, *args):
    for output, expected in zip(actual, reference(*args), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-9)


def cases(options: Options) -> Iterator[Case]:
    rivals = {"published": published, "fused": fused, "fused, compiled": torch.compile(fused)}
    for name, batch in CASES.items():

        def make_args(batch=batch):
            prediction, target = torch.randn(2, batch, LAYERS[-1][1], device=DEVICE)
            share = torch.full((len(LAYERS),), 1 / prediction.numel(), device=DEVICE)
            offsets = torch.tensor(LAYERS, device=DEVICE)
            return prediction.requires_grad_(), target, offsets, torch.tensor(SIGMA, device=DEVICE), share, math.inf

        # the reference cuts by values of offsets, which torch.compile cannot follow; the fused formula is its
        # compiled form
        yield operator_case(
            "layerwise_mse",
            name,
            layerwise_mse_reference,
            check,
            make_args,
            lambda prediction, *args: 5 * prediction.nbytes,
            rivals,
            gradients=True,
            compiled=False,
        )
