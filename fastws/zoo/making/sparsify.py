"""Sparsified twins: networks of a zoo trained on with variational dropout, which takes most of their weights away.

Every twin begins at the last state of its network and keeps its recipe. A state of the new zoo is what is left of a
network after an epoch: its weights, zero where they were dropped. Source: arXiv 2209.14764, with its schedule.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor, nn

from fastws.files.atomic import remove
from fastws.layout.layout import Layout
from fastws.ops.variational_cnn_step import INITIAL_LOG_SIGMA, kl_divergence, sparse_weights, variational_cnn_step
from fastws.small_cnn.steps import OPTIMIZERS
from fastws.small_cnn.table import ACTIVATIONS
from fastws.version import __version__
from fastws.zoo.format.manifest import MANIFEST, read_manifest
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.grids import Preset
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import Job, check_config, config_of, prepare, train, workers
from fastws.zoo.making.recipes import Part, Plan, Recipe, TrainingData, check_choices
from fastws.zoo.making.resume import RESUME
from fastws.zoo.making.training import SideBySide, Wave

KL_WEIGHT = 0.01  # of the divergence, which it would reach in the epoch behind the last
SAME_LOSS, SAME_ACCURACY = 1e-3, 1e-2  # relative, between a network and its twin at the start
MAY_CHANGE = ("zoo", "out", "data", "threads")  # fields of Config that a resumed run may have otherwise
VARIATIONAL = "variational"  # folder in the zoo, for theta and log sigma^2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes sparse twins of the networks of a zoo; the same command resumes a run that was stopped.

    fastws zoo sparsify --zoo zoos/digits --out zoos/sparse
    """

    zoo: str  # folder of a zoo that zoo make wrote, or, with --architecture, that was read from files
    out: str  # folder of the zoo of twins to write

    models: int = 100  # networks that get a twin, the first ones of the zoo; 0: all
    epochs: int = 25  # of training; the new zoo holds one state more per network, that of the start
    data: str | None = None  # images of the training, if they are not where they were when the zoo was made
    architecture: str | None = None  # of a zoo that was read: that of zoo make, or module:function, which returns it
    preset: Preset = "digits"  # of a zoo that was read: how its images look, and what its properties do not tell
    variational: bool = False  # keep theta and log sigma^2 too: in a zoo of their own in OUT, under published names

    device: Literal["cpu", "cuda"] = "cpu"  # that twins are trained on
    threads: int = 0  # processor cores to use; 0: all
    wave: int = 1024  # networks that advance epoch by epoch together

    def __post_init__(self):
        for name, least in (("models", 0), ("epochs", 0), ("threads", 0), ("wave", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def sparsify(config: Config) -> Zoo:
    """Makes the sparse twins of a zoo, or goes on with those that were stopped; returns their zoo, open.

    A run that is killed at any moment and started again gives the same weights, bit for bit on a CPU. Twins have the
    ids and the splits of their networks. Losses are cross-entropies, without the divergence.

    Raises:
        ValueError: If the zoo was not made by ``zoo make``, its networks are too large, or the folder holds twins of
            another configuration.
        BlockingIOError: If another process is writing the folder.
    """
    zoo, path = Zoo.open(config.zoo), Path(config.out)
    check_config(path, config, "zoo sparsify", MAY_CHANGE)
    check_parent(path, zoo)
    made = made_by(zoo, config)
    job = prepare(made)
    if job.one_by_one:
        raise ValueError(f"zoo sparsify: networks must be small enough to train side by side: {job.one_by_one}")
    if config.architecture is not None:
        with torch.device("meta"):
            Layout.from_checkpoint(job.plan.build()).require_same(zoo.layout, f"zoo sparsify: zoo {zoo.path}")
    recipes, weights = choose(
        zoo, config.models, made.kept_epochs[-1], told_by(made, job.plan) if config.architecture else {}
    )
    plan = job.plan._replace(epochs=config.epochs, order="seeded")
    same = starts_the_same(plan, recipes, weights, job.data)
    if not same:
        raise ValueError(f"zoo sparsify: {zoo.path} must hold networks that the first dropping leaves the same")
    job = job._replace(plan=plan, recipes=[recipes[place] for place in same])
    start = {recipe.model: weights[place] for place, recipe in enumerate(recipes)}
    left_out = [recipe.model for place, recipe in enumerate(recipes) if place not in same]
    with open_twins(config, zoo, job, path, left_out) as writer, workers(config, job) as pool:

        def make_wave(part: Sequence[Recipe]) -> SparseWave:
            return SparseWave(plan, part, job.data, torch.stack([start[recipe.model] for recipe in part]))

        train(config, job, writer, pool, make_wave, range(config.epochs + 1))
        remove(path / RESUME)
    return Zoo.open(path)


def check_parent(path: Path, zoo: Zoo) -> None:
    """Twins are gone on with only where the zoo is the one they were begun with, wherever it lies."""
    if (path / MANIFEST).exists():
        parent = read_manifest(path)["provenance"].get("parent", {})
        if parent.get("provenance") != json.loads(json.dumps(zoo.provenance)):
            what = f"{parent.get('path')}, with which {path} was begun, or a copy of it, got {zoo.path}"
            raise ValueError(f"zoo sparsify: zoo must be {what}; take another folder")


def made_by(zoo: Zoo, config: Config) -> MakeConfig:
    """The configuration with which a zoo was made, on the images and the device of this one."""
    if config.architecture is not None:
        device, data = config.device, config.data
        told = {"architecture": config.architecture, "order": "seeded", "device": device, "data": data}
        return MakeConfig(out=config.zoo, preset=config.preset, **told)
    made = config_of(zoo.path, zoo.provenance)
    return replace(made, out=config.zoo, data=config.data or made.data, device=config.device, start=None)


def told_by(made: MakeConfig, plan: Plan) -> dict[str, object]:
    """What a configuration says of networks whose zoo does not: the first choices, but no activation out of several."""
    kinds = {kind: name for name, kind in ACTIVATIONS.items()}
    own = {kinds[type(layer)] for layer in plan.build().modules() if type(layer) in kinds}
    activations = own if ":" in plan.architecture else {*made.activations}
    told = {"seed": made.seed, "dropout": made.dropouts[0], "init": made.inits[0], "optimizer": made.optimizers[0]}
    told |= {"lr": made.lrs[0], "weight_decay": made.weight_decays[0]}
    return told | ({"activation": activations.pop()} if len(activations) == 1 else {})


def choose(zoo: Zoo, models: int, epochs: int, told: Mapping[str, object]) -> tuple[list[Recipe], Tensor]:
    """The recipes of the first networks, and the weights that they ended with; those that were lost are left out.

    What ``told`` says fills the recipes of a zoo that was read from files, whose last states may be of any epoch.
    """
    table = zoo.properties
    missing = [name for name in ("epoch", *Recipe._fields) if name not in table.column_names and name not in told]
    missing = [name for name in missing if not told or name not in ("model", "epoch")]
    if missing:
        raise ValueError(f"zoo sparsify: {zoo.path} must have the properties of a recipe, got no {', '.join(missing)}")
    last = list(last_rows(zoo).values())
    if not told:
        epoch = zoo.numbers("epoch")
        last = [row for row in last if epoch[row] == epochs]
    last = last[: models or None]
    if not last:
        raise ValueError(f"zoo sparsify: {zoo.path} must hold networks of epoch {epochs}, got none; finish it first")
    columns = {name: [told.get(name)] * len(last) for name in Recipe._fields}
    columns |= {name: table[name].take(last).to_pylist() for name in Recipe._fields if name in table.column_names}
    for name, known in (("activation", ACTIVATIONS), ("optimizer", OPTIMIZERS)):
        check_choices(zoo.path, name, columns[name], known)
    return [Recipe(*values) for values in zip(*columns.values(), strict=True)], zoo.rows(last).float()


def starts_the_same(plan: Plan, recipes: list[Recipe], weights: Tensor, data: TrainingData) -> list[int]:
    """Which networks do the same on the test images after the smallest weights are dropped."""
    trainer = Sparsifier(plan, recipes, data)
    same = []
    for members in trainer.groups:
        dense = SideBySide.measure(trainer, members, weights[members], data.test)
        sparse = trainer.measure(members, begin(weights[members]), data.test)
        close = torch.ones(len(members), dtype=torch.bool)
        for x, y, tolerance in zip(sparse, dense, (SAME_LOSS, SAME_ACCURACY), strict=True):
            close &= torch.isclose(x, y, rtol=tolerance).cpu()
        same += [member for member, is_close in zip(members, close.tolist(), strict=True) if is_close]
    return sorted(same)


def begin(weights: Tensor) -> Tensor:
    """``[G, P]`` -> ``[G, 2 * P]``: theta, then log sigma^2."""
    return torch.cat([weights, torch.full_like(weights, INITIAL_LOG_SIGMA)], 1)


def kl_weight(epoch: int, epochs: int) -> float:
    """Of an epoch, from 1: nothing in the first one, then more and more."""
    return KL_WEIGHT * (epoch - 1) / max(epochs, 1)


class Sparsifier(SideBySide):
    """Networks with variational dropout; their weights are ``[G, 2 * P]``, theta and log sigma^2."""

    def make_steps(self, state: list[Tensor], batches: Tensor, options: dict[str, Tensor], step: int, epoch: int):
        state = [part.unflatten(1, (2, -1)) for part in state]
        weight = kl_weight(epoch, self.plan.epochs)
        *state, losses, right, _ = variational_cnn_step(
            *state, *self.data.train, batches, self.layers, **options, kl_weight=weight, step=step
        )
        return [part.flatten(1) for part in state], losses, right

    def measure(self, members: list[int], weights: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        sparse, _ = sparse_weights(weights.unflatten(1, (2, -1)), self.layers)
        return super().measure(members, sparse, part)


class SparseWave(Wave):
    """Twins that advance together; their state is ``[3, W, 2 * P]``."""

    def __init__(self, plan: Plan, recipes: Sequence[Recipe], data: TrainingData, start: Tensor):
        super().__init__(plan, recipes, data, side_by_side=True)
        self.trainer, self.start = Sparsifier(plan, recipes, data), start

    @cached_property
    def state(self) -> Tensor:
        weights = begin(self.start)
        return torch.stack([weights, torch.zeros_like(weights), torch.zeros_like(weights)])

    def _describe(self, measures: dict[str, Tensor]) -> dict[str, object]:
        columns = super()._describe(measures)
        weights = self.state[0].unflatten(1, (2, -1))
        columns |= {"parent": columns["model"], "sparsity": sparse_weights(weights, self.trainer.layers)[1]}
        weight = kl_weight(max(self.epoch, 1), self.plan.epochs)
        columns["kl_weight"] = numpy.full(len(self.recipes), weight, dtype=numpy.float32)
        return columns | {"kl_divergence": kl_divergence(weights, self.trainer.layers)}


class TwinWriter:
    """Writes the sparse networks, and theta and log sigma^2 to a zoo of their own where that is asked for."""

    def __init__(self, sparse: ZooWriter, variational: ZooWriter | None, network: nn.Module, layers: Tensor):
        self.sparse, self.variational, self.layers = sparse, variational, layers
        self.names = {name: tensor.numel() for name, tensor in network.state_dict().items()}

    @property
    def path(self) -> Path:
        return self.sparse.path

    @property
    def submitted(self) -> int:
        return self.sparse.submitted

    @property
    def dropped(self) -> int:
        return self.sparse.dropped

    def append(self, state: Tensor, properties: dict[str, object]) -> None:
        weights = state.unflatten(1, (2, -1))
        # a run that died between the two has added these states to the first one already
        if self.variational is not None and self.variational.submitted == self.sparse.submitted:
            pieces = (part.split(list(self.names.values()), 1) for part in weights.unbind(1))
            of_name = dict(zip(self.names, zip(*pieces, strict=True), strict=True))
            ordered = [of_name[name][kind] for name, kind, _ in published_names(self.names)]
            self.variational.append(torch.cat(ordered, 1), properties)
        self.sparse.append(sparse_weights(weights, self.layers)[0], properties)


def published_names(names: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """Tensors of a layer and their log sigma^2, in the order and with the names of published checkpoints."""
    names = list(names)
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in names):
        own = [name for name in names if name.rpartition(".")[0] == prefix]
        yield from ((name, 0, name) for name in own)
        for name in own:
            what = "log_sigma2_bias" if name.endswith(".bias") else "log_sigma2"
            yield name, 1, f"{prefix}.{what}"


@contextmanager
def open_twins(config: Config, zoo: Zoo, job: Job, path: Path, left_out: list[str]) -> Iterator[TwinWriter]:
    chosen = {recipe.model for recipe in job.recipes}
    splits = {name: [model for model in models if model in chosen] for name, models in zoo.splits.items()}
    provenance = {"made_by": f"fastws {__version__}", "torch": torch.__version__, "config": asdict(config)}
    provenance |= {"parent": {"path": str(zoo.path), "provenance": zoo.provenance}, "left_out": left_out}
    network = job.plan.build()
    with ExitStack() as stack:
        sparse = stack.enter_context(ZooWriter(path, zoo.layout, zoo.symmetry, provenance, splits=splits))
        variational = None
        if config.variational:
            shapes = network.state_dict()
            tensors = {new: torch.empty_like(shapes[name]) for name, _, new in published_names(shapes)}
            layout = Layout.from_checkpoint(tensors)
            variational = ZooWriter(path / VARIATIONAL, layout, None, provenance, splits=splits)
            stack.enter_context(variational)
        yield TwinWriter(sparse, variational, network, job.plan.layers())


def run(config: Config) -> None:
    zoo = sparsify(config)
    left_out, last = zoo.provenance["left_out"], zoo.numbers("epoch") == config.epochs
    print(f"{zoo.path}: {len(zoo):,} states of {last.sum():,} sparse networks, {zoo.dropped} left out as not finite")
    if left_out:
        print(f"left out because they change when their smallest weights are dropped: {', '.join(left_out)}")
    if last.any():
        sparsity, accuracy = (zoo.numbers(name)[last].mean() for name in ("sparsity", "test_accuracy"))
        print(f"mean sparsity {sparsity:.3f}, mean test accuracy {accuracy:.3f}")
