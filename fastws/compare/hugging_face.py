"""Modules of transformers, from the ``config.json`` of a folder; nothing of the folder is executed."""

import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastws.files import json
from fastws.symmetry.copies import Inputs, told
from fastws.terminal import shorten

CONFIG = "config.json"
LENGTH = 12  # tokens of an example
FACTORY = "give --architecture module:function, which returns the module and its example inputs"
FAILURES = (ImportError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def make_hugging_face(folder: Path) -> tuple[nn.Module, Inputs]:
    """The module that ``config.json`` of a folder names, with random weights, and inputs that it takes.

    Raises:
        ValueError: If transformers is not installed or does not know the architecture, or its inputs are other than
            tokens or images.
    """
    path = folder / CONFIG
    kind, config = read_config(folder)
    module = build(path, kind, config)
    return module, example_inputs(path, module)


def read_config(folder: Path) -> tuple[type[nn.Module], Any]:
    """The class of modules that ``config.json`` of a folder names, and its configuration.

    Raises ValueError as ``make_hugging_face`` does.
    """
    path = folder / CONFIG
    content = json.read(path)
    names = content.get("architectures") if isinstance(content, dict) else None
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        raise ValueError(f"{path}: config must name its architecture under 'architectures', got none; {FACTORY}")
    if find_spec("transformers") is None:
        raise ValueError(f"{path}: transformers must be installed to make a {shorten(name)}, got none; {FACTORY}")
    try:
        transformers = import_module("transformers")  # takes seconds, which only these folders need
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ValueError(f"architecture must be one of transformers, got {shorten(name)!r}; {FACTORY}")
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
    except FAILURES as error:
        raise ValueError(f"{path}: config must be that of a module of transformers, got {told(error)}") from error
    # caches of keys and values are outputs, which permutations of heads would change
    config.use_cache = False
    return kind, config


def build(path: Path, kind: Any, config: Any) -> nn.Module:
    try:
        return kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    except FAILURES as error:
        raise ValueError(f"{path}: config must be that of a module of transformers, got {told(error)}") from error


def example_inputs(path: Path, module: nn.Module) -> Inputs:
    random, config = torch.Generator().manual_seed(0), module.config
    if module.main_input_name == "input_ids":
        text = getattr(config, "text_config", config)
        length = min(LENGTH, getattr(text, "max_position_embeddings", LENGTH))
        return {"input_ids": torch.randint(text.vocab_size, (1, length), generator=random)}
    if module.main_input_name == "pixel_values" and isinstance(size := getattr(config, "image_size", None), int):
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), size, size, generator=random)}
    raise ValueError(f"{path}: inputs must be tokens or images, got {module.main_input_name}; {FACTORY}")


def is_ignored(module: nn.Module, name: str) -> bool:
    """Whether a module of transformers says that files may hold a tensor that it does not have."""
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(compiled(pattern).search(name) for pattern in patterns)


@cache
def compiled(pattern: str) -> re.Pattern:
    return re.compile(pattern)
