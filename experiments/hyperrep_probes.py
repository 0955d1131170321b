"""What a learned embedding of networks foretells about them, beside statistics, weights and an equivariant network.

python experiments/hyperrep_probes.py --out runs/hyperrep-probes        # --smoke for a minute's run

Two zoos of digits networks: one recipe and many seeds, where linear probes of weights do well, and a grid of recipes,
where they fail. Embeddings are the codes of autoencoders with and without contrast and with and without permuted views,
of networks as they were trained and aligned. The same command goes on where a stopped run was.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import tyro
from hyperrep import ALIKE

from fastws.downstream import predict
from fastws.files.atomic import write_json
from fastws.terminal import one_sentence
from fastws.train.ae import train as ae
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import ALIGNMENT
from fastws.zoo.making.make import Config as MakeConfig

ZOOS: dict[str, dict[str, Any]] = {
    "seeds": ALIKE,
    "recipes": {"activations": ("tanh", "relu", "gelu", "sigmoid")},
}
MODELS: dict[str, dict[str, Any]] = {  # options of train ae
    "aligned": {"aligned": True},
    "aligned, contrast and permuted views": {"aligned": True, "permute": True, "gamma": 0.1},
    "permuted views": {"permute": True},
    "contrast and permuted views": {"permute": True, "gamma": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints R^2 and rank correlation of every probe."""

    out: str  # folder of everything
    networks: int = 256  # of each zoo
    passes: int = 60  # of the autoencoders over the training networks
    seed: int = 0  # of everything random
    smoke: bool = False  # a few networks and one model; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one


def run(config: Config) -> None:
    begin, smoke = perf_counter(), config.smoke
    lines = []
    for kind, options in list(ZOOS.items())[: 1 if smoke else None]:
        zoo = make(
            MakeConfig(
                out=str(Path(config.out, kind)),
                networks=40 if smoke else config.networks,
                epochs=3 if smoke else 25,
                seed=config.seed,
                **options,
            )
        )
        if not (zoo.path / ALIGNMENT).exists():
            align(AlignConfig(zoo=str(zoo.path)))
        for name, found in probe_all(config, zoo, Path(config.out), kind):
            lines += [line | {"zoo": kind, "run": name} for line in found]
    write_json(
        Path(config.out, "results.json"), {"seed": config.seed, "lines": lines, "seconds": perf_counter() - begin}
    )
    for line in lines:
        print(
            "{zoo:<8} {run:<40} {features:<12} {probe:<12} {target:<20} R2 {r2:7.3f} tau {tau:6.3f}".format(
                **short(line)
            )
        )


def short(line: dict[str, Any]) -> dict[str, Any]:
    missing = float("nan")
    return line | {"r2": line.get("test_r2") or missing, "tau": line.get("test_tau") or missing}


def probe_all(config: Config, zoo: Zoo, out: Path, kind: str):
    """What was probed, and the lines that ``fastws predict`` found, which are kept in a folder for each."""
    plain = {"probe": ("linear", "trees"), "features": ("statistics", "weights")}
    runs: dict[str, dict[str, Any]] = {
        "as trained": plain,
        "aligned": plain | {"aligned": True},
        "equivariant": {"probe": ("equivariant",), "features": ()},
    }
    for name, options in list(MODELS.items())[: 1 if config.smoke else None]:
        folder = out / f"{kind} {name}".replace(" ", "-").replace(",", "")
        passes = 2 if config.smoke else config.passes
        options = {"zoo": str(zoo.path), "out": str(folder), "passes": passes, "seed": config.seed} | options
        ae.run(ae.Config(device=config.device, **options))
        model = {"model": str(folder / "checkpoint.pt"), "aligned": options.get("aligned", False)}
        runs[f"codes: {name}"] = plain | model | {"features": ()}
    for number, (name, options) in enumerate(runs.items()):
        path = out / f"{kind}-probe-{number}"
        if not (path / "results.json").exists():
            epochs = {"epochs": 2} if config.smoke else {}
            predict.run(predict.Config(zoo=str(zoo.path), out=str(path), seed=config.seed, **epochs, **options))
        yield name, json.loads((path / "results.json").read_text())["results"]


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
