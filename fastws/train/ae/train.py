"""Hyper-representations: an autoencoder of whole networks (Schürholt et al., arXiv 2110.15288 and 2209.14733).

Per step: choose B networks of the zoo and see each twice, its neurons permuted, its weights noised and partly erased.
Minimise the error of reconstructing both, every layer in units of its spread, and the contrast between the two codes.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import fastws
from fastws.devices import to_device
from fastws.layout.spread import layer_offsets, layer_std, per_weight
from fastws.nn.hyper_representation import HyperRepresentation, HyperRepresentationConfig, rows_of
from fastws.nn.perceptron import linear_widths
from fastws.random.philox import normal_reference
from fastws.runs import processes
from fastws.train import files, loop
from fastws.train.ae.plateau import Plateau
from fastws.train.ae.presets import PRESETS, Preset
from fastws.train.ae.views import CODE, Augmentation, Batch, Source, choose, view
from fastws.zoo.alignment import aligned_rows
from fastws.zoo.format.rows import rows_of_epochs
from fastws.zoo.format.zoo import Zoo

HIDDEN_LAYERS = 10  # of the published perceptron, whose widths fall by equal steps
BEST = "best.pt"  # beside checkpoint.pt, which is the last
NOTHING = 1e-10  # a share of the loss below which it is not computed
VALIDATION_NETWORKS = 512  # that an evaluation looks at, at most
Contrast = Literal["simclr", "positive", "positive-reference"]


@dataclass(frozen=True, kw_only=True)
class Config(loop.Config):
    """Trains an autoencoder of whole networks. A preset gives a value to every option that is None.

    fastws train ae --zoo zoos/digits --out runs/ae
    fastws train ae --zoo zoos/mnist-s-seed --epochs 21 25 --preset mnist-seed --out runs/ae-published
    """

    zoo: str  # folder of the zoo
    epochs: tuple[int, int] | None = None  # first and last epoch of the states to train on; all by default
    aligned: bool = False  # networks in the order that fastws zoo align found

    preset: Preset = "cpu"  # cpu and cpu-transformer learn a zoo of small networks in minutes; others are published
    passes: int | None = None  # passes over the training networks; give the steps unless steps are given
    steps: int | None = None  # of training, those before an interruption included
    batch_size: int | None = None  # networks per step, over all processes
    lr: float | None = None  # the largest learning rate
    weight_decay: float | None = None  # as the optimizer understands it
    optimizer: Literal["adam", "adamw", "sgd"] | None = None  # which updates the model; sgd has momentum 0.9
    schedule: Literal["constant", "plateau", "one-cycle"] | None = None  # plateau: rate x 0.3 after 10 passes in vain

    encoding: Literal["vector", "weight", "neuron", "neuron_in_out"] | None = None  # what a token is; vector: no tokens
    latent: int | None = None  # entries of the code
    bounded: bool | None = None  # pass the code through tanh
    dropout: float | None = None  # probability of dropout in the model
    hidden: tuple[int, ...] | None = None  # widths of the encoder's hidden layers, for encoding vector
    activation: str | None = None  # of the encoder's hidden layers, for encoding vector
    layer_norm: bool | None = None  # norms before the activations, for encoding vector
    width: int | None = None  # of the transformers
    heads: int | None = None  # of the attention
    depth: int | None = None  # blocks of the encoder, and of the decoder
    feed_forward: int | None = None  # width of the hidden layer of each block
    compression: Literal["token", "average", "linear"] | None = None  # what of the tokens becomes the code
    decompression: Literal["linear", "repeat"] | None = None  # from the code to a token each, or to one for all
    decoder_bias: bool | None = None  # add a learned number to each entry of the code
    debedder_depth: int | None = None  # layers from a token to its weights
    embedder: Literal["linear", "attn"] | None = None  # what makes a token of the weights of a neuron
    head_depth: int | None = None  # hidden layers of the projection that is contrasted; 0: the code itself
    head_width: int | None = None  # width of the hidden layers of the projection
    projection: int | None = None  # outputs of the projection that is contrasted

    standardize: Literal["none", "layer", "center"] | None = None  # by each layer's std; center: about the mean network
    layerwise: bool | None = None  # the error of each layer in units of its std (LWLN)
    reduction: Literal["global_mean", "layer_mean"] = "global_mean"  # all weights count alike, or all layers
    error_clip: float | None = None  # largest squared error of a weight
    gamma: float | None = None  # weight of the contrast; reconstruction gets 1 - gamma
    contrast: Contrast | None = None  # simclr: NT-Xent; positive: pairs pulled together; -reference: as released
    temperature: float = 0.1  # of the contrast
    code_variance: float = 0.0  # weight of the mean variance of the code's entries
    code_norm: float = 0.0  # weight of the mean norm of the code

    permute: bool | None = None  # permute the neurons of both views at random
    flips: bool = True  # where neurons are permuted, change their signs at random too, if the network allows it
    noise: float | None = None  # std of the factors that weights are multiplied by
    additive: float | None = None  # std of what is added to weights, in units of their layer's std
    erase: float = 0.0  # share of the weights that are erased, each on its own
    block_erase: float | None = None  # probability that 2 to 33 % of the weights, one block, are erased
    erase_value: float | None = 0.0  # what erased weights are set to; None: standard normals
    code_noise: float | None = None  # std of what is added to codes, in units of their std over the batch
    target: Literal["view", "clean"] = "view"  # reconstruct what the encoder saw, or the same without noise and erasing

    def __post_init__(self):
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"train ae: gamma must be in [0, 1], got {self.gamma}")
        if self.batch_size < 2:
            raise ValueError(f"train ae: batch_size must be at least 2, for batch norm, got {self.batch_size}")


def run(config: Config) -> None:
    with processes.join(config.device) as device:
        metrics = train(config, Zoo.open(config.zoo), device)
        if processes.rank() == 0:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/r2_" not in name)
            print(numbers or "all steps were done before")
            last, best, log = (Path(config.out) / name for name in ("checkpoint.pt", BEST, "log.jsonl"))
            print(f"model: {last}; the best by validation: {best}; log: {log}")


def train(config: Config, zoo: Zoo, device: torch.device) -> dict[str, float]:
    """Trains on an open zoo; see ``loop.train``."""
    source = make_source(config, zoo, device)
    batch = min(config.batch_size, len(source.rows["train"]))
    if batch % processes.world():
        count = processes.world()
        raise ValueError(f"train ae: batch_size must be a multiple of {count} processes, got {batch}")
    per_pass = max(1, len(source.rows["train"]) // batch)
    config = replace(config, steps=config.steps or config.passes * per_pass, batch_size=batch)
    objective = Objective(config, source)
    torch.manual_seed(config.seed)
    model = HyperRepresentation(model_config(config, source)).to(device)
    objective.scale(model)
    optimizer = make_optimizer(model, config)
    plateau = Plateau(per_pass, device)
    best = torch.tensor(torch.inf, dtype=torch.float64)

    def loss(model: nn.Module, drawn: Batch) -> loop.Metrics:
        metrics = objective.losses(model, drawn)
        plateau.see(metrics["loss"])
        return metrics

    def evaluate(model: nn.Module) -> loop.Metrics:
        found = objective.evaluate(model)
        value = processes.average({"loss": found["loss"]})["loss"]
        if value < best and processes.rank() == 0:
            files.save(Path(config.out) / BEST, {"extra": extra, "model": unwrapped(model).state_dict()})
        best.fill_(min(value, best.item()))
        return found

    extra = {
        "hyper_representation": model.config.to_dict(),
        "layout": source.layout.to_dict(),
        "aligned": config.aligned,
        "networks": {split: len(rows) for split, rows in source.rows.items()},
        "offsets": objective.offsets.cpu(),
        "sigma": objective.sigma.cpu(),
    }
    set_rates = {"constant": constant, "plateau": plateau.set_rates, "one-cycle": loop.set_one_cycle}[config.schedule]
    return loop.train(
        config,
        model=model,
        optimizer=optimizer,
        batch=objective.draw,
        loss=loss,
        evaluate=evaluate if len(source.rows["val"]) > 1 else None,
        extra=extra,
        carried={"best": best} | plateau.carried,
        set_rates=set_rates,
    )


def unwrapped(model: nn.Module) -> HyperRepresentation:
    """The model in its wrapper for several processes, if it has one."""
    return getattr(model, "module", model)


def constant(optimizer: torch.optim.Optimizer, config: loop.Config, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = config.lr


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **options)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), fused=True, **options)


class Objective:
    """What is minimised, and how it is measured."""

    def __init__(self, config: Config, source: Source):
        self.config, self.source = config, source
        training = source.weights[: len(source.rows["train"])]
        self.offsets = layer_offsets(source.layout)
        self.mean = training.double().mean(0).float()
        spread = layer_std(training, self.offsets)
        self.sigma = (spread if config.layerwise else torch.ones(len(spread))).to(training.device)
        # what a prediction of the mean network costs in each layer, per network
        around = [((training[:, a:b] - self.mean[a:b]) ** 2).sum().double() for a, b in self.offsets.tolist()]
        self.around = torch.stack(around).to(training.device) / self.sigma.double() ** 2 / len(training)
        self.offsets = self.offsets.to(training.device)
        names = {"permute", "noise", "additive", "erase", "block_erase", "erase_value", "flips"}
        self.augmentation = Augmentation(**{name: getattr(config, name) for name in names})

    def scale(self, model: HyperRepresentation) -> None:
        """Tells the model how to put weights on one scale."""
        if self.config.standardize == "none":
            return
        training = self.source.weights[: len(self.source.rows["train"])]
        shift = self.mean if self.config.standardize == "center" else torch.zeros_like(self.mean)
        model.shift.copy_(shift)
        model.scale.copy_(per_weight(layer_std(training - shift, self.offsets.cpu()), self.offsets.cpu(), len(shift)))

    def draw(self, step: int) -> Batch:
        """This process's share of batch ``step``; the same whatever the number of processes."""
        config = self.config
        model = choose(self.source, "train", config.batch_size, config.seed, step)
        views = target = view(self.source, model, self.augmentation, config.seed, step)
        if config.target == "clean":
            plain = Augmentation(config.permute, flips=config.flips)
            target = view(self.source, model, plain, config.seed, step)
        noise = None
        if config.code_noise > 0:
            count = 2 * config.batch_size * config.latent
            noise = normal_reference(config.seed, CODE + step, count, torch.device("cpu")).view(-1, config.latent)
            noise = to_device(noise * config.code_noise, views.device)
        return Batch(self.own(views), self.own(target), None if noise is None else self.own(noise))

    def own(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (2, -1))[:, processes.share(self.config.batch_size)].flatten(0, 1)

    def losses(self, model: nn.Module, batch: Batch) -> loop.Metrics:
        """``gamma * contrast + (1 - gamma) * reconstruction`` and the penalties of the code."""
        config = self.config
        z, prediction, projection = model(batch.views, batch.code_noise, 2)
        error, sums = self.reconstruction(prediction, batch.target)
        metrics = {"loss": (1 - config.gamma) * error, "reconstruction": error}
        if config.gamma > NOTHING:
            metrics["contrast"] = contrast(projection.float(), config.contrast, config.temperature)
            metrics["loss"] = config.gamma * metrics["contrast"] + (
                metrics["loss"] if config.gamma < 1 - NOTHING else 0
            )
        first = z.float().chunk(2)[0]
        if config.code_variance > 0:
            metrics["loss"] = metrics["loss"] + config.code_variance * first.var(0).mean()
        if config.code_norm > 0:
            metrics["loss"] = metrics["loss"] + config.code_norm * first.norm(dim=1).mean()
        share = sums.detach() / len(prediction) / self.around
        metrics |= {f"r2_layer{number}": 1 - part for number, part in enumerate(share)}
        return metrics | {"code_std": first.detach().std(0).mean()}

    def reconstruction(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        options = {"clip": self.config.error_clip, "reduction": self.config.reduction}
        return fastws.layerwise_mse(prediction.float(), target, self.offsets, self.sigma, **options)

    def evaluate(self, model: nn.Module) -> loop.Metrics:
        """Of networks as they are, held out and trained on: the loss and the share of the variance reconstructed."""
        found: loop.Metrics = {}
        for split, suffix in (("val", ""), ("train", "_of_train")):
            rows = self.source.rows[split]
            rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), VALIDATION_NETWORKS)).long()]
            errors, sums = [], 0
            for part in rows.split(max(2, self.config.batch_size)):
                flat = self.source.weights[part.to(self.source.weights.device)]
                error, layer = self.reconstruction(unwrapped(model).decode(unwrapped(model).encode(flat)), flat)
                errors.append(error * len(part))
                sums = sums + layer.double()
            share = sums / len(rows) / self.around
            found["loss" if not suffix else f"loss{suffix}"] = torch.stack(errors).sum() / len(rows)
            found[f"r2{suffix}"] = 1 - (sums.sum() / len(rows) / self.around.sum())
            if not suffix:
                found |= {f"r2_layer{number}": 1 - part for number, part in enumerate(share)}
        return found


def contrast(projection: Tensor, kind: Contrast, temperature: float) -> Tensor:
    """The contrast of the two views of all networks; projections ``[2B, E]`` of this process.

    "positive" is the mean square of (1 - cosine) / temperature over 2B, which is 0 where both views agree;
    "positive-reference" that of cosine / temperature, which the released code minimises although it drives the two
    views of a network apart.
    """
    first, second = processes.gather(projection.unflatten(0, (2, -1)).transpose(0, 1)).unbind(1)
    if kind == "simclr":
        return fastws.nt_xent(first.contiguous(), second.contiguous(), temperature)
    cosine = cosine_similarity(first, second)
    distance = 1 - cosine if kind == "positive" else cosine
    return (distance / temperature).square().mean() / (2 * len(first))


# --- the zoo and the model


def make_source(config: Config, zoo: Zoo, device: torch.device) -> Source:
    """Reads the networks to train on and to validate on onto the device."""
    rows = {split: rows_of_epochs(zoo, zoo.split(split), config.epochs, "train ae") for split in ("train", "val")}
    if len(rows["train"]) < 2:
        raise ValueError(f"train ae: zoo must have 2 networks to train on, got {len(rows['train'])} in {config.zoo}")
    if config.permute and zoo.symmetry is None:
        raise ValueError(
            f"train ae: zoo must have a symmetry to permute by, got none in {config.zoo}; use --no-permute"
        )
    chosen = torch.cat(list(rows.values()))
    weights = (aligned_rows(zoo, chosen) if config.aligned else zoo.rows(chosen)).float().to(device)
    numbers = torch.arange(len(weights)).split([len(part) for part in rows.values()])
    return Source.of(weights, dict(zip(rows, numbers, strict=True)), zoo.layout, zoo.symmetry, zoo.may_flip[chosen])


def model_config(config: Config, source: Source) -> HyperRepresentationConfig:
    size, layers = source.layout.num_weights, rows_of(source.layout)
    names = {field.name for field in fields(HyperRepresentationConfig)} & {field.name for field in fields(Config)}
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.encoding == "vector" and config.hidden is None:
        given["hidden"] = tuple(linear_widths(size, config.latent, HIDDEN_LAYERS)[1:-1])
    return HyperRepresentationConfig(size=size, layers=layers, **given)
