"""fastws.feature_distance of the maps of a ResNet-20, forward and backward, against the published composition.

Predicted for 256 images in float32: 19 maps, of which 9 count twice, are 193 MB for each network. The loss reads both,
386 MB; the gradient reads them again and writes 193, which the processor reads before it writes: 1,160 MB in all, and
new memory for gradients is cleared first, 193 more: at 20 GB/s of one core 68 ms. The arithmetic, 14 operations in
float64 and 3 in float32 for 48 million pairs, is 24 ms of AVX-512, half hidden behind memory. The published composition
knows no weights and takes 28 maps, 281 MB: it makes norms, quotients, a difference and its square, and as many
gradients, each a pass, 12 to 16 times as many bytes. On an H200 1,160 MB take 0.3 ms, 95 launches about as long.
In bfloat16 bytes are half as many, 34 ms, but arithmetic is not, and is no longer hidden.

Run: fastws bench feature_distance
"""

from collections.abc import Iterator
from functools import partial

import torch

import fastws
from fastws.benchmarks.harness import DEVICE, Case, Options, with_gradients
from fastws.ops.feature_distance import feature_distance_reference

BATCH = 256
STAGES = [(16, 32)] * 7 + [(32, 16)] * 6 + [(64, 8)] * 6  # channels and width of the different maps
WEIGHTS = [1] + [1, 2] * 9  # the sum of a block is also found in the place of the map before it


def composition(*maps):
    """The published loss, of all maps that it sees."""
    loss = torch.zeros((), device=maps[0].device)
    for student, teacher, weight in zip(maps[: len(WEIGHTS)], maps[len(WEIGHTS) :], WEIGHTS, strict=True):
        for _ in range(weight):
            loss = loss + torch.sum((normalised(teacher) - normalised(student)) ** 2)
    return loss / len(maps[0])


def normalised(x):
    norm = torch.norm(x.view(len(x), -1), p=2, dim=1).view(len(x), 1, 1, 1)
    return x / (norm + 1e-3)


def reference(*maps):
    """The reference of the operator, in the place of its kernel."""
    loss = 0
    for student, teacher, weight in zip(maps[: len(WEIGHTS)], maps[len(WEIGHTS) :], WEIGHTS, strict=True):
        loss = loss + feature_distance_reference(student.flatten(1), teacher.flatten(1), weight / len(teacher))[0]
    return loss


def whole(*maps):
    return fastws.feature_distance(maps[: len(WEIGHTS)], maps[len(WEIGHTS) :], WEIGHTS)


def make_args(dtype, batch):
    students, teachers = [], []
    for channels, width in STAGES:
        teacher = torch.randn(batch, channels, width, width, device=DEVICE, dtype=dtype)
        teachers.append(teacher)
        students.append((teacher + 0.3 * torch.randn_like(teacher)).requires_grad_())
    return *students, *teachers


def check(actual, truth, *maps):
    rough = maps[0].dtype == torch.bfloat16  # the published composition also adds up in it
    for ours, theirs in zip(actual, truth(*maps), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05 if rough else 1e-4, atol=1e-3 * rough + 1e-7)


def cases(options: Options) -> Iterator[Case]:
    runs = {"kernel": whole, "reference": reference, "compiled": torch.compile(reference)}
    runs |= {"published": composition, "compiled published": torch.compile(composition)}
    runs = {name: with_gradients(run) for name, run in runs.items()}
    for name, dtype in {"resnet20": torch.float32, "resnet20 bf16": torch.bfloat16}.items():
        yield Case(
            op="feature_distance",
            name=name,
            make_args=partial(make_args, dtype, 8 if options.small else BATCH),
            runs=runs,
            truth=runs["reference"],
            check=check,
            work=lambda *maps: 2.5 * sum(x.nbytes for x in maps),
        )
