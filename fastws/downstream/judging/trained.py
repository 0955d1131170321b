"""Accuracy by epoch of populations that were trained: from scratch, or from sampled networks."""

from collections.abc import Sequence
from pathlib import Path

import numpy
from numpy import ndarray

from fastws.downstream.judging.statistics import tabulate
from fastws.zoo.format.zoo import Zoo

ACCURACY = "test_accuracy"


def read(paths: Sequence[str]) -> dict[str, dict[int, ndarray]]:
    """The accuracies of all networks, by the name of their zoo and by epoch.

    Raises:
        FileNotFoundError: If there is no such zoo.
        ValueError: If a zoo does not know accuracies and epochs.
    """
    names = [Path(path).name for path in paths]
    found = {}
    for path, name in zip(paths, names if len(set(names)) == len(names) else paths, strict=True):
        zoo = Zoo.open(path)
        missing = {ACCURACY, "epoch"} - set(zoo.properties.column_names)
        if missing:
            what = f"zoos with {ACCURACY} and epoch, as zoo make and zoo evaluate write them"
            raise ValueError(
                f"zoo compare: continued must be {what}, got {zoo.path} without {', '.join(sorted(missing))}"
            )
        accuracy, epochs = zoo.numbers(ACCURACY).astype(numpy.float64), zoo.numbers("epoch")
        known = numpy.isfinite(accuracy) & numpy.isfinite(epochs)
        found[name] = {int(epoch): accuracy[known & (epochs == epoch)] for epoch in numpy.unique(epochs[known])}
    return found


def tables(found: dict[str, dict[int, ndarray]]) -> list[dict[str, object]]:
    """For each epoch a table of the populations that have it."""
    epochs = sorted({epoch for one in found.values() for epoch in one})
    here = ({name: one[epoch] for name, one in found.items() if epoch in one} for epoch in epochs)
    return [{"epoch": epoch, "rows": tabulate(one)} for epoch, one in zip(epochs, here, strict=True)]
