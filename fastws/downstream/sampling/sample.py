"""New networks, sampled from a learned representation or from the weights of a zoo; they are a zoo themselves.

A sampler draws new points from a cloud of anchors (see ``generators``). With ``--model`` the points are codes, which
are decoded to networks; without, they are the weights themselves, which is the baseline that a model has to beat.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from fastws.devices import find_device
from fastws.downstream.evaluate import job_of
from fastws.downstream.representation import Representation, load
from fastws.downstream.sampling import flow as flows
from fastws.downstream.sampling import generators
from fastws.downstream.sampling.anchors import Anchors, Choice, choose_anchors
from fastws.downstream.sampling.behaviour import classification, teach
from fastws.downstream.sampling.generators import BANDWIDTH, Components, Drawn
from fastws.downstream.sampling.judged import Bench, set_up
from fastws.layout.layout import Layout
from fastws.layout.spread import weight_std
from fastws.version import __version__
from fastws.zoo.format.manifest import MANIFEST
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo

Method = Literal["direct", "uniform", "prior", "neighbour", "kde", "gan", "noise", "average", "pca", "flow"]
ALOOF = ("direct", "uniform", "prior")  # methods that draw nothing new from anchors


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples new networks and writes them as a zoo.

    fastws sample --model runs/sane/checkpoint.pt --zoo zoos/cnn --out zoos/sub --method kde --candidates 500
    fastws sample --zoo zoos/mnist --out zoos/pca64 --method pca --components 64

    With --candidates more networks are drawn than are kept, and with --rounds what is kept are the anchors of another
    draw. The zoo may be of another architecture than a SANE was trained on: then its own networks are the anchors.
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
    halo: int | None = None  # tokens that a SANE sees on both sides of what it codes; by default a quarter of a window
    aligned: bool | None = None  # anchors in the order of zoo align; by default as the model was trained, else if there

    mode: Literal["independent", "reference"] = "independent"  # kde: as the paper describes it, or as it was released
    density: Literal["dimension", "token", "joint"] = "dimension"  # kde: what of a code has an anchor of its own
    bandwidth: float | None = None  # kde: std of the noise, in reference mode as it is, else in units of the anchors'
    prior_std: float = 10.0  # prior: std of codes, which are normal around zero, whatever the anchors are
    noise: float = 0.2  # noise: std, in units of the std of a layer's weights, or of a code's entry
    manifold: generators.Manifold = "pca"  # neighbour: how anchors are brought to three dimensions
    together: int = 2  # average: anchors of each mean
    components: int = 64  # pca, flow, gan: leading principal components; 0: all
    flow: Literal["stopped", "deepweightflow"] = "stopped"  # flow: by held-out loss; or all components, as released
    temperature: float = 1.0  # pca, flow: factor of the noise that samples begin from
    behaviour: int = 0  # pca of weights: steps in which it learns that its samples classify training images right

    condition: int = 0  # training images from which batch norms get new statistics; 0: as drawn, or of anchors
    candidates: int = 0  # networks drawn, of which the most accurate are kept; 0: as many as are kept
    judged_on: Literal["val", "train"] = "val"  # images that candidates are judged on
    rounds: int = 1  # draws of candidates, each from what the one before kept (bootstrapping)
    data: str | None = None  # images for candidates and batch norms, where the zoo does not say its own
    architecture: str | None = None  # of networks read from files: a name of zoo make, or a function as module:function

    seed: int = 0  # of everything random
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        for name in ("count", "together", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"sample: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("bandwidth", "prior_std", "noise", "temperature", "components", "behaviour", "condition"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"sample: {name} must be a number from 0 on, got {getattr(self, name)}")
        if self.behaviour and (self.method != "pca" or self.model is not None):
            raise ValueError(
                f"sample: behaviour must be left out but for method pca without a model, got {self.behaviour}"
            )
        if not 0 < self.best <= 1:
            raise ValueError(f"sample: best must be in (0, 1], got {self.best}")
        if self.candidates and self.candidates < self.count:
            raise ValueError(f"sample: candidates must be at least {self.count}, the count, got {self.candidates}")
        if self.rounds > 1 and (not self.candidates or self.method in ALOOF):
            what = f"1 without candidates and for methods {', '.join(ALOOF)}"
            raise ValueError(f"sample: rounds must be {what}, got {self.rounds}")
        if self.architecture is not None and self.data is None:
            raise ValueError("sample: data must be given with architecture, got none; give --data")
        if self.halo is not None and self.model is None:
            raise ValueError(f"sample: halo must be left out without a model, got {self.halo}")
        if self.halo is not None and self.halo < 0:
            raise ValueError(f"sample: halo must be at least 0, got {self.halo}")
        if self.condition == 1:
            raise ValueError("sample: condition must be 0, or at least 2 images, got 1")

    @property
    def choice(self) -> Choice:
        return Choice(self.epochs, self.best, self.by, self.activation, self.aligned)


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
    representation = None if config.model is None else load(config.model, device, config.halo).suit(zoo, "sample")
    anchors = choose_anchors(config.choice, zoo, representation)
    made = make(config, zoo, representation, anchors, set_up(config, zoo, anchors.activation, device), device)
    number = range(len(made.weights))
    properties = {
        "model": [f"{config.method}-{n:06}" for n in number],
        "epoch": numpy.zeros(len(number), dtype=numpy.int32),
        "seed": numpy.full(len(number), config.seed, dtype=numpy.int64),
        "method": [config.method] * len(number),
        "space": ["weights" if representation is None else "codes"] * len(number),
        "anchors": made.anchors,
    }
    if made.accuracy is not None:
        properties[f"candidate_{config.judged_on}_accuracy"] = made.accuracy.numpy()
    if anchors.activation is not None:
        properties["activation"] = [anchors.activation] * len(number)
    sampled = asdict(config) | {"from": anchors.said, "aligned": anchors.aligned} | made.told
    provenance = {"made_by": f"fastws {__version__}", "config": zoo.provenance.get("config"), "sampled": sampled}
    splits = {"train": properties["model"], "val": [], "test": []}
    with ZooWriter(out, zoo.layout, zoo.symmetry, provenance, splits=splits) as writer:
        writer.append(made.weights.float().cpu(), properties)
    return Zoo.open(out)


class Made(NamedTuple):
    """New networks."""

    weights: Tensor  # [count, P], on the device
    anchors: list[str]  # names of those that each was made of
    accuracy: Tensor | None  # by which they were chosen among candidates, [count] float64
    told: dict[str, Any]  # what a sampler says that was trained


def make(
    config: Config,
    zoo: Zoo,
    representation: Representation | None,
    anchors: Anchors,
    bench: Bench,
    device: torch.device,
) -> Made:
    """Draws networks, as many rounds as are asked for, and writes nothing."""

    def points_of(flat: Tensor) -> Tensor:
        return flat if representation is None else representation.encode(flat)

    flat, names = anchors.read(zoo, anchors.rows).to(device), anchors.names
    codes = points_of(flat)
    generator = torch.Generator(device).manual_seed(config.seed)
    count = max(config.count, config.candidates)

    def held_out() -> Tensor:
        return points_of(anchors.read(zoo, anchors.held_out).to(device)) if len(anchors.held_out) else codes[:0]

    for number in range(config.rounds):
        drawn, told = draw(config, zoo, representation, codes, count, generator, anchors.activation, held_out)
        own = drawn.points.unflatten(1, codes.shape[1:])
        rest = rest_of(flat, drawn.anchors)
        weights = own.clone() if representation is None else representation.decode(own, like=rest)
        weights = bench.condition(hold_variances(weights, flat, zoo.layout))
        names = [" ".join(dict.fromkeys(names[i] for i in chosen if i >= 0)) for chosen in drawn.anchors.tolist()]
        if not config.candidates:
            return Made(weights, names, None, told)
        accuracy = bench.accuracy(weights)
        kept = accuracy.argsort(descending=True, stable=True)[: config.count]
        if config.mode == "reference" and number and number == config.rounds - 1:
            kept = torch.arange(config.count)  # the released code forgets to sort its last round
        flat, codes, names = weights[kept.to(device)], own[kept.to(device)], [names[i] for i in kept.tolist()]
    return Made(flat, names, accuracy[kept], told)


def rest_of(flat: Tensor, anchors: Tensor) -> Tensor:
    """What samples take from anchors where their codes say nothing: the mean of theirs, or of all; ``[count, P]``."""
    mean, known = flat.mean(0), (anchors[:, 0] >= 0).tolist()
    own = zip(anchors.clamp(min=0).to(flat.device), known, strict=True)
    return torch.stack([flat[chosen].mean(0) if made_of else mean for chosen, made_of in own])


def hold_variances(weights: Tensor, flat: Tensor, layout: Layout) -> Tensor:
    """Samples whose running variances are not below the least of the anchors', which no variance of theirs was."""
    for entry in layout.entries:
        if entry.name.endswith("running_var") and entry.offset >= 0:
            place = slice(entry.offset, entry.offset + entry.numel)
            weights[:, place] = torch.maximum(weights[:, place], flat[:, place].amin(0))
    return weights


def draw(
    config: Config,
    zoo: Zoo,
    representation: Representation | None,
    codes: Tensor,
    count: int,
    generator: torch.Generator,
    activation: str | None,
    held_out: Callable[[], Tensor],
) -> tuple[Drawn, dict[str, Any]]:
    """New points ``[count, d]`` around anchors ``[n, ..]``, and what a sampler says that was trained."""
    cloud, method = codes.flatten(1), config.method
    if method == "direct":
        return generators.direct(cloud, count), {}
    if method == "uniform":
        return generators.uniform(cloud, count, generator), {}
    if method == "prior":
        return generators.prior(cloud, count, config.prior_std, generator), {}
    if method == "neighbour":
        return generators.neighbour(cloud, count, generator, config.manifold), {}
    if method == "kde":
        return density(config, representation, codes, count, generator)
    if method == "noise":
        scale = weight_std(cloud, zoo.layout) if representation is None else cloud.std(0, correction=0)
        return generators.noisy(cloud, count, config.noise * scale, generator), {}
    if method == "average":
        return generators.average(cloud, count, config.together, generator), {}
    if method == "pca":
        space = Components.of(cloud, config.components)
        if config.behaviour:
            space = taught(config, zoo, activation, space, generator)
        return generators.gaussian(space, count, config.temperature, generator), {}
    if method == "gan":
        return generators.gan(cloud, count, generator, components=config.components), {}
    if config.flow == "deepweightflow":
        trained = flows.train_deepweightflow(cloud, generator)
    else:
        space = Components.of(cloud, config.components)
        trained = flows.train_flow(space, cloud, held_out().flatten(1), generator)
    told = {"steps": trained.steps, "kept": trained.kept, "loss": trained.loss}
    return flows.follow(trained, count, config.temperature, generator), told


def density(
    config: Config, representation: Representation | None, codes: Tensor, count: int, generator: torch.Generator
) -> tuple[Drawn, dict[str, Any]]:
    """Samples of a kernel density of each dimension, each token, or whole codes."""
    if config.density == "token" and codes.dim() < 3:
        raise ValueError("sample: density must be dimension or joint where networks have no codes of tokens, got token")
    cloud = codes.flatten(1)
    width = {"dimension": 1, "token": codes.shape[-1], "joint": cloud.shape[1]}[config.density]
    bandwidth = config.bandwidth
    if bandwidth is None:
        bandwidth = BANDWIDTH if representation is None else representation.bandwidth
    if config.mode == "reference":
        drawn = generators.kde_reference(cloud, count, bandwidth, width=width)
    else:
        drawn = generators.kde(cloud, count, bandwidth * cloud.std(0, correction=0), generator, width=width)
    return drawn, {"bandwidth": bandwidth}


def taught(
    config: Config, zoo: Zoo, activation: str | None, space: Components, generator: torch.Generator
) -> Components:
    """The Gaussian after it was trained on the images that the zoo's networks were trained on."""
    job = job_of(zoo, device=str(generator.device))
    if activation is None:
        raise ValueError(f"sample: behaviour must be left out for {zoo.path}, which does not say its activations")
    try:
        gradient = classification(job.plan, job.data.train, activation, generator)
    except ValueError as error:
        raise ValueError(f"sample: behaviour must be left out for networks of {zoo.path}: {error}") from error
    return teach(space, gradient, config.behaviour, generator)
