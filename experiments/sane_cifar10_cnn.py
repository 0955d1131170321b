"""New networks from a SANE of small CNNs, beside what needs no learning, and the table of the paper (arXiv 2406.09997).

python experiments/sane_cifar10_cnn.py --out runs/sane-cifar10 --data cifar10         # makes the zoo first, for hours
python experiments/sane_cifar10_cnn.py --out runs/sane-digits --zoo zoos/digits       # any zoo of fastws zoo make

See hyperrep.py for what is done. The same command goes on where a stopped run was; a zoo that is given is aligned where
it lies. --smoke is a minute's run on digits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hyperrep
import tyro

from fastws.terminal import one_sentence
from fastws.zoo.making.make import Config as MakeConfig

KDE = {"method": "kde", "model": True, "best": 0.3}
SETS = {  # name: how it is sampled; sub keeps the best fifth of its candidates, boot does so three times
    "reconstructed": {"method": "direct", "model": True},
    "kde-independent": KDE | {"density": "token"},
    "kde-reference": KDE | {"density": "token", "mode": "reference"},
    "kde-dimension": KDE,
    "sub": KDE | {"density": "token", "candidates": 5},
    "boot": KDE | {"density": "token", "candidates": 5, "rounds": 3},
    "prior": {"method": "prior", "model": True},
    "pca64-codes": {"method": "pca", "components": 64, "model": True},
    "pca64": {"method": "pca", "components": 64},
    "sub-pca64": {"method": "pca", "components": 64, "candidates": 5},
    "noise": {"method": "noise", "noise": 0.4},
    "average": {"method": "average", "together": 2},
}
SMOKE = ("reconstructed", "kde-independent", "sub", "pca64")
PUBLISHED = {  # CIFAR-10 column of table 3: accuracy in percent at epochs 0, 1 and 5
    "scratch": (10.0, 37.2, 48.5),
    "kde-reference": (56.3, 58.2, 58.8),  # KDE30, as it was released
    "sub": (57.9, 59.1, 59.6),
    "prior": (19.3, 27.2, 43.3),  # GAUSS
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes a zoo or takes one, learns it by SANE, samples from it, and says what the samples are worth."""

    out: str  # folder of everything
    zoo: str | None = None  # folder of a zoo of fastws zoo make with validation images; by default one is made
    data: str = "cifar10"  # folder of the images of a zoo that is made
    seed: int = 0  # of the zoo and of everything drawn
    networks: int = 100  # of a zoo that is made
    count: int = 100  # networks of each set
    passes: int = 200  # of SANE over the training networks
    width: int = 256  # of SANE
    depth: int = 4  # of SANE's encoder, and of its decoder
    latent: int = 64  # entries of a token's code
    behaviour: float = 0.0  # share of what networks compute in SANE's loss of reconstruction
    bandwidth: float = 0.2  # of the densities
    more: tuple[int, ...] = (1, 5)  # epochs of training after which samples are measured again
    smoke: bool = False  # a few digits networks, to see that everything works; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one


def run(config: Config) -> dict[str, Any]:
    zoo = describe_zoo(config)
    count, more = (12, (1,)) if config.smoke else (config.count, config.more)
    model = {"size": "tiny", "steps": 4} if config.smoke else {"size": "small", "passes": config.passes, "lr": 1e-3}
    if not config.smoke:
        model |= {name: getattr(config, name) for name in ("width", "depth", "latent")}
    model |= {"behaviour": config.behaviour}
    methods = {name: dict(options) for name, options in SETS.items() if not config.smoke or name in SMOKE}
    for options in methods.values():
        options["candidates"] = options.get("candidates", 0) * count
        options |= {"bandwidth": config.bandwidth} if options["method"] == "kde" else {}
    found = hyperrep.run(
        hyperrep.Plan(
            zoo=zoo,
            out=Path(config.out),
            states=(max(1, zoo.epochs - 4), zoo.epochs),
            sets=tuple(methods),
            methods=methods,
            learner="sane",
            model=model,
            count=count,
            more=more,
            baselines=not config.smoke,
            device=config.device,
        )
    )
    print("\npublished, CNNs on CIFAR-10, accuracy in percent at epochs 0, 1 and 5:")
    for name, values in PUBLISHED.items():
        print(f"{name:36}" + "".join(f"{value:9.1f}" for value in values))
    return found


def describe_zoo(config: Config) -> MakeConfig:
    """The configuration of the zoo: of the one that is given, or of one to make."""
    if config.zoo is not None:
        return hyperrep.describe_given(config.zoo)
    out = str(Path(config.out, "zoo"))
    if config.smoke:
        return MakeConfig(out=out, networks=80, epochs=2, seed=config.seed, **hyperrep.ALIKE)
    recipe = {"activations": ("tanh",), "inits": ("kaiming_uniform",), "dropouts": (0.0,), "validation": 5000}
    recipe |= {"optimizers": ("adam",), "lrs": (1e-3,), "weight_decays": (1e-3,), "batch_size": 32}
    about = {"architecture": "cnn-l", "data": config.data, "epochs": 25, "train_metrics": "running"}
    return MakeConfig(out=out, networks=config.networks, seed=config.seed, **about, **recipe)


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
