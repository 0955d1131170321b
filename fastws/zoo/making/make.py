"""Training of model zoos: recipes drawn, networks trained side by side, every epoch of each kept."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from math import inf, isfinite
from pathlib import Path
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from fastws.data.images import Transform, load
from fastws.files.atomic import remove
from fastws.layout.layout import Layout
from fastws.runs import log
from fastws.runs.begun import former_names, require_same
from fastws.symmetry.symmetry import Symmetry
from fastws.version import __version__
from fastws.zoo.format.manifest import MANIFEST, read_manifest
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import ODD, Zoo
from fastws.zoo.making import beginning, ranks
from fastws.zoo.making.architectures import Activation, Architecture, Init
from fastws.zoo.making.explain import explain
from fastws.zoo.making.grids import PRESETS, Preset
from fastws.zoo.making.recipes import (
    Augment,
    Optimizer,
    Order,
    Plan,
    Recipe,
    Schedule,
    TrainingData,
    TrainMetrics,
    kept_epochs,
)
from fastws.zoo.making.resume import RESUME, read_resume, write_resume
from fastws.zoo.making.training import Regularise, Wave

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAY_CHANGE = ("out", "threads", "explain")  # fields of Config that a resumed run may have otherwise
RANDOM_SEEDS = 1_000_000  # those of grid-random-seeds are below, as published
CHOICES = ("activations", "dropouts", "inits", "optimizers", "lrs", "weight_decays")


@former_names(zoo="out")
@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a zoo of networks; the same command resumes a run that was stopped.

    fastws zoo make --out zoos/digits
    fastws zoo make --out zoos/mnist --preset mnist-s-seed --data mnist --explain

    A preset gives a value to every option that is None; --explain prints them all. Under torchrun every process
    trains its share of the networks; more processes than GPUs share them, which pays for small networks.
    """

    out: str  # folder of the zoo to write
    preset: Preset = "digits"  # digits, or a published zoo: one recipe and 1,000 seeds, or a grid with ten seeds each
    explain: bool = False  # print what would be trained, on what and for how long, and end
    start: str | None = None  # folder of a zoo whose last states are trained on, by default as they were

    regularise: str | None = None  # with start: checkpoint of train ae or train sane that networks are passed through
    regularise_at: tuple[int, ...] = ()  # epochs after which they are, 0 for those of the start

    data: str | None = None  # "digits"; a folder: parquet, IDX, torchvision's files, a folder per class; or dataset.pt
    limit: int | None = None  # images of each part, evenly spaced; by default all
    gray: bool | None = None  # make the pixels gray
    crop: int | None = None  # height and width in pixels of the middle of each image that is kept; 0: all
    resize: int | None = None  # height and width in pixels that images are brought to; 0: as they are
    mean: tuple[float, ...] | None = None  # of pixels in [0, 1], one or one per channel; by default that of the images
    std: tuple[float, ...] | None = None  # of pixels, one or one per channel; by default that of the images
    validation: int | None = None  # training images held out, on which every state is measured too

    architecture: Architecture | None = None  # of the networks: small ones train side by side, others one by one
    networks: int | None = None  # to train; fewer than the preset has are its first ones
    epochs: int | None = None  # the zoo holds one state more per network, that of the start
    keep_epochs: tuple[int, ...] = ()  # whose states the zoo holds, 0 for those of the start; by default all
    batch_size: int | None = None  # images per step; the last one of an epoch has what is left
    sampling: Literal["random", "grid", "grid-random-seeds"] | None = None  # random recipes, or all seed by seed
    activations: tuple[Activation, ...] | None = None  # choices of a recipe for the activation
    dropouts: tuple[float, ...] | None = None  # choices of a recipe for the probability of dropout
    inits: tuple[Init, ...] | None = None  # choices of a recipe for the distribution of the initial weights
    optimizers: tuple[Optimizer, ...] | None = None  # choices of a recipe for the optimizer; momentum is SGD with 0.9
    lrs: tuple[float, ...] | None = None  # choices of a recipe for the learning rate, the largest one of a schedule
    weight_decays: tuple[float, ...] | None = None  # choices of a recipe for the weight decay
    schedule: Schedule | None = None  # of the learning rate
    augment: Augment | None = None  # how training images are changed at random
    seed: int | None = None  # of the draw of recipes, or of the first networks of a grid
    order: Order | None = None  # which random numbers shuffle images: seed and epoch, or those of the published code
    train_metrics: TrainMetrics | None = None  # on all images after an epoch, or on its minibatches, which is free

    dtype: Literal["fp32", "bf16"] = "fp32"  # of the stored weights
    device: Literal["cpu", "cuda"] = "cpu"  # that networks are trained on
    precision: Literal["fp32", "bf16"] = "fp32"  # of products in training, where networks train one by one
    compile: bool = False  # pass networks that train one by one through torch.compile
    threads: int = 0  # processor cores to use; 0: all
    wave: int = 1024  # networks that advance epoch by epoch together

    def __post_init__(self):
        inherited = {} if self.start is None else beginning.options(self.start, self)
        for name, value in (PRESETS[self.preset] | inherited).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the way of dataclasses that are frozen
        if (self.regularise is None) != (not self.regularise_at) or (self.regularise and self.start is None):
            got = f"{self.regularise} at {self.regularise_at} from {self.start}"
            raise ValueError(f"zoo make: regularise must be given with regularise_at and start, got {got}")
        if not all(0 <= epoch <= self.epochs for epoch in self.regularise_at):
            what = f"epochs in [0, {self.epochs}], got {self.regularise_at}"
            raise ValueError(f"zoo make: regularise_at must be {what}")
        if not all(0 <= epoch <= self.epochs for epoch in self.keep_epochs):
            raise ValueError(f"zoo make: keep_epochs must be epochs in [0, {self.epochs}], got {self.keep_epochs}")
        for name in ("networks", "batch_size", "wave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "threads", "seed", "crop", "resize", "validation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in CHOICES:
            if getattr(self, name) == ():
                raise ValueError(f"{name} must name at least one choice, got none")
        if self.seed >= 2**62:
            raise ValueError(f"seed must be less than 2^62, got {self.seed}")
        if not all(0 <= dropout < 1 for dropout in self.dropouts):
            raise ValueError(f"dropouts must be in [0, 1), got {self.dropouts}")
        for name in ("lrs", "weight_decays"):
            if not all(0 <= value < inf for value in getattr(self, name)):
                raise ValueError(f"{name} must be numbers from 0 on, got {getattr(self, name)}")
        if not all(map(isfinite, self.mean)) or not all(0 < value < inf for value in self.std):
            raise ValueError(f"mean and std must be finite, std more than 0, got {self.mean} and {self.std}")
        if self.schedule == "one-cycle" and set(self.optimizers) != {"momentum"}:
            raise ValueError(f"optimizers must be momentum for a one-cycle schedule, got {' '.join(self.optimizers)}")

    @property
    def kept_epochs(self) -> list[int]:
        return kept_epochs(self.epochs, self.keep_epochs)


class Job(NamedTuple):
    """What a configuration amounts to."""

    plan: Plan
    data: TrainingData
    recipes: list[Recipe]
    one_by_one: str  # why the networks are not trained side by side; "" if they are
    start: dict[str, Tensor] | None = None  # the weights that each network begins with; drawn where there are none


def draw_recipes(config: Config) -> list[Recipe]:
    """The recipes of all networks. A longer list begins with the shorter one."""
    choices = [getattr(config, name) for name in CHOICES]
    grid = list(product(*choices))
    random = numpy.random.default_rng(config.seed)
    recipes = []
    for number in range(config.networks):
        if config.sampling == "random":
            seed = int(random.integers(2**31))
            chosen = tuple(choice[int(random.integers(len(choice)))] for choice in choices)
        else:
            seed, chosen = config.seed + number // len(grid), grid[number % len(grid)]
            if config.sampling == "grid-random-seeds":
                seed = int(random.integers(RANDOM_SEEDS))
        recipes.append(Recipe(f"{number:06}", seed, *chosen))
    return recipes


def prepare(config: Config) -> Job:
    """Loads the images and decides how the networks are trained.

    Raises:
        FileNotFoundError: If the images are not there.
        ValueError: If something does not fit together.
    """
    if not config.data:
        raise ValueError(f"zoo make: data must be the folder of the images of {config.preset}, got none; give --data")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"zoo make: device must be cpu where no GPU is, got {config.device!r}")
    transform = Transform(config.gray, config.crop, config.resize, config.mean, config.std)
    images = load(config.data, config.limit, transform=transform, validation=config.validation)
    if len(images.train_y) < config.batch_size:
        raise ValueError(f"batch_size must be at most {len(images.train_y)}, the images, got {config.batch_size}")
    common = ("schedule", "augment", "order", "train_metrics", "precision", "compile")
    common = {name: getattr(config, name) for name in common}
    shape = tuple(images.train_x.shape[1:])
    plan = Plan(config.architecture, shape, images.num_classes, config.batch_size, config.epochs, **common)
    for activation, dropout in product(config.activations, config.dropouts):
        plan.build(activation, dropout)  # says which combination there is not
    try:
        plan.layers()
        one_by_one = ""
    except ValueError as error:
        one_by_one = str(error)
        if config.order == "published":
            raise ValueError(f"zoo make: order must be seeded where networks train one by one: {error}") from error
    if not one_by_one and (config.precision != "fp32" or config.compile):
        what = f"fp32 and not compiled for {config.architecture}, whose networks train side by side"
        raise ValueError(f"zoo make: precision must be {what}, got {config.precision}, compile {config.compile}")
    recipes, start = (draw_recipes(config), None) if config.start is None else beginning.networks(config, plan)
    return Job(plan, TrainingData.of(images, ranks.device(config.device)), recipes, one_by_one, start)


def make(config: Config, regularise: Regularise | None = None) -> Zoo:
    """Trains a zoo, or goes on with one that was stopped; returns it, open.

    ``regularise`` is called after the epochs ``config.regularise_at`` with the weights ``[G, P]`` of some networks, and
    what it returns they go on with. It comes from above, because zoos know nothing of what learns them.

    A run that is killed at any moment and started again gives the same weights, bit for bit on a CPU. Under torchrun
    all processes make one zoo, and return when it is whole.

    Raises:
        ValueError: If the folder holds a zoo with another configuration, or the data does not fit.
        BlockingIOError: If another process is writing the zoo.
    """
    path, place = Path(config.out), ranks.place()
    if (config.regularise is None) != (regularise is None):
        what = f"given with the function that it stands for, got {config.regularise}; call fastws zoo make"
        raise ValueError(f"zoo make: regularise must be {what}")
    for begun in (path, *ranks.begun_parts(path)):
        check_config(begun, config)
    ranks.check(path, place, config.networks * len(config.kept_epochs))
    if place.world > 1 and ranks.finished(path, place):
        ranks.remove_joined(path, place)
        return Zoo.open(path)
    job = prepare(config)
    if place.world == 1:
        return make_part(config, job, path, regularise)
    share = job._replace(recipes=job.recipes[place.rank :: place.world])
    make_part(config, share, ranks.folder(path, place), regularise)
    ranks.join(path, place, lambda: open_writer(config, job, path), lambda part: check_config(part, config))
    return Zoo.open(path)


def make_part(config: Config, job: Job, path: Path, regularise: Regularise | None) -> Zoo:
    """Trains the networks of a job."""

    def make_wave(recipes: Sequence[Recipe]) -> Wave:
        wave = Wave(job.plan, recipes, job.data, not job.one_by_one, job.start)
        wave.regularise, wave.regularise_at = regularise, config.regularise_at
        return wave

    with open_writer(config, job, path) as writer, workers(config, job) as pool:
        train(config, job, writer, pool, make_wave, config.kept_epochs)
        remove(path / RESUME)
    return Zoo.open(path)


def open_writer(config: Config, job: Job, path: Path) -> ZooWriter:
    # that of the networks that have most: signs of units, which Zoo.may_flip keeps from the others
    odd = [recipe.activation for recipe in job.recipes if recipe.activation in ODD]
    network = job.plan.build(odd[0]) if odd else job.plan.build()
    images = torch.randn(1, *job.plan.image_shape, generator=torch.Generator().manual_seed(0))
    symmetry = Symmetry.trace(network, images)
    provenance = {"made_by": f"fastws {__version__}", "torch": torch.__version__, "config": asdict(config)}
    models = [recipe.model for recipe in job.recipes]
    return ZooWriter(path, Layout.from_checkpoint(network), symmetry, provenance, DTYPES[config.dtype], models=models)


def train(
    config,
    job: Job,
    writer: ZooWriter,
    pool: Executor,
    make_wave: Callable[[Sequence[Recipe]], Wave],
    kept: Sequence[int],
) -> None:
    """Trains the networks of a job, wave after wave, and keeps their states; goes on where a stopped run was.

    Args:
        config: Has ``epochs`` and ``wave``.
        job: What to train.
        writer: Where the weights of each epoch go.
        pool: Each of its threads trains a group of networks.
        make_wave: The networks of some recipes, before their first epoch.
        kept: The epochs whose states go to the writer, ascending; networks are measured after these only.
    """
    networks, states = len(job.recipes), config.epochs + 1
    first, epoch, tensors = read_resume(writer.path)
    if not tensors and writer.submitted >= networks * len(kept):
        return  # a finished zoo
    size = 1 if job.one_by_one else config.wave
    if first not in range(0, networks, size):
        what = f"a multiple of {size} below {networks}, got {first}"
        raise ValueError(f"{writer.path / RESUME}: first must be {what}; take another folder")
    rank = ranks.place().rank
    done = first * states + (epoch + 1) * min(size, networks - first)
    bar = tqdm(total=networks * states, initial=done, unit=" states", smoothing=0.05, disable=rank > 0)
    for begin in range(first, networks, size):
        wave = make_wave(job.recipes[begin : begin + size])
        if begin == first and tensors:
            wave.go_on(writer.path / RESUME, epoch, **tensors)
        while wave.epoch < config.epochs:
            bar.set_postfix(networks=f"{begin + len(wave.recipes)}/{networks}", epoch=wave.epoch + 1, refresh=False)
            keeps = wave.epoch + 1 in kept
            properties = wave.advance(pool, bar.update, measure=keeps)
            found = {"first": begin, "epoch": wave.epoch}
            if keeps:
                # a run that died between append and write_resume has added these states already
                kept_before = len([epoch for epoch in kept if epoch <= wave.epoch])
                if writer.submitted < begin * len(kept) + kept_before * len(wave.recipes):
                    writer.append(wave.state[0], properties)
                found["median_test_accuracy"] = float(properties["test_accuracy"].median())
            write_resume(writer.path, begin, wave)
            log.append(writer.path, found | {"dropped": writer.dropped})
    bar.close()


def check_config(path: Path, config, command: str = "zoo make", may_change: Sequence[str] = MAY_CHANGE) -> None:
    """Raises ValueError if there is a zoo that was begun with another configuration, or by another command."""
    if (path / MANIFEST).exists():
        require_same(command, path, config, read_manifest(path)["provenance"].get("config"), may_change)


def config_of(path: Path, provenance: object) -> Config:
    """The configuration that ``zoo make`` wrote into a provenance of the zoo at ``path``, which may be anybody's.

    Raises:
        ValueError: If another program wrote it.
    """
    made = provenance.get("config") if isinstance(provenance, dict) else None
    try:
        return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in made.items()})
    except (AttributeError, KeyError, TypeError) as error:
        what = f"that of fastws zoo make, which says what networks are, got the config {str(made)[:80]}"
        raise ValueError(f"{path}: provenance must be {what}") from error


@contextmanager
def workers(config: Config, job: Job) -> Iterator[Executor]:
    """Threads that each train a group of networks; networks that train one by one get all cores instead."""
    before = torch.get_num_threads()
    cores = config.threads or before
    alone = bool(job.one_by_one) or config.device != "cpu"
    inside = cores if alone else 1
    try:
        with ThreadPoolExecutor(1 if alone else cores, initializer=torch.set_num_threads, initargs=(inside,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def run(config: Config, regularise: Regularise | None = None) -> None:
    if config.explain:
        print(explain(config, prepare(config)))
        return
    zoo = make(config, regularise)
    if ranks.place().rank > 0:
        return
    last = zoo.numbers("epoch") == config.kept_epochs[-1]
    accuracy = torch.from_numpy(zoo.numbers("test_accuracy")[last])
    print(f"{zoo.path}: {len(zoo):,} states of {config.networks:,} networks, {zoo.dropped} left out as not finite")
    if len(accuracy):
        low, middle, high = accuracy.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=accuracy.dtype)).tolist()
        print(f"test accuracy, 10 %, 50 % and 90 % of the networks: {low:.3f}, {middle:.3f}, {high:.3f}")
