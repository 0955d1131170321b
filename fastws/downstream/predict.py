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
from fastws.table import table_rows
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
PROTOCOL = "the intercept is not penalised; scaling of features and penalty by the validation split"
PUBLISHED = (
    "as published with SANE (arXiv 2406.09997): the intercept is penalised and features are not scaled; statistics "
    "count the padding of tokens and norm layers; embeddings are made in one pass"
)
RESAMPLES = 1000  # for the intervals of R^2
WEIGHTS_AT_ONCE = 2**24
Splits = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predicts properties of the networks of a zoo by ridge regression, and prints R^2 and rank correlation.

    fastws predict --zoo zoos/digits --out runs/predict
    fastws predict --zoo zoos/digits --model runs/sane/checkpoint.pt --out runs/predict-sane

    The regression is fitted on the training split, the penalty and the scaling of features are chosen on the
    validation split, and the scores that count are those of the test split.
    """

    zoo: str  # folder of the zoo
    out: str  # folder for results.json
    model: str | None = None  # checkpoint.pt of fastws train sane, whose embeddings are probed
    embeddings: str | None = None  # file of fastws embed whose embeddings are probed, instead of model
    aligned: bool = False  # probe networks in the order that fastws zoo align found; statistics see its signs only

    statistics: bool = True  # probe mean, variance and quantiles of each layer as well
    apart: bool = False  # statistics of weights and of biases apart, as the model zoo data set has them
    weights: bool = True  # probe the weights as well
    targets: tuple[str, ...] = ("test_accuracy", "epoch", "generalisation_gap")  # columns of the zoo's properties
    norm: bool = False  # statistics and weights of norm layers as well
    standardize: bool | None = None  # features to mean 0 and std 1 or not; by default what the validation split prefers
    padded: int | None = None  # count the padding of tokens of this size in statistics
    published: bool = False  # exactly as published with SANE: what that changes is printed, and kept in results.json
    device: str | None = None  # of the model; by default cuda where there is one

    def __post_init__(self):
        if not self.targets:
            raise ValueError("predict: targets must name at least one property, got none")
        if self.apart and self.padded is not None:
            raise ValueError("predict: padded must be left out where biases are apart, got both")
        if self.published and (self.apart or self.standardize):
            raise ValueError("predict: published must be given without apart and standardize, got both")


class Probe(NamedTuple):
    """What a ridge regression reached. Entries are nan where a target is constant."""

    penalty: float
    standardized: bool  # whether features were scaled to mean 0 and std 1
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
    protocol = PUBLISHED if config.published else PROTOCOL
    dealt = torch.cat(list(rows.values()))
    left_out = {name: int((~target[dealt].isfinite()).sum()) for name, target in targets.items()}
    print(f"protocol: {protocol}")
    numbers = f"{'train R2':>9} {'val R2':>9} {'test R2':>9} {'test tau':>9}"
    print(f"{'features':<12} {'target':<20} {numbers} {'penalty':>8} scaled")
    results = []
    for kind, features in make_features(config, zoo).items():
        by_split = {split: features[numbers] for split, numbers in rows.items()}
        wanted = {split: torch.stack([t[numbers] for t in targets.values()], 1) for split, numbers in rows.items()}
        probes = fit_probes(by_split, wanted, standardize=config.standardize, published=config.published)
        for target, probe in zip(targets, probes, strict=True):
            results.append({"features": kind, "target": target} | probe.scores())
            numbers = f"{probe.train_r2:9.4f} {probe.val_r2:9.4f} {probe.test_r2:9.4f} {probe.test_tau:9.4f}"
            print(f"{kind:<12} {target:<20} {numbers} {probe.penalty:8.0e} {'yes' if probe.standardized else 'no'}")
    path = Path(config.out) / "results.json"
    about = {"config": asdict(config), "fastws": fastws.__version__, "protocol": protocol}
    about["left_out"] = left_out  # states whose target is missing or infinite
    write_json(path, about | {"rows": {split: len(numbers) for split, numbers in rows.items()}, "results": results})
    for name, count in left_out.items():
        if count:
            print(f"note: {name} is missing or infinite in {count:,} states, which are left out of its probes")
    print(f"results: {path}")


def read_target(zoo: Zoo, name: str) -> Tensor:
    if name not in zoo.properties.column_names:
        known = ", ".join(zoo.properties.column_names)
        raise ValueError(f"predict: targets must be properties of the zoo ({known}), got {name!r}")
    return torch.from_numpy(zoo.numbers(name))


def make_features(config: Config, zoo: Zoo) -> dict[str, Tensor]:
    """The feature sets that were asked for, ``[M, d]`` each."""
    features, read = {}, rows_of(zoo, config.aligned)
    padded = config.padded is not None or config.published
    if config.embeddings is not None:
        features["sane"] = load_embeddings(config.embeddings, len(zoo), zoo.layout)
    elif config.model is not None:
        encoder = load_encoder(config.model, find_device(config.device))
        halo = None if config.published else default_halo(encoder)
        features["sane"] = embed(encoder, zoo, halo=halo, aligned=config.aligned)
    layout = zoo.layout.with_tokens(config.padded, "keep" if config.norm or config.published else "skip")
    if config.statistics:
        parts = [
            layer_statistics(read(rows), layout, padded=padded, apart=config.apart)
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
    for row in table_rows(layout.table):
        parts = [flat[:, row.weight_offset : row.weight_offset + row.rows * row.row_length]]
        parts += [flat[:, row.bias_offset : row.bias_offset + row.rows]] if row.bias_offset >= 0 else []
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
        filled = [row.rows * row.chunks * layout.token_size for row in table_rows(layout.table)]
        layers = [pad(layer, (0, size - layer.shape[1])) for layer, size in zip(layers, filled, strict=True)]
    sizes = torch.tensor([layer.shape[1] for layer in layers])
    ends = sizes.cumsum(0)
    return fastws.layer_statistics(torch.cat(layers, 1), torch.stack([ends - sizes, ends], 1)).flatten(1)


# --- probes


class Decomposition(NamedTuple):
    """``X X' = U diag(eigenvalues) U'`` of training features ``X`` ``[n, d]``, and how to get ``x X' U`` for others.

    Features are taken relative to ``center``: then the intercept is the mean of the target, and no penalty moves it.
    """

    features: Tensor
    center: Tensor  # [d] float64
    vectors: Tensor  # U, [n, r]
    eigenvalues: Tensor  # [r]
    axes: Tensor | None  # X' U, [d, r], where it is small

    def project(self, x: Tensor) -> Tensor:
        """``x X' U``, ``[m, r]``."""
        if self.axes is None:
            return gram(x, self.features, self.center) @ self.vectors
        return (x.double() - self.center) @ self.axes


def decompose(features: Tensor, center: Tensor) -> Decomposition:
    if features.shape[0] >= features.shape[1]:
        vectors, singular, axes = torch.linalg.svd(features.double() - center, full_matrices=False)
        return Decomposition(features, center, vectors, singular.square(), axes.T * singular)
    eigenvalues, vectors = torch.linalg.eigh(gram(features, features, center))
    return Decomposition(features, center, vectors, eigenvalues.clamp(min=0), None)


def gram(x: Tensor, y: Tensor, center: Tensor) -> Tensor:
    """``(x - center) (y - center)'`` in float64, without float64 copies of features that are as long as networks."""
    parts = (matrix.split(2**16, dim=-1) for matrix in (x, y, center))
    return torch.stack([(a.double() - c) @ (b.double() - c).T for a, b, c in zip(*parts, strict=True)]).sum(0)


def fit_probes(
    features: Splits, targets: Splits, *, standardize: bool | None = None, published: bool = False
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

    Returns:
        One probe per target. ``R^2 = 1 - MSE / variance`` of the split.
    """
    if published:
        return fit_scaled(features, targets, standardize=False, published=True)
    ways = (False, True) if standardize is None else (standardize,)
    tried = [fit_scaled(features, targets, standardize=way, published=False) for way in ways]
    chooses = "val_r2" if len(targets["val"]) else "train_r2"
    # the first of equals, which are the features as they are
    return [
        max(probes, key=lambda probe: numpy.nan_to_num(getattr(probe, chooses), nan=-numpy.inf))
        for probes in zip(*tried, strict=True)
    ]


def fit_scaled(features: Splits, targets: Splits, *, standardize: bool, published: bool) -> list[Probe]:
    if standardize:
        mean, std = features["train"].mean(0), features["train"].std(0, correction=0)
        features = {split: (x - mean) / std.where(std > 0, 1) for split, x in features.items()}
    if published:
        features = {split: torch.cat([x, x.new_ones(len(x), 1)], 1) for split, x in features.items()}
    decompositions: dict[bytes, Decomposition] = {}
    probes = []
    for target in range(targets["train"].shape[1]):
        y = {split: values[:, target].double() for split, values in targets.items()}
        known = {split: values.isfinite() for split, values in y.items()}
        x = {split: features[split][known[split]] for split in y}
        y = {split: y[split][known[split]] for split in y}
        key = known["train"].numpy().tobytes()
        if key not in decompositions:
            center = x["train"].mean(0, dtype=torch.float64)
            decompositions[key] = decompose(x["train"], torch.zeros_like(center) if published else center)
        intercept = 0.0 if published else y["train"].mean()
        projected = {split: decompositions[key].project(found) for split, found in x.items()}
        probes.append(fit_probe(decompositions[key], projected, y, intercept, standardize))
    return probes


def fit_probe(
    decomposition: Decomposition, projected: Splits, targets: Splits, intercept: Tensor | float, standardized: bool
) -> Probe:
    penalties = torch.tensor(PENALTIES, dtype=torch.float64)
    inner = decomposition.vectors.T @ (targets["train"] - intercept)  # [r]
    weights = inner[:, None] / (decomposition.eigenvalues[:, None] + penalties)  # [r, penalties]
    predictions = {split: x @ weights + intercept for split, x in projected.items()}
    scores = {split: r_squared(predictions[split], targets[split]) for split in targets}
    chosen = scores["val"] if len(targets["val"]) else scores["train"]
    chosen = chosen.nan_to_num(-torch.inf)
    best = int((chosen == chosen.max()).nonzero()[0])  # the largest penalty of equals
    tau = kendalltau(targets["test"].numpy(), predictions["test"][:, best].numpy()).statistic
    numbers = [float(scores[split][best]) for split in ("train", "val", "test")]
    return Probe(PENALTIES[best], standardized, *numbers, float(tau), predictions["test"][:, best])


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
