"""Which tensors of two checkpoints correspond: by name, and where one has grown, as far as both reach."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fastws.compare.modules import Checkpoint
from fastws.files.names import plain_names
from fastws.terminal import shorten

LEAST_SHARE = 0.5  # of the weights of the larger network that must correspond, or two are not compared


class Grown(NamedTuple):
    """A tensor with other numbers of rows, as those of vocabularies and heads may have."""

    name: str
    rows: tuple[int, int]  # in a and in b


class Paired(NamedTuple):
    """Two networks, tensor by tensor, under the names of a."""

    weights: dict[str, tuple[Tensor, Tensor]]  # floating tensors of one shape, but running statistics
    statistics: dict[str, tuple[Tensor, Tensor]]  # running means and variances
    grown: dict[str, tuple[Tensor, Tensor]]  # the rows that both have
    rows: list[Grown]
    reshaped: list[str]  # sentences about tensors of other shapes
    only: tuple[list[str], list[str]]  # names of floating tensors that a alone has, and b alone
    others_equal: bool  # whether what is not floating (step counters, masks) is equal too
    share: float  # of the weights of the larger network that are in ``weights``


def pair(a: Checkpoint, b: Checkpoint) -> Paired:
    """Finds what corresponds; nothing is read but headers."""
    roles = {entry.name: entry.role for entry in a.layout.entries}
    ours, theirs = floating(a), floating(b)
    names = corresponding(ours, theirs)
    weights, statistics, grown, rows, reshaped = {}, {}, {}, [], []
    for name, other in names.items():
        one, two = ours[name], theirs[other]
        if one.shape == two.shape:
            (statistics if roles.get(name) == "norm statistic" else weights)[name] = one, two
        elif one.dim() == two.dim() > 0 and one.shape[1:] == two.shape[1:]:
            least = min(len(one), len(two))
            grown[name] = one[:least], two[:least]
            rows.append(Grown(name, (len(one), len(two))))
        else:
            reshaped.append(f"{shorten(name)!r} is {list(one.shape)} in one and {list(two.shape)} in the other")
    only = [name for name in ours if name not in names], [name for name in theirs if name not in set(names.values())]
    held = sum(tensor.numel() for tensor, _ in weights.values())
    total = max(sum(tensor.numel() for tensor in state.values()) for state in (ours, theirs))
    total -= sum(tensor.numel() for tensor, _ in statistics.values())
    return Paired(weights, statistics, grown, rows, reshaped, only, equal_others(a, b), held / max(1, total))


def floating(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tied = checkpoint.layout.aliases
    state = checkpoint.state.items()
    return {name: tensor for name, tensor in state if tensor.is_floating_point() and name not in tied}


def corresponding(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """Equal names; or, where hardly any are, names that are equal without what all of a file begin with."""
    same = {name: name for name in ours if name in theirs}
    if 2 * len(same) >= min(len(ours), len(theirs)):
        return same
    heads = [common_prefix(names) for names in (ours, theirs)]
    plain = {name.removeprefix(heads[1]): name for name in theirs}
    found = {name: plain[name.removeprefix(heads[0])] for name in ours if name.removeprefix(heads[0]) in plain}
    return max(found, same, key=len)


def common_prefix(names: Mapping[str, object]) -> str:
    """The modules that all names begin with, with the dot behind them."""
    parts = [name.split(".")[:-1] for name in plain_names(names)]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{part}." for part in shared)


def equal_others(a: Checkpoint, b: Checkpoint) -> bool:
    ours, theirs = (
        {name: tensor for name, tensor in x.state.items() if not tensor.is_floating_point()} for x in (a, b)
    )
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and ours[name].equal(theirs[name]) for name in ours
    )


def why_not(paired: Paired, a: Checkpoint, b: Checkpoint) -> str:
    """Why two networks cannot be compared, in words; "" if they can."""
    if paired.share >= LEAST_SHARE:
        return ""
    if paired.reshaped or paired.rows:
        grown = (f"{shorten(x.name)!r} has {x.rows[0]} rows in one and {x.rows[1]} in the other" for x in paired.rows)
        return next(iter([*paired.reshaped, *grown]))
    missing = [*paired.only[0], *paired.only[1]]
    if missing:
        there, lacking = (a, b) if paired.only[0] else (b, a)
        return f"{shorten(missing[0])!r} is in {there.path} and not in {lacking.path}"
    return "they hold no weights"
