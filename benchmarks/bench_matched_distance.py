"""fastws.matched_distance: pairs of networks modulo permutations and signs, against weight matching of whole zoos.

Predicted for CNN-s (2,464 weights, groups of 8, 6, 4 and 20 units): similarities of a sweep are 51,000 products, 3 us
of one core, assignments 5 us, most of it that of 20 units; three sweeps, and the copy and the distance of a network,
make 30 us a pair. Weight matching of all references to a query at once batches products and solves assignments by
scipy's solver in threads, but has its tensors' overheads in every sweep.

Run: fastws bench matched_distance
"""

from collections.abc import Iterator
from functools import cache

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.layout.layout import Layout
from fastws.matching.match import match
from fastws.matching.packing import packing_of
from fastws.ops.matched_distance import matched_distance_reference
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.making.architectures import build

CASES = {"digits-cnn": ((1, 8, 8), "digits-cnn"), "cnn-s": ((1, 28, 28), "cnn-s")}  # image, architecture
QUERIES, REFERENCES = 2, 20


def check(actual, reference, *args):
    """Local searches in float32 and in float64 may end at different places for a few pairs; most agree."""
    expected = reference(*args)
    near = torch.isclose(actual, expected, rtol=1e-3).double().mean()
    if actual.shape != expected.shape or near < 0.9:
        raise ValueError(f"matched_distance: 90 % of the distances must be those of the reference, got {near:.0%}")


@cache
def make_networks(name: str) -> tuple:
    """A layout, its symmetry, queries and references."""
    shape, architecture = CASES[name]
    network = build(architecture, shape, activation="tanh")
    layout, symmetry = Layout.from_checkpoint(network), Symmetry.trace(network, torch.zeros(1, *shape))
    rng = torch.Generator().manual_seed(0)
    queries, references = (torch.randn(n, layout.num_weights, generator=rng) for n in (QUERIES, REFERENCES))
    return layout, symmetry, queries, references


def make_args(name: str) -> tuple:
    layout, symmetry, queries, references = make_networks(name)
    packing = packing_of(symmetry, layout)
    candidates = torch.arange(len(references)).repeat(len(queries), 1)
    marks = [torch.ones(len(x), dtype=torch.bool) for x in (queries, references)]
    packed = packing.pack(queries), packing.pack(references)
    tensors = *packed, candidates, *marks, packing.groups, packing.parts, packing.once
    return tuple(x.to(DEVICE) for x in tensors)


def matching(name: str) -> torch.Tensor:
    """Weight matching of all references to one query after the other."""
    layout, symmetry, queries, references = make_networks(name)
    found = []
    for query in queries:
        moved = symmetry.permute(references, match(references, query, symmetry, layout), layout)
        found.append((moved - query).double().square().sum(1))
    return torch.stack(found)


def cases(options: Options) -> Iterator[Case]:
    for name in options.pick(CASES):
        yield operator_case(
            "matched_distance",
            name,
            matched_distance_reference,
            check,
            lambda name=name: make_args(name),
            lambda queries, *args: QUERIES * REFERENCES * queries[0].nbytes,
            {"weight matching": lambda *args, name=name: matching(name)},
            compiled=False,
        )
