"""Which rows of a zoo are which states of its networks."""

import numpy
import torch
from torch import Tensor

from fastws.zoo.format.zoo import Zoo


def rows_of_epochs(zoo: Zoo, rows: Tensor, epochs: tuple[int, int] | None, where: str) -> Tensor:
    """Those of some rows, int64, that are states of epochs from the first to the last of ``epochs``; None: all.

    Raises:
        ValueError: If the zoo knows no epochs; the sentence begins with ``where``.
    """
    if epochs is None:
        return rows
    if "epoch" not in zoo.properties.column_names:
        raise ValueError(f"{where}: epochs must be left out for {zoo.path}, which does not know them")
    epoch = torch.from_numpy(zoo.numbers("epoch"))[rows]
    return rows[(epochs[0] <= epoch) & (epoch <= epochs[1])]


def last_rows(zoo: Zoo) -> dict[str, int]:
    """The row of each model's last epoch; of its last row, where epochs are not known."""
    models = zoo.properties["model"].cast("string").to_pylist()
    known = "epoch" in zoo.properties.column_names
    epochs = zoo.numbers("epoch") if known else numpy.arange(len(models))
    epochs = numpy.where(numpy.isnan(epochs), -numpy.inf, epochs).tolist()
    last: dict[str, int] = {}
    for row, model in enumerate(models):
        if model not in last or epochs[row] >= epochs[last[model]]:
            last[model] = row
    if not last:
        raise ValueError(f"{zoo.path}: zoo must hold networks, got none")
    return last
