"""How relatives descend from each other, with directions only where they are certain or nearly so."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy
import torch
from scipy.optimize import nnls
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from fastws.compare.changes import Summary, find_changes, summarise
from fastws.compare.differences import CHUNK, compare_tensors, rounding
from fastws.compare.kinds import find_levels
from fastws.compare.states import State

Direction = Literal["certain", "strong", "unknown"]
EXACT = 4.0  # times the rounding: what may lie between duplicates, and between an average and what it was made of
MOST_SOURCES = 16  # nearest relatives of which a network may be an average
LEAST_SHARE = 0.02  # of a source in an average
NEAR = 0.05  # of its way to the nearest source, what an average may miss before all is computed exactly
ZEROS = 0.05  # of the weights more than the usual network of the component has: it was pruned
HUB = 3  # relatives around one that is likely to be their parent


class Edge(NamedTuple):
    """A relation of two networks, by their numbers."""

    parent: int  # or, where the direction is unknown, one of the two
    child: int
    direction: Direction
    distance: float  # ||a - b|| / (||a|| ||b||)**0.5
    log_p: float | None  # of strangers that are as close
    kinds: list[str]  # one word or two each
    told: list[str]  # the same in sentences about a, the parent, and b, the child
    share: float | None = None  # of the parent in an average


class Family(NamedTuple):
    """Relatives."""

    edges: list[Edge]
    duplicates: list[tuple[int, int]]  # the network that is kept, and one that is equal up to rounding


def find_family(
    states: Sequence[State],
    distances: Tensor,
    gram: Tensor,
    probability: Callable[[int, int], float | None],
    related: float,
) -> Family:
    """The relations of networks of one component.

    Averages come first, because they have several parents; then what was quantised or pruned, whose parent is the
    nearest network that was not; then a minimum spanning tree of the rest.

    Args:
        states: k networks in the coordinates of one of them, tensors by name.
        distances: ``[k, k]``.
        gram: Inner products of what each has changed of one of them, ``[k, k]``.
        probability: Natural logarithm of the probability that strangers are as close as two; None if it is unknown.
        related: Its largest value at which a relation is told.
    """
    least = EXACT * max(rounding(tensor.dtype) for state in states for tensor in state.values())
    kept, duplicates = without_duplicates(distances, least)
    edges: list[Edge] = []

    def add(parent: int, child: int, direction: Direction = "unknown", share: float | None = None) -> None:
        log_p = probability(parent, child)
        if log_p is None or log_p < related:
            told = tell(states[parent], states[child]) if share is None else Summary([], ["average"], "b")
            if told.child == "a":
                parent, child = child, parent
                told = tell(states[parent], states[child])
            direction = "certain" if told.child else direction
            distance = float(distances[parent, child])
            edges.append(Edge(parent, child, direction, distance, log_p, told.names, told.kinds, share))

    averages = find_averages(states, kept, distances, gram)
    for child, sources in averages.items():
        for parent, share in sources.items():
            add(parent, child, "certain", share)
    made = find_made(states, [one for one in kept if one not in averages])
    originals = [one for one in kept if one not in averages and one not in made]
    for child in made:
        others = originals or [one for one in made if one != child]
        if others:
            add(min(others, key=lambda one: float(distances[one, child])), child)
    for one, other in spanning_tree(originals, distances):
        add(one, other)
    return Family(point(edges), duplicates)


def without_duplicates(distances: Tensor, least: float) -> tuple[list[int], list[tuple[int, int]]]:
    kept: list[int] = []
    duplicates = []
    for one in range(len(distances)):
        equal = next((other for other in kept if distances[one, other] <= least), None)
        if equal is None:
            kept.append(one)
        else:
            duplicates.append((equal, one))
    return kept, duplicates


def spanning_tree(members: Sequence[int], distances: Tensor) -> list[tuple[int, int]]:
    if len(members) < 2:
        return []
    some = distances[members][:, members].clamp(min=1e-300).numpy()
    rows, columns = minimum_spanning_tree(some).nonzero()
    return [(members[row], members[column]) for row, column in zip(rows, columns, strict=True)]


def tell(a: State, b: State) -> Summary:
    pairs = {name: (tensor, b[name]) for name, tensor in a.items()}
    return summarise(list(find_changes(pairs, list(compare_tensors(pairs, progress=False)))))


def point(edges: list[Edge]) -> list[Edge]:
    """Directs relations of unknown direction away from the one network that has at least three of them.

    At most one of them can be its parent, so that nearly all are right; it is called strong, not certain.
    """
    counts = Counter(end for edge in edges if edge.direction == "unknown" for end in (edge.parent, edge.child))
    (hub, most), *others = [*counts.most_common(2), (None, 0)]
    if most < HUB or others[0][1] == most:
        return edges
    pointed = []
    for edge in edges:
        if edge.direction == "unknown" and hub in (edge.parent, edge.child):
            other = edge.child if edge.parent == hub else edge.parent
            edge = edge._replace(parent=hub, child=other, direction="strong")
        pointed.append(edge)
    return pointed


# --- networks that others were made into


def find_made(states: Sequence[State], members: Sequence[int]) -> set[int]:
    """Those that were quantised, or pruned: with more zeros than is usual among the members."""
    zeros = {one: share_of_zeros(states[one]) for one in members}
    usual = min(zeros.values(), default=0.0)
    return {one for one in members if zeros[one] > usual + ZEROS or is_quantised(states[one])}


def share_of_zeros(state: State) -> float:
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    return sum(int((tensor == 0).sum()) for tensor in weights) / max(1, sum(tensor.numel() for tensor in weights))


def is_quantised(state: State) -> bool:
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    levels = sum(tensor.numel() for tensor in weights if find_levels(tensor) is not None)
    return levels > sum(tensor.numel() for tensor in weights) / 2


# --- averages


def find_averages(
    states: Sequence[State], members: Sequence[int], distances: Tensor, gram: Tensor
) -> dict[int, dict[int, float]]:
    """Networks that are weighted means of others, with the shares of these.

    By non-negative least squares that add up to 1 of inner products, then exactly, number by number.
    """
    found: dict[int, dict[int, float]] = {}
    values, vectors = numpy.linalg.eigh(gram[members][:, members].numpy())
    points = vectors * numpy.sqrt(values.clip(min=0))  # [k, k], as far apart as the networks
    for place, one in enumerate(members):
        order = distances[one][members].argsort().tolist()
        others = [number for number in order if number != place and members[number] not in found][:MOST_SOURCES]
        if len(others) < 2:
            continue
        heavy = 1e3 * max(1e-300, float(numpy.abs(points).max()))  # weight of the row that makes shares add up to 1
        system = numpy.vstack([points[others].T, numpy.full(len(others), heavy)])
        shares, _ = nnls(system, numpy.append(points[place], heavy))
        shares = numpy.where(shares < LEAST_SHARE, 0, shares)
        if (shares > 0).sum() < 2:
            continue
        shares /= shares.sum()
        missed = numpy.linalg.norm(points[place] - shares @ points[others])
        if missed > NEAR * numpy.linalg.norm(points[place] - points[others[0]]):
            continue
        sources = {members[number]: float(share) for number, share in zip(others, shares, strict=True) if share > 0}
        if (exact := refine(states, one, sources)) is not None:
            found[one] = exact
    return found


def refine(states: Sequence[State], one: int, sources: Mapping[int, float]) -> dict[int, float] | None:
    """Shares by least squares over all numbers; None if the mean of the sources is another network than ``one``."""
    names = list(sources)
    last = states[names[-1]]
    gram, right = torch.zeros(len(names) - 1, len(names) - 1).double(), torch.zeros(len(names) - 1).double()
    for flat, base, others in pieces(states, one, names[:-1], last):
        changes = others - base
        gram += changes @ changes.T
        right += changes @ (flat - base)
    shares = torch.linalg.lstsq(gram, right[:, None]).solution[:, 0]
    missed, size = 0.0, 0.0
    for flat, base, others in pieces(states, one, names[:-1], last):
        missed += float((flat - base - shares @ (others - base)).square().sum())
        size += float(flat.square().sum())
    least = EXACT * max(rounding(tensor.dtype) for tensor in states[one].values())
    if missed > least**2 * size:
        return None
    return dict(zip(names, [*shares.tolist(), 1 - float(shares.sum())], strict=True))


def pieces(states: Sequence[State], one: int, others: Sequence[int], base: State):
    """All numbers of networks in pieces, float64: ``[n]``, ``[n]`` and ``[k, n]``."""
    for name, tensor in states[one].items():
        flats = [state[name].reshape(-1) for state in (states[one], base, *(states[other] for other in others))]
        for begin in range(0, tensor.numel(), CHUNK):
            first, second, *rest = (flat[begin : begin + CHUNK].double() for flat in flats)
            yield first, second, torch.stack(rest) if rest else first.new_zeros(0, len(first))
