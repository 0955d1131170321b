"""Work on threads, each of which computes by kernels of one thread."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


def map_on_threads(
    run: Callable[[Item], Result], items: Sequence[Item], threads: int | None = None
) -> Iterator[Result]:
    """Results of items, in their order, computed side by side.

    Small networks keep a thread each busier than one of them keeps all threads.

    Args:
        run: Gives the result of an item.
        items: To be worked on.
        threads: How many; by default those that torch has.
    """
    before = torch.get_num_threads()
    threads = threads or min(before, max(1, len(items)))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(before // threads,)) as pool:
            yield from pool.map(run, items)
    finally:
        torch.set_num_threads(before)
