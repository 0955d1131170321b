"""fastws.layer_statistics against numpy's mean, var and percentile layer by layer, which is the published s(W).

Predicted for one core: memory sets a bound of one read, 19.7 MB and 3 ms at 7 GB/s for 2,000 CNN-s, 44.7 MB for a
ResNet-18. That is not reached: weights are gone over three times (moments, histogram, gathering), of which the
histogram and the look-up cost about 1.5 cycles a weight each and the rest half of that together, about 1.5 ns a weight
at 2.5 GHz: 17 ms for the 11.2 M weights of a ResNet-18. Of CNN-s 4.9 M weights make 7 ms, and 20,000 segments at 300 ns
(counting through bins, sorting what was gathered) 6 ms more: 13 ms.

Run: python benchmarks/bench_layer_statistics.py
"""

import numpy
import torch
from harness import race

from fastws.nn.resnet import ResNet
from fastws.ops.layer_statistics import PERCENTS, layer_statistics_reference
from fastws.zoo.making.architectures import build

CASES = {"cnn-s": (build("cnn-s", (1, 28, 28)), 2000), "resnet18": (ResNet(18), 1)}  # network, how many


def published(flat, offsets):
    x, statistics = flat.numpy(), []
    for begin, end in offsets.tolist():
        part = x[:, begin:end]
        statistics.append(numpy.stack([part.mean(1), part.var(1), *numpy.percentile(part, PERCENTS, axis=1)], 1))
    return torch.from_numpy(numpy.stack(statistics, 1))


def check(actual, reference, *args):
    torch.testing.assert_close(actual.double(), reference(*args), rtol=1e-4, atol=1e-6)  # numpy adds up in fp32


for case, (network, batch) in CASES.items():
    sizes = torch.tensor([parameter.numel() for parameter in network.parameters()])
    offsets = torch.stack([sizes.cumsum(0) - sizes, sizes.cumsum(0)], 1)

    def make_args(device, sizes=sizes, offsets=offsets, batch=batch):
        return torch.randn(batch, int(sizes.sum()), device=device), offsets.to(device)

    # what is written is little; the compiled reference loops over segments and would compile for minutes
    num_bytes = 4 * batch * int(sizes.sum())
    rivals = {"published": published} if not torch.cuda.is_available() else {}
    race("layer_statistics", case, layer_statistics_reference, check, make_args, num_bytes, rivals, compiled=False)
