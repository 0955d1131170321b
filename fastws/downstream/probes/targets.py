"""What is to be foretold: properties of a zoo that are numbers, and those that are names."""

from typing import NamedTuple

import pyarrow
import torch
from torch import Tensor

from fastws.downstream.probes.softmax import UNKNOWN
from fastws.zoo.format.zoo import Zoo, is_number


class Targets(NamedTuple):
    """Properties of all states of a zoo."""

    numbers: dict[str, Tensor]  # float64 [M], not finite where it is unknown
    names: dict[str, list[str | None]]  # M values

    def left_out(self, rows: Tensor) -> dict[str, int]:
        """For each target, in how many of the rows it is missing or infinite."""
        counts = {name: int((~values[rows].isfinite()).sum()) for name, values in self.numbers.items()}
        return counts | {name: sum(values[row] is None for row in rows.tolist()) for name, values in self.names.items()}


def read_target(zoo: Zoo, name: str) -> Tensor:
    require_property(zoo, name)
    return torch.from_numpy(zoo.numbers(name))


def require_property(zoo: Zoo, name: str) -> None:
    if name not in zoo.properties.column_names:
        known = ", ".join(zoo.properties.column_names)
        raise ValueError(f"predict: targets must be properties of the zoo ({known}), got {name!r}")


def read_targets(zoo: Zoo, names: tuple[str, ...]) -> Targets:
    """Numbers and names among properties; truth values are names.

    Raises:
        ValueError: If a property is missing, or neither a number nor a name.
    """
    found = Targets({}, {})
    for name in names:
        require_property(zoo, name)
        column = zoo.properties[name]
        kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
        if is_number(kind):
            found.numbers[name] = read_target(zoo, name)
        elif name != "model" and any(
            same(kind) for same in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_boolean)
        ):
            found.names[name] = column.cast("string").to_pylist()
        else:
            raise ValueError(f"{zoo.path}: property {name!r} must be a number or a name to be predicted, got {kind}")
    return found


class Names(NamedTuple):
    """Names as codes, the classes being those of the training split in alphabetical order."""

    classes: list[list[str]]  # of each target
    codes: Tensor  # int64 [M, K]: -1 where unknown, the number of classes where no training network has the name

    @classmethod
    def of(cls, names: dict[str, list[str | None]], train: Tensor) -> "Names":
        known = [sorted({values[row] for row in train.tolist()} - {None}) for values in names.values()]
        for name, classes in zip(names, known, strict=True):
            if not classes:
                raise ValueError(f"predict: target {name!r} must be known of some training network, got none")
        return cls(known, cls.encode(names, known))

    @staticmethod
    def encode(names: dict[str, list[str | None]], classes: list[list[str]]) -> Tensor:
        """Codes ``[M, K]`` of the names of any zoo by the classes of the training split."""
        columns = []
        for values, known in zip(names.values(), classes, strict=True):
            number = {name: code for code, name in enumerate(known)} | {None: UNKNOWN}
            columns.append(torch.tensor([number.get(value, len(known)) for value in values]))
        return torch.stack(columns, 1)
