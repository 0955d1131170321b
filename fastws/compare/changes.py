"""What was done to a network to make another: tensor by tensor, and as a whole."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from fastws.compare.differences import Difference
from fastws.compare.kinds import Levels, find_levels, find_pruned, find_rank, stored_wider

Kind = Literal["frozen", "quantised", "rounded", "pruned", "low rank", "changed", "undetermined"]
Side = Literal["a", "b"]
MOST = 0.5  # of the weights of changed matrices, which make the whole of that kind
NEARLY_ALL = 0.9  # of them, for low ranks: other changes of weights may be of low rank here and there


class Change(NamedTuple):
    """What was found out about one tensor."""

    difference: Difference
    kind: Kind
    text: str
    child: Side | None = None  # the one that was made of the other, where that is certain
    detail: object = None  # of the kind: levels, a share, a rank


class Summary(NamedTuple):
    """What was done to the network."""

    kinds: list[str]  # sentences without an end
    names: list[str]  # one word or two for each
    child: Side | None  # the network that was made of the other, where that is certain


def find_change(a: Tensor, b: Tensor, found: Difference) -> Change:
    """What happened to one tensor; reads it again where numbers differ."""
    if found.unequal == 0:
        return Change(found, "frozen", "frozen")
    levels = [find_levels(tensor) for tensor in (a, b)]
    sides: tuple[Side, Side] = ("a", "b")
    for side, own, other in zip(sides, levels, reversed(levels), strict=True):
        if own is not None and (other is None or other.bits > own.bits):
            return Change(found, "quantised", f"{side} has {own.bits} bits per {own.per}", side, own)
    pruned = find_pruned(found, b, a, True), find_pruned(found, a, b, False)
    for side, one in zip(reversed(sides), pruned, strict=True):
        if one is not None:
            how = f", {one.pattern}" if one.pattern else ", by magnitude" if one.by_magnitude else ""
            kept = "" if found.unequal <= sum(found.new_zeros) else "; the rest was trained on"
            return Change(found, "pruned", f"{one.share:.0%} of {side} are zero{how}{kept}", side, one)
    wider = [stored_wider(tensor) for tensor in (a, b)]
    for side, own, other in zip(sides, wider, reversed(wider), strict=True):
        if own is not None and other is None:
            return Change(found, "rounded", f"numbers of {side} are those of {str(own).removeprefix('torch.')}", side)
    if a.dim() < 2 or min(a.shape[0], a.numel() // a.shape[0]) < 2:
        return Change(found, "changed", f"changed by {found.distance:.2g}")
    rank = find_rank(a, b, found)
    if rank.full:
        return Change(found, "changed", f"changed by {found.distance:.2g}, full rank")
    if rank.rank is None:
        return Change(found, "undetermined", f"changed by {found.distance:.2g}, rank not determinable below rounding")
    return Change(found, "low rank", f"changed by {found.distance:.2g}, rank {rank.rank}", None, rank.rank)


def summarise(changes: Sequence[Change]) -> Summary:
    """What was done to all tensors together."""
    matrices = [x for x in changes if len(x.difference.shape) >= 2 and x.kind != "frozen"]
    weights = sum(x.difference.numel for x in matrices)
    kinds, names, children = [], [], set()

    def share(kind: Kind) -> float:
        return sum(x.difference.numel for x in matrices if x.kind == kind) / max(1, weights)

    def add(name: str, text: str, members: Sequence[Change]) -> None:
        names.append(name)
        kinds.append(text)
        children.update(x.child for x in members)

    for kind, tell in (("quantised", tell_quantised), ("pruned", tell_pruned), ("rounded", tell_rounded)):
        members = [x for x in matrices if x.kind == kind]
        if share(kind) >= MOST:
            add(kind, tell(members), members)
    low = [x for x in matrices if x.kind == "low rank"]
    if share("low rank") >= NEARLY_ALL:
        ranks = Counter(x.detail for x in low)
        usual, count = ranks.most_common(1)[0]
        if count >= MOST * len(low) and all(usual < min_side(x.difference.shape) / 2 for x in low if x.detail == usual):
            add("low rank", f"low rank: rank {usual} in {count} of {len(low)} changed matrices, as a merged LoRA", ())
    if not names and any(x.kind != "frozen" for x in changes):
        add("fine-tuned", "fine-tuned: all of what changed did so in full rank, or too little to tell", ())
    frozen = [x for x in changes if x.kind == "frozen"]
    if frozen and len(frozen) < len(changes):
        part = sum(x.difference.numel for x in frozen) / sum(x.difference.numel for x in changes)
        add("frozen", f"frozen: {len(frozen)} of {len(changes)} tensors, {part:.0%} of the weights", ())
    certain = children - {None}
    return Summary(kinds, names, certain.pop() if len(certain) == 1 else None)


def min_side(shape: Sequence[int]) -> int:
    return min(shape[0], math.prod(shape[1:]))


def tell_quantised(members: Sequence[Change]) -> str:
    levels: Levels = Counter(x.detail for x in members).most_common(1)[0][0]
    return f"quantised: {members[0].child} has {levels.bits} bits, a scale for each {levels.per}"


def tell_pruned(members: Sequence[Change]) -> str:
    zeros = sum(x.detail.share * x.difference.numel for x in members) / sum(x.difference.numel for x in members)
    patterns = {x.detail.pattern for x in members}
    how = f" ({patterns.pop()})" if len(patterns) == 1 and None not in patterns else ""
    rest = "unchanged" if all(x.difference.unequal <= sum(x.difference.new_zeros) for x in members) else "trained on"
    return f"pruned: {zeros:.0%} of {members[0].child} are zero{how}, the rest is {rest}"


def tell_rounded(members: Sequence[Change]) -> str:
    return f"rounded: {members[0].text}"


def find_changes(pairs: Mapping[str, tuple[Tensor, Tensor]], found: Sequence[Difference]) -> Iterator[Change]:
    """``find_change`` of each tensor of both networks."""
    for one in found:
        yield find_change(*pairs[one.name], one)
