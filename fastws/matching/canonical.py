"""Canonical forms: of all orders of a network's neurons one, found without another network to compare with."""

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastws.layout.layout import Layout
from fastws.matching.match import batch_size, is_finite
from fastws.matching.places import Place, find_places
from fastws.symmetry.symmetry import Symmetry

Form = Literal["l2", "lexicographic"]


def canonical(flat: Tensor, symmetry: Symmetry, layout: Layout, form: Form = "l2") -> Tensor:
    """Finds the permutations that sort the units of networks: the same weights for all permuted copies of a network.

    Group by group, each applied before the next is looked at (hyper-representations, arXiv 2110.15288). What is
    compared are the rows ``[weights, bias]`` of the first weight whose rows the group moves and whose inputs are sorted
    already or stay. In a plain network that is each layer's own weight; of the channels of a residual stream it is the
    layer where the stream begins. A group without such a weight is sorted by another axis whose units are sorted, and
    if there is none, by the entries of its rows in ascending order, which no permutation of inputs changes.

    Units whose rows are equal, dead ones for example, stay in the order in which they were: only then do permuted
    copies differ, in other weights of these units.

    Args:
        flat: Networks, ``[M, P]``, floating point.
        symmetry: Of their architecture. "First" above means the order of its tensors, whatever that of the layout is.
        layout: What the networks were flattened with.
        form: ``"l2"`` sorts by Euclidean norm, the largest first; ``"lexicographic"`` by the first weight, the smallest
            first, then by the second and so on. The published code calls the latter "absolute", although signs count.

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
    if not len(flat):
        return symmetry.identity(0, flat.device)
    keys = list(find_keys(symmetry, layout, flat.device))
    parts = [sort(part.detach(), symmetry, layout, keys, form) for part in flat.split(batch_size(symmetry))]
    return torch.cat(parts)


def canonical_hashes(flat: Tensor, symmetry: Symmetry | None, layout: Layout) -> list[str]:
    """A name of 32 hexadecimal digits for each network ``[M, P]``, the same for its permuted copies.

    It is a hash of the weights in lexicographic form, for which see ``canonical``; without a symmetry, of the weights
    as they lie. Zeros are equal whatever their sign. The order of tensors in the layout counts: compare hashes of one.
    """
    if symmetry is not None:
        flat = symmetry.permute(flat, canonical(flat, symmetry, layout, "lexicographic"), layout)
    rows = (flat.detach().cpu() + 0.0).contiguous()  # -0.0 becomes 0.0
    return [hashlib.blake2b(row.view(torch.uint8).numpy(), digest_size=16).hexdigest() for row in rows]


class Key(NamedTuple):
    """What the units of a group are sorted by."""

    group: int
    weight: Place
    bias: Place | None
    inputs_in_order: bool


def find_keys(symmetry: Symmetry, layout: Layout, device: torch.device) -> Iterator[Key]:
    """The keys of all groups, in the order in which they are to be sorted."""
    places = find_places(symmetry, layout, device)
    names = [entry.name for entry in layout.entries if entry.offset >= 0 and entry.numel]
    number = {name: i for i, name in enumerate(symmetry.axes)}
    number |= {alias: number[name] for alias, name in symmetry.aliases.items()}
    bias_of = dict(layout.with_tokens(1, "keep").layers)
    waiting = list(range(len(places)))

    def in_order(place: Place) -> bool:
        axes = symmetry.axes[names[place.tensor]]
        others = axes[:1] if place.axis else axes[1:]
        groups = {group for segments in others for group, *_ in segments or ()}
        return not groups & set(waiting)

    def rank(group: int, place: Place) -> tuple:
        """The least is the best: a matrix, whose inputs are in order, and whose rows the group moves."""
        return len(place.shape) < 2, not in_order(place), place.axis > 0, group, number[names[place.tensor]]

    while waiting:
        group, place = min(((group, place) for group in waiting for place in places[group]), key=lambda x: rank(*x))
        biases = [other for other in places[group] if names[other.tensor] == bias_of.get(names[place.tensor])]
        yield Key(group, place, biases[0] if biases and place.axis == 0 else None, in_order(place))
        waiting.remove(group)


def sort(flat: Tensor, symmetry: Symmetry, layout: Layout, keys: list[Key], form: Form) -> Tensor:
    """The permutations of networks ``[k, P]``: ``[k, S]``."""
    rows = symmetry.identity(len(flat), flat.device)
    entries = [entry for entry in layout.entries if entry.offset >= 0 and entry.numel]
    for key in keys:
        size, values = symmetry.sizes[key.group], []
        for place in [key.weight] + [key.bias] * (key.bias is not None):
            entry = entries[place.tensor]
            weights = flat[:, entry.offset : entry.offset + entry.numel].contiguous()
            if place.other is not None and key.inputs_in_order:
                weights = place.select(weights, rows[:, place.other])
            weights = place.arrange(weights, size)
            values.append(weights if key.inputs_in_order else weights.sort(2).values)
        order = order_of(torch.cat(values, 2), form)
        first = symmetry.starts[key.group]
        groups = rows[:, : symmetry.starts[-1]].clone()
        groups[:, first : first + size] = order
        rows = symmetry.expand(groups)
    return rows


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
