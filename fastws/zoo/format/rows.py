"""Which rows of a zoo are which states of its networks."""

import numpy

from fastws.zoo.format.zoo import Zoo


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
