"""Symmetries of the models of a hub, where ``config.json`` beside a file names a network that transformers makes."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastws.compare.hugging_face import CONFIG, make_hugging_face
from fastws.layout.layout import Layout
from fastws.symmetry.blocks import block_of, extend, find_blocks, is_extended
from fastws.symmetry.symmetry import Symmetry

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what configs call the number of blocks
LARGEST = 50_000_000  # weights of a network that is traced: in float64, several times over


def find_symmetry(config: str, layout: Layout) -> Symmetry:
    """The symmetry of a network, traced with two blocks and with three, which must be one another's continuation.

    Args:
        config: The text of ``config.json``.
        layout: Of the network's file.

    Raises:
        ValueError: If there is none to be found: transformers is not installed, or does not make this network, whose
            tensors have other names or shapes, or it is too large, or blocks are not alike.
    """
    content = json.loads(config)
    depth = next((content[name] for name in DEPTHS if isinstance(content.get(name), int)), 0)
    shapes = {entry.name: entry.shape for entry in layout.entries if entry.offset >= 0 and entry.numel}
    if depth <= 3:
        require_small(sum(entry.numel for entry in layout.entries if entry.name in shapes))
        found = trace(content)
        found.table(layout)
        return found
    prefix = find_blocks(shapes, depth)
    require_small(sum(e.numel for e in layout.entries if e.name in shapes and (block_of(e.name, prefix) or 0) < 3))
    two, three = (trace(shallow(content, depth, blocks)) for blocks in (2, 3))
    strange = [name for name in shapes if (block_of(name, prefix) or 0) < 2 and name not in two.shapes]
    if strange:
        raise ValueError(f"tensors must have the names of the network that transformers makes, got {strange[0]}")
    if not is_extended(three, two, prefix):
        raise ValueError("blocks must be alike, got a third one whose units move otherwise than those of the second")
    found = extend(two, shapes, prefix)
    found.table(layout)
    return found


def require_small(count: int) -> None:
    if count > LARGEST:
        raise ValueError(f"network must have {LARGEST:,} weights at most in what is traced, got {count:,}")


def shallow(content: dict[str, Any], depth: int, blocks: int) -> dict[str, Any]:
    """A config with fewer blocks; lists with an entry for each block are cut too."""

    def cut(name: str, value: Any) -> Any:
        if name in DEPTHS and value == depth:
            return blocks
        return value[:blocks] if isinstance(value, list) and len(value) == depth else value

    return {name: cut(name, value) for name, value in content.items()}


def trace(content: dict[str, Any]) -> Symmetry:
    """The symmetry of the network that a config names, which is made without its numbers first, to see its size."""
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Path(folder, CONFIG).write_text(json.dumps(content))
        try:
            with torch.device("meta"):
                module, _ = make_hugging_face(Path(folder))
            require_small(sum(parameter.numel() for parameter in module.parameters()))
            return Symmetry.trace(*make_hugging_face(Path(folder)))
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{Path(folder, CONFIG)}: ")) from None
