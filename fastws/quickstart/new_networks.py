"""New networks, sampled from a zoo of their own, and what they are worth: what the quickstart shows of generators.

All networks of this zoo are of one recipe, with tanh, whose units may change their sign, and weight decay: without the
one or the other nothing that is learned from a few hundred networks generalises.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy

from fastws.downstream import evaluate
from fastws.downstream.judging import compare as compare_zoos
from fastws.downstream.sampling import sample
from fastws.train.ae import train as ae
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import ALIGNMENT
from fastws.zoo.making.make import Config as MakeConfig

STATES = 5  # of each network that are learned from, the last ones
MORE = 2  # epochs that new networks are trained for
# words for the page, and how a set is sampled; "model": from the codes of the autoencoder
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "kde": ("autoencoder, KDE of its codes", {"method": "kde", "best": 0.3, "model": True}),
    "kde-reference": (
        "KDE as it was released",
        {"method": "kde", "best": 0.3, "mode": "reference", "model": True},
    ),
    "pca": ("PCA of the weights + Gaussian", {"method": "pca", "components": 64}),
    "behaviour": (
        "Gaussian, taught on training images",
        {"method": "pca", "components": 64, "behaviour": 200},
    ),
    "noise": ("training networks + noise", {"method": "noise", "noise": 0.4}),
}


class Sizes(NamedTuple):
    """Of the zoo and of what is done with it."""

    networks: int
    epochs: int  # of training them
    passes: int  # of the autoencoder over the training networks
    count: int  # new networks of each set


def sample_sets(folder: Path, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Makes the zoo, learns it, samples every set and judges it; a plain description of what was found.

    Everything is written into ``folder``; what is there already is kept.
    """
    zoo, states = aligned_zoo(folder, sizes, seed), (max(1, sizes.epochs - STATES + 1), sizes.epochs)
    common = {"zoo": str(zoo.path), "epochs": states}
    ae.run(ae.Config(out=str(folder / "ae"), aligned=True, passes=sizes.passes, seed=seed, device="cpu", **common))
    trained = {}
    for name, (_, options) in SETS.items():
        options = options | ({"model": str(folder / "ae/checkpoint.pt")} if "model" in options else {})
        if not (folder / name / "zoo.json").exists():
            sample.sample(
                sample.Config(
                    out=str(folder / name),
                    count=sizes.count,
                    seed=seed,
                    aligned=True,
                    device="cpu",
                    **common,
                    **options,
                )
            )
        evaluate.evaluate(evaluate.Config(zoo=str(folder / name), device="cpu"))
        trained[name] = make(MakeConfig(out=str(folder / f"{name}-trained"), start=str(folder / name), epochs=MORE))
    judged = compare_zoos.compare(
        compare_zoos.Config(
            samples=tuple(str(folder / name) for name in SETS),
            out=str(folder / "compare"),
            baselines=False,
            device="cpu",
            count=sizes.count,
            train=str(zoo.path),
            epochs=states,
        )
    )
    measured = {one["name"]: {key: one[key] for key in ("accuracy", "novelty", "spread")} for one in judged["sets"]}
    sets = {name: measured[name] | {"trained": accuracy(trained[name], MORE)} for name in SETS}
    held_out = measured["held-out networks"] | {"trained": None}
    return {
        "networks": len(zoo.splits["train"]),
        "training_states": judged["training states"],
        "weights": zoo.layout.num_weights,
        "count": sizes.count,
        "more_epochs": MORE,
        "sets": {SETS[name][0]: found for name, found in sets.items()} | {"held-out networks": held_out},
        "scratch": [accuracy(zoo, 0), accuracy(zoo, MORE)],
    }


def aligned_zoo(folder: Path, sizes: Sizes, seed: int) -> Zoo:
    zoo = make(
        MakeConfig(
            out=str(folder / "zoo"),
            networks=sizes.networks,
            epochs=sizes.epochs,
            activations=("tanh",),
            inits=("xavier_uniform",),
            optimizers=("momentum",),
            lrs=(0.1,),
            weight_decays=(1e-2,),
            validation=200,
            seed=seed,
        )
    )
    if not (zoo.path / ALIGNMENT).exists():
        align(AlignConfig(zoo=str(zoo.path)))
    return zoo


def accuracy(zoo: Zoo, epoch: int) -> float:
    """The mean test accuracy of a zoo's networks after an epoch."""
    values = zoo.numbers("test_accuracy")[zoo.numbers("epoch") == epoch]
    return float(numpy.mean(values))
