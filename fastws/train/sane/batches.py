"""Batches of windows: which networks and tokens, how views differ, and where the networks are."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.devices import to_device
from fastws.nn.sane import PRESETS
from fastws.ops.token_views import Noise
from fastws.random.integers import epoch_rows
from fastws.random.philox import philox_reference
from fastws.runs import processes
from fastws.train.sane.config import Config
from fastws.windows.hub import Hub, split_models
from fastws.windows.places import Places, places_of
from fastws.windows.population import Population, align, cut, random_permutations, rows_of_tokens
from fastws.windows.zoos import Group, layouts_of, open_zoos
from fastws.zoo.format.rows import rows_of_epochs
from fastws.zoo.format.zoo import Zoo

# where the draws of each kind begin in the stream of random numbers; noise takes 2 * step and 2 * step + 1
VALIDATION, RECTANGLE, START, PERMUTATION, ORDER = 2**58, 2**59, 2**60, 2**61, 2**62
CPU = torch.device("cpu")


class Source(NamedTuple):
    """What windows are cut from."""

    population: Population
    groups: tuple[Group, ...]  # the networks of each zoo
    window: int
    places: Places | None  # what the model is told beside positions; on the device

    def rows(self, split: str) -> Tensor:
        """Networks of a split, int64, on the CPU."""
        return torch.cat([getattr(group, split) for group in self.groups])


class Batch(NamedTuple):
    values: Tensor  # [2, B, W, T], the two views
    target: Tensor  # [2, B, W, T]
    lengths: Tensor  # [B, W] int32
    positions: Tensor  # [B, W, 3] or, where all windows start at the same token of one architecture, [W, 3], int32
    seed: int = 0  # of what the model draws
    networks: tuple[int, ...] = ()  # rows of the population
    stream: int = 0  # of random numbers, for what is drawn beside windows


def make_source(config: Config, zoos: Zoo | Sequence[Zoo], device: torch.device) -> Source:
    """The networks to train and to validate on, on the device if they fit there."""
    zoos = [zoos] if isinstance(zoos, Zoo) else list(zoos)
    layouts = layouts_of(zoos, config.token_size, config.norm, config.span)
    window = window_of(config, max(layout.num_tokens for layout in layouts))
    for zoo in zoos:
        if config.permute != "none" and zoo.symmetry is None:
            raise ValueError(
                f"train sane: zoo must have a symmetry to permute by, got none in {zoo.path}; permute none"
            )
    chosen = [read_splits(config, zoo) for zoo in zoos]
    for zoo, rows in zip(zoos, chosen, strict=True):
        if len(rows["train"]) < 2:
            raise ValueError(
                f"train sane: zoo must have 2 networks to train on, got {len(rows['train'])} in {zoo.path}"
            )
    population, groups = open_zoos(
        zoos, chosen, layouts, device,
        permute=config.permute != "none",
        aligned=config.aligned,
        statistic=config.statistic if config.standardize and config.statistic != "none" else None,
        memory=config.memory,
    )  # fmt: skip
    return Source(population, tuple(groups), window, describe_places(config, population))


def make_hub_source(config: Config, hub: Hub) -> Source:
    """The models of a folder to train and to validate on; their windows are always cut on the CPU, from the files."""
    population = hub.population
    train, val = split_models(hub)
    if len(train) < 2:
        raise ValueError(f"train sane: hub must have 2 models to train on, got {len(train)} in {hub.path}")
    window = window_of(config, int(population.num_tokens.max()))
    group = Group(hub.path.name, train, val)
    return Source(population, (group,), window, describe_places(config, population))


def window_of(config: Config, longest: int) -> int:
    """Tokens of a window, of networks of which the longest has so many."""
    window = min(PRESETS[config.size]["window"], longest) if config.window is None else config.window
    if window > longest:
        raise ValueError(f"train sane: window must be at most the {longest} tokens of a network, got {window}")
    return window


def describe_places(config: Config, population: Population) -> Places | None:
    if not (config.relative or config.layer_types):
        return None
    return Places(*(x.to(population.device) for x in places_of(*(kind.layout for kind in population.kinds))))


def read_splits(config: Config, zoo: Zoo) -> dict[str, Tensor]:
    """Rows of the zoo to train and to validate on."""
    return {split: rows_of_epochs(zoo, zoo.split(split), config.epochs, "train sane") for split in ("train", "val")}


def draw(config: Config, source: Source, split: str, step: int, rows: Tensor | None = None) -> Batch:
    """This process's share of batch ``step`` of a split, or of ``rows`` of it; the same for any number of processes.

    Each process cuts the windows of all, because the noise of a window depends on its place in the batch: that costs
    microseconds beside the milliseconds of the model. Of files it reads its own share only.
    """
    training, batch, population = split == "train", config.batch_size, source.population
    device = population.device
    stream = step + (0 if training else VALIDATION)
    model, start = choose(config, source, source.rows(split) if rows is None else rows, step, stream)
    if population.arena is not None:
        model, start = leave_to_others(model), leave_to_others(start)
    model, start = model.repeat(2), start.repeat(2)
    permutations = None
    if config.permute != "none":
        flips = config.flips and population.may_flip is not None and population.may_flip[to_device(model, device)]
        still = batch if config.permute == "second" else 0
        permutations = random_permutations(
            population, model, config.seed, PERMUTATION + stream, flips=flips, still=still
        )
    views = partial(
        cut, population, model, start, source.window, align(population, model, permutations),
        seed=config.seed, offset=stream,
    )  # fmt: skip

    def own(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, batch))[:, processes.share(batch)]  # [2, B, ..]

    augmentation = {"noise": Noise(config.noise, config.additive), "erase": config.erase} if training else {}
    tokens = views(**augmentation)
    values, lengths, positions = map(own, tokens)
    if training and config.rectangle:
        values = values * own(outside_rectangle(config, tokens.values, stream))
    target = own(views().values) if training and config.target == "clean" else values
    if source.places is not None:
        layer = own(rows_of_tokens(population, to_device(model, device), tokens.positions))
        told = {"relative": config.relative, "layer_types": config.layer_types}
        positions = source.places.describe(positions, layer, **told)
    # views of one window have the same positions, and so have all windows of a shared one
    shared = config.shared_window and len(population.kinds) == 1
    seed = (config.seed + stream * processes.world() + processes.rank()) % 2**63
    networks = tuple(model[:batch][processes.share(batch)].tolist())
    return Batch(values, target, lengths[0], positions[0, 0] if shared else positions[0], seed, networks, stream)


def leave_to_others(x: Tensor) -> Tensor:
    """What is chosen for each window of a batch, with the first of this process in the places of other processes."""
    own = processes.share(len(x))
    mine = x[own.start].expand_as(x).clone()
    mine[own] = x[own]
    return mine


def choose(config: Config, source: Source, rows: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor]:
    """Networks and first tokens of the windows of a batch, int64 ``[B]`` each, on the CPU."""
    batch = config.batch_size
    if config.windows == "covering":
        ends = count_windows(source, rows).cumsum(0)
        number = epoch_rows(int(ends[-1]), batch, config.seed, ORDER, step)
        place = torch.searchsorted(ends, number, right=True)
        first = torch.cat([ends.new_zeros(1), ends])[place]
        model, start = rows[place], (number - first) * source.window
        # the last window of a network ends with it
        return model, torch.minimum(start, (source.population.num_tokens[model] - source.window).clamp(min=0))
    model = rows[epoch_rows(len(rows), batch, config.seed, ORDER, step)]
    words = philox_reference(config.seed, START + stream, batch, CPU)
    if config.shared_window:
        words = words[:1].expand(batch)
    return model, words * (source.population.num_tokens[model] - source.window + 1).clamp(min=1) >> 32


def count_windows(source: Source, rows: Tensor) -> Tensor:
    """Windows that it takes to see all tokens of networks, int64."""
    return -(-source.population.num_tokens[rows] // source.window)


def outside_rectangle(config: Config, values: Tensor, stream: int) -> Tensor:
    """0 in the rectangle of each window that is erased, else 1: ``[B, W, T]``; a fiftieth to a third of the window.

    As RandomErasing of torchvision draws it, of which the published code uses one for a whole batch: its area, then
    the ratio of its sides in [0.3, 3.3], evenly in the logarithm.
    """
    count, window, size = values.shape
    words = philox_reference(config.seed, RECTANGLE + stream, 5 * count, CPU).view(5, count)
    drawn, area, ratio, top, left = words.double() / 2**32
    area = (0.02 + (0.33 - 0.02) * area) * window * size
    ratio = torch.exp(torch.log(torch.tensor(0.3)) + ratio * torch.log(torch.tensor(3.3 / 0.3)))
    height = (area * ratio).sqrt().round().clamp(1, window)
    width = (area / ratio).sqrt().round().clamp(1, size)
    first, begin = (top * (window - height + 1)).floor(), (left * (size - width + 1)).floor()
    token, entry = torch.arange(window), torch.arange(size)
    tokens = (token >= first[:, None]) & (token < (first + height)[:, None])
    entries = (entry >= begin[:, None]) & (entry < (begin + width)[:, None])
    erased = tokens[:, :, None] & entries[:, None] & (drawn < config.rectangle)[:, None, None]
    return to_device((~erased).float(), values.device)
