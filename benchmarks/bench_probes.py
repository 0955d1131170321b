"""Ridge probes of seven properties and 17 penalties against the published sweep, restated in PyTorch.

The published sweep multiplies out ``X' X`` and solves anew for every property and penalty, in float64 with a column of
ones; of all penalties that of the best R^2 on the validation split counts. 1,500 training networks, 500 to choose by
and 500 to test on, of 700 features; with --full also of 2,464, more than networks: the weights of a CNN-s.

Predicted for one core of 35 GFLOP/s in float64. A product is 1.5 GFLOP or 45 ms, a solution 0.23 GFLOP or 13 ms, the
predictions next to nothing: 17 of them are a second, 7 s for seven properties. Ours is one product, 45 ms, one
decomposition, which LAPACK does in about 110 ms, 7 x 17 columns of predictions for 2,500 networks, 0.4 GFLOP or 15 ms,
and ranks of seven predictions, 5 ms: 175 ms, 40 times as fast. Of 2,464 features the published product is 18 GFLOP,
0.5 s, and a solution 10 GFLOP, 0.3 s: 95 s. Ours decomposes the products of networks, 11 GFLOP for all splits, 0.3 s,
of 1,500 networks, eight times the work of before, 1 s: 70 times as fast.

Run: fastws bench probes
"""

from collections.abc import Iterator

import torch

from fastws.benchmarks.harness import Case, Options
from fastws.downstream.probes.ridge import PENALTIES, fit_probes, r_squared

NETWORKS = {"train": 1500, "val": 500, "test": 500}
SIZES = {"small": (60, 12), "700 features": (1500, 700), "2,464 features": (1500, 2464)}
TARGETS = 7


def published(features, targets):
    """R^2 of the three splits for each target, ``[K, 3]``."""
    x = {split: torch.cat([part, part.new_ones(len(part), 1)], 1).double() for split, part in features.items()}
    found = []
    for target in range(targets["train"].shape[1]):
        tried = []
        for penalty in PENALTIES:
            products = x["train"].T @ x["train"]
            matrix = products + penalty * torch.eye(len(products), dtype=products.dtype)
            one = {split: y[:, target : target + 1] for split, y in targets.items()}
            weights = torch.linalg.solve(matrix, x["train"].T @ one["train"])
            tried.append(torch.cat([r_squared(part @ weights, one[split]) for split, part in x.items()]))
        found.append(max(tried, key=lambda scores: scores[1]))
    return torch.stack(found)


def ours(features, targets):
    probes = fit_probes(features, targets, published=True)
    return torch.tensor([[p.train_r2, p.val_r2, p.test_r2] for p in probes], dtype=torch.float64)


def check(actual, reference, *args):
    torch.testing.assert_close(actual, reference(*args), rtol=0, atol=1e-8)


def make_args(networks: int, width: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, TARGETS, generator=generator, dtype=torch.float64) / width**0.5
    features, targets = {}, {}
    for split, count in NETWORKS.items():
        count = count * networks // NETWORKS["train"]
        features[split] = torch.randn(count, width, generator=generator)
        noise = torch.randn(count, TARGETS, generator=generator, dtype=torch.float64)
        targets[split] = features[split].double() @ mixing + 0.5 * noise
    return features, targets


def cases(options: Options) -> Iterator[Case]:
    names = ["small"] if options.small else list(SIZES)[1 : 3 if options.full else 2]
    for name in names:
        yield Case(
            op="probes",
            name=f"{name}, {TARGETS} targets",
            make_args=lambda name=name: make_args(*SIZES[name]),
            runs={"fastws": ours, "published": published},
            truth=published,
            check=check,
        )
