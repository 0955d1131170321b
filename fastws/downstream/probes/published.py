"""Published scores of linear probes on published zoos, to stand beside those of a zoo that is made alike."""

import json
from typing import Literal, NamedTuple

from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.grids import PRESETS

PublishedZoo = Literal[
    "unterthiner-mnist",
    "unterthiner-fashion",
    "unterthiner-cifar10",
    "unterthiner-svhn",
    "sane-mnist",
    "sane-svhn",
    "sane-cifar10",
    "sane-stl10",
]
FEATURES = ("weights", "statistics", "embedding")
# R^2, of the last three accuracy, in percent; arXiv 2110.15288: W, s(W) and its learned representation
TABLE_2110_15288 = {
    "unterthiner-mnist": {
        "epoch": (25.8, 33.2, 50.0),
        "test_accuracy": (74.7, 81.5, 94.9),
        "generalisation_gap": (23.4, 24.4, 27.4),
        "lr": (29.3, 34.3, 37.1),
        "l2reg": (12.5, 16.5, 20.1),
        "dropout": (28.5, 19.2, 35.8),
        "train_fraction": (3.8, 7.8, 15.9),
        "activation": (88.6, 81.1, 88.7),
        "init": (94.6, 72.0, 80.6),
        "optimizer": (76.7, 65.4, 66.4),
    },
    "unterthiner-fashion": {
        "epoch": (26.6, 34.6, 51.3),
        "test_accuracy": (70.9, 78.5, 96.2),
        "generalisation_gap": (48.1, 41.1, 49.0),
        "lr": (33.5, 35.6, 42.4),
        "l2reg": (11.9, 16.3, 25.0),
        "dropout": (26.7, 21.3, 38.3),
        "train_fraction": (8.1, 8.2, 22.1),
        "activation": (89.8, 82.4, 90.1),
        "init": (95.7, 76.5, 86.7),
        "optimizer": (79.9, 67.4, 73.0),
    },
    "unterthiner-cifar10": {
        "epoch": (25.7, 30.3, 53.3),
        "test_accuracy": (76.4, 82.9, 92.7),
        "generalisation_gap": (37.7, 37.4, 40.4),
        "lr": (27.4, 32.3, 44.7),
        "l2reg": (8.7, 13.8, 28.0),
        "dropout": (16.7, 16.5, 33.8),
        "train_fraction": (8.4, 6.9, 35.4),
        "activation": (88.3, 80.3, 90.0),
        "init": (93.5, 73.3, 82.6),
        "optimizer": (74.0, 65.5, 71.0),
    },
    "unterthiner-svhn": {
        "epoch": (22.8, 37.8, 52.6),
        "test_accuracy": (80.5, 82.1, 91.1),
        "generalisation_gap": (38.7, 42.2, 44.2),
        "lr": (24.5, 33.4, 49.1),
        "l2reg": (9.0, 13.6, 28.0),
        "dropout": (9.0, 14.6, 23.3),
        "train_fraction": (3.2, 8.8, 21.4),
        "activation": (86.9, 78.8, 87.2),
        "init": (91.0, 73.0, 82.8),
        "optimizer": (72.5, 68.2, 72.3),
    },
}
# R^2; table 1 of arXiv 2406.09997: W, s(W) and SANE
TABLE_2406_09997 = {
    "sane-mnist": {
        "test_accuracy": (0.965, 0.987, 0.978),
        "epoch": (0.953, 0.974, 0.958),
        "generalisation_gap": (0.246, 0.393, 0.402),
    },
    "sane-svhn": {
        "test_accuracy": (0.910, 0.985, 0.991),
        "epoch": (0.833, 0.953, 0.930),
        "generalisation_gap": (0.479, 0.711, 0.760),
    },
    "sane-cifar10": {
        "test_accuracy": (-7.580, 0.965, 0.885),
        "epoch": (0.636, 0.923, 0.771),
        "generalisation_gap": (0.324, 0.909, 0.772),
    },
    "sane-stl10": {
        "test_accuracy": (-18.818, 0.919, 0.305),
        "epoch": (-1.926, 0.977, 0.344),
        "generalisation_gap": (-0.617, 0.858, 0.307),
    },
}
MADE_LIKE = {"mnist-s-seed": "sane-mnist", "svhn-s-seed": "sane-svhn"}  # presets of zoo make
# what of a preset must be as it was published; of networks and epochs there may be fewer
RECIPE = ("architecture", "batch_size", "activations", "dropouts", "inits", "optimizers", "lrs", "weight_decays")


class Published(NamedTuple):
    """The scores of a published zoo, and where they stand."""

    scores: dict[str, tuple[float, float, float]]  # of W, s(W) and the learned representation, by target
    source: str

    def score(self, features: str, target: str) -> float | None:
        """The published score of a linear probe, if there is one."""
        if features not in FEATURES or target not in self.scores:
            return None
        return self.scores[target][FEATURES.index(features)]


def find_published(zoo: Zoo, name: PublishedZoo | None) -> Published | None:
    """The published scores of the zoo ``name``, by default of that which the zoo says it was made like, if any."""
    made = zoo.provenance.get("config") if isinstance(zoo.provenance, dict) else None
    preset = made.get("preset") if isinstance(made, dict) else None
    if name is None and isinstance(preset, str) and preset in MADE_LIKE:
        theirs = json.loads(json.dumps(PRESETS[preset]))  # lists for tuples, as in the zoo
        name = MADE_LIKE[preset] if all(made.get(key) == theirs[key] for key in RECIPE) else None
    if name in TABLE_2110_15288:
        found = {target: tuple(score / 100 for score in row) for target, row in TABLE_2110_15288[name].items()}
        return Published(found, f"{name}, arXiv 2110.15288")
    return Published(TABLE_2406_09997[name], f"{name}, arXiv 2406.09997, table 1") if name else None
