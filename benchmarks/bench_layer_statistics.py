"""fastws.layer_statistics against numpy's mean, var and percentile layer by layer, which is the published s(W).

Predicted for one core: memory sets a bound of one read, 19.7 MB and 3 ms at 7 GB/s for 2,000 CNN-s, 44.7 MB for a
ResNet-18. That is not reached: weights are gone over three times (moments, histogram, gathering), of which the
histogram and the look-up cost about 1.5 cycles a weight each and the rest half of that together, about 1.5 ns a weight
at 2.5 GHz: 17 ms for the 11.2 M weights of a ResNet-18. Of CNN-s 4.9 M weights make 7 ms, and 20,000 segments at 300 ns
(counting through bins, sorting what was gathered) 6 ms more: 13 ms.

Run: fastws bench layer_statistics
"""

from collections.abc import Iterator

import numpy
import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.nn.resnet import ResNet
from fastws.ops.layer_statistics import PERCENTS, layer_statistics_reference
from fastws.zoo.making.architectures import build

CASES = {"cnn-s": (lambda: build("cnn-s", (1, 28, 28)), 2000), "resnet18": (lambda: ResNet(18), 1)}  # of how many


def published(flat, offsets):
    x, statistics = flat.numpy(), []
    for begin, end in offsets.tolist():
        part = x[:, begin:end]
        statistics.append(numpy.stack([part.mean(1), part.var(1), *numpy.percentile(part, PERCENTS, axis=1)], 1))
    return torch.from_numpy(numpy.stack(statistics, 1))


def check(actual, reference, *args):
    torch.testing.assert_close(actual.double(), reference(*args), rtol=1e-4, atol=1e-6)  # numpy adds up in fp32


def cases(options: Options) -> Iterator[Case]:
    rivals = {"published": published} if DEVICE == "cpu" else {}
    for name, (make_network, batch) in options.pick(CASES).items():

        def make_args(make_network=make_network, batch=batch):
            sizes = torch.tensor([parameter.numel() for parameter in make_network().parameters()])
            offsets = torch.stack([sizes.cumsum(0) - sizes, sizes.cumsum(0)], 1)
            return torch.randn(batch, int(sizes.sum()), device=DEVICE), offsets.to(DEVICE)

        # the compiled reference loops over segments and would compile for minutes
        yield operator_case(
            "layer_statistics", name, layer_statistics_reference, check, make_args, read_bytes, rivals, compiled=False
        )


def read_bytes(flat, offsets):
    """What is written is little."""
    return flat.nbytes
