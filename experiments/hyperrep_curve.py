"""How many networks does a generator of networks need? Digits networks, 50 to 700 of them to learn from.

python experiments/hyperrep_curve.py --out runs/hyperrep-curve    # --smoke for a few networks

One zoo, aligned once to the mean of all its training networks. Of the first so many of them the last five states are
learned from: principal components and a Gaussian, the same taught on training images, and means of two networks.
"""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import tyro
from hyperrep import ALIKE
from torch import Tensor

from fastws.downstream.evaluate import job_of
from fastws.downstream.judging.memorisation import Judge
from fastws.downstream.populations import measure
from fastws.downstream.sampling import generators
from fastws.downstream.sampling.behaviour import classification, teach
from fastws.files.atomic import write_json
from fastws.terminal import one_sentence
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import ALIGNMENT, aligned_rows
from fastws.zoo.making.make import Config as MakeConfig

STATES = 5  # of each network that are learned from, the last ones
METHODS = ("PCA 64 + Gaussian", "the same, taught", "average of two")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draws the curve of accuracy and novelty over the number of networks that are learned from."""

    out: str  # folder of everything
    networks: int = 1000  # of the zoo, of which 70 % are for training
    sizes: tuple[int, ...] = (50, 100, 200, 400, 700)  # networks that are learned from
    components: int = 64  # of the Gaussian
    steps: int = 200  # of teaching it
    count: int = 200  # networks of each set
    seed: int = 0  # of everything random
    smoke: bool = False  # few networks; its numbers mean nothing


def run(config: Config) -> None:
    begin, smoke = perf_counter(), config.smoke
    epochs, count = (6, 12) if smoke else (25, config.count)
    zoo = make(
        MakeConfig(
            out=str(Path(config.out, "zoo")),
            networks=60 if smoke else config.networks,
            epochs=epochs,
            seed=config.seed,
            **ALIKE,
        )
    )
    if not (zoo.path / ALIGNMENT).exists():
        align(AlignConfig(zoo=str(zoo.path)))
    rows, held_out = rows_of(zoo, "train", epochs - STATES + 1), rows_of(zoo, "test", epochs)
    lines = []
    for size in (20, 40) if smoke else config.sizes:
        models = dict.fromkeys(zoo.properties["model"].take(rows.numpy()).to_pylist())
        chosen = set(list(models)[:size])
        kept = torch.tensor([row for row in rows.tolist() if zoo.properties["model"][row].as_py() in chosen])
        training, others = (aligned_rows(zoo, one).float() for one in (kept, held_out))
        judge = Judge(training, others, zoo.symmetry, zoo.layout, zoo.symmetry.flips)
        for method, flat in draw(config, zoo, training, count).items():
            lines.append({"networks": size, "method": method} | measure_set(zoo, judge, flat))
            print(
                "{networks:>5} {method:<20} accuracy {accuracy:.3f} novelty {novelty:.2f} spread {spread:.2f}".format(
                    **lines[-1]
                )
            )
    write_json(
        Path(config.out, "results.json"), {"seed": config.seed, "lines": lines, "seconds": perf_counter() - begin}
    )


def rows_of(zoo: Zoo, split: str, first_epoch: int) -> Tensor:
    rows = zoo.split(split)
    return rows[torch.from_numpy(zoo.numbers("epoch"))[rows] >= first_epoch]


def draw(config: Config, zoo: Zoo, training: Tensor, count: int) -> dict[str, Tensor]:
    """New networks ``[count, P]`` by method."""
    generator = torch.Generator().manual_seed(config.seed)
    space, job = generators.Components.of(training, config.components), job_of(zoo)
    gradient = classification(job.plan, job.data.train, "tanh", generator)
    taught = teach(space, gradient, 5 if config.smoke else config.steps, generator)
    made = [generators.gaussian(one, count, 1.0, generator) for one in (space, taught)]
    made.append(generators.average(training, count, 2, generator))
    return {method: one.points for method, one in zip(METHODS, made, strict=True)}


def measure_set(zoo: Zoo, judge: Judge, flat: Tensor) -> dict[str, float]:
    job = job_of(zoo)
    found = measure(flat, job.plan, ["tanh"] * len(flat), job.data.test, progress=False)
    return {
        "accuracy": found.accuracy.mean().item(),
        "novelty": judge.novelty(flat).novelty.median().item(),
        "spread": flat.std(0).mean().item() / judge.sd,
    }


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
