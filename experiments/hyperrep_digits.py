"""New networks from a hyper-representation of digits networks, beside what needs no learning, and what they are worth.

python experiments/hyperrep_digits.py --out runs/hyperrep-digits-0 --seed 0    # --smoke for a minute's run

See hyperrep.py for what is done. The same command goes on where a stopped run was.
"""

from dataclasses import dataclass
from pathlib import Path

import hyperrep
import tyro

from fastws.terminal import one_sentence
from fastws.zoo.making.make import Config as MakeConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes a zoo, learns it, samples from it, and says what the samples are worth."""

    out: str  # folder of everything
    seed: int = 0  # of the zoo
    networks: int = 400  # of the zoo
    count: int = 200  # networks of each set
    passes: int = 100  # of the autoencoder over the training networks
    large: bool = False  # images of 28 x 28 pixels and CNN-s, which then can be trained on MNIST too
    transfer: str | None = None  # folder of images that samples are trained on as well, with large
    transfer_limit: int | None = None  # of its training and test images
    more: tuple[int, ...] = (1,)  # epochs of training after which samples are measured again
    sets: tuple[str, ...] = tuple(hyperrep.SETS)  # names of hyperrep.py
    baselines: bool = True  # curves of noise, averages and PCA + Gaussian in the report
    smoke: bool = False  # a few networks, to see that everything works; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one


def run(config: Config) -> None:
    smoke = {"sets": hyperrep.SMOKE, "count": 12, "baselines": False} if config.smoke else {}
    epochs = 2 if config.smoke else 25
    zoo = MakeConfig(
        out=str(Path(config.out, "zoo")),
        networks=80 if config.smoke else config.networks,
        epochs=epochs,
        seed=config.seed,
        **hyperrep.ALIKE | ({"data": "digits28", "architecture": "cnn-s"} if config.large else {}),
    )
    hyperrep.run(
        hyperrep.Plan(
            zoo=zoo,
            out=Path(config.out),
            states=(max(1, epochs - 4), epochs),
            model={"passes": 2 if config.smoke else config.passes},
            device=config.device,
            more=config.more,
            other_data=config.transfer,
            other_limit=config.transfer_limit,
            **{"sets": config.sets, "count": config.count, "baselines": config.baselines} | smoke,
        )
    )


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
