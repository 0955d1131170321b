"""Names of tensors without what wrappers of modules put into them."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

COMPILED = "_orig_mod"  # how torch.compile calls what it compiled, wherever in a network that is
PARALLEL = "module."  # how DataParallel, DistributedDataParallel and AveragedModel call the network that they hold
AVERAGED = "n_averaged"  # what AveragedModel has beside it
Value = TypeVar("Value")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name and what is left of it without wrappers, in whatever order and however often they were put around.

    Names stay as they are where two would become one.
    """
    names = list(names)
    plain = [without_compiled(name) for name in names]
    while is_wrapped(plain):
        plain = [name.removeprefix(PARALLEL) for name in plain]
    return dict(zip(names, plain if len(set(plain)) == len(plain) else names, strict=True))


def is_wrapped(names: Iterable[str]) -> bool:
    inner = [name for name in names if name != AVERAGED]
    return bool(inner) and all(name.startswith(PARALLEL) and name != PARALLEL for name in inner)


def check_names(where: str, names: Iterable[object]) -> None:
    """Raises ValueError unless all are strings."""
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: names of tensors must be strings, got {name!r}")


def without_compiled(name: str) -> str:
    if COMPILED not in name:
        return name
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module != COMPILED), last])


def unwrap_names(entries: Mapping[str, Value]) -> Mapping[str, Value]:
    """The entries under plain names; the mapping itself if its names are plain."""
    plain = plain_names(entries)
    if all(name == old for old, name in plain.items()):
        return entries
    return {plain[old]: value for old, value in entries.items()}
