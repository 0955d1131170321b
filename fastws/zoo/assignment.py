"""Assignment problems, many at once: scipy's solver in threads, started from the answer that is there already."""

from collections.abc import Iterable
from concurrent.futures import Executor

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PRICED_SIZE = 48  # smaller problems are solved faster than prices for them are found
PRICE_ROUNDS = 8


def solve(similarity: Tensor, current: Tensor, pool: Executor) -> Tensor:
    """The unit of each network that goes to each place, int32 ``[k, size]``.

    ``similarity`` is ``[k, size, size]`` (unit, place), ``current`` the present answer, from which the search starts.
    """

    def solve_some(some: Iterable[tuple[numpy.ndarray, numpy.ndarray]]) -> list[numpy.ndarray]:
        return [linear_sum_assignment(with_prices(-one.T, now))[1] for one, now in some]

    both = list(zip(similarity.numpy(), current.numpy(), strict=True))
    workers = min(len(both), torch.get_num_threads())
    parts = pool.map(solve_some, (both[i::workers] for i in range(workers)))
    best = numpy.empty(current.shape, numpy.int32)
    for first, part in enumerate(parts):
        best[first::workers] = part
    return torch.from_numpy(best)


def with_prices(cost: numpy.ndarray, current: numpy.ndarray) -> numpy.ndarray:
    """Costs (place, unit) less a price for each unit, which changes every assignment's cost by the same amount.

    Under the right prices each place's own unit is the cheapest, and scipy's search for shortest augmenting paths ends
    at the first step. The right ones for the assignment ``current`` are shortest paths too: a few rounds of Bellman and
    Ford find most of them, when it is nearly the best one.
    """
    if len(cost) < PRICED_SIZE:
        return cost
    cost = cost - cost.mean(0, dtype=numpy.float64)
    cost -= cost.mean(1, keepdims=True)
    relative = (cost - cost[numpy.arange(len(cost)), current][:, None]).astype(numpy.float32)
    prices = numpy.zeros(len(cost), numpy.float32)
    for _ in range(PRICE_ROUNDS):
        better = numpy.minimum(prices, (prices[current][:, None] + relative).min(0))
        if (better == prices).all():
            break
        prices = better
    return cost - prices
