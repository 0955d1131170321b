"""Properties that are found out about the networks of a finished zoo."""

from collections.abc import Mapping

import numpy
import pyarrow

from fastws.files.lock import release_lock, take_lock
from fastws.zoo.format.parts import write_models
from fastws.zoo.format.zoo import Zoo


def add_properties(zoo: Zoo, columns: Mapping[str, numpy.ndarray]) -> Zoo:
    """Adds columns to the properties of a zoo, or replaces those of the same name; returns the zoo, open anew.

    The file of properties is replaced at once: readers see all of it, or what was there before.

    Raises:
        ValueError: If a column has not one value for each state, or the zoo is still being written.
        BlockingIOError: If another program is writing the zoo.
    """
    lock = take_lock(zoo.path)
    try:
        current = Zoo.open(zoo.path)
        if len(current.model_files) != 1 or len(current) != len(zoo):
            raise ValueError(f"{zoo.path}: zoo must be finished before properties are added to it; finish or close it")
        table = current.properties
        for name, values in columns.items():
            if len(values) != len(table):
                what = f"one value for each of {len(table)} states, got {len(values)}"
                raise ValueError(f"{zoo.path}: property {name!r} must have {what}")
            column = pyarrow.array(values)
            known = name in table.column_names
            place = table.column_names.index(name) if known else 0
            table = table.set_column(place, name, column) if known else table.append_column(name, column)
        write_models(zoo.path / current.model_files[0]["file"], table)
    finally:
        release_lock(zoo.path, lock)
    return Zoo.open(zoo.path)
