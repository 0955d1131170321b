"""Preprocessed populations: torch files of pickled data set objects, read without their classes."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from torch import Tensor

from fastws.files.limits import room
from fastws.files.state_dict import describe_value, split
from fastws.files.torch_file import NOT_A_TORCH_FILE, TorchFile
from fastws.files.values import Array, StoredTensor
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.readers.collect import Population, ReadOptions, collect
from fastws.zoo.readers.names import Expected, check_dtype
from fastws.zoo.readers.ray import add_columns, add_gap
from fastws.zoo.readers.reasons import BadState
from fastws.zoo.readers.record import check_new
from fastws.zoo.readers.states import Like, fill, make_layout, read_expected

PARTS = {"trainset": "train", "valset": "val", "testset": "test", "train": "train", "val": "val", "test": "test"}
LABEL = re.compile(r"(?P<path>.*?)(?:#_#| )epoch[_ ](?P<epoch>\d{1,18})(?:#_#| ).*", re.DOTALL)


class State:
    """A state in the file: a checkpoint, or a vector and perhaps its row in a matrix of vectors."""

    def __init__(self, part: str, path: str, epoch: int | None, weights: object, row: int | None = None):
        self.part, self.path, self.epoch, self.weights, self.row = part, path, epoch, weights, row
        self.properties: dict[str, object] = {}

    def __str__(self) -> str:
        return f"{self.path} epoch {self.epoch}"


def read_pickle(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    like: Like | None = None,
    options: ReadOptions | None = None,
) -> Zoo:
    """Reads a pickled data set (``{"trainset": ..., "valset": ..., "testset": ...}``) into a zoo folder.

    The file is read by an unpickler that makes tensors, numbers, strings and containers only, and knows objects of the
    published data set classes as dictionaries of their attributes; it executes nothing. Each state is read once, though
    such files hold two copies of it and permutations beside them. The splits are kept. Numpy arrays and lists of
    properties become columns, under the names of zoos that fastws makes; those called ``model`` or ``epoch`` are left
    out, because paths and labels say which state is which.

    Args:
        path: The file, in torch's zip format or the one before it.
        out: The zoo folder to write.
        like: A checkpoint of the architecture, or its layout; by default the first in the file. Needed if the file
            holds vectors and no checkpoint to explain them.
        options: What all readers have in common.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds anything else than data, which is named, or no data set.
    """
    check_new(out)
    file = TorchFile(path)
    parts = find_parts(file.content)
    if not parts:
        what = describe_value(file.content)
        raise ValueError(f"{path}: file must hold data sets under {', '.join(list(PARTS)[:3])}, got {what}")
    states = [state for name, part in parts.items() for state in unique(read_part(file, name, part))]
    if not states:
        raise ValueError(f"{path}: data sets must hold states, got none")
    expected = find_expected(file, parts, states, like)
    names = dict.fromkeys(name for state in states for name in state.properties)
    models = shorten([state.path for state in states])
    columns = {"model": models, "epoch": [state.epoch for state in states]}
    add_columns(columns, {name: [state.properties.get(name) for state in states] for name in names})

    def fill_row(state: State, row: Tensor) -> list[str]:
        try:
            return fill_state(file, state, row, expected)
        except BadState:
            raise
        except NOT_A_TORCH_FILE as error:
            raise BadState("unreadable", str(error)) from error

    source = {"kind": "pickle", "paths": [str(path)]}
    splits = to_splits(states, models) if len(parts) > 1 else None
    population = Population(states, add_gap(columns), fill_row, expected.layout, source, splits, [path])
    return collect(out, population, options or ReadOptions())


def find_parts(content: object) -> dict[str, Mapping]:
    """Split names and data sets."""
    if not isinstance(content, dict):
        return {}
    if "data_in" in content:
        return {"all": content}
    named = {split: content.get(name) for name, split in PARTS.items() if content.get(name) is not None}
    return {split: part for split, part in named.items() if isinstance(part, dict) and "data_in" in part}


def read_part(file: TorchFile, part: str, dataset: Mapping) -> Iterator[State]:
    """The states of one data set: those that it gives as input, then those that it gives as output."""
    count = count_of(file, dataset["data_in"])
    properties = read_properties(file, dataset.get("properties"), count)
    labels = dataset.get("labels_in")
    paths, epochs = dataset.get("paths"), dataset.get("epochs")
    for place in range(count):
        path, epoch = parse_label(file, labels[place]) if is_column(labels, count) else (f"{part}-{place}", None)
        path = to_name(file, paths[place]) if is_column(paths, count) else path
        epoch = to_epoch(file, epochs[place]) if is_column(epochs, count) else epoch
        state = State(part, path, epoch, *weights_of(dataset["data_in"], place))
        state.properties = {name: column[place] for name, column in properties.items()}
        yield state
    following, labels = dataset.get("data_out"), dataset.get("labels_out")
    if following is not None and is_column(labels, count_of(file, following)):
        for place in range(len(labels)):
            yield State(part, *parse_label(file, labels[place]), *weights_of(following, place))


def unique(states: Iterator[State]) -> list[State]:
    """The first of all states of one network and epoch."""
    kept = {}
    for state in states:
        kept.setdefault((state.path, state.epoch), state)
    return list(kept.values())


def parse_label(file: TorchFile, label: object) -> tuple[str, int | None]:
    label = to_name(file, label)
    found = LABEL.fullmatch(label)
    return (found["path"], int(found["epoch"])) if found else (label, None)


def to_name(file: TorchFile, value: object) -> str:
    if not isinstance(value, str | int):
        raise ValueError(f"{file.path}: paths and labels must be strings, got a {type(value).__name__}")
    return str(value)


def to_epoch(file: TorchFile, value: object) -> int:
    if not isinstance(value, int | float) or not abs(value) < 2**53 or value != int(value):
        got = value if isinstance(value, float) else f"a {type(value).__name__}"
        raise ValueError(f"{file.path}: epochs must be whole numbers, got {got}")
    return int(value)


def count_of(file: TorchFile, weights: object) -> int:
    if isinstance(weights, StoredTensor):
        if len(weights.shape) != 2:
            return 0
        file.tensor(weights)  # or it may claim to have rows that are not there
        return weights.shape[0]
    return len(weights) if isinstance(weights, list | tuple) else 0


def weights_of(weights: object, place: int) -> tuple[object, int | None]:
    return (weights, place) if isinstance(weights, StoredTensor) else (weights[place], None)


def is_column(column: object, count: int) -> bool:
    return isinstance(column, list | tuple) and len(column) == count


def read_properties(file: TorchFile, properties: object, count: int) -> dict[str, list]:
    """Columns with a number or a string per state; what else is there is left out."""
    columns = {}
    for name, column in properties.items() if isinstance(properties, dict) else ():
        if isinstance(column, StoredTensor) and column.shape == (count,):
            column = file.tensor(column).tolist()
        if isinstance(column, Array) and column.value.shape == (count,):
            column = column.value.tolist()
        if is_column(column, count) and all(isinstance(value, str | int | float | None) for value in column):
            columns[str(name)] = list(column)
    return columns


def find_expected(file: TorchFile, parts: Mapping, states: Sequence[State], like: Like | None) -> Expected:
    if like is not None:
        return read_expected(like)
    first = states[0].weights
    if isinstance(first, dict):
        return Expected(make_layout(read_tensors(file, first)), f"{states[0]}")
    dataset = next(iter(parts.values()))
    base, layers = dataset.get("checkpoint_base"), dataset.get("layer_lst")
    if not isinstance(base, dict) or not isinstance(layers, list) or not all(map(is_named_layer, layers)):
        fix = "say --like <a checkpoint of their kind>"
        raise ValueError(f"{file.path}: file must hold checkpoints, got vectors; {fix}")
    # a vector holds these tensors in this order
    kinds = ("weight", "bias") if dataset.get("use_bias", True) else ("weight",)
    names = [f"module_list.{layer[0]}.{kind}" for layer in layers for kind in kinds]
    return Expected(make_layout(read_tensors(file, {name: base.get(name) for name in names})), f"{file.path}")


def is_named_layer(layer: object) -> bool:
    return isinstance(layer, list | tuple) and len(layer) > 0 and isinstance(layer[0], str | int)


def read_tensors(file: TorchFile, stored: Mapping) -> dict[str, Tensor]:
    """The tensors among entries; a few bytes may stand for many of them, so all together are bounded by the file.

    Raises:
        ValueError: If they take more than the file has room for, or one does not lie in it.
    """
    tensors = {name: file.tensor(value) for name, value in split(f"{file.path}", stored)[0].items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > room(len(file.buffer)):
        what = f"{len(tensors)} tensors that are many times larger"
        raise ValueError(f"{file.path}: tensors of a state must fit into the file, got {what}")
    return tensors


def is_stored(value: object) -> bool:
    return isinstance(value, StoredTensor)


def fill_state(file: TorchFile, state: State, row: Tensor, expected: Expected) -> list[str]:
    layout, source = expected
    if isinstance(state.weights, dict):
        return fill(row, expected, read_tensors(file, state.weights))
    if not is_stored(state.weights):
        raise BadState("unreadable", f"a checkpoint or a vector is expected, got {type(state.weights).__name__}")
    vector = file.tensor(state.weights)
    vector = vector if state.row is None else vector[state.row]
    if vector.numel() != layout.num_weights or not vector.is_floating_point():
        expected_size = f"vector must have {layout.num_weights} weights as in {source}"
        raise BadState("other architecture", f"{expected_size}, got {vector.numel()} {vector.dtype}")
    check_dtype("vector", vector.dtype, layout.dtype, source)
    row.copy_(vector.reshape(-1))
    return []


def shorten(paths: Sequence[str]) -> list[str]:
    """Names of the networks' folders; whole paths where names repeat."""
    names = {path: PurePosixPath(path).name for path in paths}
    distinct = len(set(names.values())) == len(names)
    return [names[path] if distinct else path for path in paths]


def to_splits(states: Sequence[State], models: Sequence[str]) -> dict[str, list[str]]:
    splits = {name: {} for name in ("train", "val", "test")}
    for state, model in zip(states, models, strict=True):
        splits[state.part][model] = True
    shared = next((m for name in ("val", "test") for m in splits[name] if m in splits["train"]), None)
    shared = shared or next((m for m in splits["test"] if m in splits["val"]), None)
    if shared is not None:
        raise ValueError(f"zoo read: networks must be in one data set each, got {shared!r} in several")
    return {name: list(members) for name, members in splits.items()}
