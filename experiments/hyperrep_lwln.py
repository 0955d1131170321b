"""What the layer-wise normalised loss (LWLN, arXiv 2209.14733) does for reconstructed networks.

python experiments/hyperrep_lwln.py --zoo runs/hyperrep-digits-0/zoo --out runs/hyperrep-lwln    # --smoke: its own zoo

Autoencoders of aligned digits networks with the error of every layer in units of its standard deviation and without,
and with weights put on one scale before, which makes the two nearly the same. R^2 of each layer and the accuracy of
reconstructed networks, of those that were learned from and of those that were not.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro

from fastws.downstream.evaluate import job_of
from fastws.downstream.populations import measure
from fastws.downstream.representation import load
from fastws.files.atomic import write_json
from fastws.terminal import one_sentence
from fastws.train.ae import train as ae
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import ALIGNMENT, aligned_rows
from fastws.zoo.making.make import Config as MakeConfig

STATES = 5  # of each network that are learned from, the last ones
RUNS: dict[str, dict[str, Any]] = {  # options of train ae
    "LWLN": {"layerwise": True, "standardize": "none"},
    "plain": {"layerwise": False, "standardize": "none"},
    "LWLN, weights on one scale": {"layerwise": True, "standardize": "center"},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains the autoencoders and prints what they reconstruct."""

    out: str  # folder of everything
    zoo: str | None = None  # folder of an aligned zoo of tanh networks; may be left out with smoke
    passes: int = 100  # of the autoencoders over the training networks
    seed: int = 0  # of the autoencoders
    smoke: bool = False  # a few networks; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if self.zoo is None and not self.smoke:
            raise ValueError("hyperrep_lwln: zoo must be a folder, got none; or give --smoke")


def run(config: Config) -> None:
    begin = perf_counter()
    if config.zoo is None:
        zoo = make(MakeConfig(out=str(Path(config.out, "zoo")), networks=40, epochs=2, activations=("tanh",)))
    else:
        zoo = Zoo.open(config.zoo)
    if not (zoo.path / ALIGNMENT).exists():
        align(AlignConfig(zoo=str(zoo.path)))
    last = int(zoo.numbers("epoch").max())
    lines = [train_one(config, zoo, name, (max(1, last - STATES + 1), last)) for name in RUNS]
    write_json(
        Path(config.out, "results.json"), {"seed": config.seed, "lines": lines, "seconds": perf_counter() - begin}
    )
    for line in lines:
        layers = " ".join(f"{value:6.3f}" for value in line["r2"])
        print(f"{line['run']:<28} R2 of layers {layers}; new {line['held_out']:.3f}, learned {line['train']:.3f}")


def train_one(config: Config, zoo: Zoo, name: str, epochs: tuple[int, int]) -> dict[str, Any]:
    folder = Path(config.out, name.replace(" ", "-").replace(",", ""))
    ae.run(
        ae.Config(
            zoo=str(zoo.path),
            out=str(folder),
            epochs=epochs,
            aligned=True,
            passes=2 if config.smoke else config.passes,
            seed=config.seed,
            device=config.device,
            **RUNS[name],
        )
    )
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [line for line in log if "val/loss" in line][-1]
    layers = sorted(key for key in found if key.startswith("val/r2_layer"))
    model, job, epoch = load(folder / "checkpoint.pt"), job_of(zoo), torch.from_numpy(zoo.numbers("epoch"))
    accuracy = {}
    for split, kind in (("train", "train"), ("test", "held_out")):
        rows = zoo.split(split)
        rows = rows[epoch[rows] == epochs[1]]
        made = model.decode(model.encode(aligned_rows(zoo, rows).float()))
        accuracy[kind] = (
            measure(made, job.plan, ["tanh"] * len(made), job.data.test, progress=False).accuracy.mean().item()
        )
    return {"run": name, "r2": [found[key] for key in layers]} | accuracy


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
