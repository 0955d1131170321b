"""What a delivered network costs: floating point operations of the zoo, the model, the sample and its training.

An operation is an addition or a multiplication, so that a multiply-add counts two; a backward pass counts two forward
ones. The cost of one of S networks is ``(zoo + train) / S + sample + evaluate + finetune``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastws.downstream.encoder import chunk
from fastws.downstream.evaluate import job_of
from fastws.downstream.representation import Tokens, WholeNetworks, load
from fastws.downstream.sampling import flow as flows
from fastws.files.checkpoints import load_plain
from fastws.zoo.format.manifest import MANIFEST
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.make import config_of

DELIVERED = (10, 100, 1000, 10_000)  # networks that the cost of zoo and model is shared by
TRAINING = 3  # forward passes that a step of training costs
VIEWS = 2  # of each network, in a step of a trainer of representations
LEARNED = ("pca", "flow", "gan", "neighbour")  # methods that need principal components


def cost_of(zoo: Zoo) -> dict[str, Any]:
    """Parts of the cost of the networks of a zoo, and the cost of one of S; None for what is not known.

    Networks of ``zoo make`` cost their training alone; those that were sampled also the zoo that they were sampled from
    and its model; those that ``zoo make --start`` trained on, all of these.
    """
    parts = parts_of(zoo)
    shared, own = ("zoo", "train"), ("sample", "evaluate", "finetune")

    def of_one(count: int, given: bool) -> float | None:
        counted = [parts[name] for name in (*shared[given:], *own)]
        if any(part is None for part in counted):
            return None
        return sum(parts[name] for name in shared[given:]) / count + sum(parts[name] for name in own)

    return parts | {
        "per network": {str(count): of_one(count, False) for count in DELIVERED},
        "zoo given": {str(count): of_one(count, True) for count in DELIVERED},
    }


def parts_of(zoo: Zoo) -> dict[str, float | None]:
    config, sampled = config_of(zoo.path, zoo.provenance), zoo.provenance.get("sampled")
    job = job_of(zoo)
    forward = flops(job.plan.build(), torch.zeros(1, *job.plan.image_shape))
    images = len(job.data.train.y)
    epochs = images * TRAINING * forward * config.epochs
    evaluated = "val_accuracy" in zoo.properties.column_names and job.data.val is not None
    parts = {"zoo": 0.0, "train": 0.0, "sample": 0.0, "evaluate": forward * len(job.data.val.y) if evaluated else 0.0}
    if isinstance(sampled, dict):
        learned, drawn = cost_of_sampling(zoo, sampled)
        if sampled.get("candidates"):
            judged = job.data.train if sampled["judged_on"] == "train" else job.data.val
            parts["evaluate"] = forward * len(judged.y) * sampled["candidates"] * sampled["rounds"] / sampled["count"]
        return parts | {"zoo": config.networks * epochs, "train": learned, "sample": drawn, "finetune": 0.0}
    if config.start is not None and (Path(config.start) / MANIFEST).is_file():
        begun = parts_of(Zoo.open(config.start))
        return begun | {"finetune": begun["finetune"] + epochs}
    return parts | {"finetune": epochs}


def cost_of_sampling(zoo: Zoo, sampled: dict[str, Any]) -> tuple[float | None, float | None]:
    """Operations to train what samples come from, and to draw one of them; None where its files are gone."""
    weights, method = zoo.layout.num_weights, sampled.get("method")
    if method == "gan":
        return None, None  # of a game of two networks, whose gradients have gradients, nothing is counted
    source = Path(str(sampled.get("zoo")))
    if method in LEARNED and not (source / MANIFEST).is_file():
        return None, None
    learned, drawn, size = 0.0, 0.0, weights
    if sampled.get("model") is not None:
        if not Path(sampled["model"]).is_file():
            return None, None
        representation, state = load(sampled["model"]).suit(zoo, "zoo compare"), load_plain(sampled["model"])
        if "config" not in state:
            return None, None
        seen = state["step"] * state["config"]["batch_size"] * VIEWS * TRAINING
        if isinstance(representation, WholeNetworks):
            model = representation.model
            learned = seen * flops(model, torch.zeros(1, weights))
            code = model.encode(torch.zeros(1, weights))
            drawn, size = flops(model.decode, code), code.shape[1]
        else:
            learned, drawn, size = cost_of_tokens(representation, seen)
    if method in LEARNED:
        few, many = sorted((len(Zoo.open(source).split("train")), size))
        learned += 6 * many * few**2 + 20 * few**3  # a thin singular value decomposition
        components = min(few, sampled.get("components") or few)
        drawn += 2 * components * size
        if method == "flow":
            flow_learned, flow_drawn = cost_of_flow(sampled, few - 1, components)
            learned, drawn = learned + flow_learned, drawn + flow_drawn
    # candidates that are not kept cost as much as those that are
    return learned, drawn * max(1, sampled.get("candidates", 0) / sampled["count"]) * sampled.get("rounds", 1)


def cost_of_tokens(representation: Tokens, windows: int) -> tuple[float, float, int]:
    """Operations to train on so many windows and to decode a network, and the size of its codes."""
    model, layout = representation.encoder.model, representation.layout
    config = model.config
    starts, window, _ = chunk(layout.num_tokens, config.window, representation.halo)
    trained = flops(model, torch.zeros(1, config.window, config.token_size), layout.positions[: config.window][None])
    decoded = flops(model.decode, torch.zeros(1, window, config.latent), layout.positions[:window][None])
    return windows * trained, len(starts) * decoded, layout.num_tokens * config.latent


def cost_of_flow(sampled: dict[str, Any], most: int, components: int) -> tuple[float, float]:
    """Operations to train a flow, and to follow it once."""
    released = sampled.get("flow") == "deepweightflow"
    size, batch, integration = (most, 8, 99) if released else (components, flows.BATCH, flows.INTEGRATION_STEPS)
    velocity = (flows.ReleasedVelocity if released else flows.Velocity)(size)
    forward = flops(velocity, torch.zeros(1, size), torch.zeros(1))
    return sampled.get("steps", flows.STEPS) * batch * TRAINING * forward, integration * 4 * forward


def flops(function: nn.Module | Any, *inputs: torch.Tensor) -> float:
    """Operations of the products, convolutions and attention of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return float(counter.get_total_flops())
