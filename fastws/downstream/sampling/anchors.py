"""The networks that samples are made from."""

from typing import NamedTuple

import numpy
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

from fastws.downstream.judging.statistics import selection_optimism
from fastws.downstream.representation import Representation
from fastws.zoo.alignment import ALIGNMENT, aligned_rows
from fastws.zoo.format.rows import last_rows, rows_of_epochs
from fastws.zoo.format.zoo import Zoo

BY = ("val_accuracy", "test_accuracy")  # what ranks anchors, the first that is known


class Choice(NamedTuple):
    """Which networks of a zoo are anchors; see the options of ``fastws sample``."""

    epochs: tuple[int, int] | None = None
    best: float = 1.0
    by: str | None = None
    activation: str | None = None
    aligned: bool | None = None


class Anchors(NamedTuple):
    """The networks that samples are made from."""

    rows: Tensor  # of the zoo, int64
    held_out: Tensor  # rows of the validation split, by the same choice of states
    names: list[str]  # model and epoch of each
    activation: str | None
    aligned: bool
    said: str  # which ones these are, in words

    def read(self, zoo: Zoo, rows: Tensor) -> Tensor:
        """Networks of the zoo in the order that anchors have, ``[n, P]`` float32."""
        return (aligned_rows(zoo, rows) if self.aligned else zoo.rows(rows)).float()


def choose_anchors(config: Choice, zoo: Zoo, representation: Representation | None = None) -> Anchors:
    """The states to sample from: of the training split, of one activation, the best of them."""
    properties, known = zoo.properties, zoo.properties.column_names
    train, held_out = (states(config, zoo, split) for split in ("train", "val"))
    if not len(train):
        epochs = "" if config.epochs is None else " of epochs {} to {}".format(*config.epochs)
        raise ValueError(f"sample: zoo must hold states of the train split{epochs}, got none in {zoo.path}")
    said = [f"{zoo.path}"]
    activation = None
    if "activation" in known:
        column = properties["activation"].cast("string")
        here = column.take(pyarrow.array(train.numpy()))
        counts = {entry["values"]: entry["counts"] for entry in pyarrow.compute.value_counts(here).to_pylist()}
        activation = config.activation or max(sorted(filter(None, counts)), key=counts.get, default=None)
        keep = torch.tensor([name == activation for name in column.to_pylist()], dtype=torch.bool)
        train, held_out = train[keep[train]], held_out[keep[held_out]]
        said.append(f"activation {activation}")
    elif config.activation is not None:
        raise ValueError(f"sample: activation must be left out for {zoo.path}, which does not know any")
    if len(train) and config.best < 1:
        by = config.by or next((name for name in BY if name in known), None)
        if by is None or by not in known:
            what = f"one of {', '.join(known)}, got {by or 'none of ' + ' and '.join(BY)}"
            raise ValueError(f"sample: by must be a property of {zoo.path} to take the best by, {what}")
        values = torch.from_numpy(zoo.numbers(by))[train]
        finite = values.isfinite()
        if not finite.any():
            raise ValueError(f"sample: by must be a property that anchors have, got {by} without any finite value")
        bound = values[finite].quantile(1 - config.best)
        train = train[finite & (values >= bound)]
        said.append(f"best {config.best:.0%} by {by}{overstated(zoo, by, config.best, values[finite])}")
    if not len(train):
        what = f"states of the train split with {', '.join(said[1:])}"
        raise ValueError(f"sample: zoo must hold {what}, got none in {zoo.path}")
    aligned = config.aligned
    if aligned is None:
        aligned = (zoo.path / ALIGNMENT).is_file() if representation is None else representation.aligned
    said.append(f"{len(train)} anchors{', aligned' if aligned else ''}")
    models = properties["model"].cast("string").to_pylist()
    epochs = zoo.numbers("epoch") if "epoch" in known else numpy.zeros(len(zoo))
    names = [f"{models[row]}@{epochs[row]:g}" for row in train.tolist()]
    return Anchors(train, held_out, names, activation, aligned, ", ".join(said))


def overstated(zoo: Zoo, by: str, best: float, values: Tensor) -> str:
    """How much the accuracies that the best were chosen by overstate theirs, in words; "" where images are unknown."""
    made = zoo.provenance.get("config")
    images = made.get("validation") if isinstance(made, dict) and by == "val_accuracy" else None
    mean = values.double().mean().item()
    if not isinstance(images, int) or images < 1 or not 0 < mean < 1 or len(values) < 2:
        return ""
    between = max(0.0, values.double().var().item() - mean * (1 - mean) / images) ** 0.5
    points = 100 * selection_optimism(best, mean, images, between)
    return f" (which overstates theirs by about {points:.1f} points)"


def states(config: Choice, zoo: Zoo, split: str) -> Tensor:
    """Rows of a split: those of the epochs that were asked for, or the last one of each network."""
    rows = zoo.split(split)
    if config.epochs is not None or "epoch" not in zoo.properties.column_names:
        return rows_of_epochs(zoo, rows, config.epochs, "sample")
    return rows[torch.isin(rows, torch.tensor(list(last_rows(zoo).values())))]
