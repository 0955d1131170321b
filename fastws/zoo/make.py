"""Training of model zoos: recipes drawn, networks trained side by side, every epoch of each kept."""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Literal

import numpy
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from fastws.data.images import load
from fastws.layout import Layout
from fastws.symmetry import Symmetry
from fastws.version import __version__
from fastws.zoo.architectures import Activation, Architecture, Init, build
from fastws.zoo.format import MANIFEST, Zoo, read_manifest, remove, write_atomically
from fastws.zoo.training import Optimizer, Plan, Recipe, TrainingData, Wave, fit_stack
from fastws.zoo.writer import ZooWriter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESUME, LOG = "resume.safetensors", "log.jsonl"
MAY_CHANGE = ("zoo", "threads")  # fields of Config that a resumed run may have otherwise


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a zoo of small networks; the same command goes on where a stopped run was."""

    zoo: str  # folder to write

    data: str = "digits"  # images to learn; or a folder with train*.parquet and test*.parquet
    limit: int | None = None  # images of each part, evenly spaced; all by default
    architecture: Architecture = "digits-cnn"
    networks: int = 240
    epochs: int = 25  # the zoo holds one state more per network, that of the start
    batch_size: int = 32  # images per step; what is left of an epoch waits for the next, which has another order

    sampling: Literal["random", "grid"] = "random"  # a draw per network; or all combinations, seed after seed
    activations: tuple[Activation, ...] = ("tanh", "relu", "gelu", "sigmoid")
    dropouts: tuple[float, ...] = (0.0,)  # probabilities
    inits: tuple[Init, ...] = ("kaiming_uniform", "kaiming_normal", "xavier_uniform", "normal")
    optimizers: tuple[Optimizer, ...] = ("adam", "momentum")
    lrs: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
    weight_decays: tuple[float, ...] = (0.0, 1e-3)
    seed: int = 0  # of the draw of recipes, or of the first networks in a grid; each network has its own

    dtype: Literal["fp32", "bf16"] = "fp32"  # of the stored weights
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0  # processor cores to use; 0: all
    stack: int = 0  # networks per batched operation; 0: what suits the device
    wave: int = 1024  # networks that advance epoch by epoch together

    def __post_init__(self):
        for name in ("networks", "batch_size", "wave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "threads", "stack", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for field in fields(self):
            if getattr(self, field.name) == ():
                raise ValueError(f"{field.name} must name at least one choice, got none")
        if not all(0 <= dropout < 1 for dropout in self.dropouts):
            raise ValueError(f"dropouts must be in [0, 1), got {self.dropouts}")


def draw_recipes(config: Config) -> list[Recipe]:
    """The recipes of all networks. A longer list begins with the shorter one."""
    choices = [config.activations, config.dropouts, config.inits, config.optimizers, config.lrs, config.weight_decays]
    grid = list(product(*choices))
    random = numpy.random.default_rng(config.seed)
    recipes = []
    for number in range(config.networks):
        if config.sampling == "grid":
            seed, chosen = config.seed + number // len(grid), grid[number % len(grid)]
        else:
            seed = int(random.integers(2**31))
            chosen = tuple(choice[int(random.integers(len(choice)))] for choice in choices)
        recipes.append(Recipe(f"{number:06}", seed, *chosen))
    return recipes


def make(config: Config) -> Zoo:
    """Trains a zoo, or goes on with one that was stopped; returns it, open.

    A run that is killed at any moment and started again gives the same weights, bit for bit on a CPU.

    Raises:
        ValueError: If the folder holds a zoo with another configuration, or the data does not fit.
        RuntimeError: If another process is writing the zoo.
    """
    path = Path(config.zoo)
    check_config(path, config)
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"zoo make: device must be cpu where no GPU is, got {config.device!r}")
    images = load(config.data, config.limit)
    if len(images.train_y) < config.batch_size:
        raise ValueError(f"batch_size must be at most {len(images.train_y)}, the images, got {config.batch_size}")
    shape = tuple(images.train_x.shape[1:])
    network = build(config.architecture, shape, num_classes=images.num_classes)
    stack = config.stack or fit_stack(network, shape, config.batch_size, config.device)
    plan = Plan(config.architecture, shape, images.num_classes, config.batch_size, stack)
    symmetry = Symmetry.trace(network, torch.zeros(1, *shape))
    provenance = {"made_by": f"fastws {__version__}", "torch": torch.__version__, "config": asdict(config)}
    layout = Layout.from_checkpoint(network)
    with ZooWriter(path, layout, symmetry, provenance, DTYPES[config.dtype]) as writer, workers(config) as pool:
        train(config, plan, TrainingData.of(images, config.device), writer, pool)
        remove(path / RESUME)
    return Zoo.open(path)


def train(config: Config, plan: Plan, data: TrainingData, writer: ZooWriter, pool: Executor) -> None:
    recipes, states = draw_recipes(config), config.epochs + 1
    total = config.networks * states
    first, epoch, state = read_resume(writer.path)
    if state is None and writer.submitted >= total:
        return  # a finished zoo
    bar = tqdm(total=total, initial=writer.submitted, unit=" states", smoothing=0.05)
    for begin in range(first, config.networks, config.wave):
        wave = Wave(plan, recipes[begin : begin + config.wave])
        if begin == first and state is not None:
            wave.state, wave.epoch = state, epoch
        wave.load(data)
        while wave.epoch < config.epochs:
            properties = wave.advance(data, pool)
            # a run that died between append and write_resume has added these states already
            if writer.submitted < begin * states + (wave.epoch + 1) * len(wave.recipes):
                writer.append(wave.state[0], properties)
                bar.update(len(wave.recipes))
            write_resume(writer.path, begin, wave)
            accuracy = float(properties["test_accuracy"].median())
            bar.set_postfix(epoch=wave.epoch, accuracy=f"{accuracy:.3f}", dropped=writer.dropped)
            log(writer.path, {"first": begin, "epoch": wave.epoch, "median_test_accuracy": accuracy})
    bar.close()


def check_config(path: Path, config: Config) -> None:
    """A zoo is gone on with only as it was begun."""
    if not (path / MANIFEST).exists():
        return
    begun = read_manifest(path)["provenance"].get("config", {})
    wanted = json.loads(json.dumps(asdict(config)))
    for name in wanted:
        if name not in MAY_CHANGE and begun.get(name) != wanted[name]:
            what = f"{begun.get(name)!r}, with which {path} was begun, got {wanted[name]!r}"
            raise ValueError(f"zoo make: {name} must be {what}; take another folder")


@contextmanager
def workers(config: Config) -> Iterator[Executor]:
    """Threads that each run whole stacks: small operations gain nothing from several threads each."""
    before = torch.get_num_threads()
    count = 1 if config.device != "cpu" else config.threads or before
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def write_resume(path: Path, first: int, wave: Wave) -> None:
    """Where a killed run goes on: the first network of the wave, its epoch, weights and moments."""
    content = safetensors.torch.save({"state": wave.state}, {"first": str(first), "epoch": str(wave.epoch)})
    with write_atomically(path / RESUME, len(content)) as file:
        file.write(content)


def read_resume(path: Path) -> tuple[int, int, Tensor | None]:
    if not (path / RESUME).exists():
        return 0, -1, None
    try:
        with safetensors.safe_open(path / RESUME, framework="pt") as file:
            place = file.metadata()
            return int(place["first"]), int(place["epoch"]), file.get_tensor("state").clone()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / RESUME}: file must be readable, got {error}; take another folder") from error


def log(path: Path, line: Mapping) -> None:
    with open(path / LOG, "a") as file:
        file.write(json.dumps({"time": round(time.time(), 3)} | line) + "\n")


def run(config: Config) -> None:
    zoo = make(config)
    accuracy = torch.from_numpy(zoo.properties["test_accuracy"].to_numpy()[-config.networks :].copy())
    low, middle, high = accuracy.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"{zoo.path}: {len(zoo):,} states of {config.networks:,} networks, {zoo.dropped} left out as not finite")
    print(f"test accuracy, 10 %, 50 % and 90 % of the networks: {low:.3f}, {middle:.3f}, {high:.3f}")
