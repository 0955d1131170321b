"""Which kernels a training step learns from (arXiv 2212.13554, section 3.3, and the published code).

The loss is always that of all kernels. Those that are not in the batch are predicted without gradient, and enter only
through the loss.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastws.devices import to_device
from fastws.ops.random_subset import random_subset
from fastws.ops.weighted_sample import AliasTable, weighted_sample
from fastws.random.philox import philox_reference

Method = Literal[
    "all",  # kernels
    "sequential_layer",  # the kernels of one layer after the other
    "random_layer",  # those of a layer drawn at random
    "random_batch",  # as many as asked, uniform, without replacement
    "random_batch_without_replacement",  # the same, and none twice before all had their turn
    "random_weighted_batch",  # in one step of five drawn by norm, with replacement; in the others random_batch
]
# where the draws of each kind begin in the stream of random numbers; each adds the step or the epoch
COIN, SUBSET, WEIGHTED = 2**55, 2**56, 2**57
UNIFORM_SHARE = 0.8  # of the steps of random_weighted_batch
CPU = torch.device("cpu")


class KernelBatches:
    """The kernels of each step, a function of seed and step.

    Args:
        method: One of ``Method``.
        size: Kernels per step, for the random batches; at most all.
        kernels: Number of kernels of each layer.
        norms: Of the original kernels, ``[N]``, by which random_weighted_batch draws them, over all layers.
        seed: Names the stream of random numbers.
        device: Of what is drawn. The CPU draws it: how many draws a sample takes would have to be asked of a GPU.

    Raises:
        ValueError: If the size is not positive, or no kernel has a norm.
    """

    def __init__(
        self,
        method: Method,
        size: int,
        kernels: Sequence[int],
        norms: Tensor,
        seed: int,
        device: torch.device = CPU,
    ):
        if size < 1:
            raise ValueError(f"nern: kernel_batch must be at least 1, got {size}")
        self.method, self.kernels, self.seed = method, list(kernels), seed
        self.total = sum(kernels)
        self.size = min(size, self.total)
        self.table = AliasTable(norms.cpu()) if method == "random_weighted_batch" else None
        self.device = device
        self.order = -1, torch.empty(0)  # of random_batch_without_replacement: an epoch and all its kernels

    def draw(self, step: int) -> Tensor | None:
        """Numbers of kernels, ``[n]`` int64, possibly some of them several times; None for all."""
        return None if self.method == "all" else to_device(self.numbers(step), self.device)

    def numbers(self, step: int) -> Tensor:
        match self.method:
            case "sequential_layer":
                return self.layer(step % len(self.kernels))
            case "random_layer":
                return self.layer(self.word(step) * len(self.kernels) >> 32)
            case "random_batch_without_replacement":
                return self.turn(step)
        if self.method == "random_batch" or self.word(step) < UNIFORM_SHARE * 2**32:
            return random_subset(self.total, self.size, self.seed, SUBSET + step)
        return weighted_sample(self.table, self.size, seed=self.seed, offset=WEIGHTED + step)

    def word(self, step: int) -> int:
        return int(philox_reference(self.seed, COIN + step, 1, CPU))

    def layer(self, number: int) -> Tensor:
        first = sum(self.kernels[:number])
        return torch.arange(first, first + self.kernels[number])

    def turn(self, step: int) -> Tensor:
        """A part of one order of all kernels, which each epoch draws anew; the last part may be shorter."""
        epoch, part = divmod(step, -(-self.total // self.size))
        if self.order[0] != epoch:
            self.order = epoch, random_subset(self.total, self.total, self.seed, SUBSET + epoch)
        return self.order[1][part * self.size : (part + 1) * self.size]


def learn_from(predictions: Tensor, batch: Tensor, chosen: Tensor) -> Tensor:
    """``predictions``, with gradients that go on into those of the batch only.

    Each row of the batch gets the whole gradient of its kernel: a kernel that was drawn twice counts twice, as in the
    published code.

    Args:
        predictions: Of all kernels, ``[N, d]``, without gradient.
        batch: Of those that were chosen, ``[n, d]``, with gradient, of the same values.
        chosen: Their numbers, ``[n]`` int64.
    """
    return LearnFrom.apply(predictions, batch, chosen)


class LearnFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, predictions, batch, chosen):
        ctx.save_for_backward(chosen)
        return predictions.view_as(predictions)

    @staticmethod
    def backward(ctx, grad):
        (chosen,) = ctx.saved_tensors
        return None, grad[chosen], None
