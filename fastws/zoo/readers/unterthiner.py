"""Populations of "Predicting Neural Network Accuracy from Weights", arXiv 2002.11448: weights.npy and metrics.csv."""

import os
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy
import pyarrow
import pyarrow.csv
import torch
from torch import Tensor

from fastws.files.limits import DAMAGED, open_regular
from fastws.layout.layout import Layout
from fastws.terminal import shorten
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.readers.collect import Population, ReadOptions, collect
from fastws.zoo.readers.ray import add_gap
from fastws.zoo.readers.record import check_new

WEIGHTS, METRICS = "weights.npy", "metrics.csv"
SHAPES = {  # of the one architecture; modules as the published wrapper numbers them
    "module_list.0": (16, 1, 3, 3),
    "module_list.2": (16, 16, 3, 3),
    "module_list.4": (16, 16, 3, 3),
    "module_list.7": (10, 16),
}
LENGTH = 4970
DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}  # as numpy writes them, little endian
PUBLISHED_STARTS = (0, 160, 2320, 4800)  # where the published wrapper puts the layers; the third begins at 2480
OWN_NAMES = {"learning_rate": "lr", "w_init": "init"}


def read_unterthiner(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    layout: Literal["fixed", "reference"] = "fixed",
    options: ReadOptions | None = None,
) -> Zoo:
    """Reads ``weights.npy`` ``[n, 4970]`` and ``metrics.csv`` into a zoo folder.

    A row of the file holds bias and kernel of each layer, kernels as TensorFlow keeps them: [height, width, in, out]
    and [in, out].

    Args:
        path: The folder of one population.
        out: The zoo folder to write.
        layout: ``"fixed"`` gives the checkpoints of PyTorch networks: kernels [out, in, height, width], then biases.
            ``"reference"`` gives the vectors that hyper-representations were trained on: kernels are not transposed,
            and the third layer is put 160 places too early, over the end of the second.
        options: What all readers have in common.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files do not fit, or as ``options`` say.
    """
    if layout not in ("fixed", "reference"):
        raise ValueError(f"zoo read: --layout must be 'fixed' or 'reference', got {layout!r}")
    check_new(out)
    weights, columns = read_weights(Path(path) / WEIGHTS), read_metrics(Path(path) / METRICS)
    if len(weights) != len(columns["model"]):
        raise ValueError(f"{path}: {METRICS} must describe {len(weights)} states, got {len(columns['model'])}")
    order = fixed_order() if layout == "fixed" else reference_order()

    def fill(place: int, row: Tensor) -> tuple[str, ...]:
        row.copy_(torch.from_numpy(weights[place][order]))
        return ()

    source = {"kind": "unterthiner", "paths": [str(path)], "layout": layout}
    known, files = make_layout(DTYPES[weights.dtype.str]), [Path(path, name) for name in (WEIGHTS, METRICS)]
    population = Population(range(len(weights)), columns, fill, known, source, files=files)
    return collect(out, population, options or ReadOptions())


def make_layout(dtype: torch.dtype) -> Layout:
    """Of all these networks."""
    state = {}
    for name, shape in SHAPES.items():
        state[f"{name}.weight"] = torch.empty(shape, dtype=dtype)
        state[f"{name}.bias"] = torch.empty(shape[0], dtype=dtype)
    return Layout.from_checkpoint(state)


def read_weights(path: Path) -> numpy.ndarray:
    """Memory-mapped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file must be there, got nothing")
    try:
        with open_regular(path):
            weights = numpy.lib.format.open_memmap(path, mode="r")
    except (*DAMAGED, OSError, SyntaxError, TokenError) as error:  # the header is a Python dictionary
        got = shorten(str(error), 200)
        raise ValueError(f"{path}: file must be a whole numpy file, got {got}; copy it again") from error
    if weights.ndim != 2 or weights.shape[1] != LENGTH or weights.dtype.str not in DTYPES:
        what, got = f"[n, {LENGTH}] of {', '.join(DTYPES)}", f"{list(weights.shape)} {weights.dtype.str}"
        raise ValueError(f"{path}: array must be {what}, got {got}")
    return weights


def read_metrics(path: Path) -> dict[str, list]:
    """Properties under the names of zoos that fastws makes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file must be there, got nothing")
    try:
        table = pyarrow.csv.read_csv(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: file must be readable as CSV, got {error}") from error
    missing = {"modeldir", "step"} - set(table.column_names)
    if missing:
        raise ValueError(f"{path}: file must have a column {min(missing)!r}, got {', '.join(table.column_names)}")
    columns = {"model": table["modeldir"].to_pylist(), "epoch": table["step"].to_pylist()}
    for name, column in zip(table.column_names, table.columns, strict=True):
        name = name.removeprefix("config.")
        if name not in ("", "modeldir", "step"):  # the first column numbers the rows
            columns.setdefault(OWN_NAMES.get(name, name), column.to_pylist())
    return add_gap(columns)


def fixed_order() -> numpy.ndarray:
    """Place in a row of the file of each number of a flat checkpoint, int64 ``[P]``."""
    order, start = [], 0
    for out, *inputs in SHAPES.values():
        count = out * int(numpy.prod(inputs))
        kernel = numpy.arange(start + out, start + out + count).reshape(*inputs[1:], inputs[0], out)
        order += [kernel.transpose(-1, -2, *range(kernel.ndim - 2)).ravel(), numpy.arange(start, start + out)]
        start += out + count
    return numpy.concatenate(order)


def reference_order() -> numpy.ndarray:
    """The same for the vectors of the published wrapper, in which 160 numbers are missing and 160 are left over."""
    targets = []
    for start, (out, *inputs) in zip(PUBLISHED_STARTS, SHAPES.values(), strict=True):
        count = out * int(numpy.prod(inputs))
        targets += [numpy.arange(start + count, start + count + out), numpy.arange(start, start + count)]
    order = numpy.arange(LENGTH)
    for source, target in enumerate(numpy.concatenate(targets)):  # of two numbers for one place the last one stays
        order[target] = source
    return order
