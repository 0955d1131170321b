"""Units: disjoint sets of them, which may not move, and why.

Reasons are what a user reads after "stays:". The natural ones say what an architecture is; all others name an operation
that could be written otherwise, or examples that could be added.
"""

import torch
from torch import Tensor

OUTPUT = "the outputs have an order"
MET = "inputs, constants or others that stay go along with it"
NEIGHBOURS = "neighbours along it belong together"
ROWS = "inputs name its rows by number"
INSIDE = "it lies inside larger units, which move as a whole"
TRIANGLE = "a triangle is cut out along it"
ALONE = "no other unit lies alike in all tensors"
NATURAL = frozenset((OUTPUT, MET, NEIGHBOURS, ROWS, INSIDE, TRIANGLE, ALONE))


class Units:
    """Disjoint sets of units. The smallest number of a set stands for it; unit 0 never moves."""

    def __init__(self):
        self.parent = torch.zeros(1, dtype=torch.int64)
        self.reached = torch.zeros(1, dtype=torch.bool)  # by name: whether an operation computes with it
        self.reason = torch.zeros(1, dtype=torch.int16)  # by name of a set that was held still: number of the reason
        self.reasons = [MET]  # by number

    def new(self, count: int) -> Tensor:
        units = torch.arange(len(self.parent), len(self.parent) + count)
        self.parent = torch.cat([self.parent, units])
        self.reached = torch.cat([self.reached, torch.zeros(count, dtype=torch.bool)])
        self.reason = torch.cat([self.reason, torch.zeros(count, dtype=torch.int16)])
        return units

    def unreached(self) -> Tensor:
        """The units no name of which an operation computes with."""
        units = self.find(torch.arange(len(self.parent)))
        counts = torch.zeros_like(units).scatter_add_(0, units, self.reached.long())
        return torch.arange(len(units))[(counts[units] == 0) & (units > 0)]

    def find(self, units: Tensor) -> Tensor:
        while True:
            above = self.parent[units]
            if torch.equal(above, units):
                return units
            units = above

    def unite(self, a: Tensor, b: Tensor) -> None:
        names = [x.reshape(-1) for x in torch.broadcast_tensors(a, b)]
        a, b = map(self.find, names)
        for still, moving, held in ((a, b, names[0]), (b, a, names[1])):
            stop = (still == 0) & (moving > 0)
            if stop.any():
                self.reason[moving[stop]] = self.held_by(held[stop])
        while True:
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            if torch.equal(low, high):
                return
            self.parent.scatter_reduce_(0, high, low, "amin")
            a, b = self.find(a), self.find(b)

    def hold(self, units: Tensor, reason: str) -> None:
        """Keeps units where they are."""
        units = self.find(units).unique()
        units = units[units > 0]
        self.parent[units] = 0
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.reason[units] = self.reasons.index(reason)

    def held_by(self, names: Tensor) -> Tensor:
        """The number of the reason why each of some units is held still."""
        while True:
            above = self.parent[names]
            above = torch.where(above > 0, above, names)
            if torch.equal(above, names):
                return self.reason[names]
            names = above

    def why(self, names: Tensor) -> list[str]:
        """The different reasons why units are held still."""
        still = names[self.find(names) == 0]
        return [self.reasons[number] for number in self.held_by(still).unique().tolist()]
