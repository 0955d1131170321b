"""Ridge regression from features to all numeric targets at once, for all penalties by one decomposition."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import torch
from scipy.stats import kendalltau
from torch import Tensor

PENALTIES = (
    1e3,
    3e2,
    1e2,
    3e1,
    1e1,
    3.0,
    1.0,
    0.3,
    0.1,
    3e-2,
    1e-2,
    3e-3,
    1e-3,
    3e-4,
    1e-4,
    3e-5,
    1e-5,
)  # as published
ROUNDING = 1e-3  # of eigenvalues, in units of the smallest penalty, above which they are not taken of the Gram matrix
ROWS_AT_ONCE = 2**14
COLUMNS_AT_ONCE = 2**16
Splits = Mapping[str, Tensor]


class Probe(NamedTuple):
    """What a probe of a number reached. Scores are nan where a target is constant."""

    penalty: float  # nan where there is none
    standardized: bool  # whether features were scaled to mean 0 and std 1
    train_r2: float
    val_r2: float
    test_r2: float
    test_tau: float  # Kendall's rank correlation of targets and predictions
    test_prediction: Tensor  # [n] float64, for the networks of the test split whose target is known
    predict: Callable[[Tensor], Tensor]  # features [m, d] of any networks to predictions [m] float64

    def scores(self) -> dict[str, float | None]:
        """All numbers but the predictions, with None for nan, which JSON does not know."""
        numbers = dict(zip(self._fields[:-2], self[:-2], strict=True))
        return {name: value if isfinite(value) else None for name, value in numbers.items()}


class Decomposition(NamedTuple):
    """Training features relative to ``center``, ``X`` ``[n, d]``, by the eigenvectors of ``X' X`` or of ``X X'``.

    Weights for a penalty are ``inner(y) / (eigenvalues + penalty)``, and predictions are coordinates times these. With
    the mean for center the intercept is the mean of the target, and no penalty moves it.
    """

    center: Tensor  # [d] float64
    eigenvalues: Tensor  # [r]
    vectors: Tensor  # of X' X, [d, r], or of X X', [n, r], where there are fewer networks than features
    features: Tensor | None  # [n, d], where vectors are of X X'

    def project(self, x: Tensor) -> Tensor:
        """``[m, r]`` of features ``[m, d]``."""
        if self.features is None:
            return torch.cat([(part.double() - self.center) @ self.vectors for part in x.split(ROWS_AT_ONCE)])
        return gram(x, self.features, self.center) @ self.vectors

    def predict(self, x: Tensor, weights: Tensor) -> Tensor:
        """``project(x) @ weights``, ``[m, k]`` of features ``[m, d]``, without coordinates of x by themselves."""
        if self.features is None:
            inner = self.vectors @ weights
            return torch.cat([(part.double() - self.center) @ inner for part in x.split(ROWS_AT_ONCE)])
        if x is self.features:  # whose products with themselves have these eigenvectors
            return (self.vectors * self.eigenvalues) @ weights
        return gram(x, self.features, self.center) @ (self.vectors @ weights)

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """``[r, K]`` of the training features and their targets ``[n, K]``."""
        if self.features is not None:
            return self.vectors.T @ y
        parts = zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True)
        return self.vectors.T @ torch.stack([(a.double() - self.center).T @ b for a, b in parts]).sum(0)


def decompose(features: Tensor, center: Tensor) -> Decomposition:
    if features.shape[0] < features.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(gram(features, features, center))
        return Decomposition(center, eigenvalues.clamp(min=0), vectors, features)
    parts = [part.double() - center for part in features.split(ROWS_AT_ONCE)]
    eigenvalues, vectors = torch.linalg.eigh(torch.stack([part.T @ part for part in parts]).sum(0))
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps * float(eigenvalues[-1:].sum())
    if rounding > ROUNDING * PENALTIES[-1]:  # singular values of the features themselves are not squared before
        _, singular, axes = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        eigenvalues, vectors = singular.square(), axes.T
    return Decomposition(center, eigenvalues.clamp(min=0), vectors, None)


def gram(x: Tensor, y: Tensor, center: Tensor) -> Tensor:
    """``(x - center) (y - center)'`` in float64, without float64 copies of features that are as long as networks."""
    parts = (matrix.split(COLUMNS_AT_ONCE, dim=-1) for matrix in (x, y, center))
    return torch.stack([(a.double() - c) @ (b.double() - c).T for a, b, c in zip(*parts, strict=True)]).sum(0)


def fit_probes(
    features: Splits,
    targets: Splits,
    *,
    standardize: bool | None = None,
    published: bool = False,
    penalties: Sequence[float] = PENALTIES,
) -> list[Probe]:
    """Ridge regression from features to each target, with the penalty and scaling that do best on the validation split.

    ``w, b = argmin |X w + b - y|^2 + penalty |w|^2``. One decomposition of X serves all penalties and targets. Networks
    whose target is not finite are left out. Without validation rows the training split chooses.

    Args:
        features: ``train``, ``val`` and ``test``: ``[n, d]``.
        targets: Likewise ``[n, K]``.
        standardize: Features to mean 0 and std 1 over the training split first, or not; None tries both.
        published: As in the code of SANE (arXiv 2406.09997): b is the weight of a column of ones, penalised like the
            others, and features are never scaled.
        penalties: To choose from, the largest first.

    Returns:
        One probe per target. ``R^2 = 1 - MSE / variance`` of the split.
    """
    if published:
        return fit_scaled(features, targets, penalties, standardize=False, published=True)
    ways = (False, True) if standardize is None else (standardize,)
    tried = [fit_scaled(features, targets, penalties, standardize=way, published=False) for way in ways]
    chooses = "val_r2" if len(targets["val"]) else "train_r2"

    def score(probe: Probe) -> float:
        value = getattr(probe, chooses)
        return value if isfinite(value) else -float("inf")

    return [max(probes, key=score) for probes in zip(*tried, strict=True)]  # of equals the features as they are


def fit_scaled(
    features: Splits, targets: Splits, penalties: Sequence[float], *, standardize: bool, published: bool
) -> list[Probe]:
    prepare = scaling(features["train"]) if standardize else with_ones if published else as_they_are
    features = {split: prepare(x) for split, x in features.items()}
    known = {split: y.isfinite() for split, y in targets.items()}
    together: dict[bytes, list[int]] = {}  # targets that are known of the same networks
    for target in range(targets["train"].shape[1]):
        key = b"/".join(mask[:, target].numpy().tobytes() for mask in known.values())
        together.setdefault(key, []).append(target)
    found: dict[int, Probe] = {}
    for group in together.values():
        here = {split: mask[:, group[0]] for split, mask in known.items()}
        x = {split: features[split] if mask.all() else features[split][mask] for split, mask in here.items()}
        y = {split: targets[split][mask][:, group].double() for split, mask in here.items()}
        probes = fit_group(x, y, penalties, prepare, standardize, published)
        found |= dict(zip(group, probes, strict=True))
    return [found[target] for target in range(len(found))]


def scaling(train: Tensor) -> Callable[[Tensor], Tensor]:
    mean, std = train.mean(0), train.std(0, correction=0)
    return lambda x: (x - mean) / std.where(std > 0, 1)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def as_they_are(x: Tensor) -> Tensor:
    return x


def fit_group(
    features: Splits,
    targets: Splits,
    penalties: Sequence[float],
    prepare: Callable[[Tensor], Tensor],
    standardized: bool,
    published: bool,
) -> list[Probe]:
    """Probes of targets that are all known: ``[n, K]``."""
    center = features["train"].mean(0, dtype=torch.float64)
    decomposition = decompose(features["train"], torch.zeros_like(center) if published else center)
    y = targets["train"]
    intercepts = y.new_zeros(y.shape[1]) if published else y.mean(0)
    inner = decomposition.inner(features["train"], y - intercepts)
    over = torch.tensor(penalties, dtype=torch.float64)
    weights = inner[:, None] / (decomposition.eigenvalues[:, None, None] + over[:, None])  # [r, penalties, K]
    predicted = {split: decomposition.predict(x, weights.flatten(1)) for split, x in features.items()}
    predicted = {split: found.unflatten(1, weights.shape[1:]) + intercepts for split, found in predicted.items()}
    scores = {split: r_squared(predicted[split], y) for split, y in targets.items()}  # [penalties, K]
    chosen = scores["val" if len(targets["val"]) else "train"].nan_to_num(-torch.inf)
    probes = []
    for target in range(y.shape[1]):
        best = int((chosen[:, target] == chosen[:, target].max()).nonzero()[0])  # the largest penalty of equals
        numbers = [float(scores[split][best, target]) for split in ("train", "val", "test")]
        prediction = predicted["test"][:, best, target]
        tau = float(kendalltau(targets["test"][:, target].numpy(), prediction.numpy()).statistic)
        predict = predictor(decomposition, prepare, weights[:, best, target], intercepts[target])
        probes.append(Probe(penalties[best], standardized, *numbers, tau, prediction, predict))
    return probes


def predictor(
    decomposition: Decomposition, prepare: Callable[[Tensor], Tensor], weights: Tensor, intercept: Tensor
) -> Callable[[Tensor], Tensor]:
    return lambda x: decomposition.predict(prepare(x), weights[:, None])[:, 0] + intercept


def r_squared(predictions: Tensor, targets: Tensor) -> Tensor:
    """``1 - MSE / variance`` of predictions ``[n, .., K]`` of targets ``[n, K]``; nan if a target is constant."""
    if len(targets) == 0:
        return predictions.new_full(predictions.shape[1:], torch.nan)
    between = targets.view(len(targets), *(1,) * (predictions.dim() - 2), -1)
    scores = 1 - (predictions - between).square().mean(0) / targets.var(0, correction=0)
    return torch.where((targets == targets[0]).all(0), torch.nan, scores)
