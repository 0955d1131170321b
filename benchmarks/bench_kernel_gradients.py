"""fastws.kernel_gradients of the layers of a ResNet-20 against the gradients of all kernels by oneDNN.

A step of NeRN learns from 4,096 of 29,744 kernels, 14 % of each layer, on 256 images. Predicted for one core of 109
GFLOP/s in float32: of the 21.2 GFLOP of all kernels 2.9 are left, 27 ms at the peak, 0.02 s to 0.04 s with sums that
need ten loads for nine products. Inputs and gradients, 380 MB, are read once and turned into planes in cache: 40 ms at
10 GB/s. oneDNN needs at least 0.2 s for all kernels: so 3 times. What it missed: turning images into planes took twice
as long, because processors do not foresee its loads, until the kernel asked for them itself; and oneDNN needs more.
With AVX-512, twice the peak, sums of short rows hardly get faster, oneDNN does: 1.9 times.

Run: fastws bench kernel_gradients [--threads 2]
"""

from collections.abc import Iterator

import torch

from fastws import _native
from fastws.benchmarks.harness import DEVICE, Case, Options
from fastws.ops.kernel_gradients import kernel_gradients

IMAGES, SHARE = 256, 4096 / 29_744
# channels, filters, width, stride, and how many of them; the first layer, of 3 channels, is no case for it
LAYERS = [(16, 16, 32, 1, 6), (16, 32, 32, 2, 1), (32, 32, 16, 1, 5), (32, 64, 16, 2, 1), (64, 64, 8, 1, 5)]


def make_args(images, channels, filters, width, stride):
    def image(count, size):
        return torch.randn(images, count, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)

    chosen = torch.randperm(filters * channels, device=DEVICE)[: int(SHARE * filters * channels)].sort().values
    return image(channels, width), image(filters, width // stride), chosen, stride


def some(inputs, grad, kernels, stride):
    return kernel_gradients(inputs, grad, kernels, stride=stride)


def whole(inputs, grad, kernels, stride):
    weight = inputs.new_empty(grad.shape[1], inputs.shape[1], 3, 3)
    geometry = (stride, stride), (1, 1), (1, 1), False, (0, 0), 1
    return torch.ops.aten.convolution_backward(grad, inputs, weight, None, *geometry, (False, True, False))[1]


def of_all_layers(function):
    """``function`` of each layer as often as the network has it; one result for each kind."""

    def run(*layers):
        found = []
        for args, (*_, count) in zip(layers, LAYERS, strict=True):
            for _ in range(count):
                result = function(*args)
            found.append(result)
        return found

    return run


def check(actual, truth, *layers):
    for ours, whole, (_, _, kernels, _) in zip(actual, truth(*layers), layers, strict=True):
        ours = ours.flatten(0, 1)[kernels] if ours.dim() == 4 else ours
        torch.testing.assert_close(ours, whole.flatten(0, 1)[kernels], rtol=1e-3, atol=0.1)


def cases(options: Options) -> Iterator[Case]:
    # without a kernel the operator is the reference, which computes the gradients of all: nothing to race
    runs = {"kernel": of_all_layers(some)} if _native.server("kernel_gradients", DEVICE) == "compiled" else {}
    runs |= {"all kernels": of_all_layers(whole)}
    yield Case(
        op="kernel_gradients",
        name="resnet20, 4096 kernels",
        runs=runs,
        truth=runs["all kernels"],
        check=check,
        make_args=lambda: tuple(make_args(8 if options.small else IMAGES, *layer) for *layer, _ in LAYERS),
    )
