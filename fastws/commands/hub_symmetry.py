"""Symmetries of the models of a hub, where ``config.json`` beside a file names a network that transformers makes."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from fastws.compare.hugging_face import CONFIG, make_hugging_face
from fastws.compare.modules import Network
from fastws.compare.tracing import by_few_blocks
from fastws.group.group import Group
from fastws.layout.layout import Layout
from fastws.symmetry.copies import Inputs
from fastws.symmetry.symmetry import Symmetry

LARGEST = 50_000_000  # weights of what is traced: in float64, several times over


def find_symmetry(config: str, layout: Layout) -> Symmetry:
    """The symmetry of a network, of which two blocks of each kind are traced where it has more.

    Args:
        config: The text of ``config.json``.
        layout: Of the network's file.

    Raises:
        ValueError: If there is none to be found: transformers is not installed, or does not make this network, whose
            tensors have other names or shapes, or it is too large.
    """
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Path(folder, CONFIG).write_text(config)
        try:
            found = trace(Path(folder), layout)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{Path(folder, CONFIG)}: ")) from None
    found.table(layout)
    return found


def trace(folder: Path, layout: Layout) -> Symmetry:
    # without numbers first: what a config claims may be larger than the file beside it
    with torch.device("meta"):
        module, inputs = make_hugging_face(folder)
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for entry in layout.entries:
        if entry.offset >= 0 and own.get(entry.name) != entry.shape:
            what = f"{entry.name} {list(entry.shape)}"
            raise ValueError(f"tensors must be those of the network that transformers makes, got {what}")
    if (count := count_weights(module)) > layout.num_weights:
        raise ValueError(f"network must have all its {count:,} weights in the file, got {layout.num_weights:,}")
    network = Network(module, inputs, folder.name, folder)
    group = by_few_blocks(network, trace_small)
    if group is not None:
        return group.symmetry
    # with few blocks, or such as are not alike
    require_small(count)
    return Symmetry.trace(*make_hugging_face(folder))


def trace_small(module: nn.Module, inputs: Inputs) -> Group:
    require_small(count_weights(module))
    return Group(Symmetry.trace(module, inputs))


def require_small(count: int) -> None:
    if count > LARGEST:
        raise ValueError(f"network must have {LARGEST:,} weights at most in what is traced, got {count:,}")


def count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
