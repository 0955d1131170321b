"""Splits of a zoo: which models are for training, and which for validation and test."""

from collections.abc import Mapping, Sequence

import numpy

SPLITS = {"train": 0.7, "val": 0.15, "test": 0.15}


def deal(splits: Mapping[str, Sequence[str]], models: Sequence[str], seed: int) -> dict[str, list[str]]:
    """The splits with new models, in an order that ``seed`` shuffles, each in the split that lacks most."""
    splits = {name: list(members) for name, members in splits.items()}
    count = sum(map(len, splits.values()))
    for place in numpy.random.default_rng([seed, count]).permutation(len(models)):
        count += 1
        lacking = {name: share * count - len(splits[name]) for name, share in SPLITS.items()}
        splits[max(lacking, key=lacking.get)].append(models[place])
    return splits


def find_shared(splits: Mapping[str, Sequence[str]]) -> str | None:
    """A model that is in two splits, where what is learned from it would be tested on it; None if none is."""
    seen = {}
    for name, models in splits.items():
        for model in models:
            if seen.setdefault(model, name) != name:
                return f"{model!r} in {seen[model]} and {name}"
    return None


def find_splits(splits: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The split of each model."""
    return {model: name for name, models in splits.items() for model in models}
