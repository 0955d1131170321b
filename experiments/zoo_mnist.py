"""Two published zoos remade: CNN-s on MNIST, 1,000 seeds of one recipe, and one seed of each combination of a grid.

python experiments/zoo_mnist.py --data mnist --out zoos       # parquet or IDX files; --smoke for a minute's run

Prints accuracy by epoch, beside what the published seed zoo has (specified as 0.83 at epoch 25 and 0.91 at epoch 50).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import tyro

from fastws.files.atomic import write_json
from fastws.runs.log import LOG
from fastws.terminal import one_sentence
from fastws.zoo import Zoo
from fastws.zoo.making import make
from fastws.zoo.making.make import Config as ZooConfig

ZOOS = {"mnist-s-seed": 1000, "mnist-s-hyp-fix": 256}  # preset: networks
PUBLISHED = {"mnist-s-seed": {25: 0.83, 50: 0.91}}  # mean test accuracy at some epochs
SMOKE = {"networks": 8, "epochs": 2, "limit": 500}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes both zoos, or goes on with them, and says how well their networks do."""

    data: str  # folder of MNIST
    out: str = "zoos"  # folder of both zoos
    epochs: int = 25
    smoke: bool = False  # a few networks and images, to see that everything works; its numbers mean nothing
    threads: int = 0  # processor cores to use; 0: all


def run(config: Config) -> None:
    for preset, networks in ZOOS.items():
        options = {"networks": networks, "epochs": config.epochs} | (SMOKE if config.smoke else {})
        path = Path(config.out, preset + ("-smoke" if config.smoke else ""))
        zoo = make(ZooConfig(out=str(path), preset=preset, data=config.data, threads=config.threads, **options))
        found = {"preset": preset} | about(zoo)
        found["epochs"] = accuracy_by_epoch(zoo, PUBLISHED.get(preset, {}))
        write_json(path / "results.json", found)
        print_table(path, found)


def about(zoo: Zoo) -> dict[str, object]:
    """How much a zoo holds, and the minutes from an epoch to the next: the least, and the median of all, breaks too."""
    times = [json.loads(line)["time"] for line in (zoo.path / LOG).read_text().splitlines()]
    minutes = numpy.diff(times) / 60
    return {
        "states": len(zoo),
        "dropped": zoo.dropped,
        "minutes": {"least": float(minutes.min()), "median": float(numpy.median(minutes))},
    }


def print_about(path: Path, found: dict) -> None:
    print(f"\n{path}: {found['states']:,} states, {found['dropped']} left out as not finite")
    print("minutes an epoch: {least:.1f} at least, {median:.1f} in the median".format(**found["minutes"]))


def accuracy_by_epoch(zoo: Zoo, published: dict[int, float]) -> list[dict]:
    epochs, accuracy = (zoo.numbers(name) for name in ("epoch", "test_accuracy"))
    lines = []
    for epoch in numpy.unique(epochs).tolist():
        here = accuracy[epochs == epoch].astype(numpy.float64)
        low, middle, high = numpy.quantile(here, [0.1, 0.5, 0.9]).tolist()
        line = {"epoch": epoch, "mean": here.mean(), "std": here.std(), "10 %": low, "50 %": middle, "90 %": high}
        lines.append(line | {"published mean": published.get(epoch)})
    return lines


def print_table(path: Path, found: dict) -> None:
    print_about(path, found)
    print("test accuracy " + "".join(f"{name:>15}" for name in found["epochs"][0]))
    for line in found["epochs"]:
        cells = (
            "" if value is None else f"{value:.3f}" if isinstance(value, float) else value for value in line.values()
        )
        print(" " * 14 + "".join(f"{cell:>15}" for cell in cells))
    print(f"more: fastws zoo info --zoo {path}")


if __name__ == "__main__":
    with one_sentence("zoo_mnist"):
        run(tyro.cli(Config))
