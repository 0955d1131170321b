"""Linear probes: how well properties of networks are predicted from their embeddings, statistics or weights."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastws
from fastws.devices import find_device
from fastws.downstream.embed import default_halo, embed, load_embeddings, load_encoder
from fastws.downstream.probes.features import WEIGHTS_AT_ONCE, layer_statistics, layers_of
from fastws.downstream.probes.ridge import fit_probes
from fastws.files.atomic import write_json
from fastws.zoo.align import rows_of
from fastws.zoo.format.zoo import Zoo

PROTOCOL = "the intercept is not penalised; scaling of features and penalty by the validation split"
PUBLISHED = (
    "as published with SANE (arXiv 2406.09997): the intercept is penalised and features are not scaled; statistics "
    "count the padding of tokens and norm layers; embeddings are made in one pass"
)


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
