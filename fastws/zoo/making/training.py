"""Training of networks side by side: small ones by one kernel for all of them, others one by one (see ``large``).

What a network becomes depends on its recipe alone, not on its neighbours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy
import torch
from torch import Tensor

from fastws.devices import to_device
from fastws.layout.layout import Layout
from fastws.ops.small_cnn_step import small_cnn_step
from fastws.small_cnn.steps import OPTIMIZERS
from fastws.small_cnn.table import ACTIVATIONS
from fastws.zoo.making.large import OneByOne
from fastws.zoo.making.measuring import side_by_side, tally
from fastws.zoo.making.minibatches import Orders
from fastws.zoo.making.recipes import Part, Plan, Recipe, TrainingData

GROUP = 16  # networks of one call on a CPU: what the widest vectors hold
STEPS = 500  # of one call: seconds on a CPU, and the orders of a thousand networks are some megabytes


Regularise = Callable[[Tensor], Tensor]  # weights of some networks to others, [G, P]


class Trainer(Protocol):
    """Trains and measures some of the networks of a wave; ``groups`` says which ones together."""

    groups: list[list[int]]

    def train_epoch(self, members: list[int], state: Tensor, orders: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """One pass through the training images.

        Args:
            members: Places of the networks in the wave.
            state: Their weights and the two moments of their optimizers, ``[3, G, P]``; changed in place.
            orders: The training images in the order of each network, ``[G, n]``.
            epoch: From 1.

        Returns:
            Mean loss and accuracy of the minibatches, each before its update, ``[G]``.
        """

    def measure(self, members: list[int], weights: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and accuracy of the networks, ``[G]``."""


class SideBySide:
    """Small networks: ``small_cnn_step`` makes the steps of a whole group."""

    def __init__(self, plan: Plan, recipes: Sequence[Recipe], data: TrainingData):
        self.plan, self.recipes, self.data = plan, recipes, data
        self.device = data.train.x.device
        self.layers = plan.layers().to(self.device)
        # networks of one activation in one group: lanes of a vector then do the same
        order = sorted(range(len(recipes)), key=lambda member: recipes[member].activation)
        size = GROUP if self.device.type == "cpu" else len(order)
        self.groups = [order[begin : begin + size] for begin in range(0, len(order), size)]

    def train_epoch(self, members: list[int], state: Tensor, orders: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        y = self.data.train.y
        current = [part.to(self.device) for part in state.unbind()]
        step = (epoch - 1) * self.plan.num_steps(len(y))
        loss, correct = torch.zeros(2, len(members), dtype=torch.float64, device=self.device)
        options = self._options(members)
        for batches in minibatches(orders, self.plan.batch_size):
            batches = to_device(batches.int(), self.device)  # the device works on the steps before
            current, losses, right = self.make_steps(current, batches, options, step, epoch)
            step += batches.shape[1]
            loss += losses.double().sum(1) * batches.shape[2]
            correct += right.sum(1)
        for part, trained in zip(state, current, strict=True):
            part.copy_(trained)
        return loss / len(y), correct / len(y)

    def make_steps(self, state: list[Tensor], batches: Tensor, options: dict[str, Tensor], step: int, epoch: int):
        """State, losses and right classifications after some steps of ``epoch``."""
        *state, losses, right = small_cnn_step(*state, *self.data.train, batches, self.layers, **options, step=step)
        return state, losses, right

    def _options(self, members: list[int]) -> dict[str, Tensor]:
        chosen = [self.recipes[member] for member in members]
        codes = {"activation": list(ACTIVATIONS), "optimizer": list(OPTIMIZERS)}
        options = {
            name: torch.tensor([known.index(getattr(recipe, name)) for recipe in chosen], dtype=torch.int32)
            for name, known in codes.items()
        }
        for name in ("dropout", "lr", "weight_decay", "seed"):
            dtype = torch.int64 if name == "seed" else torch.float64
            options[name] = torch.tensor([getattr(recipe, name) for recipe in chosen], dtype=dtype)
        return {name: option.to(self.device) for name, option in options.items()}

    def measure(self, members: list[int], weights: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        activation = self._options(members)["activation"]
        done = tally(side_by_side(weights.to(self.device), self.layers, activation), part)
        return done.loss, done.accuracy


def minibatches(orders: Tensor, batch_size: int) -> Iterator[Tensor]:
    """``[G, n]`` -> ``[G, S, B]``, with at most STEPS steps each; the last batch has what is left."""
    whole = orders.shape[1] // batch_size * batch_size
    if whole:
        yield from orders[:, :whole].unflatten(1, (-1, batch_size)).split(STEPS, 1)
    if whole < orders.shape[1]:
        yield orders[:, None, whole:]


class Wave:
    """Networks that advance together, epoch by epoch.

    Attributes:
        state: Weights and the two moments of the optimizers, ``[3, W, P]`` float32, on the CPU.
        orders: Decides their minibatches.
        epoch: The last one that is done; 0 is that of the initial weights, -1 none.
        regularise: What makes other weights of those after the epochs ``regularise_at``; before they are measured.
    """

    regularise: Regularise | None = None
    regularise_at: Sequence[int] = ()

    def __init__(
        self,
        plan: Plan,
        recipes: Sequence[Recipe],
        data: TrainingData,
        side_by_side: bool,
        start: Mapping[str, Tensor] | None = None,
    ):
        self.plan, self.recipes, self.data, self.epoch, self.start = plan, recipes, data, -1, start
        self.trainer: Trainer = (SideBySide if side_by_side else OneByOne)(plan, recipes, data)
        self.orders = Orders(plan, recipes, len(data.train.y))

    @cached_property
    def state(self) -> Tensor:
        network = self.plan.build()
        layout = Layout.from_checkpoint(network)
        state = torch.zeros(3, len(self.recipes), layout.num_weights)
        for member, row in enumerate(state[0]):
            self.orders.initialize(member, network)  # draws also where weights are given: orders come behind
            given = None if self.start is None else self.start[self.recipes[member].model]
            row.copy_(layout.flatten(network.state_dict()) if given is None else given)
        return state

    def go_on(self, path: Path, epoch: int, state: Tensor, orders: Tensor) -> None:
        """Takes up what was read from ``path``: where a stopped run was after an epoch.

        Raises:
            ValueError: If it is not of these networks.
        """
        found = {"state": state, "orders": orders}
        expected = {"state": self.state, "orders": self.orders.state}
        for name, tensor in expected.items():
            if (found[name].dtype, found[name].shape) != (tensor.dtype, tensor.shape):
                what = f"{list(tensor.shape)} {tensor.dtype}, got {list(found[name].shape)} {found[name].dtype}"
                raise ValueError(f"{path}: {name} must be {what}; take another folder")
        if not 0 <= epoch <= self.plan.epochs:
            raise ValueError(f"{path}: epoch must be in [0, {self.plan.epochs}], got {epoch}; take another folder")
        self.epoch, self.state = epoch, state
        try:
            self.orders.state = orders
        except RuntimeError as error:
            raise ValueError(f"{path}: orders must be states of generators, got {error}") from error

    def advance(
        self, pool: Executor, done: Callable[[int], object] = lambda count: None, *, measure: bool = True
    ) -> dict[str, object]:
        """Trains one more epoch; returns the properties of all networks at its end, one column each.

        Args:
            pool: Each of its threads trains a group of networks.
            done: Called with the number of networks in each group that is ready.
            measure: Whether networks are; else all losses and accuracies are nan.
        """
        names = [f"{part}_{what}" for part in ("train", *self.data.evaluated()) for what in ("loss", "accuracy")]
        measured = torch.empty(len(names), len(self.recipes))
        self.epoch += 1
        state = self.state  # drawn before threads ask for it
        groups = self.trainer.groups

        def train(members: list[int]) -> Tensor:
            of_group = state[:, members]
            measures = self._advance_group(members, of_group, measure)
            state[:, members] = of_group
            return measures

        for members, measures in zip(groups, pool.map(train, groups), strict=True):
            measured[:, members] = measures
            done(len(members))
        return self._describe(dict(zip(names, measured, strict=True)))

    def _advance_group(self, members: list[int], state: Tensor, measure: bool) -> Tensor:
        """Trains the networks of a group, unless these are the initial weights; measures ``[2 * parts, G]``."""
        running = None
        if self.epoch > 0:
            orders = torch.stack([self.orders.next(member, self.epoch) for member in members])
            running = self.trainer.train_epoch(members, state, orders, self.epoch)
        if self.regularise is not None and self.epoch in self.regularise_at:
            state[0], running = self.regularise(state[0]), None  # minibatches know nothing of these weights
        if not measure:
            return torch.full((2 + 2 * len(self.data.evaluated()), len(members)), torch.nan)
        if running is None or self.plan.train_metrics == "evaluated":
            running = self.trainer.measure(members, state[0], self.data.train)
        measures = [*running]
        for part in self.data.evaluated().values():
            measures += self.trainer.measure(members, state[0], part)
        return torch.stack(measures).cpu().float()

    def _describe(self, measures: dict[str, Tensor]) -> dict[str, object]:
        columns = {name: [getattr(recipe, name) for recipe in self.recipes] for name in Recipe._fields}
        epochs = numpy.full(len(self.recipes), self.epoch, dtype=numpy.int32)
        measures["generalisation_gap"] = measures["train_accuracy"] - measures["test_accuracy"]
        return {"model": columns.pop("model"), "epoch": epochs} | columns | measures
