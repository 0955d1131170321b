"""Pretraining of SANE on zoos (Schürholt, Mahoney and Borth, ICML 2024, arXiv 2406.09997, section 3).

Per step: choose B networks and a window of tokens in each. View 1 is the window of the network as it is, view 2 that of
the network with its neurons permuted; the weights of both are multiplied by noise. Minimise the error of reconstructing
both, and the contrastive loss between them. Networks may be of several architectures: those of several zoos.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastws
from fastws.nn.sane import PRESETS, SANE, SANEConfig
from fastws.runs import processes, rates
from fastws.train import loop, sharding
from fastws.train.sane.batches import (
    Batch,
    Source,
    count_windows,
    draw,
    make_hub_source,
    make_source,
    read_splits,
)
from fastws.train.sane.behaviour import Behaviour
from fastws.train.sane.config import Config
from fastws.windows.ahead import Ahead
from fastws.windows.hub import Hub, Trace, open_hub
from fastws.windows.places import LAYER_TYPES, PARTS
from fastws.windows.zoos import Group
from fastws.zoo.format.zoo import Zoo

SMALLEST_STD = 1e-8

Look = Callable[[nn.Module], loop.Metrics]  # at a model while it is trained
MakeLook = Callable[[Config, Zoo, dict[str, Any]], Look]  # from the first zoo and what is saved with the model


def run(config: Config, make_look: MakeLook | None = None, trace: Trace | None = None) -> None:
    """Trains.

    ``make_look`` and ``trace``, see ``open_hub``, come from above: trainers know nothing of what samples from what they
    learn, nor of other libraries.
    """
    with processes.join(config.device) as device:
        networks = [Zoo.open(folder) for folder in config.zoo] if config.hub is None else find_hub(config, trace)
        metrics = train(config, networks, device, make_look)
        if processes.rank() == 0:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(numbers or f"all {config.steps or 'its'} steps were done before")
            print(f"model and log: {Path(config.out) / 'checkpoint.pt'}, {Path(config.out) / 'log.jsonl'}")


def find_hub(config: Config, trace: Trace | None = None) -> Hub:
    options = {name: getattr(config, name) for name in ("token_size", "norm", "span")}
    options |= {"trace": None if config.permute == "none" else trace}
    return open_hub(config.hub, standardize=config.standardize and config.statistic != "none", **options)


def train(
    config: Config, zoos: Zoo | Sequence[Zoo] | Hub, device: torch.device, make_look: MakeLook | None = None
) -> dict[str, float]:
    """Trains on open zoos, or on a hub; see ``loop.train``.

    Args:
        config: What is trained, and how.
        zoos: The networks.
        device: Of this process.
        make_look: Makes what is called with the model every ``sample_every`` steps.
    """
    hub, zoos = (zoos, []) if isinstance(zoos, Hub) else (None, [zoos] if isinstance(zoos, Zoo) else list(zoos))
    if config.sample_every is not None and make_look is None:
        what = "None where nothing is given that samples; call fastws train sane"
        raise ValueError(f"train sane: sample_every must be {what}, got {config.sample_every}")
    if config.batch_size % processes.world():
        count = processes.world()
        raise ValueError(f"train sane: batch_size must be a multiple of {count} processes, got {config.batch_size}")
    source = make_source(config, zoos, device) if hub is None else make_hub_source(config, hub)
    config = with_steps(config, source)
    torch.manual_seed(config.seed)
    model = SANE(model_config(config, source))
    if config.shard and processes.world() > 1:
        sharding.shard(model, device, ("encode", "decode"))
    model = model.to(device)
    if processes.rank() == 0:
        tell(config, source, hub)
    extra = describe(config, source, model.config, hub)
    behaviour = make_behaviour(config, zoos, source)
    look = None if config.sample_every is None else (config.sample_every, make_look(config, zoos[0], extra))

    def evaluate(model: nn.Module) -> loop.Metrics:
        found = {group.name: evaluate_group(config, model, source, group, behaviour) for group in source.groups}
        found = {name: metrics for name, metrics in found.items() if metrics}
        together = {
            name: torch.stack([metrics[name] for metrics in found.values()]).mean()
            for name in next(iter(found.values()))
        }
        several = len(source.groups) > 1
        each = {f"{group}/{name}": x for group, some in found.items() for name, x in some.items() if several}
        return together | each

    compute = partial(losses, config, behaviour=behaviour)
    compute = torch.compile(compute) if config.compile and behaviour is None else compute
    cut = partial(draw, config, source, "train", rows=source.rows("train"))
    with Ahead(cut, source.population, device) as batch:
        return loop.train(
            config,
            model=model,
            optimizer=loop.adamw(model, config),
            batch=batch,
            loss=compute,
            evaluate=evaluate if len(source.rows("val")) else None,
            extra=extra,
            carried=None if behaviour is None else behaviour.carried,
            set_rates=set_rates,
            look=look,
        )


def with_steps(config: Config, source: Source) -> Config:
    """Steps that make so many passes, where passes are asked for."""
    if config.passes is None:
        return config
    rows = source.rows("train")
    count = int(count_windows(source, rows).sum()) if config.windows == "covering" else len(rows)
    return replace(config, passes=None, steps=ceil(config.passes * count / config.batch_size))


def set_rates(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    rate, momentum = rates.one_cycle(config.lr, step, round(config.cycle * config.steps))
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = rate, (momentum, group["betas"][1])


def tell(config: Config, source: Source, hub: Hub | None = None) -> None:
    """Prints what is trained on, and what may be unexpected of it."""
    population = source.population
    if hub is not None:
        print(*hub.describe(), sep="\n")
        short = int((population.num_tokens < source.window).sum())
        if short:
            print(f"note: {short:,} models have fewer tokens than a window of {source.window}; the rest is padding")
    if config.cycle != 1:
        first, last = (
            rates.one_cycle(config.lr, step, round(config.cycle * config.steps))[0] for step in (0, config.steps - 1)
        )
        print(f"rate: {first:.3g} at first, {last:.3g} at last, of a cycle {config.cycle:g} times as long as the run")
    if hub is not None:
        return
    if population.arena is not None and len(source.groups):
        print("note: networks are read from their files as windows are cut; --memory says how much may be held")
    for group, kind in zip(source.groups, population.kinds, strict=False):
        if kind.layout.num_tokens < source.window:
            count = kind.layout.num_tokens
            print(f"note: networks of {group.name} have {count} tokens, fewer than a window; the rest is padding")


def describe(config: Config, source: Source, model: SANEConfig, hub: Hub | None = None) -> dict[str, Any]:
    """What is saved for those who use the model: its size, and how weights become its tokens, of each architecture.

    Of a hub, which may have thousands, the one that most models have, and what tells whether it is the same hub.
    """
    kinds = source.population.kinds if hub is None else [source.population.kinds[hub.usual]]
    kinds = [{"layout": kind.layout.to_dict(), "mean": kind.mean, "std": kind.std} for kind in kinds]
    extra = {"sane": asdict(model), "aligned": config.aligned} | kinds[0]
    extra["networks"] = {split: len(source.rows(split)) for split in ("train", "val")}
    if hub is not None:
        # first, so that it is what is named where another hub is found
        permuted = sum(kind.symmetry is not None for kind in source.population.kinds)
        standardized = hub.population.measured.standardize
        return {"hub": {"digest": hub.digest, "standardize": standardized, "permuted": permuted}} | extra
    return extra | ({"others": kinds[1:]} if len(kinds) > 1 else {})


def evaluate_group(
    config: Config, model: nn.Module, source: Source, group: Group, behaviour: Behaviour | None = None
) -> loop.Metrics:
    """Means over the same batches of a zoo at every evaluation; nothing where it has no networks to validate on."""
    if not len(group.val):
        return {}
    device = next(model.parameters()).device
    batches = [
        losses(config, model, move(draw(config, source, "val", n, group.val), device), behaviour)
        for n in range(config.val_batches)
    ]
    return {name: torch.stack([metrics[name] for metrics in batches]).mean() for name in batches[0]}


def move(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(x.to(device) for x in batch[:4]), *batch[4:])


def make_behaviour(config: Config, zoos: Sequence[Zoo], source: Source) -> Behaviour | None:
    if config.behaviour == 0:
        return None
    if len(zoos) > 1:
        raise ValueError(f"train sane: zoo must be one folder for behaviour, got {len(zoos)}")
    (kind,) = source.population.kinds
    if source.window != kind.layout.num_tokens:
        what = f"the {kind.layout.num_tokens} tokens of a whole network for behaviour, got {source.window}"
        raise ValueError(f"train sane: window must be {what}; give --window {kind.layout.num_tokens}")
    chosen = torch.cat([*read_splits(config, zoos[0]).values()])
    options = {name: getattr(config, name) for name in ("queries", "queries_from", "seed")}
    device = source.population.device
    return Behaviour(zoos[0], chosen, kind.layout, kind.mean, kind.std, device, share=config.behaviour, **options)


def losses(config: Config, model: nn.Module, batch: Batch, behaviour: Behaviour | None = None) -> loop.Metrics:
    """``gamma * NT-Xent + (1 - gamma) * reconstruction`` of a batch, and the share of the variance reconstructed."""
    if model.training and config.dropout:
        torch.manual_seed(batch.seed)
    _, prediction, projection = model(batch.values, batch.positions)
    windows = prediction.float().flatten(0, 1), batch.target.flatten(0, 1), batch.lengths.repeat(2, 1)
    reconstruction = reconstruction_loss(*windows, config.normalize)
    first, second = processes.gather(projection.float().transpose(0, 1)).unbind(1)
    contrast = fastws.nt_xent(first.contiguous(), second.contiguous(), config.temperature)
    loss = config.gamma * contrast + (1 - config.gamma) * reconstruction
    metrics = {"loss": loss, "reconstruction": reconstruction, "contrast": contrast}
    if behaviour is not None:
        metrics |= behaviour.compare(prediction, batch.networks, batch.stream)
        terms = metrics | {"structure": reconstruction}
        metrics["loss"] = behaviour.combine(config.gamma, terms, torch.is_grad_enabled())
    if not torch.is_grad_enabled():
        # of the whole batch, however many processes share it: a ratio of sums is not a mean of ratios
        metrics["r2"] = 1 - fastws.masked_mse(*map(processes.gather, windows), normalize="batch")
    return metrics


def reconstruction_loss(prediction: Tensor, target: Tensor, lengths: Tensor, normalize: str) -> Tensor:
    """The error of tokens ``[B, W, T]``, over each process's share; see ``masked_mse``.

    ``"window"`` divides the squares of a window by the variance of its entries, ``"token"`` those of entry t of all
    tokens by the variance of these (arXiv 2504.10141 and WeightCLIP); padding counts nowhere.
    """
    if normalize not in ("window", "token"):
        return fastws.masked_mse(prediction, target, lengths, normalize=normalize)
    there = torch.arange(target.shape[-1], device=target.device) < lengths[..., None]
    axes = (1, 2) if normalize == "window" else (0, 1)
    count = there.sum(axes, keepdim=True).clamp(min=1)
    mean = (target * there).sum(axes, keepdim=True) / count
    variance = ((target - mean) * there).square().sum(axes, keepdim=True) / count
    # entries that never vary, those of a single token for one, are not divided
    scale = torch.where(variance > SMALLEST_STD**2, variance, 1).rsqrt()
    return fastws.masked_mse(prediction * scale, target * scale, lengths, normalize="masked")


def model_config(config: Config, source: Source) -> SANEConfig:
    sizes = PRESETS[config.size] | {"window": source.window, "token_size": source.population.token_size}
    given = {name: getattr(config, name) for name in ("width", "heads", "depth", "latent", "dropout", "positions")}
    sizes |= {name: size for name, size in given.items() if size is not None}
    sizes |= {"relative": config.relative, "layer_types": len(LAYER_TYPES) if config.layer_types else 0}
    if sizes.get("positions", "learned") == "learned":
        sizes["max_positions"] = find_max_positions(config, source)
    else:
        sizes["max_positions"] = (1, 1, 1)
    return SANEConfig(**sizes)


def find_max_positions(config: Config, source: Source) -> tuple[int, int, int]:
    """How many positions tables must have: those that are asked for, or else needed."""
    if config.relative:
        return (PARTS, PARTS, PARTS)
    found = torch.stack([kind.layout.positions.amax(0) + 1 for kind in source.population.kinds])
    needed = tuple(found.amax(0).tolist())
    have = config.max_positions or needed
    if any(a < b for a, b in zip(have, needed, strict=True)):
        raise ValueError(f"train sane: max_positions must be at least {needed}, got {have}")
    return have
