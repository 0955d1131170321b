"""What a preset gives an autoencoder for every option that is not given: ours for a CPU, and the published ones.

Of the published presets the number of passes is the real one: the released code trains ten epochs in each of the
iterations that it counts. Dropout, heads and sizes are those of its configurations (arXiv 2110.15288, 2209.14733).
"""

from typing import Any, Literal

Preset = Literal[
    "cpu",
    "cpu-transformer",
    "tetris-seed",
    "tetris-hyp",
    "mnist-seed",
    "mnist-hyp-1-fix-seed",
    "mnist-hyp-1-rand-seed",
    "mnist-hyp-5-fix-seeds",
    "mnist-hyp-5-rand-seeds",
    "f-mnist-seed",
    "unterthiner-mnist",
    "unterthiner-f-mnist",
    "unterthiner-svhn",
    "unterthiner-cifar10",
    "vanilla",
    "generative",
]

COMMON: dict[str, Any] = {  # of the published configurations
    "encoding": "neuron",
    "bounded": True,
    "compression": "token",
    "dropout": 0.1,
    "batch_size": 500,
    "lr": 1e-4,
    "weight_decay": 1e-9,
    "optimizer": "adam",
    "schedule": "plateau",
    "standardize": "none",
    "layerwise": False,
    "contrast": "simclr",
    "permute": True,
    "noise": 0.0,
    "additive": 0.0,
    "code_noise": 0.0,
    "block_erase": 0.5,
}


def published(passes: int, gamma: float, sizes: tuple[int, ...], head: tuple[int, ...], **options: Any) -> dict:
    names = ("heads", "depth", "width", "feed_forward", "latent")
    shape = dict(zip(names, sizes, strict=True)) | dict(
        zip(("head_depth", "head_width", "projection"), head, strict=True)
    )
    return COMMON | {"passes": passes, "gamma": gamma} | shape | options


TETRIS, MNIST, UNTERTHINER = (4, 2, 256, 512, 50), (4, 2, 800, 900, 700), (4, 4, 512, 1000, 1200)
# seconds to minutes on a CPU: weights in units of their layer's spread around the mean network, which suits aligned
# zoos; noise on input and code keeps so small a model from learning its networks by heart
CPU = COMMON | {
    "encoding": "vector",
    "hidden": (512,),
    "latent": 64,
    "activation": "gelu",
    "layer_norm": True,
    "bounded": False,
    "dropout": 0.0,
    "head_depth": 0,
    "head_width": 50,
    "projection": 20,
    "batch_size": 64,
    "passes": 100,
    "lr": 1e-3,
    "optimizer": "adamw",
    "schedule": "one-cycle",
    "standardize": "center",
    "layerwise": True,
    "gamma": 0.0,
    "permute": False,
    "additive": 0.3,
    "code_noise": 0.3,
    "block_erase": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": CPU,
    "cpu-transformer": published(
        100, 0.05, (4, 2, 64, 128, 64), (2, 64, 32), batch_size=64, lr=1e-3, schedule="one-cycle", layerwise=True
    ),
    "tetris-seed": published(1000, 0.5, TETRIS, (3, 50, 20)),
    "tetris-hyp": published(1000, 0.5, (4, 2, 256, 900, 50), (3, 50, 20)),
    "mnist-seed": published(500, 0.1, MNIST, (4, 400, 50)),
    "mnist-hyp-1-fix-seed": published(500, 0.5, (2, 4, 800, 1000, 700), (4, 400, 50)),
    "mnist-hyp-1-rand-seed": published(500, 0.15, (2, 4, 800, 900, 700), (4, 400, 20)),
    "mnist-hyp-5-fix-seeds": published(500, 0.5, MNIST, (4, 400, 20)),
    "mnist-hyp-5-rand-seeds": published(500, 0.5, (2, 4, 800, 900, 500), (2, 400, 50)),
    "f-mnist-seed": published(500, 0.1, MNIST, (4, 400, 50)),
    "unterthiner-mnist": published(200, 0.1, UNTERTHINER, (4, 400, 50)),
    "unterthiner-f-mnist": published(200, 0.85, UNTERTHINER, (4, 400, 50)),
    "unterthiner-svhn": published(250, 0.85, UNTERTHINER, (4, 400, 50)),
    "unterthiner-cifar10": published(250, 0.5, UNTERTHINER, (4, 400, 50), contrast="positive-reference"),
    # the ablation of the architecture: ten hidden layers of widths that fall by equal steps, three times the rate
    "vanilla": published(1000, 0.5, TETRIS, (3, 50, 20), encoding="vector", hidden=None, lr=3e-4),
    # the released code of 2022 by its defaults; its configurations are not part of it
    "generative": published(
        500,
        0.1,
        MNIST,
        (4, 400, 50),
        compression="linear",
        bounded=False,
        layerwise=True,
        optimizer="adamw",
        lr=3e-4,
        weight_decay=3e-5,
        clip=5.0,
    ),
}
