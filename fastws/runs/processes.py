"""The processes of one run: one alone, or those that torchrun started. A batch is split evenly over them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

# its functions keep the group that there is when it is imported, and with it threads at whose end a process may abort
import torch.distributed.nn  # noqa: F401
from torch import Tensor

from fastws.devices import find_device

AGREE_EVERY = 10  # steps between two questions to all processes whether to stop: each waits for the device


@contextmanager
def join(device: str | None) -> Iterator[torch.device]:
    """The device of this process, as one of all processes of the run.

    Args:
        device: For example cpu, cuda, cuda:1; None is cuda where there is one.

    Raises:
        ValueError: If torch cannot work on it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield find_device(device)
        return
    own = device == "cuda" or (device is None and torch.cuda.is_available())
    found = find_device(f"cuda:{os.environ['LOCAL_RANK']}" if own else device)
    if own:
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield found
    finally:
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(count: int) -> slice:
    """The part of ``count`` samples that belongs to this process."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


def gather(x: Tensor) -> Tensor:
    """Concatenates ``x`` ``[B, ..]`` of all processes, in order: each then computes a loss of the whole batch.

    The gradient is that of this process's part, times the number of processes, because DistributedDataParallel
    divides by it.
    """
    return Gather.apply(x) if world() > 1 else x


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[share(len(grad))] * world()


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, without gradient."""
    x = x.detach().clone()
    if world() > 1:
        dist.all_reduce(x)
    return x


def average(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means over all processes, as numbers; one transfer from the device."""
    values = total(torch.stack([value.detach().float() for value in metrics.values()])) / world()
    return dict(zip(metrics, values.tolist(), strict=True))


def require_equal(name: str, value: int, device: torch.device) -> None:
    """Raises ValueError unless all processes have the same value."""
    values = gather(torch.tensor([value], device=device)).tolist()
    if len(set(values)) > 1:
        raise ValueError(f"train: {name} must be the same in all processes, got {values}; is out a shared folder?")


class StopRequest(threading.Event):
    """Set when a signal has asked to stop; ``number`` is that of the signal."""

    number = signal.SIGTERM  # where another process of the run was asked


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """An event that the first SIGINT or SIGTERM sets; the second one does what it always does."""
    stop = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.getsignal(number) for number in numbers}

    def request(number, frame):
        stop.number = number
        stop.set()
        signal.signal(number, previous[number])

    for number in numbers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, previous[number])


def agree_to_stop(requested: bool, done: int, device: torch.device) -> bool:
    """Whether any process was asked to stop; several processes ask each other every ``AGREE_EVERY`` steps only."""
    if world() == 1:
        return requested
    return done % AGREE_EVERY == 0 and bool(total(torch.tensor(float(requested), device=device)))
