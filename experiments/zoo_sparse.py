"""Sparse twins of the MNIST seed zoo: sparsity and accuracy by epoch, beside the published twins.

python experiments/zoo_sparse.py --zoo zoos/mnist-s-seed --out zoos/mnist-s-seed-sparse      # or --smoke

Twins begin at the last epoch of their networks, the published ones at epoch 50. What is published was read off a figure
of the repository of the model zoos (arXiv 2209.14764), so it is right to a percent or so.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy
import tyro
from zoo_mnist import about, print_about

from fastws.files.atomic import write_json
from fastws.terminal import one_sentence
from fastws.zoo import Zoo
from fastws.zoo.making.make import Config as ZooConfig
from fastws.zoo.making.make import make
from fastws.zoo.making.sparsify import Config as TwinConfig
from fastws.zoo.making.sparsify import sparsify

SPARSITY = {2: 0.26, 3: 0.43, 4: 0.51, 5: 0.56, 10: 0.67, 25: 0.785}  # published, epoch: mean share of weights dropped
ACCURACY = {0: 0.91, 25: 0.875}  # published, epoch: mean test accuracy


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes the twins, or goes on with them, and says how sparse and how good they are."""

    zoo: str = "zoos/mnist-s-seed"  # as experiments/zoo_mnist.py makes it
    out: str = "zoos/mnist-s-seed-sparse"
    data: str | None = None  # folder of MNIST, if it is not where it was
    models: int = 100
    epochs: int = 25
    smoke: bool = False  # twins of a few networks on digits, to see that everything works; its numbers mean nothing
    threads: int = 0  # processor cores to use; 0: all


def run(config: Config) -> None:
    common = {"epochs": config.epochs, "threads": config.threads}
    if config.smoke:
        dense = make(ZooConfig(out=f"{config.out}-smoke-dense", networks=8, epochs=3, limit=500, lrs=(3e-3,)))
        twins = TwinConfig(zoo=str(dense.path), out=f"{config.out}-smoke", models=4, **common | {"epochs": 5})
    else:
        twins = TwinConfig(zoo=config.zoo, out=config.out, data=config.data, models=config.models, **common)
    zoo = sparsify(twins)
    published = ({}, {}) if config.smoke else (SPARSITY, ACCURACY)
    found = about(zoo) | {"left_out": zoo.provenance["left_out"], "epochs": by_epoch(zoo, *published)}
    write_json(zoo.path / "results.json", found)
    print_table(zoo.path, found)


def by_epoch(zoo: Zoo, published_sparsity: dict[int, float], published_accuracy: dict[int, float]) -> list[dict]:
    epochs, sparsity, accuracy = (zoo.numbers(name) for name in ("epoch", "sparsity", "test_accuracy"))
    lines = []
    for epoch in numpy.unique(epochs).tolist():
        here = epochs == epoch
        line = {"epoch": epoch, "sparsity": float(sparsity[here].mean()), "std": float(sparsity[here].std())}
        line |= {"published": published_sparsity.get(epoch), "accuracy": float(accuracy[here].mean())}
        line |= {"std of accuracy": float(accuracy[here].std()), "published accuracy": published_accuracy.get(epoch)}
        lines.append(line)
    return lines


def print_table(path: Path, found: dict) -> None:
    print_about(path, found)
    print("".join(f"{name:>20}" for name in found["epochs"][0]))
    for line in found["epochs"]:
        cells = ("" if x is None else f"{x:.3f}" if isinstance(x, float) else x for x in line.values())
        print("".join(f"{cell:>20}" for cell in cells))
    if found["left_out"]:
        print(f"left out because they change when their smallest weights are dropped: {len(found['left_out'])}")


if __name__ == "__main__":
    with one_sentence("zoo_sparse"):
        run(tyro.cli(Config))
