"""A SANE of a folder of networks of several architectures: does the nearest network come of the same family?

python experiments/sane_hub.py --out runs/sane-hub                          # --more FOLDER: further checkpoints
python experiments/tables.py --add hub-0 runs/sane-hub/results.json

Networks of eight families, which differ by architecture, images, activation or initialisation, are written as
safetensors files. Three pairs of them, and one of the pairs' threes, have the same shapes, so that shapes alone cannot
tell them apart. A SANE is trained on windows of the files and embeds each; a network counts as right if the nearest
other one is of its family. Beside it stand what sees the shapes alone, what sees statistics of each layer, and the same
SANE before it was trained. The same command goes on where a stopped run was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastws
from fastws.downstream.embed import Config as EmbedConfig
from fastws.downstream.embed import run as embed
from fastws.downstream.hub import load_hub
from fastws.downstream.neighbors import nearest
from fastws.files.atomic import write_json
from fastws.files.checkpoints import load_checkpoint
from fastws.terminal import one_sentence
from fastws.train.sane import train as sane
from fastws.zoo import Zoo, make
from fastws.zoo.format.rows import last_rows
from fastws.zoo.making.make import Config as MakeConfig

TANH, RELU = {"activations": ("tanh",)}, {"activations": ("relu",)}
FAMILIES: dict[str, dict[str, Any]] = {
    "digits-cnn-tanh": {"architecture": "digits-cnn", "inits": ("xavier_uniform",)} | TANH,
    "digits-cnn-relu": {"architecture": "digits-cnn", "inits": ("xavier_uniform",)} | RELU,
    "digits-cnn-normal": {"architecture": "digits-cnn", "inits": ("kaiming_normal",)} | TANH,
    "mlp-tanh": {"architecture": "mlp", "inits": ("xavier_uniform",)} | TANH,
    "mlp28-tanh": {"architecture": "mlp", "data": "digits28", "inits": ("xavier_uniform",)} | TANH,
    "mlp28-relu": {"architecture": "mlp", "data": "digits28", "inits": ("xavier_uniform",)} | RELU,
    "cnn-s-tanh": {"architecture": "cnn-s", "data": "digits28", "inits": ("xavier_uniform",)} | TANH,
    "cnn-s-relu": {"architecture": "cnn-s", "data": "digits28", "inits": ("xavier_uniform",)} | RELU,
}
MORE = "more"  # the family of further checkpoints
MODELS = {  # name: options of the trainer
    "SANE": {},
    "SANE, layers as they are": {"standardize": False},
    "SANE, not trained": {"steps": 1, "lr": 1e-12},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes a hub, trains on it, embeds it, and says which families are told apart."""

    out: str  # folder of everything
    more: str | None = None  # folder of checkpoints, safetensors or torch files, that are one more family of the hub
    networks: int = 6  # of each family
    epochs: int = 15  # of their training
    steps: int = 1500  # of SANE
    token_size: int = 32  # weights per token
    window: int = 32  # tokens per sample
    seed: int = 0  # of the networks and of SANE
    smoke: bool = False  # seconds, to see that everything works; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one


def run(config: Config) -> dict[str, Any]:
    begin, out = perf_counter(), Path(config.out)
    accuracies = fill(config, out / "hub")
    features = {name: embeddings(config, name, out) for name in MODELS}
    names = next(iter(features.values()))[0]
    states = [load_file(out / "hub" / name) for name in names]
    features["shapes"] = names, shapes(states)
    features["statistics of layers"] = names, statistics(states)
    families = [name.partition("/")[0] for name in names]
    shared = shared_shapes(families, states)
    lines = []
    for name, (own, points) in features.items():
        if own != names:
            raise ValueError(f"sane_hub: models must be the same for all features, got others for {name}")
        for metric in ("cosine", "l2") if name in MODELS else ("l2",):
            right = told_apart(points, families, metric)
            line = {"features": name, "metric": metric, "accuracy": right.mean().item()}
            lines.append(line | {"same shapes": right[shared].mean().item()})
    found = {"seed": config.seed, "models": len(names), "families": accuracies, "same shapes": int(shared.sum())}
    found |= {"steps": config.steps, "lines": lines, "seconds": perf_counter() - begin}
    write_json(out / "results.json", found)
    for line in lines:
        print("{features:28}{metric:8}{accuracy:8.3f}{same shapes:8.3f}".format(**line))
    return found


def fill(config: Config, hub: Path) -> dict[str, float | None]:
    """Writes the files of all families; returns the mean test accuracy of each."""
    accuracies: dict[str, float | None] = {}
    for number, (family, recipe) in enumerate(FAMILIES.items()):
        options = {"networks": config.networks, "epochs": config.epochs, "seed": config.seed * 1000 + 100 * number}
        options |= {"networks": 2, "epochs": 1, "limit": 100} if config.smoke else {}
        common = {"optimizers": ("adam",), "lrs": (3e-3,), "weight_decays": (1e-3,), "dropouts": (0.0,)}
        zoo = make(MakeConfig(out=str(hub.parent / "zoos" / family), **common | options | recipe))
        rows = sorted(last_rows(zoo).values())
        accuracies[family] = float(zoo.numbers("test_accuracy")[rows].mean())
        write(zoo, rows, hub / family)
    for path in sorted(Path(config.more).iterdir()) if config.more else ():
        if path.suffix in (".pt", ".pth", ".th", ".safetensors"):
            accuracies[MORE] = None
            (hub / MORE).mkdir(parents=True, exist_ok=True)
            state = {name: tensor.contiguous() for name, tensor in load_checkpoint(path).items()}
            save_file(state, hub / MORE / f"{path.stem}.safetensors")
    return accuracies


def write(zoo: Zoo, rows: Sequence[int], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row, flat in zip(rows, zoo.rows(rows), strict=True):
        state = {name: tensor.contiguous() for name, tensor in zoo.layout.unflatten(flat).items()}
        save_file(state, folder / f"{row:03}.safetensors")


def embeddings(config: Config, name: str, out: Path) -> tuple[list[str], Tensor]:
    """Trains a SANE on the hub, unless it is there, and embeds all models."""
    folder = out / name.replace(", ", "-").replace(" ", "-").lower()
    options = {"steps": 2 if config.smoke else config.steps, "lr": 1e-3} | MODELS[name]
    options |= {"token_size": config.token_size, "window": config.window, "device": config.device, "seed": config.seed}
    sane.run(sane.Config(hub=str(out / "hub"), out=str(folder), size="tiny", norm="keep", **options))
    file = str(folder / "embeddings.safetensors")
    model = str(folder / "checkpoint.pt")
    embed(EmbedConfig(model=model, hub=str(out / "hub"), out=file, device=config.device))
    return load_hub(file)


# --- what needs no learning


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in sorted(state.items()) if tensor.is_floating_point()}


def shapes(states: Sequence[dict[str, Tensor]]) -> Tensor:
    """Logarithms of the sizes of all axes of all tensors, behind each other; those that are shorter end with zeros."""
    rows = [[axis for x in weights_of(state).values() for axis in (*x.shape, *[1] * (4 - x.dim()))] for state in states]
    width = max(map(len, rows))
    return torch.tensor([row + [1] * (width - len(row)) for row in rows]).double().log()


def statistics(states: Sequence[dict[str, Tensor]]) -> Tensor:
    """Seven statistics of each tensor, each in units of its spread over the models that have so many tensors.

    Behind them stands how many there are, so that models with other numbers of tensors are far away.
    """
    rows = []
    for state in states:
        tensors = list(weights_of(state).values())
        flat = torch.cat([x.flatten() for x in tensors]).float()[None]
        ends = torch.tensor([x.numel() for x in tensors]).cumsum(0)
        offsets = torch.stack([ends - torch.tensor([x.numel() for x in tensors]), ends], 1)
        rows.append(fastws.layer_statistics(flat, offsets).flatten())
    width = max(map(len, rows))
    points = torch.zeros(len(rows), width + 1, dtype=torch.float64)
    for length in {len(row) for row in rows}:
        own = [number for number, row in enumerate(rows) if len(row) == length]
        some = torch.stack([rows[number] for number in own])
        spread = some.std(0, correction=0)
        points[own, :length] = (some - some.mean(0)) / torch.where(spread > 1e-12, spread, 1)
        points[own, -1] = 1e6 * length
    return points


def shared_shapes(families: Sequence[str], states: Sequence[dict[str, Tensor]]) -> Tensor:
    """Which models have the shapes of models of another family, bool ``[n]``."""
    keys = [tuple(tuple(x.shape) for x in weights_of(state).values()) for state in states]
    have = {key: {family for family, own in zip(families, keys, strict=True) if own == key} for key in set(keys)}
    return torch.tensor([len(have[key]) > 1 for key in keys])


def told_apart(points: Tensor, families: Sequence[str], metric: str) -> Tensor:
    """For each model the share of its nearest others, several where they are equally near, that are of its family."""
    count = len(points)
    names = [str(number) for number in range(count)]
    found = nearest(points, names, torch.arange(count), count - 1, metric)
    right = []
    for row in range(count):
        near = found.index[row][found.distance[row] <= found.distance[row, 0] + 1e-12].tolist()
        right.append(sum(families[other] == families[row] for other in near) / len(near))
    return torch.tensor(right, dtype=torch.float64)


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
