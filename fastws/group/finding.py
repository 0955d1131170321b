"""Finding lines: which powers of places leave the outputs as they are.

Multiplying the entries of place p by ``exp(h a)``, with a random number per position, moves the outputs by ``h d_p``. A
line multiplies each place with a power ``e_p``, so its powers solve ``sum e_p d_p = 0``: they are the null vectors of
the derivatives. No operation need be known. What the null vectors promise is then tried with large changes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastws.group.function import Function, SizedAction
from fastws.group.lines import Linear, Matrices, Pairs, Part, Scales
from fastws.group.places import Place, Space

EXACT = 1e-9  # the largest change of outputs that is rounding
NEARLY = 1e-5  # the largest change of outputs of a line that a small constant in a norm disturbs
NULL = 2e-4  # singular values below it, of derivatives of length 1, may be 0 but for such a constant
TINY = 1e-9  # a derivative below it is 0


def null_vectors(slopes: Tensor) -> list[list[int]]:
    """Small whole numbers ``e`` with ``slopes @ e = 0``, in reduced form; slopes ``[outputs, places]``."""
    lengths = slopes.norm(dim=0)
    alive = (lengths > TINY * lengths.max().clamp(min=1e-300)).nonzero().flatten()
    if not len(alive):
        return []
    # of many outputs the triangle alone is decomposed: it has the same singular values and right vectors
    _, triangle = torch.linalg.qr(slopes[:, alive] / lengths[alive], mode="r")
    _, values, right = torch.linalg.svd(triangle, full_matrices=True)
    rank = int((values > NULL).sum())
    basis = right[rank:] / lengths[alive]
    basis = basis / basis.abs().amax(1, keepdim=True).clamp(min=1e-300)
    found = []
    for row in reduced(basis):
        for factor in (1, 2):
            rounded = (row * factor).round()
            if (row * factor - rounded).abs().max() < 0.02 and rounded.abs().max() <= 8:
                powers = [0] * slopes.shape[1]
                for place, power in zip(alive.tolist(), rounded.int().tolist(), strict=True):
                    powers[place] = power
                found.append(powers)
                break
    return found


def sparse(vectors: list[list[int]], costs: Sequence[int]) -> list[list[int]]:
    """Vectors that span the same, with fewer numbers that are not 0: multiples of others are added while that helps.

    ``costs`` say which of the numbers should rather be 0.
    """

    def cost(vector: Sequence[int]) -> int:
        return sum(price for number, price in zip(vector, costs, strict=True) if number)

    changed = True
    while changed:
        changed = False
        for i, j in itertools.permutations(range(len(vectors)), 2):
            for a, b in ((1, 1), (1, -1), (2, 1), (2, -1), (1, 2), (1, -2)):
                mixed = [a * x + b * y for x, y in zip(vectors[i], vectors[j], strict=True)]
                if cost(mixed) < cost(vectors[i]):
                    common = math.gcd(*mixed)
                    vectors[i] = [number // common for number in mixed]
                    changed = True
    return vectors


def reduced(rows: Tensor) -> Tensor:
    """The reduced row echelon form: each row has a column that is 1 in it and 0 in all others."""
    rows, done = rows.clone(), 0
    for column in range(rows.shape[1]):
        if done == len(rows):
            break
        pivot = done + int(rows[done:, column].abs().argmax())
        if rows[pivot, column].abs() < 1e-3 * rows[done:].abs().max():
            continue
        rows[[done, pivot]] = rows[[pivot, done]]
        rows[done] = rows[done] / rows[done, column]
        others = torch.arange(len(rows)) != done
        rows[others] -= rows[others, column, None] * rows[done]
        done += 1
    return rows


def powers_of(
    function: Function,
    space: Space,
    places: Sequence[Place],
    spread: Callable[[Tensor], Tensor],
    offsets: Mapping[str, float],
) -> list[list[int]]:
    """The powers of places that leave the outputs as they are to first order.

    Args:
        function: Whose outputs they are.
        space: Of the places.
        places: Some places of it.
        spread: Makes of random numbers ``[U, n]`` those that a line of this kind may have.
        offsets: Of tensors of variances the small constant that is added to them.
    """
    draws = max(2, -(-(len(places) + 8) // max(1, function.outputs_per_draw)))
    generator = torch.Generator().manual_seed(1)
    amounts = spread(torch.randn(space.units, space.positions, generator=generator, dtype=torch.float64))

    def scaling(place: Place) -> SizedAction:
        offset = offsets.get(place.name, 0.0)

        def scaled(state, by: float) -> dict[str, Tensor]:
            entries = place.get(state[place.name]) + offset
            return {place.name: place.put(state[place.name], entries * (amounts * by).exp()[..., None] - offset)}

        return scaled

    costs = [11 if place.name in offsets else 10 for place in places]
    return sparse(null_vectors(function.slopes([scaling(place) for place in places], draws)), costs)


def tried(function: Function, line: Linear, seed: int = 0) -> float:
    """The largest change of the outputs that two random elements of a line make, or one that is too large."""
    generator = torch.Generator().manual_seed(seed)
    values = [line.random(generator) for _ in range(2)]
    errors = (function.error(lambda state, value=value: line.act(state, value), NEARLY) for value in values)
    return first_above(errors, NEARLY)


def first_above(errors: Iterable[float], limit: float) -> float:
    """The largest error, or the first above a limit, after which no more are looked at."""
    largest = 0.0
    for error in errors:
        largest = max(largest, error)
        if largest > limit:
            break
    return largest


def hold(function: Function, lines: Sequence[Linear]) -> bool:
    """Whether lines leave the outputs as they are: those that are exact are tried all at once."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        moves = [(line, line.random(generator)) for line in lines if not line.approximate]

        def move(state, moves=moves) -> dict[str, Tensor]:
            changed: dict[str, Tensor] = {}
            for line, value in moves:
                changed |= line.act({**state, **changed}, value)
            return changed

        if not function.error(move, EXACT) < EXACT:
            return False
    return all(tried(function, line) < NEARLY for line in lines if line.approximate)


class Memory:
    """The lines of one search in each shape of space: layers that are alike need not be searched, only tried.

    Args:
        trusting: Whether what is recalled is not tried at once, but all of it by who asks for ``recalled``.
    """

    def __init__(self, trusting: bool = False):
        self.trusting, self.recalled = trusting, []
        self.known: dict[tuple, tuple[Space, list[Linear]]] = {}

    def keep(self, space: Space, lines: list[Linear]) -> list[Linear]:
        self.known[space.shape] = space, lines
        return lines

    def recall(self, function: Function, space: Space) -> list[Linear]:
        """The lines that hold in a space as in one of the same shape; none if one of them does not."""
        before, lines = self.known.get(space.shape, (space, []))
        there = dict(zip(before.places, space.places, strict=True))
        found = []
        for line in lines:
            parts = tuple(part._replace(place=there[part.place]) for part in line.parts)
            moved = replace(line, name=parts[0].place.name, group=space.group, parts=parts)
            if not self.trusting and tried(function, moved) > (NEARLY if line.approximate else EXACT):
                return []
            found.append(moved)
        self.recalled += found if self.trusting and before is not space else []
        return found


def find_linear(function: Function, space: Space, offsets: Mapping[str, float]) -> tuple[list[Linear], list[str]]:
    """The lines of a space that multiply, and sentences about those that do not hold.

    Args:
        function: The module.
        space: Where to look.
        offsets: Of tensors of variances the small constant that is added to them.
    """
    lines, failed = [], []
    left = list(space.places)
    for powers in powers_of(function, space, left, lambda amounts: amounts, offsets):
        parts = [Part(p, e, offsets.get(p.name, 0.0)) for p, e in zip(left, powers, strict=True) if e]
        if len(parts) < 2:
            continue
        line = largest(function, space, tuple(parts))
        if line is None:
            failed.append(f"scales of {parts[0].place.name}: outputs changed")
        else:
            lines.append(line)
    taken = {part.place for line in lines for part in line.parts}
    left = [place for place in space.places if place not in taken]
    if space.units > 1 and space.positions % 2 == 0 and len(left) > 1:
        lines += find_pairs(function, space, left)
    return lines, failed


def largest(function: Function, space: Space, parts: tuple[Part, ...]) -> Linear | None:
    """The largest of positive scales, scales and matrices that leaves the outputs as they are."""
    if next((part.power for part in parts if not part.place.reads), parts[0].power) < 0:
        parts = tuple(part._replace(power=-part.power) for part in parts)
    fields = (parts[0].place.name, space.group, space.units, space.positions, parts)
    positive = Scales(name_of(parts, False), *fields)
    error = tried(function, positive)
    if error > NEARLY:
        return None
    if error > EXACT:
        return Scales(name_of(parts, False), *fields, approximate=True)
    signed = Scales(name_of(parts, True), *fields, signed=True)
    if tried(function, signed) > EXACT:
        return positive
    if all(abs(part.power) == 1 for part in parts) and space.positions > 1:
        full = Matrices(kind_of_matrices(space, parts), *fields)
        if tried(function, full) < EXACT:
            return full
    return signed


def find_pairs(function: Function, space: Space, places: list[Place]) -> list[Linear]:
    """The lines of rotary pairs: a scale that is the same for both positions of a pair, then a whole complex number."""
    spreads = {
        "halves": lambda amounts: amounts[:, : amounts.shape[1] // 2].repeat(1, 2),
        "interleaved": lambda amounts: amounts[:, 0::2].repeat_interleave(2, 1),
    }
    for layout, spread in spreads.items():
        found = []
        for powers in powers_of(function, space, places, spread, {}):
            parts = tuple(Part(p, e) for p, e in zip(places, powers, strict=True) if e)
            if len(parts) < 2 or {abs(part.power) for part in parts} != {1}:
                continue
            fields = (parts[0].place.name, space.group, space.units, space.positions, parts)
            line = Pairs("A4", *fields, layout=layout)
            if tried(function, line) < EXACT:
                found.append(line)
        if found:
            return found
    return []


def kind_of_matrices(space: Space, parts: Sequence[Part]) -> str:
    if space.units == 1:
        return "L"
    return "A2" if any(part.place.reads for part in parts) else "A3"


def name_of(parts: Sequence[Part], signed: bool) -> str:
    """The id of a line of scales, after what it changes."""
    places = {part.place.name: part for part in parts}
    if any(name.endswith(("running_var", "running_mean")) for name in places):
        return "B1"
    ups = [part.place for part in parts if part.power > 0]
    downs = [part.place for part in parts if part.power < 0]
    if not ups or not downs:
        return "W" if len({place.name.rpartition(".")[0] for place in ups + downs}) == 1 else "N6"
    flat = [all(place.numbers == 1 for place in side) for side in (ups, downs)]
    if any(flat) and not all(flat):
        others = downs if flat[0] else ups
        if not any(place.reads for place in others):
            return "LS"
        return "N1" if signed else "B3"
    return "G" if signed else "S+"
