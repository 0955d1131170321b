"""New networks from hyper-representations of MNIST zoos (arXiv 2110.15288, 2209.14733), and what they are worth.

python experiments/hyperrep_mnist.py --data mnist --out runs/hyperrep-mnist-decay --zoo decay
python experiments/hyperrep_mnist.py --data mnist --out runs/hyperrep-mnist --published --device cuda

Two zoos of CNN-s with tanh. `seed` is the published one: one recipe, many seeds, 25 epochs. `decay` has weight decay,
Xavier initialisation and momentum, 20,000 images and 8 epochs, and networks that are more alike once aligned. See
hyperrep.py for what is done. The same command goes on where a stopped run was.

With --published the autoencoder is the published one, 44 M weights and 500 passes. On two processor cores that takes 8
to 13 hours; on one H100, by arithmetic from the work of each part, at 10 % of 67 TFLOP/s in fp32 for small networks and
20 % of 990 TFLOP/s in bf16 for the autoencoder:

| part | work | seconds |
| --- | --- | --: |
| zoo of 400 networks, 25 epochs: 125,000 joint steps | 580 TFLOP | 87 |
| alignment of 400 networks | assignments of 20 units | 2 |
| autoencoder, 280 x 5 states, two views each, 500 passes | 6,800 TFLOP | 35 |
| 10 sets of 100 networks, 10,000 images, before and after | 8 TFLOP | 2 |
| the same trained for one epoch, and on other images | 60 TFLOP, and 2 | 10 |
| distances, 10 sets of 100 networks to 1,400 states each, 40 to 64 | 1.7 M pairs of 50 us, on 16 cores | 6 |

Under three minutes in all, before anything was measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hyperrep
import tyro

from fastws.terminal import one_sentence
from fastws.zoo.making.make import Config as MakeConfig

ZOOS: dict[str, dict[str, Any]] = {
    "seed": {"networks": 400, "epochs": 25},
    "decay": {
        "networks": 256,
        "epochs": 8,
        "limit": 20_000,
        "inits": ("xavier_uniform",),
        "optimizers": ("momentum",),
        "lrs": (0.1,),
        "weight_decays": (3e-3,),
        "batch_size": 64,
        "order": "seeded",
    },
}

LEARNED = {"seed": 5, "decay": 3}  # states of each network, the last ones: of fewer epochs fewer are alike


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes a zoo on MNIST, learns it, samples from it, and says what the samples are worth."""

    out: str  # folder of everything but the zoo
    data: str  # folder of MNIST
    zoo: Literal["seed", "decay"] = "seed"  # the published recipe, or one with weight decay
    zoo_folder: str | None = None  # of a zoo that is there already, or is to be made; by default in out
    networks: int | None = None  # of the zoo, if not as many as usual
    count: int = 100  # networks of each set
    more: tuple[int, ...] = (1,)  # epochs of training after which samples are measured again
    transfer: bool = False  # trains samples on scikit-learn's digits, 28 x 28 pixels, as well
    published: bool = False  # the published autoencoder in place of a small one
    passes: int | None = None  # of the autoencoder over the training networks
    sets: tuple[str, ...] = tuple(hyperrep.SETS)  # names of hyperrep.py
    baselines: bool = True  # curves of noise, averages and PCA + Gaussian in the report
    smoke: bool = False  # a few networks and images; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one


def run(config: Config) -> None:
    options = ZOOS[config.zoo] | ({} if config.networks is None else {"networks": config.networks})
    if config.smoke:
        options |= {"networks": 80, "epochs": 2, "limit": 200}
    epochs = options["epochs"]
    zoo = MakeConfig(
        out=config.zoo_folder or str(Path(config.out, "zoo")),
        preset="mnist-s-seed",
        data=config.data,
        device="cuda" if (config.device or "cpu").startswith("cuda") else "cpu",
        **options,
    )
    model: dict[str, Any] = {"preset": "mnist-seed", "layerwise": True} if config.published else {}
    model |= {"passes": 2} if config.smoke else {} if config.passes is None else {"passes": config.passes}
    hyperrep.run(
        hyperrep.Plan(
            zoo=zoo,
            out=Path(config.out),
            states=(max(1, epochs - LEARNED[config.zoo] + 1), epochs),
            sets=hyperrep.SMOKE if config.smoke else config.sets,
            count=12 if config.smoke else config.count,
            more=config.more,
            model=model,
            other_data="digits28" if config.transfer else None,
            baselines=config.baselines and not config.smoke,
            device=config.device,
        )
    )


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
