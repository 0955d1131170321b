"""Batches of networks that are read from files: cut by a thread while the step before them computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastws.windows.population import Population

DEPTH = 2  # batches that are cut ahead


class Ahead:
    """Hands out batches, which are named tuples of tensors, on a device; ahead of time if they are read from files.

    A batch is a function of its step alone, so that it is the same whoever cuts it and when.

    Args:
        draw: Cuts the batch of a step.
        population: What it is cut from.
        device: Where batches are wanted. A GPU gets them by pinned memory, on a stream of its own.
    """

    def __init__(self, draw: Callable[[int], Any], population: Population, device: torch.device):
        self.draw, self.device = draw, device
        self.thread = None if population.arena is None else ThreadPoolExecutor(1, "windows")
        self.pending: dict[int, Future] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and self.thread else None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error) -> None:
        if self.thread:
            self.thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Any:
        if self.thread is None:
            return self.draw(step)
        for number in range(step, step + DEPTH + 1):
            if number not in self.pending:
                self.pending[number] = self.thread.submit(self.fetch, number)
        batch, copied = self.pending.pop(step).result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for x in batch:
                if isinstance(x, Tensor):
                    x.record_stream(current)  # its memory is not used again before the step is done with it
        return batch

    def fetch(self, step: int) -> tuple[Any, Any]:
        batch = self.draw(step)
        if self.stream is None:
            return batch, None
        with torch.cuda.stream(self.stream):
            moved = [x.pin_memory().to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch]
            return type(batch)(*moved), self.stream.record_event()
