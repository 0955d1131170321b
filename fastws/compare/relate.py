"""Relatives among networks of one architecture: candidates, families, and what is told of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from scipy.sparse.csgraph import connected_components
from scipy.special import ndtri
from torch import Tensor
from tqdm import tqdm

from fastws.compare.collection import Member
from fastws.compare.kinship import LEAST_NULL, Family, agreement, discoveries, find_families, log_empirical
from fastws.compare.moving import Mover
from fastws.compare.screening import distances_of, gram_of_changes, log_chance, screen
from fastws.compare.sketches import closeness, nearest_pairs, sketch_all
from fastws.compare.states import State
from fastws.compare.tree import Edge, find_family
from fastws.compare.verdict import RELATED

RATE = 1e-3  # of false discoveries among the pairs of a folder
NULL_PAIRS = 200  # of networks that are no candidates, which are matched to learn how close strangers get
NOTHING = 2.0  # standard deviations in stored coordinates that are no sign of kinship
CANDIDATE = 4.0  # spreads of all pairs that sketches of candidates are closer than those of the median pair
MOST_EACH = 4  # candidates of each network, by each kind of sketch
MATCHED_WEIGHTS = 2**31  # of all pairs that are matched: fewer are where networks are large


class Group(NamedTuple):
    """Networks of one architecture, by their numbers.

    Attributes:
        names: Their paths in the folder.
        scope: What was looked at: ``"stored coordinates"``, or also ``"permutations"``.
        edges: Relations.
        duplicates: Pairs of a network that is kept and one that is equal to it, up to rounding.
        families: Relatives with their duplicates, large families first; strangers are in none.
        deviations: Of each pair, how much closer it is than its units in other orders, in standard deviations.
        notes: What was not looked at, and what the error rate rests on.
    """

    names: list[str]
    scope: str
    edges: list[Edge]
    duplicates: list[tuple[int, int]]
    families: list[list[int]]
    deviations: Tensor
    notes: list[str]


class Scene(NamedTuple):
    """What relations are looked for in."""

    states: Sequence[State]  # weights without running statistics
    units: list[Family]
    mover: Mover | None
    prefix: str  # of the names of the module
    whole: Sequence[State]  # all floating tensors, by the names of the module
    null: list[float]  # distances of matched strangers

    deviations: Tensor  # of ``screen``, [M, M]

    def log_p(self, one: int, other: int, distance: float) -> float | None:
        """Of strangers that are as close, in stored coordinates or matched; the better of both, doubled."""
        matched = log_empirical(distance, self.null)
        if matched is not None and float(self.deviations[one, other]) < NOTHING:
            return min(0.0, math.log(2) + matched)  # stored coordinates have nothing to add
        stored = agreement(self.states[one], self.states[other], self.units).log_p
        if matched is None or stored is None:
            return stored if matched is None else matched
        return min(0.0, math.log(2) + min(stored, matched))


def relate(members: Sequence[Member], mover: Mover | None, notes: list[str], progress: bool) -> Group:
    """The relations of networks of one architecture; ``mover`` says what moves, and ``notes`` why nothing does."""
    states = [member.weights for member in members]
    units = find_families({name: tuple(tensor.shape) for name, tensor in states[0].items()})
    deviations = screen(states, units, progress)
    near = discovered(deviations)
    scope, whole, null = "stored coordinates", [], []
    if mover is not None:
        scope = f"stored coordinates and {mover.scope}"
        prefix = members[0].prefix
        whole = [{prefix + name: x for name, x in (one.weights | one.statistics).items()} for one in members]
        near, null = match_candidates(mover, whole, near, progress)
        notes = [*notes, *mover.notes, tell_null(len(null))]
    scene = Scene(states, units, mover, members[0].prefix, whole, null, deviations)
    edges, duplicates = relate_candidates(scene, near, progress)
    families = connected(len(states), [(edge.parent, edge.child) for edge in edges] + duplicates)
    return Group([member.name for member in members], scope, edges, duplicates, families, deviations, notes)


def discovered(deviations: Tensor) -> Tensor:
    """Pairs that are closer than strangers, bool ``[M, M]``, at a rate of false discoveries over all pairs."""
    near = torch.zeros(deviations.shape, dtype=torch.bool)
    upper = torch.triu_indices(*deviations.shape, offset=1)
    near[upper[0], upper[1]] = torch.tensor(discoveries(log_chance(deviations[upper[0], upper[1]]).tolist(), RATE))
    return near | near.T


def match_candidates(mover: Mover, whole: Sequence[State], near: Tensor, progress: bool) -> tuple[Tensor, list[float]]:
    """Adds pairs that are near when matched; also the distances of matched strangers.

    Matched are pairs whose sketches are nearest. Strangers are pairs drawn at random among the others, of which some
    may be relatives that nobody has found: so only the farther half of them says how distances are spread.
    """
    sketches = sketch_all(whole, mover, progress)
    each = max(1, min(MOST_EACH, MATCHED_WEIGHTS // (mover.layout.num_weights * len(whole))))
    kinds = [nearest_pairs(closeness(kind), each, CANDIDATE) for kind in zip(*sketches, strict=True)]
    candidates = torch.stack(kinds).any(0) & ~near
    far = (~near & ~candidates).triu(1).nonzero()
    most = min(NULL_PAIRS, max(LEAST_NULL, MATCHED_WEIGHTS // 4 // mover.layout.num_weights))
    far = far[torch.randperm(len(far), generator=torch.Generator().manual_seed(0))[:most]]
    if len(far) < LEAST_NULL:
        return near, []
    pairs = [tuple(pair) for pair in (*far.tolist(), *candidates.triu(1).nonzero().tolist())]
    bar = tqdm(mover.null(whole, pairs), "match", len(pairs), disable=not progress, leave=False, unit=" pairs")
    distances = list(bar)
    null, found = mirrored(distances[: len(far)]), distances[len(far) :]
    logs = [log_empirical(distance, null) for distance in found]
    others = [0.0] * (len(near) * (len(near) - 1) // 2 - len(found))
    near = near.clone()
    for (one, other), related in zip(pairs[len(far) :], discoveries([*logs, *others], RATE), strict=False):
        near[one, other] = near[other, one] = near[one, other] or related
    return near, null


def mirrored(distances: Sequence[float]) -> list[float]:
    """The farther half of distances, and their mirror images at the median, as logarithms."""
    middle = float(numpy.median(distances))
    far = [distance for distance in distances if distance >= middle > 0]
    return [*far, *(middle**2 / distance for distance in far)]


def tell_null(count: int) -> str:
    if count < LEAST_NULL:
        what = f"fewer than {LEAST_NULL} pairs of strangers are in the folder"
        return f"matched neurons have no error rate, because {what}: relations rest on stored coordinates"
    return f"p of matched neurons is the tail of a normal distribution of log distances of {count} pairs of the folder"


def relate_candidates(scene: Scene, near: Tensor, progress: bool) -> tuple[list[Edge], list[tuple[int, int]]]:
    """Relations and duplicates of all components of candidates."""
    edges, duplicates = [], []
    for left in tqdm(connected_of(near), "relate", unit=" families", disable=not progress, leave=False):
        while len(left) > 1:
            # all are moved to one of them; what turns out to be far from it is looked at again without it
            base = max(left, key=lambda one: int(near[one][left].sum()))
            joined, found, equal = relate_to(scene, left, base, near)
            edges += found
            duplicates += equal
            left = [one for one in left if one not in joined]
    return edges, duplicates


def relate_to(
    scene: Scene, numbers: Sequence[int], base: int, near: Tensor
) -> tuple[list[int], list[Edge], list[tuple[int, int]]]:
    """Networks that are near one of them in its coordinates, by steps from one to the next, and their relations."""
    some: Sequence[State] = [scene.states[number] for number in numbers]
    if scene.mover is not None:
        moved = scene.mover.move_all([scene.whole[number] for number in numbers], numbers.index(base))
        some = [{name: state[scene.prefix + name] for name in scene.states[base]} for state in moved]
    gram, squares = gram_of_changes(some, some[numbers.index(base)])
    distances = distances_of(gram, squares)
    if scene.mover is not None:
        close = (distances < related_distance(scene.null)) | near[numbers][:, numbers]
        close &= distances < 1  # sums of squares of strangers are those of their distance
        own = numbers.index(base)
        kept = next((one for one in connected_of(close) if own in one), [own])
        numbers, some = [numbers[place] for place in kept], [some[place] for place in kept]
        gram, distances = gram[kept][:, kept], distances[kept][:, kept]

    def probability(one: int, other: int) -> float | None:
        return scene.log_p(numbers[one], numbers[other], float(distances[one, other]))

    found = find_family(some, distances, gram, probability, RELATED)
    edges = [edge._replace(parent=numbers[edge.parent], child=numbers[edge.child]) for edge in found.edges]
    return numbers, edges, [(numbers[one], numbers[other]) for one, other in found.duplicates]


def related_distance(null: Sequence[float]) -> float:
    """The distance of which strangers have a smaller one with the probability of relatives."""
    if len(null) < LEAST_NULL:
        return 0.0
    logs = numpy.log(null)
    return float(numpy.exp(logs.mean() + ndtri(math.exp(RELATED) / 2) * logs.std(ddof=1)))


def connected_of(near: Tensor) -> list[list[int]]:
    """Components of two and more, large ones first."""
    _, labels = connected_components(near.numpy(), directed=False)
    found = [numpy.flatnonzero(labels == label).tolist() for label in range(labels.max() + 1)]
    return sorted((one for one in found if len(one) > 1), key=lambda one: (-len(one), one))


def connected(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    joined = torch.zeros(count, count, dtype=torch.bool)
    for one, other in pairs:
        joined[one, other] = True
    return connected_of(joined)
