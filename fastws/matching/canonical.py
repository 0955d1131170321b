"""Canonical forms: of all orders of a network's neurons one, found without another network to compare with."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.matching.match import batch_size, check_flips, is_finite
from fastws.matching.places import Place, find_places
from fastws.symmetry.symmetry import Symmetry

Form = Literal["l2", "lexicographic"]


def canonical(
    flat: Tensor, symmetry: Symmetry, layout: Layout, form: Form = "l2", *, flips: bool | Tensor = False
) -> Tensor:
    """Finds the permutations that sort the units of networks: the same weights for all permuted copies of a network.

    Group by group, each applied before the next is looked at (hyper-representations, arXiv 2110.15288). What is
    compared are the rows ``[weights, bias]`` of the first weight whose rows the group moves and whose inputs are sorted
    already or stay. In a plain network that is each layer's own weight; of the channels of a residual stream it is the
    layer where the stream begins. A group without such a weight is sorted by another axis whose units are sorted, and
    if there is none, by the entries of its rows in ascending order, which no permutation of inputs changes.

    Where units may change their sign, a unit gets the one that makes the sum of cubes of what it is compared by
    positive, and is compared then. What its row says nothing of, as before a batch norm, is said by the first weight
    that changes its sign with the unit and whose inputs have order and sign already. Rows whose inputs have none are
    compared by absolute values. A sign that nothing decides, for only weights between the units of one group change
    with it, stays.

    Units whose rows are equal, dead ones for example, stay in the order in which they were: only then do permuted
    copies differ, in other weights of these units.

    Args:
        flat: Networks, ``[M, P]``, floating point.
        symmetry: Of their architecture. "First" above means the order of its tensors, whatever that of the layout is.
        layout: What the networks were flattened with.
        form: ``"l2"`` sorts by Euclidean norm, the largest first; ``"lexicographic"`` by the first weight, the smallest
            first, then by the second and so on. The published code calls the latter "absolute", although signs count.
        flips: Whether units of the groups that ``symmetry.flips`` says may change their sign too, of all networks or,
            bool ``[M]``, of each; see ``match``.

    Returns:
        int32 ``[M, S]`` for ``symmetry.permute(flat, permutations, layout)``.

    Raises:
        ValueError: If a shape or dtype does not fit, or a weight is NaN or infinite.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> symmetry = fastws.Symmetry.trace(mlp, torch.randn(1, 4))
        >>> layout = fastws.Layout.from_checkpoint(mlp)
        >>> copies = symmetry.permute(layout.flatten(mlp).detach(), symmetry.random(5), layout)
        >>> sorted_copies = symmetry.permute(copies, canonical(copies, symmetry, layout), layout)
        >>> bool((sorted_copies == sorted_copies[0]).all())
        True
    """
    if flat.dim() != 2 or flat.shape[1] != layout.num_weights or not flat.is_floating_point():
        expected, got = f"[M, {layout.num_weights}] floating point", f"{list(flat.shape)} {flat.dtype}"
        raise ValueError(f"canonical: flat must be {expected}, as the layout says, got {got}")
    if form not in ("l2", "lexicographic"):
        raise ValueError(f"canonical: form must be 'l2' or 'lexicographic', got {form!r}")
    if not is_finite(flat):
        raise ValueError("canonical: flat must be finite, got NaN or infinity; leave such rows out")
    flips = check_flips("canonical", flips, flat)
    if not len(flat):
        return symmetry.identity(0, flat.device)
    keys = list(
        find_keys(symmetry, layout, flat.device, symmetry.flips if flips.any() else (False,) * len(symmetry.sizes))
    )
    size = batch_size(symmetry)
    parts = zip(flat.detach().split(size), flips.split(size), strict=True)
    return torch.cat([sort(*part, symmetry, layout, keys, form) for part in parts])


def canonical_hashes(
    flat: Tensor, symmetry: Symmetry | None, layout: Layout, *, flips: bool | Tensor = False
) -> list[str]:
    """A name of 32 hexadecimal digits for each network ``[M, P]``, the same for its permuted copies.

    It is a hash of the weights in lexicographic form, for which and for ``flips`` see ``canonical``; without a
    symmetry, of the weights as they lie. Zeros are equal whatever their sign. The order of tensors in the layout
    counts: compare hashes of one.
    """
    if symmetry is not None:
        found = canonical(flat, symmetry, layout, "lexicographic", flips=flips)
        flat = symmetry.permute(flat, found, layout)
    rows = (flat.detach().cpu() + 0.0).contiguous()  # -0.0 becomes 0.0
    return [hashlib.blake2b(row.view(torch.uint8).numpy(), digest_size=16).hexdigest() for row in rows]


class Key(NamedTuple):
    """What the units of a group are compared by: to get their signs, to get their order, or both."""

    group: int
    weight: Place
    bias: Place | None
    inputs_in_order: bool  # and with their signs
    gives_sign: bool
    gives_order: bool = True


def find_keys(symmetry: Symmetry, layout: Layout, device: torch.device, flips: tuple[bool, ...]) -> Iterator[Key]:
    """The keys of all groups, in the order in which they are to be used; ``flips``: the groups that get signs."""
    places = find_places(symmetry, layout, device)
    names = [entry.name for entry in layout.entries if entry.offset >= 0 and entry.numel]
    number = {name: i for i, name in enumerate(symmetry.axes)}
    number |= {alias: number[name] for alias, name in symmetry.aliases.items()}
    bias_of = dict(layout.with_tokens(1, "keep").layers)
    waiting = list(range(len(places)))  # for their order
    without_sign = {group for group, may in enumerate(flips) if may}

    def in_order(place: Place) -> bool:
        axes = symmetry.axes[names[place.tensor]]
        others = axes[:1] if place.axis else axes[1:]
        groups = {group for segments in others for group, *_ in segments or ()}
        return not groups & (set(waiting) | without_sign)

    def rank(group: int, place: Place) -> tuple:
        """The least is the best: a matrix, whose inputs are in order, and whose rows the group moves."""
        return len(place.shape) < 2, not in_order(place), place.axis > 0, group, number[names[place.tensor]]

    def best(groups: Iterable[int]) -> tuple[int, Place]:
        return min(((group, place) for group in groups for place in places[group]), key=lambda x: rank(*x))

    def find_sign() -> Key | None:
        """The key of a group that has its order and not its sign, if one decides it."""
        for group in sorted(without_sign - set(waiting)):
            found = [place for place in places[group] if place.negated and in_order(place)]
            if found:
                place = min(found, key=lambda place: rank(group, place))
                return Key(group, place, None, True, gives_sign=True, gives_order=False)
        return None

    while waiting:
        group, place = best(waiting)
        biases = [other for other in places[group] if names[other.tensor] == bias_of.get(names[place.tensor])]
        biases = [other for other in biases if other.negated == place.negated and place.axis == 0]
        sign = group in without_sign and place.negated and in_order(place)
        yield Key(group, place, biases[0] if biases else None, in_order(place), gives_sign=sign)
        waiting.remove(group)
        without_sign -= {group} if sign else set()
        while (key := find_sign()) is not None:
            yield key
            without_sign.remove(key.group)


def sort(flat: Tensor, flips: Tensor, symmetry: Symmetry, layout: Layout, keys: list[Key], form: Form) -> Tensor:
    """The permutations of networks ``[k, P]``, of which those of ``flips`` ``[k]`` get signs: ``[k, S]``."""
    rows = symmetry.identity(len(flat), flat.device)
    for key in keys:
        values = values_of(flat, flips, rows, key, symmetry, layout)
        first, size = symmetry.starts[key.group], symmetry.sizes[key.group]
        groups = rows[:, : symmetry.starts[-1]].clone()
        negative = torch.zeros_like(groups[:, :size])
        if key.gives_sign:
            negative = -((values.double() ** 3).sum(2) < 0).to(groups.dtype) * flips[:, None]
            values = values * (1 + 2 * negative).to(values)[..., None]
        order = groups[:, first : first + size]
        order = order_of(values, form).to(order) if key.gives_order else order
        groups[:, first : first + size] = order ^ negative.gather(1, order.long())
        rows = symmetry.expand(groups)
    return rows


def values_of(flat: Tensor, flips: Tensor, rows: Tensor, key: Key, symmetry: Symmetry, layout: Layout) -> Tensor:
    """What the units of a group are compared by, ``[k, size, n]``; ``rows`` say how inputs are permuted so far."""
    entries = [entry for entry in layout.entries if entry.offset >= 0 and entry.numel]
    values = []
    for place in [key.weight] + [key.bias] * (key.bias is not None):
        entry = entries[place.tensor]
        weights = flat[:, entry.offset : entry.offset + entry.numel].contiguous()
        if place.other is not None and key.inputs_in_order:
            weights = place.select(weights, rows[:, place.other])
        weights = place.arrange(weights, symmetry.sizes[key.group])
        if not key.inputs_in_order:
            weights = torch.where(flips[:, None, None], weights.abs(), weights).sort(2).values
        values.append(weights)
    return torch.cat(values, 2)


def order_of(values: Tensor, form: Form) -> Tensor:
    """The order of the units of networks, int64 ``[k, size]``, by their rows, ``values`` ``[k, size, n]``."""
    if form == "l2":
        return values.double().square().sum(2).argsort(dim=1, descending=True, stable=True)
    order = torch.arange(values.shape[1], device=values.device).repeat(len(values), 1)
    rank = torch.zeros_like(order)  # of the units in that order; equal for those that are equal so far
    networks = torch.arange(len(values), device=values.device)  # in which some are
    for column in range(values.shape[2]):
        if not len(networks):
            break
        value = values[networks, :, column].gather(1, order[networks])
        by_value = value.argsort(dim=1, stable=True)
        both = by_value.gather(1, rank[networks].gather(1, by_value).argsort(dim=1, stable=True))
        order[networks] = order[networks].gather(1, both)
        value, old_rank = value.gather(1, both), rank[networks].gather(1, both)
        different = (value[:, 1:] != value[:, :-1]) | (old_rank[:, 1:] != old_rank[:, :-1])
        rank[networks, 1:] = different.cumsum(1)
        networks = networks[~different.all(1)]
    return order
