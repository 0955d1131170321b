"""Balance: for what is continuous one place on every orbit, where the sum of squares of the weights is least.

In the logarithms of the scales that sum is convex, so its minimum is unique, and each line's own minimum is known in
closed form: they are visited in turn until nothing moves.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fastws.group.lines import Linear, Matrices, Move, Pairs

SWEEPS = 200
STILL = 1e-7  # the largest change of a logarithm of a scale that counts as none


def balance(lines: list[Linear], state: dict[str, Tensor], statistics: Collection[str]) -> list[Move]:
    """Changes a state to its balanced form, in place, and tells by which moves.

    Args:
        lines: Of scales, pairs and matrices.
        state: Tensors by name.
        statistics: Names of tensors that do not count as weights: running means and variances.
    """
    moves = []
    for _ in range(SWEEPS):
        largest = 0.0
        for line in lines:
            value, change = best(line, state, statistics)
            if change > STILL:
                state |= line.act(state, value)
                moves.append(Move(line.key, value))
                largest = max(largest, change)
        if largest <= STILL:
            break
    return together(moves, {line.key: line for line in lines})


def best(line: Linear, state: Mapping[str, Tensor], statistics: Collection[str]) -> tuple[Tensor, float]:
    """What balances a line, and how far it is from doing nothing."""
    if isinstance(line, Matrices):
        return best_matrices(line, state)
    squares, powers = [], []
    for place, power, _ in line.parts:
        if place.name not in statistics:
            squares.append(place.get(state[place.name]).square().sum(-1))
            powers.append(power)
    squares = torch.stack(squares or [torch.zeros(line.units, line.positions, dtype=torch.float64)])
    powers = torch.tensor(powers or [1], dtype=torch.float64)[:, None, None]
    if isinstance(line, Pairs):
        squares = line.to_complex(squares[..., None].flatten(0, 1))[..., 0].unflatten(0, (len(powers), -1))
        squares = squares.real + squares.imag
    if (powers > 0).all() or (powers < 0).all():
        scale = one_sided(line, state, squares, powers)
    else:
        scale = least(squares, powers)
    value = scale.to(torch.complex128) if isinstance(line, Pairs) else scale
    return value, float(scale.log().abs().max())


def one_sided(line: Linear, state: Mapping[str, Tensor], squares: Tensor, powers: Tensor) -> Tensor:
    """Scales without counterpart: variances become 1, or else norms do."""
    for place, power, offset in line.parts:
        if offset:
            variance = place.get(state[place.name])[..., 0] + offset
            return torch.where(variance > 0, variance, 1.0) ** (-1 / power)
    total = squares[0]
    return torch.where(total > 0, total, 1.0) ** (-0.5 / powers[0])


def least(squares: Tensor, powers: Tensor) -> Tensor:
    """The scales s that make ``sum squares * s^(2 powers)`` least: Newton's method in the logarithm of s."""
    sides = [torch.where(side, squares, 0.0).sum(0) for side in (powers > 0, powers < 0)]
    dead = (sides[0] <= 0) | (sides[1] <= 0)
    up, down = (torch.where(dead, 1.0, side) for side in sides)
    log = (down / up).log() / 4
    if (powers.abs() > 1).any():
        for _ in range(50):
            terms = squares * (2 * powers * log).exp()
            step = (powers * terms).sum(0) / (2 * powers.square() * terms).sum(0).clamp(min=1e-300)
            log = log - step.clamp(-1, 1)
    return torch.where(dead, 0.0, log).exp()


def best_matrices(line: Matrices, state: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """The matrices after which both sides have the same Gram matrix, which is diagonal: U S^(1/2) and S^(1/2) V^T."""
    grams = [torch.zeros(line.units, line.positions, line.positions, dtype=torch.float64) for _ in range(2)]
    for place, power, _ in line.parts:
        entries = place.get(state[place.name])
        grams[power < 0] += entries @ entries.mT
    up, down = grams
    identity = torch.eye(line.positions, dtype=torch.float64).expand_as(up)
    roots = [torch.linalg.eigh(gram) for gram in (up, down)]
    sound = torch.stack([values[:, 0] > 1e-12 * values[:, -1].clamp(min=1e-300) for values, _ in roots]).all(0)
    distance = (up - down).flatten(1).norm(dim=1) / (up + down).flatten(1).norm(dim=1).clamp(min=1e-300)
    crossed = (up - torch.diag_embed(up.diagonal(dim1=1, dim2=2))).flatten(1).norm(dim=1) / up.flatten(1).norm(dim=1)
    if not sound.any():
        return identity.clone(), 0.0
    safe = torch.where(sound[:, None, None], up, identity)
    other = torch.where(sound[:, None, None], down, identity)
    lower = torch.linalg.cholesky(safe)
    values, vectors = torch.linalg.eigh(lower.mT @ other @ lower)
    matrices = values.clamp(min=1e-300).pow(0.25)[..., None] * vectors.mT @ torch.linalg.inv(lower)
    change = torch.where(sound, torch.maximum(distance, crossed), 0.0)
    return torch.where(sound[:, None, None], matrices, identity), float(change.max())


def together(moves: list[Move], lines: Mapping[str, Linear]) -> list[Move]:
    """One move per line: those of one kind are multiplied, for they commute with all others that balance."""
    values: dict[str, Tensor] = {}
    for key, value in moves:
        before = values.get(key)
        if before is None:
            values[key] = value
        else:
            values[key] = value @ before if isinstance(lines[key], Matrices) else value * before
    return [Move(key, value) for key, value in values.items()]
