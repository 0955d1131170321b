"""Accuracy of all networks of a zoo at once, written as properties of the zoo."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from fastws.devices import find_device
from fastws.downstream.judging.statistics import cluster_interval
from fastws.downstream.populations import Measured, measure
from fastws.layout.layout import Layout
from fastws.small_cnn.table import ACTIVATIONS
from fastws.zoo.format.properties import add_properties
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.architectures import Activation
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import Job, config_of, prepare
from fastws.zoo.making.measuring import norms_of
from fastws.zoo.making.recipes import Part, Plan, check_choices

ANY = "relu"  # of networks that do not ask


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures all networks of a zoo on a data set's test images, and on its validation images where there are any.

    fastws zoo evaluate --zoo zoos/kde30
    fastws zoo evaluate --zoo zoos/kde30 --data digits28
    """

    zoo: str  # folder of the zoo; the results become columns of its properties
    data: str | None = None  # another data set than the one that the networks were made for
    limit: int | None = None  # images of each part, evenly spaced; by default as many as the zoo was made with
    activation: Activation | None = None  # of networks whose zoo does not say theirs
    architecture: str | None = None  # of networks read from files: a name of zoo make, or a function as module:function
    condition: int = 0  # training images on which running statistics of batch norms are computed anew before; 0: kept
    ensemble: bool = True  # says the accuracy of the mean of all networks' logits as well
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if self.condition < 0 or self.condition == 1:
            raise ValueError(f"zoo evaluate: condition must be 0, or at least 2 images, got {self.condition}")
        if self.architecture is not None and self.data is None:
            raise ValueError("zoo evaluate: data must be given with architecture, got none; give --data")


def run(config: Config) -> None:
    zoo, results, ensemble = evaluate(config)
    models = numpy.array(zoo.properties["model"].cast("string").to_pylist())
    for name, values in results.items():
        if not name.endswith("accuracy"):
            continue
        quantiles = ", ".join(f"{value:.4f}" for value in numpy.quantile(values, [0.1, 0.5, 0.9]))
        # all states of a network are one observation: as if they were several, intervals would be too narrow
        mean, low, high = cluster_interval(values, models, numpy.random.default_rng(0))
        line = f"{name}: {mean:.4f} [{low:.4f}, {high:.4f}], sd {values.std():.4f}; 10 %, 50 %, 90 %: {quantiles}"
        print(line + (f"; ensemble of all {len(zoo)}: {ensemble[name]:.4f}" if config.ensemble else ""))
    if config.condition:
        print(f"running statistics of batch norms were computed anew on {config.condition:,} training images")
    print(f"written to the properties of {zoo.path}")


def evaluate(config: Config) -> tuple[Zoo, dict[str, numpy.ndarray], dict[str, float]]:
    """Measures a zoo and adds what was found to its properties.

    Returns:
        The zoo, open anew; columns ``[M]`` by name; and the accuracy of the ensemble of all networks by column.

    Raises:
        FileNotFoundError: If zoo or images are not there.
        ValueError: If the zoo does not say what its networks are, or the images do not fit them.
    """
    zoo = Zoo.open(config.zoo)
    options = {"data": config.data, "limit": config.limit, "device": config.device}
    job = job_of(zoo, architecture=config.architecture, **options)
    prefix = "" if config.data is None or config.architecture is not None else f"{Path(config.data).name}_"
    condition = None
    if config.condition:
        condition = conditioning_images(zoo, job, config.condition)
        prefix += f"conditioned_{config.condition}_"
    columns, ensemble = {}, {}
    for name, part in job.data.evaluated().items():
        found = measure_zoo(zoo, job, part, config.activation, condition)
        columns[f"{prefix}{name}_accuracy"] = found.accuracy.numpy()
        columns[f"{prefix}{name}_loss"] = found.loss.numpy()
        right = found.mean_logits.argmax(1) == part.y.cpu()
        ensemble[f"{prefix}{name}_accuracy"] = right.double().mean().item()
    return add_properties(zoo, columns), columns, ensemble


def job_of(
    zoo: Zoo,
    data: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    architecture: str | None = None,
    where: str = "zoo evaluate",
) -> Job:
    """Architecture and images of a zoo that ``zoo make`` made, or that was sampled from one, or what is said of it.

    Raises:
        ValueError: If it is of another origin, or other images do not fit its networks.
    """
    if architecture is None:
        made = config_of(zoo.path, zoo.provenance)
    else:
        made = MakeConfig(out=str(zoo.path), architecture=architecture, data=data, batch_size=1)
    changes = {"device": find_device(device).type, "networks": 1, "start": None, "regularise": None}
    changes |= {"regularise_at": ()}
    changes |= ({} if data is None else {"data": data}) | ({} if limit is None else {"limit": limit})
    job = prepare(replace(made, **changes))
    if data is not None and data != made.data:
        own = prepare(replace(made, networks=1, limit=1, batch_size=1)).plan if Path(made.data).exists() else None
        if own is not None and (own.image_shape, own.num_classes) != (job.plan.image_shape, job.plan.num_classes):
            what = f"images {own.image_shape} of {own.num_classes} classes"
            raise ValueError(
                f"{where}: data must have {what}, as {zoo.path} was made for, "
                f"got {job.plan.image_shape} and {job.plan.num_classes} in {data}"
            )
    with torch.device("meta"):
        network = job.plan.build()
        if architecture is not None:
            Layout.from_checkpoint(network).require_same(zoo.layout, f"{where}: zoo {zoo.path}")
    weights = sum(tensor.numel() for tensor in network.state_dict().values() if tensor.is_floating_point())
    if weights != zoo.layout.num_weights:
        images = f"{job.plan.image_shape} of {job.plan.num_classes} classes"
        raise ValueError(
            f"{where}: data must be for networks of {zoo.layout.num_weights} weights, those of {zoo.path}, "
            f"got images {images}, which take {weights}, in {data or made.data}"
        )
    return job


def measure_zoo(
    zoo: Zoo, job: Job, part: Part, activation: str | None = None, condition: Tensor | None = None
) -> Measured:
    """What all networks of a zoo do on images; ``activation`` is of those whose zoo does not say theirs."""
    names = activations_of(zoo, job.plan, activation)
    weights = zoo.rows(torch.arange(len(zoo))).float().to(part.x.device)
    return measure(weights, job.plan, names, part, condition=condition)


def conditioning_images(zoo: Zoo, job: Job, count: int, where: str = "zoo evaluate") -> Tensor:
    """Training images, evenly spaced, for the running statistics of batch norms.

    Raises:
        ValueError: If the networks have none, or there are not so many images.
    """
    if not norms_of(job.plan.build()):
        raise ValueError(f"{where}: condition must be left out for {zoo.path}, whose networks have no batch norm")
    x = job.data.train.x
    if count > len(x):
        raise ValueError(f"{where}: condition must be at most {len(x)}, the training images, got {count}")
    return x[torch.linspace(0, len(x) - 1, count).long().to(x.device)]


def activations_of(zoo: Zoo, plan: Plan, activation: str | None = None) -> list[str]:
    """The activation of each network of a zoo.

    Raises:
        ValueError: If neither zoo nor ``activation`` says it, or both do.
    """
    known = "activation" in zoo.properties.column_names
    names = zoo.properties["activation"].cast("string").to_pylist() if known else [None] * len(zoo)
    if ":" in plan.architecture:  # a function of the user's, whose networks have theirs inside
        return [name or ANY for name in names]
    missing = sum(not name for name in names)
    if missing and activation is None:
        what = f"given for networks whose zoo does not say theirs, got {missing} such networks of {zoo.path}"
        raise ValueError(f"zoo evaluate: activation must be {what}; give --activation")
    if activation is not None and not missing:
        raise ValueError(f"zoo evaluate: activation must be left out for {zoo.path}, whose networks say theirs")
    names = [name or activation for name in names]
    check_choices(zoo.path, "activation", set(names), ACTIVATIONS)
    return names
