"""What ``fastws zoo make`` would do: how much, by which way and why, and for how long."""

from collections.abc import Callable
from dataclasses import asdict
from math import prod
from time import perf_counter

import torch

from fastws import _native
from fastws.layout.layout import Layout
from fastws.zoo.making import ranks
from fastws.zoo.making.recipes import Part
from fastws.zoo.making.training import GROUP, Wave

OPTIONS = ("zoo", "explain", "networks", "epochs")  # that need no line of their own
SECONDS = 0.3  # of a timing, at least
PROPERTIES = 0.01  # of the bytes of weights, about: what properties and headers add


def explain(config, job) -> str:
    """The lines to print.

    Args:
        config: Of ``zoo make``.
        job: What ``make.prepare`` made of it.
    """
    weights = Layout.from_checkpoint(job.plan.build()).num_weights
    states = config.networks * len(config.kept_epochs)
    size = states * weights * (2 if config.dtype == "bf16" else 4)
    parts = {name: part for name, part in (("train", job.data.train), *job.data.evaluated().items())}
    counts = ", ".join(f"{len(part.y):,} {name}" for name, part in parts.items())
    combinations = prod(len(getattr(config, name)) for name in ("activations", "dropouts", "inits", "optimizers"))
    combinations *= len(config.lrs) * len(config.weight_decays)
    lines = [
        f"networks    {config.networks:,} of {weights:,} weights; combinations of hyperparameters: {combinations:,}",
        f"images      {counts}, {' x '.join(map(str, job.plan.image_shape))}, {job.plan.num_classes} classes",
        f"steps       {config.epochs} epochs of {job.plan.num_steps(len(job.data.train.y)):,} steps per network",
        f"states      {states:,}, {size / 1e9:.3g} GB on disk and about {PROPERTIES:.0%} for their properties",
        f"way         {way(config, job)}",
        f"time        about {duration(estimate(config, job))}",
    ]
    options = {name: value for name, value in asdict(config).items() if name not in OPTIONS}
    return "\n".join([*lines, "", *(f"{name:<15} {value}" for name, value in options.items())])


def way(config, job) -> str:
    if job.one_by_one:
        return f"one network after the other in plain PyTorch, because {job.one_by_one}"
    served = _native.server("small_cnn_step", config.device)
    return f"side by side, small_cnn_step on {config.device}: {served}"


def estimate(config, job) -> float:
    """Seconds, from a few steps of one group and the evaluation of a few images."""
    few = job.recipes[: 1 if job.one_by_one else GROUP if config.device == "cpu" else config.wave]
    threads, cores = torch.get_num_threads(), config.threads or torch.get_num_threads()
    torch.set_num_threads(cores if job.one_by_one else 1)
    try:
        wave = Wave(job.plan, few, job.data, not job.one_by_one)
        members, trainer, state = list(range(len(few))), wave.trainer, wave.state.clone()
        orders = torch.stack([wave.orders.next(member, 1) for member in members])
        batch_size, test = job.plan.batch_size, job.data.test
        steps = max(1, len(job.data.train.y) // batch_size)
        train = timed(lambda count: trainer.train_epoch(members, state, orders[:, : count * batch_size], 1), steps)
        measure = timed(lambda count: trainer.measure(members, state[0], Part(*(x[:count] for x in test))), len(test.y))
    finally:
        torch.set_num_threads(threads)
    images = sum(len(part.y) for part in job.data.evaluated().values())
    if job.plan.train_metrics == "evaluated":
        images += len(job.data.train.y)
    seconds = (
        config.epochs * job.plan.num_steps(len(job.data.train.y)) * train + len(config.kept_epochs) * images * measure
    )
    side_by_side = cores if not job.one_by_one and config.device == "cpu" else 1
    return seconds * config.networks / len(few) / side_by_side / ranks.place().world


def timed(work: Callable[[int], object], most: int) -> float:
    """Seconds per unit of ``work(count)``, beyond what it takes for one; at most so many units are done."""
    work(1)  # what is done at the first time only
    begin = perf_counter()
    work(1)
    first, count = perf_counter() - begin, 1
    while True:
        count = min(2 * count, most)
        begin = perf_counter()
        work(count)
        seconds = perf_counter() - begin - first
        if seconds > SECONDS or count == most:
            return max(seconds, 0.0) / max(count - 1, 1)


def duration(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
