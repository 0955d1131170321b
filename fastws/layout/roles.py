"""Roles: what each tensor of a checkpoint is, from a module, a state dict or the headers of a file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastws.files.checkpoints import check_tensors, find_checkpoint, is_safetensors, load_checkpoint, read_headers
from fastws.files.names import check_names, unwrap_names

Role = Literal["weight", "bias", "norm weight", "norm bias", "norm statistic", "other"]


def bias_name(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return head + dot + last.replace("weight", "bias")


def load_state(source: Mapping[str, Tensor] | nn.Module | str | os.PathLike) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint under plain names, whatever it comes from."""
    state = source.state_dict(keep_vars=True) if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping):
        return load_checkpoint(state)
    check_names("layout", state)
    return unwrap_names(state)


def describe_source(source) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], dict[str, str], dict[str, Role]]:
    """Shapes and dtypes, tied names, and roles of what a layout is made from."""
    if isinstance(source, str | os.PathLike):
        source = find_checkpoint(source)
    if isinstance(source, Path) and is_safetensors(source):
        headers = unwrap_names(read_headers(source))
        shapes = {name: (header.shape, header.dtype) for name, header in headers.items()}
        return shapes, {}, infer_roles({name: shape for name, (shape, _) in shapes.items()})
    state = load_state(source)
    shapes, aliases, seen = {}, {}, {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"layout: {name!r} must be a tensor, got {type(tensor).__name__}")
    check_tensors("layout", state)
    for name, tensor in state.items():
        key = storage_key(name, tensor)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            shapes[name] = (tuple(tensor.shape), tensor.dtype)
    roles = infer_roles({name: shape for name, (shape, _) in shapes.items()})
    return shapes, aliases, roles


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
