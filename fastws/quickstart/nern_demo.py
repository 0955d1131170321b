"""The best network of a zoo of digits, its convolutions stored in a NeRN: what the quickstart shows of it."""

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fastws.data import images
from fastws.nern.checkpoint import load_nern
from fastws.train.nern import train as nern
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.architectures import build

HIDDEN = 32  # width of the NeRN
NO_DISTILLATION = {"feature_weight": 0.0, "distillation_weight": 0.0}


def store_best(zoo: Zoo, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """Stores the state with the highest test accuracy; a plain description of it, and of what was lost.

    Args:
        zoo: Of networks ``digits-cnn``.
        out: Folder of the run; an interrupted one is resumed.
        steps: Of reconstruction, with all kernels in each.
        seed: Of the initial weights.
    """
    row = int(numpy.argmax(zoo.numbers("test_accuracy")))
    known = {name: zoo.properties[name][row].as_py() for name in ("model", "epoch", "activation", "test_accuracy")}
    data = images.load("digits")
    network = build("digits-cnn", tuple(data.test_x.shape[1:]), activation=known["activation"])
    network.load_state_dict(zoo.layout.unflatten(zoo.rows(torch.tensor([row]))[0]))
    config = nern.Config(
        out=str(out), weights=str(zoo.path), architecture="digits-cnn", hidden=HIDDEN, steps=steps, lr=2e-2, seed=seed,
        batching="all", device="cpu", eval_every=steps, save_every=max(1, steps // 4), **NO_DISTILLATION,
    )  # fmt: skip
    nern.train(config, network.eval().requires_grad_(False), None, torch.device("cpu"))
    predictor, stored, _ = load_nern(out / "checkpoint.pt")
    before = stored.originals(network)
    with torch.no_grad():
        after = stored.weights(predictor(stored.rows))
        accuracy = [count_right(network, data.test_x, data.test_y)]
        network.load_state_dict(after, strict=False)
        accuracy.append(count_right(network, data.test_x, data.test_y))
    first = next(iter(after))
    return known | {
        "stored_weights": stored.num_weights,
        "nern_weights": sum(parameter.numel() for parameter in predictor.parameters()),
        "accuracy": accuracy,  # before and after
        "kernels": [weights[first].flatten(0, 1).tolist() for weights in (before, after)],  # of the first layer
    }


def count_right(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return (network(x).argmax(1) == y).float().mean().item()
