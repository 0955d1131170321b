"""Probes: how well properties of networks are foretold by their embeddings, statistics, spectra or weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastws
from fastws.devices import find_device
from fastws.downstream.probes.equivariant import Training, fit_equivariant
from fastws.downstream.probes.extract import Extractor, Features, Transformed, make_extractors
from fastws.downstream.probes.published import Published, PublishedZoo, find_published
from fastws.downstream.probes.ridge import PENALTIES, Probe, Splits, fit_probes
from fastws.downstream.probes.scores import chance_of, describe, score_names, score_numbers
from fastws.downstream.probes.softmax import UNKNOWN, Classified, classify
from fastws.downstream.probes.targets import Names, Targets, read_targets
from fastws.downstream.probes.trees import classify_trees, fit_trees
from fastws.files.atomic import write_json
from fastws.zoo.format.zoo import Zoo

SPLITS = ("train", "val", "test")
PROTOCOL = (
    "numbers by ridge regression, names by softmax regression with L-BFGS; the intercept is not penalised; scaling of "
    "features and penalty by the validation split"
)
PUBLISHED = (
    "as published with SANE (arXiv 2406.09997): the intercept is penalised and features are not scaled; statistics "
    "count the padding of tokens and norm layers; embeddings are made in one pass; names by Adam, 50 epochs of batches "
    "of 10; other zoos with the penalty 1e-5"
)
ProbeName = Literal["linear", "trees", "equivariant"]
WIDEST = 4096  # features that trees are grown on, at most


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predicts properties of the networks of a zoo, and prints R^2, rank correlation or accuracy with 95 % intervals.

    fastws predict --zoo zoos/digits --out runs/predict
    fastws predict --zoo zoos/mnist --model runs/sane/checkpoint.pt --probe linear trees --ood zoos/usps --out runs/ood

    Probes are fitted on the training split, penalties and the like are chosen on the validation split, and the scores
    that count are those of the test split. Intervals are of resampled networks, all states of one together.

    Features: statistics are mean, variance and quantiles of each layer; spectra are norms and power laws of its
    singular values, as WeightWatcher has them; a chunk is a slice of the weights; kpca and umap are components of them.
    """

    zoo: str  # folder of the zoo
    out: str  # folder for results.json
    model: str | None = None  # checkpoint.pt of fastws train sane or train ae, whose embeddings are probed
    embeddings: str | None = None  # file of fastws embed whose embeddings are probed, instead of model
    aligned: bool = False  # probe networks in the order that fastws zoo align found; statistics see its signs only

    features: tuple[Features, ...] = ("statistics", "weights")  # what is probed, beside embeddings
    probe: tuple[ProbeName, ...] = ("linear",)  # linear: numbers by ridge, names by softmax; equivariant: sees weights
    targets: tuple[str, ...] = ("test_accuracy", "epoch", "generalisation_gap")  # columns of the zoo's properties
    ood: tuple[str, ...] = ()  # folders of other zoos whose test splits the fitted probes are tried on
    transform: Transformed = "none"  # polar: radius and angles instead of each set of features
    apart: bool = False  # statistics of weights and of biases apart, as the model zoo data set has them
    chunk: int = 256  # consecutive weights of the feature set chunk
    chunk_start: int | None = None  # first weight of the feature set chunk; by default drawn by the seed
    leading: int | None = None  # singular values of a layer in spectra, by random projection; by default all
    norm: bool = False  # statistics and weights of norm layers as well
    standardize: bool | None = None  # features to mean 0 and std 1 or not; by default what the validation split prefers
    padded: int | None = None  # count the padding of tokens of this size in statistics
    published: bool = False  # exactly as published with SANE: what that changes is printed, and kept in results.json
    beside: PublishedZoo | None = None  # published zoo whose scores are shown too; by default what the zoo is made like
    channels: tuple[int, ...] = (8, 8)  # of each layer of the equivariant probe
    head: int = 256  # width of the perceptron behind the layers of the equivariant probe
    epochs: int = 50  # of the equivariant probe, at most: it stops when the validation split says so
    batch_size: int = 32  # networks in each step of the equivariant probe
    lr: float = 1e-3  # learning rate of the equivariant probe
    seed: int = 0  # of intervals, of the chunk and of the equivariant probe
    device: str | None = None  # of the model and of the equivariant probe; by default cuda where there is one

    def __post_init__(self):
        if not self.targets:
            raise ValueError("predict: targets must name at least one property, got none")
        if not self.probe:
            raise ValueError("predict: probe must name at least one, got none")
        if self.apart and self.padded is not None:
            raise ValueError("predict: padded must be left out where biases are apart, got both")
        if self.published and (self.apart or self.standardize):
            raise ValueError("predict: published must be given without apart and standardize, got both")
        if self.ood and self.embeddings:
            raise ValueError("predict: ood must be given with model instead of embeddings, which are of one zoo alone")
        for name in ("head", "epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"predict: {name} must be positive, got {getattr(self, name)}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"predict: channels must be positive, of one layer or more, got {self.channels}")
        if self.chunk < 1 or (self.leading is not None and self.leading < 1):
            got = f"{self.chunk} and {self.leading}"
            raise ValueError(f"predict: chunk and leading must be at least 1, got {got}")


class Job(NamedTuple):
    """One kind of probe on one set of features."""

    features: str
    probe: str
    extract: Extractor
    fit: Callable[[Splits, Splits], list[Probe]]
    fit_elsewhere: Callable[[Splits, Splits], list[Probe]] | None  # of probes for other zoos, where they differ
    classify: Callable[[Splits, Splits, Sequence[int]], list[Classified]] | None


class Data(NamedTuple):
    """Rows of the splits of a zoo, and what is to be foretold of them."""

    zoo: Zoo
    rows: Splits
    targets: Targets
    chance: float | None  # accuracy of guessing

    @classmethod
    def of(cls, path: str, names: tuple[str, ...]) -> "Data":
        zoo = Zoo.open(path)
        return cls(zoo, {split: zoo.split(split) for split in SPLITS}, read_targets(zoo, names), chance_of(zoo))

    @property
    def models(self) -> list[str]:
        """Of each row of the test split its network."""
        return self.zoo.properties["model"].cast("string").take(self.rows["test"].numpy()).to_pylist()

    def number(self, name: str) -> tuple[Tensor, list[str]]:
        """A numeric target on the test split, and the network of each row."""
        if name not in self.targets.numbers:
            what = f"property {name!r} must be a number, as in the zoo of the probes, got names"
            raise ValueError(f"{self.zoo.path}: {what}")
        return self.targets.numbers[name][self.rows["test"]], self.models

    def name(self, name: str, classes: list[str]) -> tuple[Tensor, list[str]]:
        """The codes of a categorical target on the test split, and the network of each row."""
        if name not in self.targets.names:
            what = f"property {name!r} must be a name, as in the zoo of the probes, got numbers"
            raise ValueError(f"{self.zoo.path}: {what}")
        return Names.encode({name: self.targets.names[name]}, [classes])[self.rows["test"], 0], self.models


class Place(NamedTuple):
    """Where a probe is tried: the features of the test split of a zoo."""

    data: Data
    features: Tensor
    name: str | None  # of another zoo than that of the probes


def run(config: Config) -> None:
    data = Data.of(config.zoo, config.targets)
    others = [Data.of(path, config.targets) for path in config.ood]
    protocol = PUBLISHED if config.published else PROTOCOL
    published = find_published(data.zoo, config.beside)
    print(f"protocol: {protocol}")
    results = []
    for job in make_jobs(config, data):
        for line in probe(config, job, data, others, published):
            results.append(line)
            print(describe(line, heading=len(results) == 1), flush=True)
    left_out = data.targets.left_out(torch.cat(list(data.rows.values())))
    about = {"config": asdict(config), "fastws": fastws.__version__, "protocol": protocol}
    about |= {"left_out": left_out, "published": published and published.source, "chance": data.chance}
    about |= {"rows": {split: len(numbers) for split, numbers in data.rows.items()}, "results": results}
    path = Path(config.out) / "results.json"
    write_json(path, about)
    if published:
        print(f"published scores: {published.source}")
    for name, count in left_out.items():
        if count:
            print(f"note: {name} is missing or infinite in {count:,} states, which are left out of its probes")
    print(f"results: {path}")


def make_jobs(config: Config, data: Data) -> Iterator[Job]:
    ridge = partial(fit_probes, standardize=config.standardize, published=config.published)
    elsewhere = partial(ridge, penalties=PENALTIES[-1:]) if config.published else None
    softmax = partial(classify, published=config.published)
    of_features = [name for name in config.probe if name != "equivariant"]
    for kind, extract in make_extractors(config, data.zoo).items() if of_features else ():
        for name in of_features:
            if name == "linear":
                yield Job(kind, name, extract, ridge, elsewhere, softmax)
            else:
                yield Job(kind, name, extract, fit_trees, None, classify_trees)
    if "equivariant" in config.probe:
        yield equivariant_job(config, data)


def equivariant_job(config: Config, data: Data) -> Job:
    zoo = data.zoo
    if zoo.symmetry is None:
        raise ValueError(f"predict: zoo {zoo.path} must know its symmetry for the equivariant probe, got none")
    names = ("channels", "head", "epochs", "batch_size", "lr", "seed")
    fit = partial(
        fit_equivariant,
        layout=zoo.layout.with_tokens(None, "keep"),
        symmetry=zoo.symmetry,
        may_flip=zoo.may_flip[data.rows["train"]],
        training=Training(**{name: getattr(config, name) for name in names}),
        device=find_device(config.device),
    )

    def extract(other: Zoo) -> Tensor:
        zoo.layout.require_same(other.layout, f"predict: zoo {other.path}")
        return other.rows(torch.arange(len(other)))

    return Job("weights", "equivariant", extract, fit, None, None)


def probe(
    config: Config, job: Job, data: Data, others: Sequence[Data], published: Published | None
) -> Iterator[dict[str, Any]]:
    """Fits one kind of probe to one set of features, and scores it on the test split and on those of other zoos."""
    features = job.extract(data.zoo)
    if job.probe == "trees" and features.shape[1] > WIDEST:
        print(f"note: {job.features} has {features.shape[1]:,} features; trees are grown on at most {WIDEST:,}")
        return
    by_split = {split: features[rows] for split, rows in data.rows.items()}
    places = [Place(data, by_split["test"], None)]
    for other in others:
        found = job.extract(other.zoo)
        if found.shape[1] != features.shape[1]:
            what = f"must have {features.shape[1]:,} features, got {found.shape[1]:,} in {other.zoo.path}"
            raise ValueError(f"predict: {job.features} of other zoos {what}")
        places.append(Place(other, found[other.rows["test"]], str(other.zoo.path)))
    about = {"features": job.features, "probe": job.probe}
    lines = list(probe_numbers(config, job, data, by_split, places)) if data.targets.numbers else []
    if data.targets.names and job.classify:
        lines += probe_names(config, job, data, by_split, places)
    elif data.targets.names:
        print(f"note: {', '.join(data.targets.names)} are names, which the {job.probe} probe does not foretell")
    for line in lines:
        known = published.score(job.features, line["target"]) if published and job.probe == "linear" else None
        yield about | line | ({} if known is None or line["zoo"] else {"published": known})


def probe_numbers(
    config: Config, job: Job, data: Data, by_split: Splits, places: Sequence[Place]
) -> Iterator[dict[str, Any]]:
    columns = torch.stack(list(data.targets.numbers.values()), 1)
    wanted = {split: columns[rows] for split, rows in data.rows.items()}
    probes = job.fit(by_split, wanted)
    moved = job.fit_elsewhere(by_split, wanted) if len(places) > 1 and job.fit_elsewhere else probes
    for name, here, there in zip(data.targets.numbers, probes, moved, strict=True):
        for place in places:
            own = place.data is data
            target, models = place.data.number(name)
            known = target.isfinite()
            prediction = here.test_prediction if own else there.predict(place.features[known])
            chance = place.data.chance if name.endswith("accuracy") else None
            found = score_numbers(prediction, target[known], pick(models, known), chance, config.seed)
            scores = here.scores() if own else {"penalty": there.scores()["penalty"]}
            yield {"target": name, "zoo": place.name} | scores | found


def probe_names(
    config: Config, job: Job, data: Data, by_split: Splits, places: Sequence[Place]
) -> Iterator[dict[str, Any]]:
    names = Names.of(data.targets.names, data.rows["train"])
    counts = [len(known) for known in names.classes]
    codes = {split: names.codes[rows] for split, rows in data.rows.items()}
    # a name that no training network has is no class by which anything could be chosen
    codes["val"] = codes["val"].where(codes["val"] < torch.tensor(counts), UNKNOWN)
    for target, (name, fitted) in enumerate(
        zip(data.targets.names, job.classify(by_split, codes, counts), strict=True)
    ):
        train = codes["train"][:, target]
        frequent = train[train != UNKNOWN].mode().values
        for place in places:
            wanted, models = place.data.name(name, names.classes[target])
            known = wanted != UNKNOWN
            right = fitted.predict(place.features[known]) == wanted[known]
            found = score_names(right, wanted[known] == frequent, pick(models, known), config.seed)
            scores = fitted.scores() if place.data is data else {"penalty": fitted.scores()["penalty"]}
            yield {"target": name, "zoo": place.name} | scores | found


def pick(models: list[str], known: Tensor) -> list[str]:
    return [model for model, here in zip(models, known.tolist(), strict=True) if here]
