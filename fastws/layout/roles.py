"""Roles: what each tensor of a checkpoint is, from a module, a state dict or the headers of a file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastws.files.checkpoints import (
    find_checkpoint,
    is_safetensors,
    load_checkpoint,
    open_checkpoint,
    read_headers,
    tell_others,
)
from fastws.files.names import plain_names
from fastws.files.state_dict import count_numbers, find_networks, find_state, split

Role = Literal["weight", "bias", "norm weight", "norm bias", "norm statistic", "other"]


def bias_name(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return head + dot + last.replace("weight", "bias")


def load_state(source: Mapping[str, Tensor] | nn.Module | str | os.PathLike) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint under plain names, whatever it comes from."""
    if isinstance(source, str | os.PathLike):
        return load_checkpoint(source)
    return load_parts(source)[0]


def load_parts(source: Mapping[str, Tensor] | nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors, and what is no tensor of numbers: extra states, packed weights.

    Of a dictionary of networks, as training scripts save it, the one that would be read from its file.
    """
    if isinstance(source, nn.Module):
        return split("layout", source.state_dict(keep_vars=True))
    if not any(find_networks(source)):
        return split("layout", source)
    state = find_state(source, "layout")
    tell_others("layout", state)
    return state.tensors, state.aside


class Described(NamedTuple):
    """What a layout is made from."""

    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: dict[str, str]  # names of tied tensors, and those that they are tied to
    roles: dict[str, Role]
    aside: dict[str, int]  # names of what is no tensor of numbers, and how many numbers it holds


def describe_source(source: Mapping[str, Tensor] | nn.Module | str | os.PathLike) -> Described:
    """Shapes and dtypes, tied names and roles of a checkpoint."""
    if isinstance(source, str | os.PathLike):
        source = find_checkpoint(source)
        if is_safetensors(source):
            return describe_safetensors(source)
        state = open_checkpoint(source)
        tell_others(source, state)
        tensors, values = state.tensors, state.aside
    else:
        tensors, values = load_parts(source)
    shapes, aliases, seen = {}, {}, {}
    for name, tensor in tensors.items():
        key = storage_key(name, tensor)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            shapes[name] = (tuple(tensor.shape), tensor.dtype)
    aside = {name: count_numbers(value) for name, value in values.items()}
    return Described(shapes, aliases, infer_roles({name: shape for name, (shape, _) in shapes.items()}), aside)


def describe_safetensors(path: Path) -> Described:
    headers, ties = read_headers(path)
    plain = plain_names([*headers, *ties])
    shapes = {plain[name]: (header.shape, header.dtype) for name, header in headers.items()}
    aliases = {plain[name]: plain[kept] for name, kept in ties.items()}
    return Described(shapes, aliases, infer_roles({name: shape for name, (shape, _) in shapes.items()}), {})


def storage_key(name: str, tensor: Tensor) -> tuple:
    """Equal for two names of one tensor; tensors without storage (meta, empty) are never tied by it."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (name,) if not isinstance(tensor, nn.Parameter) else (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def infer_roles(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Role]:
    """Roles from names and shapes alone, also of a module: its own checkpoint must get the same layout."""
    roles: dict[str, Role] = {}
    for name, shape in shapes.items():
        head, _, last = name.rpartition(".")
        if last in ("running_mean", "running_var"):
            roles[name] = "norm statistic"
        elif len(shape) >= 2:
            roles[name] = "weight"
        elif len(shape) == 1 and last == "weight":
            roles[name] = "norm weight"
        else:
            roles[name] = "other"
    for name in [name for name, role in roles.items() if role.endswith("weight")]:
        partner = bias_name(name)
        if partner != name and len(shapes.get(partner, ())) == 1:
            roles[partner] = "norm bias" if roles[name] == "norm weight" else "bias"
    return roles
