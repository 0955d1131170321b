"""Linear probes: how well properties of networks are predicted from their embeddings, statistics or weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn.functional import pad

import fastws
from fastws.devices import find_device
from fastws.downstream.embed import default_halo, embed, load_embeddings, load_encoder
from fastws.files.atomic import write_json
from fastws.zoo.align import rows_of
from fastws.zoo.format.zoo import Zoo

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
RESAMPLES = 1000  # for the intervals of R^2
WEIGHTS_AT_ONCE = 2**24
Splits = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predicts properties of the networks of a zoo by ridge regression, and prints R^2 on the test split."""

    zoo: str  # folder of the zoo
    out: str  # folder for results.json
    model: str | None = None  # checkpoint.pt of fastws train sane, whose embeddings are probed
    embeddings: str | None = None  # file of fastws embed, instead of model
    aligned: bool = False  # probe networks in the order that fastws zoo align found; statistics do not depend on it

    statistics: bool = True  # probe mean, variance and quantiles of each layer as well
    apart: bool = False  # statistics of weights and of biases, as the model zoo data set has them, not of both together
    weights: bool = True  # probe the weights as well
    targets: tuple[str, ...] = ("test_accuracy", "epoch", "generalisation_gap")  # columns of the zoo's properties
    norm: bool = False  # statistics and weights of norm layers as well
    standardize: bool = False  # features to mean 0 and std 1 over the training split
    padded: int | None = None  # count the padding of tokens of this size in statistics, as published results do
    device: str | None = None  # of the model; by default cuda where there is one

    def __post_init__(self):
        if not self.targets:
            raise ValueError("predict: targets must name at least one property, got none")
        if self.apart and self.padded is not None:
            raise ValueError("predict: padded must be left out where biases are apart, got both")


class Probe(NamedTuple):
    """What a ridge regression reached. Entries are nan where a target is constant."""

    penalty: float
    train_r2: float
    val_r2: float
    test_r2: float
    test_tau: float  # Kendall's rank correlation of targets and predictions
    test_prediction: Tensor  # [n] float64, for the networks of the test split whose target is known

    def scores(self) -> dict[str, float | None]:
        """All but the predictions, with None for nan, which JSON does not know."""
        numbers = dict(zip(self._fields[:-1], self[:-1], strict=True))
        return {name: value if isfinite(value) else None for name, value in numbers.items()}


def run(config: Config) -> None:
    zoo = Zoo.open(config.zoo)
    rows = {split: zoo.split(split) for split in ("train", "val", "test")}
    targets = {name: read_target(zoo, name) for name in config.targets}
    results = []
    print(
        f"{'features':<12} {'target':<20} {'train R2':>9} {'val R2':>9} {'test R2':>9} {'test tau':>9} {'penalty':>8}"
    )
    for kind, features in make_features(config, zoo).items():
        by_split = {split: features[numbers] for split, numbers in rows.items()}
        wanted = {split: torch.stack([t[numbers] for t in targets.values()], 1) for split, numbers in rows.items()}
        probes = fit_probes(by_split, wanted, standardize=config.standardize)
        for target, probe in zip(targets, probes, strict=True):
            results.append({"features": kind, "target": target} | probe.scores())
            numbers = f"{probe.train_r2:9.4f} {probe.val_r2:9.4f} {probe.test_r2:9.4f} {probe.test_tau:9.4f}"
            print(f"{kind:<12} {target:<20} {numbers} {probe.penalty:8.0e}")
    path = Path(config.out) / "results.json"
    sizes = {split: len(numbers) for split, numbers in rows.items()}
    write_json(path, {"config": asdict(config), "fastws": fastws.__version__, "rows": sizes, "results": results})
    print(f"results: {path}")


def read_target(zoo: Zoo, name: str) -> Tensor:
    if name not in zoo.properties.column_names:
        known = ", ".join(zoo.properties.column_names)
        raise ValueError(f"predict: targets must be properties of the zoo ({known}), got {name!r}")
    return torch.from_numpy(zoo.numbers(name).copy())


def make_features(config: Config, zoo: Zoo) -> dict[str, Tensor]:
    """The feature sets that were asked for, ``[M, d]`` each."""
    features, read = {}, rows_of(zoo, config.aligned)
    if config.embeddings is not None:
        features["sane"] = load_embeddings(config.embeddings, len(zoo), zoo.layout)
    elif config.model is not None:
        encoder = load_encoder(config.model, find_device(config.device))
        features["sane"] = embed(encoder, zoo, halo=default_halo(encoder), aligned=config.aligned)
    layout = zoo.layout.with_tokens(config.padded, "keep" if config.norm else "skip")
    if config.statistics:
        parts = [
            layer_statistics(read(rows), layout, padded=config.padded is not None, apart=config.apart)
            for rows in torch.arange(len(zoo)).split(max(1, WEIGHTS_AT_ONCE // layout.num_weights))
        ]
        features["statistics"] = torch.cat(parts)
    if config.weights:
        features["weights"] = torch.cat(layers_of(read(torch.arange(len(zoo))), layout), 1)
    if not features:
        raise ValueError("predict: features must be asked for, got none; give model, embeddings, statistics or weights")
    return features


# --- features


def layers_of(flat: Tensor, layout: fastws.Layout, *, apart: bool = False) -> list[Tensor]:
    """``[B, n]`` each: the weights of each layer with its biases or, apart, the biases behind its weights."""
    layers = []
    for weight, bias, rows, length, *_ in layout.table.tolist():
        parts = [flat[:, weight : weight + rows * length]]
        parts += [flat[:, bias : bias + rows]] if bias >= 0 else []
        layers += parts if apart else [torch.cat(parts, 1)]
    return layers


def layer_statistics(flat: Tensor, layout: fastws.Layout, *, padded: bool = False, apart: bool = False) -> Tensor:
    """Mean, population variance and the 1, 25, 50, 75, 99 % quantiles of the weights of each layer.

    The features s(W) of Unterthiner et al. (arXiv 2002.11448), as in SANE. Quantiles interpolate linearly.

    Args:
        flat: Checkpoints, ``[B, P]``.
        layout: Says which weights make a layer; a bias belongs to its weight.
        padded: Count the zeros that fill up tokens among the weights, as the published code does.
        apart: Statistics of weights and of biases, as in the model zoo data set (arXiv 2209.14764).

    Returns:
        ``[B, 7 L]`` float64, layer by layer; apart, one more for each bias, behind its weight.
    """
    layers = layers_of(flat, layout, apart=apart)
    if padded:
        filled = layout.table[:, 2] * layout.table[:, 6] * layout.token_size  # rows * chunks * T
        layers = [pad(layer, (0, size - layer.shape[1])) for layer, size in zip(layers, filled.tolist(), strict=True)]
    sizes = torch.tensor([layer.shape[1] for layer in layers])
    ends = sizes.cumsum(0)
    return fastws.layer_statistics(torch.cat(layers, 1), torch.stack([ends - sizes, ends], 1)).flatten(1)


# --- probes


class Decomposition(NamedTuple):
    """``X X' = U diag(eigenvalues) U'`` of training features ``X`` ``[n, d]``, and how to get ``x X' U`` for others."""

    features: Tensor
    vectors: Tensor  # U, [n, r]
    eigenvalues: Tensor  # [r]
    axes: Tensor | None  # X' U, [d, r], where it is small

    def project(self, x: Tensor) -> Tensor:
        """``x X' U``, ``[m, r]``."""
        return gram(x, self.features) @ self.vectors if self.axes is None else x.double() @ self.axes


def decompose(features: Tensor) -> Decomposition:
    if features.shape[0] >= features.shape[1]:
        vectors, singular, axes = torch.linalg.svd(features.double(), full_matrices=False)
        return Decomposition(features, vectors, singular.square(), axes.T * singular)
    eigenvalues, vectors = torch.linalg.eigh(gram(features, features))
    return Decomposition(features, vectors, eigenvalues.clamp(min=0), None)


def gram(x: Tensor, y: Tensor) -> Tensor:
    """``x y'`` in float64, without float64 copies of features that are as long as networks."""
    pairs = zip(x.split(2**16, dim=1), y.split(2**16, dim=1), strict=True)
    return torch.stack([a.double() @ b.double().T for a, b in pairs]).sum(0)


def fit_probes(features: Splits, targets: Splits, *, standardize: bool = False) -> list[Probe]:
    """Ridge regression from features to each target, with the penalty that does best on the validation split.

    ``w = argmin |X w - y|^2 + penalty |w|^2``, with a column of ones in X, whose weight is penalised like the others.
    One decomposition of X serves all penalties and targets. Networks whose target is nan are left out. Without
    validation rows the penalty is chosen on the training split.

    Args:
        features: ``train``, ``val`` and ``test``: ``[n, d]``.
        targets: Likewise ``[n, K]``.
        standardize: Features to mean 0 and std 1 over the training split first.

    Returns:
        One probe per target. ``R^2 = 1 - MSE / variance`` of the split.
    """
    if standardize:
        mean, std = features["train"].mean(0), features["train"].std(0, correction=0)
        features = {split: (x - mean) / std.where(std > 0, 1) for split, x in features.items()}
    features = {split: torch.cat([x, x.new_ones(len(x), 1)], 1) for split, x in features.items()}
    decompositions: dict[bytes, Decomposition] = {}
    probes = []
    for target in range(targets["train"].shape[1]):
        y = {split: values[:, target].double() for split, values in targets.items()}
        known = {split: ~values.isnan() for split, values in y.items()}
        key = known["train"].numpy().tobytes()
        if key not in decompositions:
            decompositions[key] = decompose(features["train"][known["train"]])
        x = {split: decompositions[key].project(features[split][known[split]]) for split in y}
        probes.append(fit_probe(decompositions[key], x, {split: y[split][known[split]] for split in y}))
    return probes


def fit_probe(decomposition: Decomposition, projected: Splits, targets: Splits) -> Probe:
    penalties = torch.tensor(PENALTIES, dtype=torch.float64)
    inner = decomposition.vectors.T @ targets["train"]  # [r]
    weights = inner[:, None] / (decomposition.eigenvalues[:, None] + penalties)  # [r, penalties]
    predictions = {split: x @ weights for split, x in projected.items()}
    scores = {split: r_squared(predictions[split], targets[split]) for split in targets}
    chosen = scores["val"] if len(targets["val"]) else scores["train"]
    chosen = chosen.nan_to_num(-torch.inf)
    best = int((chosen == chosen.max()).nonzero()[0])  # the largest penalty of equals
    tau = kendalltau(targets["test"].numpy(), predictions["test"][:, best].numpy()).statistic
    numbers = [float(scores[split][best]) for split in ("train", "val", "test")]
    return Probe(PENALTIES[best], *numbers, float(tau), predictions["test"][:, best])


def r_squared(predictions: Tensor, target: Tensor) -> Tensor:
    """``1 - MSE / variance`` of each column of predictions ``[n, k]``; nan if the target is constant."""
    if len(target) == 0 or (target == target[0]).all():
        return predictions.new_full(predictions.shape[1:], torch.nan)
    return 1 - (predictions - target[:, None]).square().mean(0) / target.var(correction=0)


def r2_interval(prediction: Tensor, target: Tensor, models: list[str], seed: int) -> list[float] | None:
    """5 % and 95 % quantile of R^2 over resampled networks, all states of a network together; None without variance.

    Args:
        prediction: float64 ``[n]``.
        target: float64 ``[n]``.
        models: The network of each.
        seed: Of the samples.
    """
    _, member = numpy.unique(models, return_inverse=True)
    y, error = target.numpy(), (target - prediction).square().numpy()
    sums = numpy.stack([numpy.bincount(member, weights) for weights in (numpy.ones(len(y)), y, y**2, error)])
    count = sums.shape[1]
    drawn = numpy.random.default_rng(seed).multinomial(count, numpy.full(count, 1 / count), RESAMPLES)
    total, first, second, squares = sums @ drawn.T  # [RESAMPLES] each
    variance = second / total - (first / total) ** 2
    if not (variance > 1e-12).all():
        return None
    return numpy.quantile(1 - squares / total / variance, [0.05, 0.95]).tolist()
