"""fastws.matching.match.match of ResNet-18s to a reference, against a loop of the published algorithm over networks.

Predicted: every weight of a tensor with n units on each axis takes part in two products of 2 n FLOPs: 18.9 GFLOP for a
ResNet-18, 0.14 s on 2 cores at 70 GFLOP/s each. Networks that have nothing in common ("random") need 7 to 9 sweeps, in
which all but the first two move few units. The published loop computes every sweep anew, 150 GFLOP or 1.1 s, copies
both axes of every tensor, 0.3 s, and solves 12 assignment problems a sweep one after the other, of which those of 512
units take 40 to 75 ms: 2.3 s. Computing only what moved leaves twice the first sweep; prices leave a fifth of the time
of assignments, on both cores: 0.3 + 0.1 + 0.2 s, 6 times as fast. Copies of the reference with noise ("noisy") take two
sweeps, of which the second repeats half of the products: 2 against 1.5 times 18.9 GFLOP are 1.3 times as fast, and no
more is to be had without products of lower precision.

Networks are made and matched a few at a time: memory does not grow with their number.

Run: fastws bench align --threads 2 [--quick]
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastws.benchmarks.harness import Options
from fastws.benchmarks.zoo import resnet18
from fastws.matching.match import batch_size, match, objective

KINDS = {"noisy": 0.6, "random": 0.0}  # share of the reference in each network


def network(layout, seed: int) -> Tensor:
    """Matrices by fan-in, scales of norm layers in [0.5, 1.5]: a network whose neurons are unlike one another."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.empty(layout.num_weights)
    for entry in layout.entries:
        part = flat[entry.offset : entry.offset + entry.numel]
        if len(entry.shape) > 1:
            part.normal_(0, (entry.numel / entry.shape[0]) ** -0.5, generator=generator)
        else:
            part.uniform_(0.5, 1.5, generator=generator)
    return flat


def published_loop(symmetry, reference: dict, state: dict) -> Tensor:
    """Weight matching of one network, tensor by tensor, all of them permuted anew at each visit of a group.

    The steps of the published code (index_select per axis, one product per tensor, assignment, progress from the
    similarities of old and new), written anew; groups forward and backward by turns, so that both find the same.
    """
    places = [[] for _ in symmetry.sizes]
    for name, axes in symmetry.axes.items():
        for axis, segments in enumerate(axes):
            if segments and "running" not in name:
                places[segments[0][0]].append((name, axis))
    chosen = [torch.arange(size) for size in symmetry.sizes]
    order = list(range(len(chosen)))
    for sweep in range(100):
        progress = False
        for group in order[:: (-1) ** sweep]:
            size = symmetry.sizes[group]
            similarity = torch.zeros(size, size)
            for name, axis in places[group]:
                theirs = state[name]
                for other, segments in enumerate(symmetry.axes[name]):
                    if segments and other != axis:
                        theirs = theirs.index_select(other, chosen[segments[0][0]])
                own, theirs = (x.movedim(axis, 0).reshape(size, -1) for x in (reference[name], theirs))
                similarity += own @ theirs.T
            best = torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
            old, new = (torch.einsum("ij,ij->", similarity, torch.eye(size)[x]) for x in (chosen[group], best))
            progress = progress or bool(new > old + 1e-12)
            chosen[group] = best
        if not progress:
            break
    return torch.cat(chosen).int()


def timed(run: Callable, *args) -> tuple[float, float, Tensor]:
    """Seconds that passed, seconds of processor time, and the result."""
    begin = time.perf_counter(), time.process_time()
    result = run(*args)
    return time.perf_counter() - begin[0], time.process_time() - begin[1], result


def compare(kind: str, share: float, networks: int) -> Iterator[dict]:
    layout, symmetry = resnet18()
    reference = network(layout, 0)
    reference_state, step = layout.unflatten(reference), batch_size(symmetry)
    times = {"fastws": [], "published loop": []}
    for first in range(0, networks, step):
        seeds = range(first + 1, min(first + step, networks) + 1)
        flat = torch.stack([share * reference + (1 - share) * network(layout, seed) for seed in seeds])
        flat = symmetry.permute(flat, symmetry.random(len(flat), seed=first), layout)
        *seconds, found = timed(match, flat, reference, symmetry, layout)
        times["fastws"].append([x / len(flat) for x in seconds])
        # the loop does the first of each batch
        *seconds, theirs = timed(published_loop, symmetry, reference_state, layout.unflatten(flat[0]))
        times["published loop"].append(seconds)
        moved = (symmetry.permute(flat[:1], rows, layout) for rows in (found[:1], theirs))
        ours, theirs = (objective(x, reference, symmetry, layout) for x in moved)
        if not ours >= theirs * (1 - 1e-6):
            raise ValueError(f"bench_align: objective must be that of the published loop, {theirs}, got {ours}")
    for name, both in times.items():
        wall, processor = (statistics.median(column) * 1e6 for column in zip(*both, strict=True))
        memory = {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3} if name == "fastws" else {}
        case = f"{networks} x resnet18, {kind}; per network"
        yield {"op": "align", "implementation": name, "case": case, "us": wall, "processor_us": processor} | memory


def rows(options: Options) -> Iterator[dict]:
    for kind, share in options.pick(KINDS).items():
        yield from compare(kind, share, 1 if options.small else 10 if options.quick else 100)
