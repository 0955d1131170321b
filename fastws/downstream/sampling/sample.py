"""New networks, sampled from a learned representation or from the weights of a zoo; they are a zoo themselves.

A sampler draws new points from a cloud of anchors (see ``generators``). With ``--model`` the points are codes, which
are decoded to networks; without, they are the weights themselves, which is the baseline that a model has to beat.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

from fastws.devices import find_device
from fastws.downstream.evaluate import job_of
from fastws.downstream.judging.statistics import selection_optimism
from fastws.downstream.representation import Representation, load
from fastws.downstream.sampling import flow as flows
from fastws.downstream.sampling import generators
from fastws.downstream.sampling.behaviour import classification, teach
from fastws.downstream.sampling.generators import BANDWIDTH, Components, Drawn
from fastws.layout.spread import weight_std
from fastws.version import __version__
from fastws.zoo.align import ALIGNMENT, aligned_rows
from fastws.zoo.format.manifest import MANIFEST
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo

Method = Literal["direct", "uniform", "neighbour", "kde", "gan", "noise", "average", "pca", "flow"]
BY = ("val_accuracy", "test_accuracy")  # what ranks anchors, the first that is known


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples new networks and writes them as a zoo.

    fastws sample --model runs/ae/checkpoint.pt --zoo zoos/mnist --out zoos/kde30 --method kde --best 0.3 --count 500
    fastws sample --zoo zoos/mnist --out zoos/pca64 --method pca --components 64
    """

    zoo: str  # folder of the zoo whose networks are the anchors
    out: str  # folder to write, a new one
    method: Method  # direct: anchors as they are, with a model reconstructed; the others draw new points around them
    model: str | None = None  # checkpoint of train ae or train sane, in whose codes points are drawn; else in weights
    count: int = 100  # networks to make

    epochs: tuple[int, int] | None = None  # first and last epoch of the anchors; by default only each network's last
    best: float = 1.0  # share of the anchors to keep, the most accurate ones on validation images
    by: str | None = None  # property that ranks anchors by accuracy; by default val_accuracy, else test_accuracy
    activation: str | None = None  # of the anchors; by default the commonest
    aligned: bool | None = None  # anchors in the order of zoo align; by default as the model was trained, else if there

    mode: Literal["independent", "reference"] = "independent"  # kde: as the paper describes it, or as it was released
    bandwidth: float = BANDWIDTH  # kde: std of the noise
    noise: float = 0.2  # noise: std, in units of the std of a layer's weights, or of a code's entry
    together: int = 2  # average: anchors of each mean
    components: int = 64  # pca, flow, gan: leading principal components; 0: all
    flow: Literal["stopped", "deepweightflow"] = "stopped"  # flow: by held-out loss; or all components, as released
    temperature: float = 1.0  # pca, flow: factor of the noise that samples begin from
    behaviour: int = 0  # pca of weights: steps in which it learns that its samples classify training images right

    seed: int = 0  # of everything random
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        for name in ("count", "together"):
            if getattr(self, name) < 1:
                raise ValueError(f"sample: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("bandwidth", "noise", "temperature", "components", "behaviour"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"sample: {name} must be at least 0, got {getattr(self, name)}")
        if self.behaviour and (self.method != "pca" or self.model is not None):
            raise ValueError(
                f"sample: behaviour must be left out but for method pca without a model, got {self.behaviour}"
            )
        if not 0 < self.best <= 1:
            raise ValueError(f"sample: best must be in (0, 1], got {self.best}")


class Anchors(NamedTuple):
    """The networks that samples are made from."""

    rows: Tensor  # of the zoo, int64
    held_out: Tensor  # rows of the validation split, by the same choice of states
    names: list[str]  # model and epoch of each
    activation: str | None
    aligned: bool
    said: str  # which ones these are, in words


def run(config: Config) -> None:
    zoo = sample(config)
    print(f"{zoo.path}: {len(zoo)} networks, {zoo.dropped} left out as not finite")
    print(f"anchors: {zoo.provenance['sampled']['from']}")
    print(f"next: fastws zoo evaluate --zoo {zoo.path}")


def sample(config: Config) -> Zoo:
    """Samples networks and writes them as a zoo, which is returned open.

    Raises:
        FileNotFoundError: If there is no such zoo or model, or no alignment where one is asked for.
        ValueError: If the model does not fit the zoo, or nothing is left to sample from.
    """
    out = Path(config.out)
    if (out / MANIFEST).exists():
        raise ValueError(f"sample: out must be a new folder, got the zoo {out}; give another, or remove it")
    device = find_device(config.device)
    zoo = Zoo.open(config.zoo)
    representation = None if config.model is None else load(config.model, device)
    if representation is not None:
        representation.layout.require_same(zoo.layout, f"sample: zoo {zoo.path}")
    anchors = choose_anchors(config, zoo, representation)
    drawn, made_by = draw(config, zoo, representation, anchors, device)
    weights = drawn.points if representation is None else representation.decode(drawn.points)
    number = range(len(weights))
    properties = {
        "model": [f"{config.method}-{n:06}" for n in number],
        "epoch": numpy.zeros(len(weights), dtype=numpy.int32),
        "seed": numpy.full(len(weights), config.seed, dtype=numpy.int64),
        "method": [config.method] * len(weights),
        "space": ["weights" if representation is None else "codes"] * len(weights),
        "anchors": [" ".join(anchors.names[i] for i in chosen if i >= 0) for chosen in drawn.anchors.tolist()],
    }
    if anchors.activation is not None:
        properties["activation"] = [anchors.activation] * len(weights)
    sampled = asdict(config) | {"from": anchors.said, "aligned": anchors.aligned} | made_by
    provenance = {"made_by": f"fastws {__version__}", "config": zoo.provenance.get("config"), "sampled": sampled}
    splits = {"train": properties["model"], "val": [], "test": []}
    with ZooWriter(out, zoo.layout, zoo.symmetry, provenance, splits=splits) as writer:
        writer.append(weights.float().cpu(), properties)
    return Zoo.open(out)


def draw(
    config: Config, zoo: Zoo, representation: Representation | None, anchors: Anchors, device: torch.device
) -> tuple[Drawn, dict[str, float]]:
    """New points, codes where there is a representation, else weights, and what a sampler says that was trained."""

    def points_of(rows: Tensor) -> Tensor:
        flat = (aligned_rows(zoo, rows) if anchors.aligned else zoo.rows(rows)).float().to(device)
        return flat if representation is None else representation.encode(flat)

    codes = points_of(anchors.rows)
    shape, cloud = codes.shape[1:], codes.flatten(1)
    generator = torch.Generator(device).manual_seed(config.seed)
    count, method, made_by = config.count, config.method, {}
    if method == "direct":
        drawn = generators.direct(cloud, count)
    elif method == "uniform":
        drawn = generators.uniform(cloud, count, generator)
    elif method == "neighbour":
        drawn = generators.neighbour(cloud, count, generator)
    elif method == "kde" and config.mode == "reference":
        drawn = generators.kde_reference(cloud, count, config.bandwidth)
    elif method == "kde":
        drawn = generators.kde(cloud, count, config.bandwidth, generator)
    elif method == "noise":
        drawn = generators.noisy(cloud, count, config.noise * spread(zoo, representation, cloud), generator)
    elif method == "average":
        drawn = generators.average(cloud, count, config.together, generator)
    elif method == "pca":
        space = Components.of(cloud, config.components)
        if config.behaviour:
            space = taught(config, zoo, anchors, space, generator)
        drawn = generators.gaussian(space, count, config.temperature, generator)
    elif method == "gan":
        drawn = generators.gan(cloud, count, generator, components=config.components)
    else:
        if config.flow == "deepweightflow":
            trained = flows.train_deepweightflow(cloud, generator)
        else:
            held_out = points_of(anchors.held_out).flatten(1) if len(anchors.held_out) else cloud[:0]
            trained = flows.train_flow(Components.of(cloud, config.components), cloud, held_out, generator)
        made_by |= {"steps": trained.steps, "kept": trained.kept, "loss": trained.loss}
        drawn = flows.follow(trained, count, config.temperature, generator)
    return Drawn(drawn.points.unflatten(1, shape), drawn.anchors), made_by


def taught(config: Config, zoo: Zoo, anchors: Anchors, space: Components, generator: torch.Generator) -> Components:
    """The Gaussian after it was trained on the images that the zoo's networks were trained on."""
    job = job_of(zoo, device=str(generator.device))
    if anchors.activation is None:
        raise ValueError(f"sample: behaviour must be left out for {zoo.path}, which does not say its activations")
    try:
        gradient = classification(job.plan, job.data.train, anchors.activation, generator)
    except ValueError as error:
        raise ValueError(f"sample: behaviour must be left out for networks of {zoo.path}: {error}") from error
    return teach(space, gradient, config.behaviour, generator)


def spread(zoo: Zoo, representation: Representation | None, cloud: Tensor) -> Tensor:
    """The standard deviation of each entry of a code, or of each weight's layer over all anchors, ``[d]``."""
    return weight_std(cloud, zoo.layout) if representation is None else cloud.std(0, correction=0)


def choose_anchors(config: Config, zoo: Zoo, representation: Representation | None) -> Anchors:
    """The states to sample from: of the training split, of one activation, the best of them."""
    properties, known = zoo.properties, zoo.properties.column_names
    train, held_out = (states(config, zoo, split) for split in ("train", "val"))
    said = [f"{zoo.path}"]
    activation = None
    if "activation" in known:
        column = properties["activation"].cast("string")
        here = column.take(pyarrow.array(train.numpy()))
        counts = {entry["values"]: entry["counts"] for entry in pyarrow.compute.value_counts(here).to_pylist()}
        activation = config.activation or max(sorted(filter(None, counts)), key=counts.get, default=None)
        keep = torch.tensor([name == activation for name in column.to_pylist()], dtype=torch.bool)
        train, held_out = train[keep[train]], held_out[keep[held_out]]
        said.append(f"activation {activation}")
    elif config.activation is not None:
        raise ValueError(f"sample: activation must be left out for {zoo.path}, which does not know any")
    if len(train) and config.best < 1:
        by = config.by or next((name for name in BY if name in known), None)
        if by is None or by not in known:
            what = f"one of {', '.join(known)}, got {by or 'none of ' + ' and '.join(BY)}"
            raise ValueError(f"sample: by must be a property of {zoo.path} to take the best by, {what}")
        values = torch.from_numpy(zoo.numbers(by))[train]
        finite = values.isfinite()
        if not finite.any():
            raise ValueError(f"sample: by must be a property that anchors have, got {by} without any finite value")
        bound = values[finite].quantile(1 - config.best)
        train = train[finite & (values >= bound)]
        said.append(f"best {config.best:.0%} by {by}{overstated(zoo, by, config.best, values[finite])}")
    if not len(train):
        what = f"states of the train split with {', '.join(said[1:]) or 'these epochs'}"
        raise ValueError(f"sample: zoo must hold {what}, got none in {zoo.path}")
    aligned = config.aligned
    if aligned is None:
        aligned = (zoo.path / ALIGNMENT).is_file() if representation is None else representation.aligned
    said.append(f"{len(train)} anchors{', aligned' if aligned else ''}")
    models = properties["model"].cast("string").to_pylist()
    epochs = zoo.numbers("epoch") if "epoch" in known else numpy.zeros(len(zoo))
    names = [f"{models[row]}@{epochs[row]:g}" for row in train.tolist()]
    return Anchors(train, held_out, names, activation, aligned, ", ".join(said))


def overstated(zoo: Zoo, by: str, best: float, values: Tensor) -> str:
    """How much the accuracies that the best were chosen by overstate theirs, in words; "" where images are unknown."""
    made = zoo.provenance.get("config")
    images = made.get("validation") if isinstance(made, dict) and by == "val_accuracy" else None
    mean = values.double().mean().item()
    if not isinstance(images, int) or images < 1 or not 0 < mean < 1 or len(values) < 2:
        return ""
    between = max(0.0, values.double().var().item() - mean * (1 - mean) / images) ** 0.5
    points = 100 * selection_optimism(best, mean, images, between)
    return f" (which overstates theirs by about {points:.1f} points)"


def states(config: Config, zoo: Zoo, split: str) -> Tensor:
    """Rows of a split: those of the epochs that were asked for, or the last one of each network."""
    rows = zoo.split(split)
    if "epoch" not in zoo.properties.column_names:
        if config.epochs is not None:
            raise ValueError(f"sample: epochs must be left out for {zoo.path}, which does not know them")
        return rows
    epoch = torch.from_numpy(zoo.numbers("epoch"))
    if config.epochs is not None:
        return rows[(epoch[rows] >= config.epochs[0]) & (epoch[rows] <= config.epochs[1])]
    models = zoo.properties["model"].cast("string").to_pylist()
    last: dict[str, int] = {}
    for row in rows.tolist():
        if models[row] not in last or epoch[row] >= epoch[last[models[row]]]:
            last[models[row]] = row
    return torch.tensor(sorted(last.values()), dtype=torch.int64)
