"""What may be moved in a network. Of transformers with many blocks that are alike a few are traced, which say all."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastws.compare.hugging_face import CONFIG, build, example_inputs, read_config
from fastws.compare.modules import Network
from fastws.group.group import Group
from fastws.group.repeat import Blocks, repeat
from fastws.layout.roles import load_state, storage_key
from fastws.symmetry.copies import Inputs
from fastws.symmetry.symmetry import Symmetry

FEW = 64  # rows of the vocabulary of a network that is traced for another
LAYERS = "num_hidden_layers"
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")  # rows of the vocabulary that a smaller one may not have


def trace_group(network: Network) -> Group:
    """``Group.trace`` of a network, on few of its blocks if they are alike.

    Raises ValueError as ``Group.trace`` does.
    """
    return by_few_blocks(network, Group.trace) or Group.trace(network.module, network.inputs)


def trace_symmetry(network: Network) -> Symmetry:
    """``Symmetry.trace`` of a network, on few of its blocks if they are alike.

    Raises ValueError as ``Symmetry.trace`` does.
    """
    found = by_few_blocks(network, lambda module, inputs: Group(Symmetry.trace(module, inputs)))
    return Symmetry.trace(network.module, network.inputs) if found is None else found.symmetry


def by_few_blocks(network: Network, trace: Callable[[nn.Module, Inputs], Group]) -> Group | None:
    """What ``trace`` says of a module with few blocks, said of all; None where there are no more, or others."""
    if network.folder is None:
        return None
    try:
        found = few_blocks(network)
        return None if found is None else repeat(trace(*found[:2]), found[2])
    except ValueError:  # of other blocks, or of a module that has no smaller one: all of it is traced
        return None


def few_blocks(network: Network) -> tuple[nn.Module, Inputs, Blocks] | None:
    """A module with each kind of block twice, if the network has it twice; None if that has no more.

    Raises:
        ValueError: If there is no such module.
    """
    kind, config = read_config(network.folder)
    lists = block_lists(network.module, getattr(config, LAYERS, None))
    kinds = {name: kinds_of(blocks) for name, blocks in lists.items()}
    count = max(map(shortest, kinds.values()), default=0)
    if not lists or count >= getattr(config, LAYERS):
        return None
    module = build(network.folder / CONFIG, kind, cut(config, count)).eval().requires_grad_(False)
    if any(len(module.get_submodule(name)) != count for name in lists):
        return None
    aliases, first, shapes = {}, {}, {}
    for name, tensor in load_state(network.module).items():
        if tensor.is_floating_point():
            shapes[name] = tuple(tensor.shape)
            tied = first.setdefault(storage_key(name, tensor), name)
            aliases |= {name: tied} if tied != name else {}
    like = {f"{name}.": [found.index(one) for one in found] for name, found in kinds.items()}
    return (
        module,
        example_inputs(network.folder / CONFIG, module),
        Blocks(like, shapes, aliases, dict.fromkeys(like, count)),
    )


def cut(config: Any, count: int) -> Any:
    """A configuration of fewer blocks and tokens; lists with an entry for each block are cut too."""
    config, before = copy.deepcopy(config), getattr(config, LAYERS)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:count])
    setattr(config, LAYERS, count)
    config.vocab_size = min(config.vocab_size, FEW) if isinstance(getattr(config, "vocab_size", None), int) else FEW
    for name in TOKENS:
        setattr(config, name, None)
    return config


def block_lists(module: nn.Module, count: int | None) -> dict[str, nn.ModuleList]:
    """The lists of blocks of a module, which have as many as its configuration says."""
    parts = module.named_modules()
    return {name: part for name, part in parts if isinstance(part, nn.ModuleList) and len(part) == count and count > 1}


def shortest(kinds: Sequence[Any]) -> int:
    """How many blocks hold each kind twice, or once if there is no more."""
    wanted = {kind: min(2, list(kinds).count(kind)) for kind in kinds}
    for count in range(1, len(kinds)):
        if all(list(kinds[:count]).count(kind) >= times for kind, times in wanted.items()):
            return count
    return len(kinds)


def kinds_of(blocks: nn.ModuleList) -> list[tuple]:
    """What makes blocks alike: classes, shapes, and plain attributes, other than the number of the block."""
    described = [[plain_attributes(name, part) for name, part in block.named_modules()] for block in blocks]
    counted = {
        (place, key)
        for place, attributes in enumerate(described[0])
        for key in attributes
        if all(
            len(found) > place and type(found[place].get(key)) is int and found[place][key] == number
            for number, found in enumerate(described)
        )
    }
    kinds = []
    for block, found in zip(blocks, described, strict=True):
        plain = tuple(
            tuple((key, value) for key, value in attributes.items() if (place, key) not in counted)
            for place, attributes in enumerate(found)
        )
        kinds.append((plain, tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())))
    return kinds


def plain_attributes(name: str, part: nn.Module) -> dict[str, Any]:
    plain = {key: x for key, x in vars(part).items() if isinstance(x, bool | int | float | str) or x is None}
    return {"": (name, type(part))} | plain
