"""SANE on a zoo of ResNets: what embeddings foretell, and new networks, beside the tables of arXiv 2406.09997.

python experiments/sane_cifar100_resnet18.py --zoo zoos/cifar100-resnet18 --out runs/sane-resnet18 --size resnet18
python experiments/sane_cifar100_resnet18.py --zoo zoos/resnet8 --out runs/sane-resnet8    # any zoo of fastws zoo make

The zoo is one of networks with batch norms, with validation images and the states of several epochs; it is aligned
where it lies. Networks are reconstructed with and without new statistics of batch norms, and with and without a halo,
sampled as published, and beside that from weights. The same command goes on where a stopped run was; --smoke makes a
zoo of small ResNets first.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hyperrep
import tyro

from fastws.downstream import predict
from fastws.files.atomic import write_json
from fastws.terminal import one_sentence
from fastws.zoo import Zoo
from fastws.zoo.making.make import Config as MakeConfig

IMAGES = 500  # from which batch norms get new statistics
NEW = {"condition": IMAGES}
KDE = {"method": "kde", "model": True, "best": 0.3, "density": "token"} | NEW
SETS = {  # name: how it is sampled; sub keeps the best fifth of its candidates, boot does so three times
    "reconstructed": {"method": "direct", "model": True} | NEW,
    "reconstructed without halo": {"method": "direct", "model": True, "halo": 0} | NEW,
    "reconstructed, statistics of anchors": {"method": "direct", "model": True},
    "neither": {"method": "direct", "model": True, "halo": 0},
    "kde-independent": KDE,
    "kde-reference": KDE | {"mode": "reference"},
    "sub": KDE | {"candidates": 5},
    "boot": KDE | {"candidates": 5, "rounds": 3},
    "pca64": {"method": "pca", "components": 64} | NEW,
    "noise": {"method": "noise", "noise": 0.2} | NEW,
    "average": {"method": "average", "together": 2} | NEW,
    "anchors": {"method": "direct"},
}
SMOKE = ("reconstructed", "sub")
PUBLISHED = """
published, ResNet-18 on CIFAR-10, CIFAR-100, Tiny-ImageNet; R2 of accuracy, s(W): .880 .923 .802, SANE: .879 .922 .795
accuracy in percent at epochs 0, 1, 5 on CIFAR-100: scratch 1, 17.5, 36.5; KDE30 19.8, 59.0, 56.2; SUB 19.8, 60.8, 56.7;
BOOT 20.4, 60.2, 56.4. On CIFAR-10 at epoch 0: neither halo nor new statistics 10.0, halo 14.5, statistics 60.8, both
64.8"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learns a zoo of ResNets by SANE, samples from it, and says what embeddings and samples are worth."""

    out: str  # folder of everything but the zoo
    zoo: str | None = None  # folder of a zoo of fastws zoo make; may be left out with smoke
    seed: int = 0  # of everything drawn
    size: str = "small"  # of SANE: resnet18 is the published one
    width: int | None = None  # of SANE, if not that of the size
    depth: int | None = None  # of its encoder, and of its decoder
    latent: int | None = None  # entries of a token's code
    window: int | None = None  # tokens; by default those of the size
    steps: int = 3000  # of SANE
    lr: float = 1e-3  # of SANE
    count: int = 20  # networks of each set
    more: tuple[int, ...] = (1,)  # epochs of training after which samples are measured again
    judged: bool = True  # whether distances to training networks are measured, long for large networks
    baselines: bool = False  # curves of noise, averages and PCA + Gaussian in the report
    smoke: bool = False  # a few networks and steps; its numbers mean nothing
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if self.zoo is None and not self.smoke:
            raise ValueError(
                "sane_cifar100_resnet18: zoo must be a folder of fastws zoo make, got none; or give --smoke"
            )


def run(config: Config) -> dict[str, Any]:
    about = describe_zoo(config)
    count = 4 if config.smoke else config.count
    methods = {name: dict(options) for name, options in SETS.items() if not config.smoke or name in SMOKE}
    for options in methods.values():
        options["candidates"] = options.get("candidates", 0) * count
        if config.smoke and "condition" in options:
            options["condition"] = 50
    model = {name: getattr(config, name) for name in ("size", "width", "depth", "latent", "window", "lr", "steps")}
    model |= {"size": "tiny", "window": 16, "steps": 4} if config.smoke else {}
    zoo = Zoo.open(about.out) if config.zoo is not None else None
    last = about.epochs if zoo is None else int(zoo.numbers("epoch").max())
    found = hyperrep.run(
        hyperrep.Plan(
            zoo=about,
            out=Path(config.out),
            states=(max(1, last - 4), last),
            sets=tuple(methods),
            methods=methods,
            learner="sane",
            model=model,
            count=count,
            more=config.more,
            judged=config.judged and not config.smoke,
            baselines=config.baselines,
            device=config.device,
        )
    )
    found["results"] = probe(config, about.out)
    write_json(Path(config.out, "results.json"), found)
    for line in found["results"]:
        print("{features:<12} {target:<20} R2 {test_r2:7.3f} tau {test_tau:6.3f}".format(**line))
    print(PUBLISHED)
    return found


def describe_zoo(config: Config) -> MakeConfig:
    """The configuration of the zoo: of the one that is given, or of a small one to make."""
    if config.zoo is not None:
        return hyperrep.describe_given(config.zoo)
    out = str(Path(config.out, "zoo"))
    recipe = {"activations": ("relu",), "inits": ("kaiming_normal",), "dropouts": (0.0,), "batch_size": 16}
    recipe |= {"optimizers": ("momentum",), "lrs": (0.1,), "weight_decays": (5e-4,)}
    about = {"architecture": "cifar-resnet8-b-half", "networks": 10, "epochs": 1, "limit": 60, "validation": 60}
    return MakeConfig(out=out, seed=config.seed, **about, **recipe)


def probe(config: Config, zoo: str) -> list[dict[str, Any]]:
    """R2 and rank correlation of what can be foretold of networks, with all states of the zoo."""
    out = Path(config.out, "probe")
    if not (out / "results.json").exists():
        model = str(Path(config.out, "sane/checkpoint.pt"))
        predict.run(
            predict.Config(zoo=zoo, out=str(out), model=model, aligned=True, seed=config.seed, device=config.device)
        )
    return json.loads((out / "results.json").read_text())["results"]


if __name__ == "__main__":
    with one_sentence():
        run(tyro.cli(Config))
