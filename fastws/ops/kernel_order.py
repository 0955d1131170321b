"""Kernel order: a path through a set of kernels on which each is similar to the one before."""

import torch
from torch import Tensor

from fastws import _native  # noqa: F401  loads the compiled kernels
from fastws.random.philox import philox_reference

MAX_KERNELS = 2**31 - 2  # kernels are counted in int32
# how far a path is improved; csrc/cpu/kernel_order_path.h has the same numbers
NEIGHBORS, LONGEST_SEGMENT, LONGEST_PIECE = 6, 3, 10
LONGEST_REVERSAL = 25_000
KICKS_PER_ROW, MOST_KICKS = 30, 75_000
LEAST_GAIN, FIXED = 1e-9, 1e3


def kernel_order(kernels: Tensor, *, improve: bool = False) -> Tensor:
    """The order of a path through kernels, each followed by the most similar one that has not been visited.

    ``order[0] = 0`` and ``order[t + 1] = argmax_j similarity(order[t], j)`` over the j that are not yet in ``order``,
    the first of equals. This is the crossfilter permutation of NeRN (Ashkenazi et al., arXiv 2212.13554). In numbers::

        row[i] = float32(kernels[i] / norm[i])       norm in float64; zeros where the norm is 0
        similarity(i, j) = (row[i][0] * row[j][0] + row[i][1] * row[j][1]) + ...    in float64, from the left

    Products of two float32 numbers are exact in float64, so all implementations find the same path, bit for bit. Equal
    rows follow one another in the order of their numbers unless a row is still more similar by rounding, a zero kernel
    is followed by the first one that is left, and of kernels of one entry all of the first sign come before the others.

    With ``improve``, the greedy path is made better by 2-opt and Or-opt moves among 6 neighbours, then by 30 random
    kicks per kernel, at most 75,000, each followed by repairs and undone unless it was worth it. The path still begins
    at 0. It depends on the kernels alone, not on clock, threads or device, and its sum of similarities is never less
    than that of the greedy path. It is found on the CPU, whatever the device. No gradients: an order has none.

    Args:
        kernels: One per row, ``[n, d]``, floating point, finite, fewer than 2**31 - 1. In float64, squares must not
            overflow or vanish.
        improve: Whether to go on from the greedy path.

    Returns:
        ``[n]``, int64: position on the path to number of the kernel.

    Raises:
        ValueError: If shape or dtype do not fit, or values are not finite.

    Example:
        >>> kernels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [-1.0, 3.0]])
        >>> fastws.kernel_order(kernels)
        tensor([0, 2, 1, 3])
    """
    if kernels.dim() != 2 or kernels.shape[1] < 1 or not kernels.is_floating_point():
        got = f"{list(kernels.shape)} {kernels.dtype}"
        raise ValueError(f"kernel_order: kernels must be [n, d] floating point with d >= 1, got {got}")
    if kernels.shape[0] > MAX_KERNELS:
        raise ValueError(f"kernel_order: kernels must be at most {MAX_KERNELS}, got {kernels.shape[0]}")
    if not torch.compiler.is_compiling() and not kernels.isfinite().all():
        bad = (~kernels.isfinite().all(1)).sum()
        raise ValueError(f"kernel_order: kernels must be finite, got NaN or infinity in {bad} of {len(kernels)}")
    rows = unit_rows(kernels)[None]
    if improve:
        return torch.ops.fastws.kernel_order(rows.cpu(), True)[0].to(kernels.device)
    return torch.ops.fastws.kernel_order(rows, False)[0]


def unit_rows(kernels: Tensor) -> Tensor:
    """Kernels ``[..., d]`` divided by their norms, float32; zeros where the norm is 0. The same on every device."""
    rows = kernels.detach().double()
    squares = torch.zeros_like(rows[..., 0])
    for column in rows.unbind(-1):
        squares = squares + column * column
    norms = squares.sqrt()[..., None]
    return torch.where(norms > 0, rows / norms, 0).float() + 0.0  # no negative zero: equal rows are equal bytes


def kernel_order_reference(rows: Tensor, improve: bool) -> Tensor:
    batch, count, _ = rows.shape
    order = rows.new_zeros(batch, count, dtype=torch.int64)
    taken = rows.new_zeros(batch, count, dtype=torch.bool)
    every = torch.arange(batch, device=rows.device)
    columns = rows.double().unbind(-1)
    for position in range(1, count):
        current = order[:, position - 1]
        taken[every, current] = True
        similarity = similarities(columns, [column[every, current, None] for column in columns])
        order[:, position] = similarity.masked_fill(taken, -torch.inf).argmax(1)
    if improve:
        paths = [improved(x, path) for x, path in zip(rows.cpu(), order.tolist(), strict=True)]
        order = torch.tensor(paths, dtype=torch.int64, device=rows.device).view(batch, count)
    return order


def similarities(columns, others) -> Tensor:
    total = torch.zeros_like(columns[0])
    for column, other in zip(columns, others, strict=True):
        total = total + column * other
    return total


def improved(rows: Tensor, path: list[int]) -> list[int]:
    """A better path through rows ``[n, d]``, or the same; equal rows follow one another."""
    group_of = rows.unique(dim=0, return_inverse=True)[1].tolist() if path else []
    members = {}
    for row in path:
        members.setdefault(group_of[row], []).append(row)
    groups = list(members.values())
    tour = Tour(rows[[group[0] for group in groups]].double())
    better = [row for group in tour.improve() for row in groups[group]]
    return better if total(rows, better) > total(rows, path) else path


def total(rows: Tensor, path: list[int]) -> float:
    ordered, total = rows[path].double(), 0.0
    for similarity in similarities(ordered[:-1].unbind(1), ordered[1:].unbind(1)).tolist():
        total += similarity
    return total


class Tour:
    """The path 0, 1, 2, ... through rows ``[n, d]`` and how it is improved, as in csrc/cpu/kernel_order_path.h.

    The node n has no row. It stands between the end of the path and its beginning, which stays where it is.
    """

    def __init__(self, rows: Tensor):
        self.count, self.device = len(rows), rows.device
        self.nodes = list(range(self.count + 1))
        self.place = list(self.nodes)
        self.mirrored = False  # the tour is gone through backward
        self.queue: list[int] = []
        self.gained = 0.0
        self.rows = rows.tolist()
        self.neighbors = []
        columns = rows.unbind(1)
        for node in range(self.count):
            similarity, nodes = similarities(columns, rows[node]).sort(descending=True, stable=True)
            nearest = zip(similarity[: NEIGHBORS + 1].tolist(), nodes[: NEIGHBORS + 1].tolist(), strict=True)
            self.neighbors.append([(value, other) for value, other in nearest if other != node][:NEIGHBORS])

    def improve(self) -> list[int]:
        self.wait(*reversed(range(self.count)))
        self.repair()
        kicks = min(KICKS_PER_ROW * self.count, MOST_KICKS) if self.count >= 8 else 0
        for words in philox_reference(0, 0, 4 * kicks, self.device).view(-1, 4).tolist():
            self.kick(words)
        path = [(self.place[0] + step) % (self.count + 1) for step in range(self.count + 1)]
        path = [self.nodes[place] for place in path]
        return path[:-1] if path[-1] == self.count else [0, *path[:1:-1]]

    def similarity(self, a: int, b: int) -> float:
        if self.count in (a, b):
            return FIXED if a + b == self.count else 0.0
        total = 0.0
        for x, y in zip(self.rows[a], self.rows[b], strict=True):
            total += x * y
        return total

    def next(self, node: int, steps: int = 1) -> int:
        return self.nodes[(self.place[node] + (-steps if self.mirrored else steps)) % (self.count + 1)]

    def distance(self, a: int, b: int) -> int:
        steps = self.place[b] - self.place[a]
        return (-steps if self.mirrored else steps) % (self.count + 1)

    def reverse(self, first: int, last: int) -> None:
        way = [self.next(first, steps) for steps in range(self.distance(first, last) + 1)]
        for node, place in zip(reversed(way), [self.place[node] for node in way], strict=True):
            self.nodes[place], self.place[node] = node, place

    def wait(self, *nodes: int) -> None:
        for node in nodes:
            if node != self.count and node not in self.queue:
                self.queue.append(node)

    def repair(self) -> None:
        while self.queue:
            node = self.queue.pop()
            while self.move(node):
                pass

    def move(self, node: int) -> bool:
        for _ in range(2):
            if self.move_forward(node):
                return True
            self.mirrored = not self.mirrored
        return False

    def move_forward(self, c: int) -> bool:
        after = self.next(c)
        lost = self.similarity(c, after)
        for similarity, x in self.neighbors[c]:
            gain = similarity - lost
            if gain <= LEAST_GAIN:
                return False
            if min(self.distance(after, x), self.distance(x, after)) > LONGEST_REVERSAL:
                continue
            if self.exchange(c, after, x, gain) or self.insert(c, after, x, gain):
                return True
        return False

    def exchange(self, c: int, after: int, x: int, gain: float) -> bool:
        """2-opt: c after ... x y becomes c x ... after y."""
        y = self.next(x)
        gain += self.similarity(after, y) - self.similarity(x, y)
        if gain <= LEAST_GAIN:
            return False
        self.reverse(after, x)
        self.gained += gain
        self.wait(c, after, x, y)
        return True

    def insert(self, c: int, after: int, x: int, gain: float) -> bool:
        """Or-opt: the segment e ... c, of up to three rows, comes between x and a neighbour y of it."""
        e = c
        for _ in range(LONGEST_SEGMENT):
            before = self.next(e, -1)
            if e in (self.count, x) or before == after:
                return False
            closed = gain + self.similarity(after, before) - self.similarity(e, before)
            for y in (self.next(x, -1), self.next(x)):
                all_gain = closed + self.similarity(e, y) - self.similarity(x, y)
                if y != e and all_gain > LEAST_GAIN:
                    self.bring(e, c, x, y)
                    self.gained += all_gain
                    self.wait(c, e, after, before, x, y)
                    return True
            e = before
        return False

    def bring(self, e: int, c: int, x: int, y: int) -> None:
        low, high = (x, y) if self.next(x) == y else (y, x)
        if self.distance(c, low) <= self.distance(high, e):
            after = self.next(c)
            self.reverse(e, low)
            self.reverse(low, after)
        else:
            before = self.next(e, -1)
            self.reverse(high, c)
            self.reverse(before, high)
        if low != x:
            self.reverse(c, e)

    def kick(self, words: list[int]) -> None:
        """Two pieces of random length behind a random node change places."""
        longest = min(LONGEST_PIECE, (self.count - 1) // 2)
        a = words[0] * (self.count + 1) >> 32
        b = self.next(a)
        c = self.next(b, words[1] * longest >> 32)
        d = self.next(c)
        e = self.next(d, words[2] * longest >> 32)
        f = self.next(e)
        self.gained = self.similarity(a, d) + self.similarity(e, b) + self.similarity(c, f)
        self.gained -= self.similarity(a, b) + self.similarity(c, d) + self.similarity(e, f)
        if self.gained < -FIXED / 2:  # end and beginning stay together
            return
        before = self.nodes[:], self.place[:], self.mirrored
        self.reverse(b, e)
        self.reverse(e, d)
        self.reverse(c, b)
        self.wait(a, b, c, d, e, f)
        self.repair()
        if self.gained < 0:
            self.nodes, self.place, self.mirrored = before


torch.library.define("fastws::kernel_order", "(Tensor rows, bool improve) -> Tensor")
torch.library.register_kernel("fastws::kernel_order", "default", kernel_order_reference)


@torch.library.register_fake("fastws::kernel_order")
def kernel_order_fake(rows, improve):
    return rows.new_empty(rows.shape[:2], dtype=torch.int64)


def kernel_order_backward(ctx, grad_order):
    raise NotImplementedError("kernel_order: an order has no gradient")


torch.library.register_autograd("fastws::kernel_order", kernel_order_backward)
