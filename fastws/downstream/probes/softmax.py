"""Linear classifiers of all categorical targets at once: softmax regression by L-BFGS, or as published by Adam."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fastws.downstream.probes.ridge import Splits, decompose, scaling

PENALTIES = (1e3, 1e2, 1e1, 1.0, 0.1, 1e-2, 1e-3)  # of the sum of squared weights, beside the summed cross-entropy
ITERATIONS = 100  # of L-BFGS for each penalty, which begins where the one before ended
UNKNOWN = -1  # code of a network whose value is missing
SEED, EPOCHS, BATCH, RATE, DECAY, BIAS, TEST_EVERY = 42, 50, 10, 1e-4, 1e-6, 0.01, 10  # as published


class Classified(NamedTuple):
    """What a classifier of a categorical target reached."""

    penalty: float  # nan where there is none
    train_accuracy: float
    val_accuracy: float
    test_accuracy: float
    test_prediction: Tensor  # codes [n] int64, for the networks of the test split whose value is known
    predict: Callable[[Tensor], Tensor]  # features [m, d] of any networks to codes [m]

    def scores(self) -> dict[str, float | None]:
        """All numbers but the predictions, with None for nan, which JSON does not know."""
        numbers = dict(zip(self._fields[:-2], self[:-2], strict=True))
        return {name: value if isfinite(value) else None for name, value in numbers.items()}


def classify(features: Splits, codes: Splits, classes: Sequence[int], *, published: bool = False) -> list[Classified]:
    """Softmax regression from features to each categorical target; all targets at once.

    Args:
        features: ``train``, ``val`` and ``test``: ``[n, d]``.
        codes: Likewise ``[n, K]`` int64: in ``[0, classes[k])``, -1 where the value is missing, which is left out. A
            code in the validation or test split that no training network has can only be missed.
        classes: How many codes each target has, ``K`` numbers.
        published: The protocol of Schürholt et al. (arXiv 2110.15288): one linear layer of raw float32 features by
            Adam, rate 1e-4 and weight decay 1e-6, batches of 10, 50 epochs, seed 42, the same order of samples.
            Otherwise features are standardised and L-BFGS minimises cross-entropy with the penalty of squared weights
            whose cross-entropy on the validation split is least (without one, on the training split).
    """
    if published:
        return fit_published(features, codes, classes)
    prepare = scaling(features["train"].double())
    x = prepare(features["train"].double())
    decomposition = decompose(x, torch.zeros(x.shape[1], dtype=torch.float64))
    kept = decomposition.eigenvalues > 1e-10 * decomposition.eigenvalues.max()
    scale = torch.ones(()) if decomposition.features is None else decomposition.eigenvalues[kept].rsqrt()

    def project(features: Tensor) -> Tensor:
        return decomposition.project(prepare(features.double()))[:, kept] * scale

    points = {split: project(part) for split, part in features.items()}
    return fit_lbfgs(points, codes, classes, decomposition.eigenvalues[kept], project)


# --- by L-BFGS


def losses_of(logits: Tensor, codes: Tensor, classes: Sequence[int]) -> Tensor:
    """Summed cross-entropy of each target, ``[K]``, of ``logits`` ``[n, sum(classes)]``; unknown codes do not count."""
    parts = zip(logits.split(list(classes), 1), codes.unbind(1), strict=True)
    return torch.stack([cross_entropy(a, b, reduction="sum", ignore_index=UNKNOWN) for a, b in parts])


def fit_lbfgs(
    points: Splits, codes: Splits, classes: Sequence[int], eigenvalues: Tensor, project: Callable[[Tensor], Tensor]
) -> list[Classified]:
    """Along the path of penalties, from the largest: coordinates are scaled by a bound of the curvature."""
    weights = points["train"].new_zeros(len(eigenvalues), sum(classes))
    bias = points["train"].new_zeros(sum(classes))
    chooses = "val" if len(codes["val"]) else "train"
    least = [float("inf")] * len(classes)
    best: list[tuple[float, Tensor, Tensor]] = [(torch.nan, weights, bias)] * len(classes)
    for penalty in PENALTIES:
        curvature = (eigenvalues[:, None] / 4 + penalty).sqrt()
        scaled = (weights * curvature).requires_grad_()
        offset = bias.clone().requires_grad_()
        options = {"max_iter": ITERATIONS, "line_search_fn": "strong_wolfe", "tolerance_change": 1e-10}
        optimizer = torch.optim.LBFGS([scaled, offset], **options)

        def loss(optimizer=optimizer, scaled=scaled, offset=offset, curvature=curvature, penalty=penalty):
            optimizer.zero_grad()
            own = scaled / curvature
            known = losses_of(points["train"] @ own + offset, codes["train"], classes).sum()
            total = known + penalty / 2 * own.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        weights, bias = (scaled / curvature).detach(), offset.detach()
        found = losses_of(points[chooses] @ weights + bias, codes[chooses].clamp(min=UNKNOWN), classes).tolist()
        for target, value in enumerate(found):
            if value < least[target]:
                least[target], best[target] = value, (penalty, weights, bias)
    ends = torch.tensor(classes).cumsum(0).tolist()
    parts = [slice(end - count, end) for end, count in zip(ends, classes, strict=True)]
    return [
        classified(points, codes, target, penalty, project, weights[:, part], bias[part])
        for target, (part, (penalty, weights, bias)) in enumerate(zip(parts, best, strict=True))
    ]


def classified(
    points: Splits,
    codes: Splits,
    target: int,
    penalty: float,
    project: Callable[[Tensor], Tensor],
    weights: Tensor,
    bias: Tensor,
) -> Classified:
    def of_points(x: Tensor) -> Tensor:
        return (x @ weights + bias).argmax(1)

    known = {split: values[:, target] != UNKNOWN for split, values in codes.items()}
    predicted = {split: of_points(points[split][mask]) for split, mask in known.items()}
    accuracy = {s: (predicted[s] == codes[s][known[s], target]).double().mean().item() for s in predicted}
    scores = [accuracy[split] for split in ("train", "val", "test")]
    return Classified(penalty, *scores, predicted["test"], lambda x: of_points(project(x)))


# --- as published


def fit_published(features: Splits, codes: Splits, classes: Sequence[int]) -> list[Classified]:
    x = {split: part.float() for split, part in features.items()}
    rows = [(codes["train"][:, target] != UNKNOWN).nonzero().flatten() for target in range(len(classes))]
    sizes = [(len(found), int((codes["test"][:, k] != UNKNOWN).sum())) for k, found in enumerate(rows)]
    fitted: dict[int, tuple[Tensor, Tensor]] = {}
    for size in dict.fromkeys(sizes):  # targets of as many known networks take their steps side by side
        group = [target for target, other in enumerate(sizes) if other == size]
        known = torch.stack([rows[target] for target in group])
        labels = torch.stack([codes["train"][rows[target], target] for target in group])
        weights, bias = train_published(x["train"], known, labels, [classes[k] for k in group], size[1])
        fitted |= {target: (weights[i], bias[i]) for i, target in enumerate(group)}
    results = []
    for target, count in enumerate(classes):
        weights, bias = (part[..., :count] for part in fitted[target])
        results.append(classified(x, codes, target, torch.nan, lambda features: features.float(), weights, bias))
    return results


def train_published(
    x: Tensor, known: Tensor, labels: Tensor, classes: Sequence[int], num_tests: int
) -> tuple[Tensor, Tensor]:
    """Weights ``[K, d, C]`` and biases ``[K, C]`` of K classifiers, each trained as if it were alone.

    Every target has its own stream of random numbers from the one seed, in the order in which the published code draws:
    a layer's default weights and biases, the weights that replace them, then an order of the samples for each epoch,
    and every tenth epoch one of the ``num_tests`` test samples, which are looked at then.

    Args:
        x: Features of all networks, ``[n, d]`` float32.
        known: Which of them each target is trained on, ``[K, m]``.
        labels: Their codes, ``[K, m]``.
        classes: How many codes each target has; C is the largest.
        num_tests: Test samples of a target.
    """
    streams = [torch.Generator().manual_seed(SEED) for _ in classes]
    weights, bias = x.new_zeros(len(classes), x.shape[1], max(classes)), x.new_full((len(classes), max(classes)), BIAS)
    for target, (count, stream) in enumerate(zip(classes, streams, strict=True)):
        layer = x.new_empty(count, x.shape[1])
        layer.uniform_(generator=stream)
        x.new_empty(count).uniform_(generator=stream)
        weights[target, :, :count] = torch.nn.init.kaiming_normal_(layer, generator=stream).T
        bias[target, count:] = -torch.inf  # no class
    optimizer = torch.optim.Adam([weights, bias], lr=RATE, weight_decay=DECAY)
    targets = torch.arange(len(classes))[:, None]
    for epoch in tqdm(range(1, EPOCHS + 1), desc="softmax", unit="epoch"):
        order = torch.stack([torch.randperm(known.shape[1], generator=stream) for stream in streams])
        for chosen in order.split(BATCH, 1):
            batch = x[known.gather(1, chosen)]  # [K, BATCH, d]
            slope = torch.baddbmm(bias[:, None], batch, weights).softmax(2)
            slope[targets, torch.arange(chosen.shape[1]), labels.gather(1, chosen)] -= 1
            slope /= chosen.shape[1]
            weights.grad, bias.grad = batch.transpose(1, 2) @ slope, slope.sum(1)
            optimizer.step()
        if epoch % TEST_EVERY == 0:
            for stream in streams:
                torch.randperm(num_tests, generator=stream)
    return weights, bias
