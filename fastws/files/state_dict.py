"""The state dict in what a training script saved: the network among several, its tensors, and what is kept aside."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from fastws.files.names import check_names, unwrap_names
from fastws.files.values import Array, OtherTensor, StoredTensor
from fastws.terminal import shorten

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys of weights, the preferred ones first
AVERAGES = ("ema", "average", "avg", "swa")  # in keys of running averages, which are not taken beside the network
EXTRA = "_extra_state"  # the name under which a module saves what is no tensor; there may be tensors in it
OPTIMIZER = "optim"
DEEPEST, LONGEST = 3, 200  # keys that lead to a network, and their characters
MAX_NETWORKS = 100  # that are looked for
NO_NUMBERS = {getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)}  # torch cannot convert it
Stored = Tensor | StoredTensor | OtherTensor


class State(NamedTuple):
    """The tensors of one network."""

    tensors: dict[str, Tensor | StoredTensor]
    aside: dict[str, object]  # what is no tensor of numbers: extra states, packed weights
    key: str = ""  # under which the file holds the network; "" if it holds nothing else
    others: tuple[str, ...] = ()  # keys under which it holds further networks

    def told(self) -> list[str]:
        """What of the file is not among the tensors."""
        told = [describe_aside(self.aside)] if self.aside else []
        if self.others:
            others = ", ".join(repr(shorten(key or "the file itself")) for key in self.others)
            told.append(f"further networks under {others} beside the one under {shorten(self.key)!r} (see --key)")
        return told


def find_state(content: object, where: str, key: str | None = None) -> State:
    """The network in what a training script saved.

    Args:
        content: Plain containers; tensors may be in memory or still in their file.
        where: The file, for messages.
        key: Under which it is, with dots between keys in keys. By default the one network there is; of several the one
            under a usual key, or the one that is no running average.

    Raises:
        ValueError: If there is none, none under ``key``, or several of which none is the obvious one.
    """
    found = dict(find_networks(content))
    if key is None:
        key = choose(found, where) if found else ""
    elif key not in found:
        there = f"networks under {', '.join(map(repr, map(shorten, found)))}" if found else describe_value(content)
        raise ValueError(f"{where}: --key must name a network in the file, got {key!r} where there are {there}")
    state = found.get(key, content)
    if not found and not holds_tensors(state):
        raise ValueError(f"{where}: checkpoint must hold a dictionary of tensors, got {describe_value(content)}")
    tensors, aside = split(where, state)
    others = tuple(name for name in found if name != key)
    inner = f"{key}." if key else ""
    # what is told as a further network is not told as a part of this one
    aside = {name: value for name, value in aside.items() if not any(leads_to(inner + name, other) for other in others)}
    return State(tensors, aside, key, others)


def leads_to(key: str, other: str) -> bool:
    return other == key or other.startswith(f"{key}.")


def find_networks(content: object) -> Iterator[tuple[str, Mapping]]:
    """Keys and state dicts, those that are less deep first; keys in keys are joined by dots."""
    level, seen, found = [("", content)] if isinstance(content, Mapping) else [], {id(content)}, 0
    for _ in range(DEEPEST + 1):
        following = []
        for path, value in level:
            if holds_network(value):
                yield path, value
                found += 1
            if found == MAX_NETWORKS:
                return
            for key, entry in value.items():
                if isinstance(entry, Mapping) and id(entry) not in seen and leads_on(path, key):
                    seen.add(id(entry))
                    following.append((f"{path}.{key}" if path else key, entry))
        level = following


def leads_on(path: str, key: object) -> bool:
    """Whether there may be a network under a key."""
    named = isinstance(key, str) and len(path) + len(key) < LONGEST
    return named and not key.endswith(EXTRA) and OPTIMIZER not in key.lower()


def choose(found: Mapping[str, Mapping], where: str) -> str:
    """The obvious one of several networks."""
    for wrapper in WRAPPERS:
        usual = [key for key in found if key.rpartition(".")[2] == wrapper]
        if usual and [key.count(".") for key in usual].count(usual[0].count(".")) == 1:
            return usual[0]
    own = [key for key in found if not any(average in key.lower() for average in AVERAGES)]
    if len(own) == 1 or len(found) == 1:
        return (own or [*found])[0]
    names = ", ".join(repr(shorten(key or "the file itself")) for key in found)
    fix = "say which with --key (key= of load_checkpoint), or give that one alone"
    raise ValueError(f"{where}: checkpoint must hold one network, got several under {names}; {fix}")


def holds_network(value: Mapping) -> bool:
    """Whether it is a dictionary by name in which a tensor has an axis: numbers alone are losses and counters."""
    named = (entry for key, entry in value.items() if isinstance(key, str))
    return any(isinstance(entry, Stored) and entry_axes(entry) for entry in named)


def entry_axes(tensor: Stored) -> int:
    # shapes of nested tensors are not to be had, and that of others is not always told
    if isinstance(tensor, OtherTensor) or (isinstance(tensor, Tensor) and tensor.is_nested):
        return 1
    return len(tensor.shape)


def holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Stored) for entry in value.values())


def split(where: str, state: Mapping[str, object]) -> tuple[dict[str, Tensor | StoredTensor], dict[str, object]]:
    """The tensors of a state dict under plain names, and what is kept aside.

    Raises:
        ValueError: If a name is no string, or a tensor no dense one of numbers that torch can convert; it is named.
    """
    check_names(where, state)
    state = unwrap_names(state)
    for name, value in state.items():
        if isinstance(value, Stored) and (problem := find_problem(value)):
            raise ValueError(f"{where}: {shorten(name)!r} {problem}")
    tensors = {name: value for name, value in state.items() if is_plain(value)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def is_plain(value: object) -> bool:
    return isinstance(value, StoredTensor) or (isinstance(value, Tensor) and not value.is_quantized)


def find_problem(tensor: Stored) -> str:
    """Why a tensor is none whose numbers can be read; "" if it is one, or quantised, which are kept aside."""
    if isinstance(tensor, OtherTensor):
        fix = "; save the weights themselves" if tensor.kind == "meta" else ""
        return "" if tensor.kind == "quantised" else f"must be a dense tensor, got a {tensor.kind} one{fix}"
    dtype = tensor.storage.dtype if isinstance(tensor, StoredTensor) else tensor.dtype
    if dtype in NO_NUMBERS:
        return f"must be of a dtype that torch converts, got {dtype}; dequantise it where it was made"
    if isinstance(tensor, StoredTensor):
        return ""
    if tensor.is_nested:
        return "must be a dense tensor, got a nested one"
    if tensor.layout != torch.strided:
        return f"must be a dense tensor, got {tensor.layout}"
    return ""


def is_quantised(name: str, dtype: torch.dtype, axes: int) -> bool:
    """Whether a tensor of integers holds weights: masks and positions have other names."""
    integers = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    last = name.rpartition(".")[2]
    return integers and axes > 0 and ("weight" in last or last.endswith("_blocks"))


# --- what is kept aside


def describe_aside(aside: Mapping[str, object]) -> str:
    few, numbers = name_few(aside), count_numbers(aside)
    return f"values that are no tensors of numbers ({len(aside)}: {few}, with {numbers:,} numbers)"


def name_few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, map(shorten, names[:3]))) + (", ..." if len(names) > 3 else "")


def count_numbers(value: object) -> int:
    """Numbers in the tensors and arrays that containers hold, each tensor once."""
    total, seen, left = 0, set(), [value]
    while left:
        value = left.pop()
        if isinstance(value, int | float | str | bytes | type(None)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, StoredTensor | OtherTensor):
            total += math.prod(value.shape)
        elif isinstance(value, Tensor):
            total += value.numel()
        elif isinstance(value, Array | numpy.ndarray):
            total += (value.value if isinstance(value, Array) else value).size
        elif isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            left.extend(value)
    return total


def describe_value(value: object) -> str:
    if isinstance(value, Stored):
        return "a tensor without a name"
    if not isinstance(value, Mapping):
        return type(value).__name__
    if not value:
        return "an empty one"
    return f"a dictionary of {', '.join(repr(shorten(str(key))) for key in list(value)[:5])}"
