"""Assignment problems, many at once: scipy's solver in threads, with prices that leave it little to search."""

from collections.abc import Iterable
from concurrent.futures import Executor

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PRICED_SIZE = 48  # smaller problems are solved faster than prices for them are found
PATH_ROUNDS = 8
BID_ROUNDS = 40
LEAST_BID = 0.1  # standard deviations of the costs


def solve(similarity: Tensor, current: Tensor | None, pool: Executor) -> Tensor:
    """The unit of each network that goes to each place, int32 ``[k, size]``.

    Every assignment of units to places contains each unit once, so a price for each unit that is added to all of its
    costs changes which one is best in nothing. Under the right prices each place's own unit is the cheapest for it, and
    the solver's search for shortest augmenting paths ends at the first step; under nearly right ones it ends soon.

    Args:
        similarity: ``[k, size, size]`` (unit, place), on the CPU.
        current: An answer that is probably nearly the best, int32 ``[k, size]``, or None.
        pool: Where problems are solved side by side; the solver lets other threads run.
    """

    def solve_some(some: Iterable[tuple[numpy.ndarray, numpy.ndarray | None]]) -> list[numpy.ndarray]:
        return [linear_sum_assignment(with_prices(-one.T, answer))[1] for one, answer in some]

    answers = [None] * len(similarity) if current is None else current.numpy()
    problems = list(zip(similarity.numpy(), answers, strict=True))
    workers = min(len(problems), torch.get_num_threads())
    parts = pool.map(solve_some, (problems[i::workers] for i in range(workers)))
    best = numpy.empty(similarity.shape[:2], numpy.int32)
    for first, part in enumerate(parts):
        best[first::workers] = part
    return torch.from_numpy(best)


def with_prices(cost: numpy.ndarray, current: numpy.ndarray | None) -> numpy.ndarray:
    """Costs ``[size, size]`` (place, unit) with prices of units, and less what is common to a place: float64."""
    if len(cost) < PRICED_SIZE:
        return cost
    cost = cost - cost.mean(0, dtype=numpy.float64)
    cost -= cost.mean(1, keepdims=True)
    rough = cost.astype(numpy.float32)
    return cost + (bid(rough) if current is None else prices_of(current, rough))


def prices_of(current: numpy.ndarray, cost: numpy.ndarray) -> numpy.ndarray:
    """Prices under which the assignment ``current`` is nearly the best, if it is.

    They are shortest paths from unit to unit; few rounds of Bellman and Ford find most of them.
    """
    relative = cost - cost[numpy.arange(len(cost)), current][:, None]
    distances = numpy.zeros(len(cost), numpy.float32)
    for _ in range(PATH_ROUNDS):
        nearer = numpy.minimum(distances, (distances[current][:, None] + relative).min(0))
        if (nearer == distances).all():
            break
        distances = nearer
    return -distances


def bid(cost: numpy.ndarray) -> numpy.ndarray:
    """Prices at which most units find one place that wants them: an auction, cut short (Bertsekas 1988).

    In each round every place without a unit bids for the one that is cheapest to it as much as it would lose with the
    second cheapest, and a little more. The highest bid gets the unit, whose last owner is without one again.
    """
    prices, least = numpy.zeros(len(cost), cost.dtype), LEAST_BID * cost.std()
    owner, without = numpy.full(len(cost), -1), numpy.full(len(cost), True)
    for _ in range(BID_ROUNDS):
        bidders = without.nonzero()[0]
        if not len(bidders):
            break
        total = cost[bidders] + prices
        everyone, wanted = numpy.arange(len(bidders)), total.argmin(1)
        cheapest = total[everyone, wanted]
        total[everyone, wanted] = numpy.inf
        bids = prices[wanted] + total.min(1) - cheapest + least
        order = bids.argsort(kind="stable")  # so that of several bids for a unit the highest is written last
        prices[wanted[order]] = bids[order]
        before = owner[wanted]
        without[before[before >= 0]] = True
        owner[wanted[order]] = bidders[order]
        without[owner[wanted]] = False
    return prices
