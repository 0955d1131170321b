"""Training of small networks side by side: stacked weights, stacked optimizers, every network on its own.

Networks that run the same operations are stacked (see ``stacked``); learning rate, weight decay, optimizer, dropout and
random numbers are each network's own. What a network becomes depends on its recipe alone, not on its neighbours, up to
rounding.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastws.data.images import Images
from fastws.layout import Layout
from fastws.zoo.architectures import Activation, Architecture, Init, Network, build, initialize
from fastws.zoo.stacked import BUDGET, evaluate, largest_operand, stacked_forward

Optimizer = Literal["sgd", "momentum", "adam", "adamw"]
ADAPTIVE = ("adam", "adamw")
MOMENTUM, BETA1, BETA2, EPSILON = 0.9, 0.9, 0.999, 1e-8


class Recipe(NamedTuple):
    """All that decides what a network becomes."""

    model: str
    seed: int
    activation: Activation
    dropout: float
    init: Init
    optimizer: Optimizer
    lr: float
    weight_decay: float


class Plan(NamedTuple):
    """What all networks of a zoo have in common."""

    architecture: Architecture
    image_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int
    stack: int  # networks per batched operation, at most

    def build(self, activation: Activation = "tanh", dropout: float = 0.0) -> Network:
        options = {"num_classes": self.num_classes, "activation": activation, "dropout": dropout}
        return build(self.architecture, self.image_shape, **options).eval()


class TrainingData(NamedTuple):
    """Images ``[C, H, W, n]``, the batch last, and labels ``[n]``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, images: Images, device: str) -> "TrainingData":
        x, y, test_x, test_y = (tensor.to(device) for tensor in images[:4])
        return cls(x.permute(1, 2, 3, 0).contiguous(), y, test_x.permute(1, 2, 3, 0).contiguous(), test_y)


class Stack:
    """Networks that run the same operations, with their optimizers.

    Attributes:
        members: Their places in the wave.
        state: Weights and the two moments of the optimizer, ``[3, G, P]``.
        steps: Updates so far.
    """

    def __init__(self, plan: Plan, recipes: Sequence[Recipe], members: list[int]):
        self.batch_size, self.members = plan.batch_size, torch.tensor(members)
        self.recipes = [recipes[member] for member in members]
        self.dropout = self.recipes[0].dropout > 0
        self.adaptive = self.recipes[0].optimizer in ADAPTIVE
        self.network = plan.build(self.recipes[0].activation, 0.5 if self.dropout else 0.0)

    def load(self, state: Tensor, steps: int) -> None:
        """Takes the state ``[3, wave, P]`` of its networks."""
        self.state, self.steps = state[:, self.members.to(state.device)], steps
        column = {"dtype": state.dtype, "device": state.device}
        self.lr, self.weight_decay, self.rate = (
            torch.tensor([[getattr(recipe, name)] for recipe in self.recipes], **column)
            for name in ("lr", "weight_decay", "dropout")
        )
        kinds = [recipe.optimizer for recipe in self.recipes]
        self.momentum = torch.tensor([[MOMENTUM * (kind == "momentum")] for kind in kinds], **column)
        self.decoupled = torch.tensor([[kind == "adamw"] for kind in kinds], device=state.device)

    def train_epoch(self, epoch: int, data: TrainingData) -> None:
        """One pass through the training images, in each network's own order."""
        random = [numpy.random.default_rng([recipe.seed, epoch]) for recipe in self.recipes]
        count = len(data.train_y) // self.batch_size
        orders = numpy.stack([generator.permutation(len(data.train_y)) for generator in random])
        orders = torch.from_numpy(orders[:, : count * self.batch_size]).view(len(random), count, -1)
        drop = (lambda x: self._drop(x, random)) if self.dropout else None
        for batch in orders.to(data.train_y.device).unbind(1):  # [G, B]
            self._step(data, batch, drop)

    def _step(self, data: TrainingData, batch: Tensor, drop) -> None:
        x = data.train_x.flatten(0, 2).index_select(1, batch.flatten())
        x = x.unflatten(1, batch.shape).unflatten(0, data.train_x.shape[:3]).permute(3, 0, 1, 2, 4).contiguous()
        weights = self.state[0].requires_grad_()
        logits = stacked_forward(self.network, weights, x, drop)  # [G, num_classes, B]
        loss = cross_entropy(logits, data.train_y[batch], reduction="sum") / self.batch_size
        (grad,) = torch.autograd.grad(loss, weights)
        self.steps += 1
        self._update(weights.detach(), grad)

    def _update(self, weights: Tensor, grad: Tensor) -> None:
        """The formulas of torch.optim, with a learning rate and a weight decay per row; in place."""
        _, first, second = self.state.detach()
        if not self.adaptive:
            first.mul_(self.momentum).add_(grad.addcmul_(self.weight_decay, weights))
            weights.addcmul_(self.lr, first, value=-1)
            return
        weights.mul_(torch.where(self.decoupled, 1 - self.lr * self.weight_decay, 1.0))
        grad.addcmul_(torch.where(self.decoupled, 0.0, self.weight_decay), weights)
        first.lerp_(grad, 1 - BETA1)
        second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        denominator = second.sqrt().div_((1 - BETA2**self.steps) ** 0.5).add_(EPSILON)
        weights.sub_(first.div(denominator).mul_(self.lr / (1 - BETA1**self.steps)))

    def _drop(self, x: Tensor, random: list[numpy.random.Generator]) -> Tensor:
        """Dropout with each network's own rate and random numbers."""
        uniform = numpy.empty((len(random), x[0].numel()), dtype=numpy.float32)
        for row, generator in zip(uniform, random, strict=True):
            generator.random(out=row, dtype=numpy.float32)
        kept = torch.from_numpy(uniform).to(x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype).view_as(x)

    def measure(self, data: TrainingData) -> Tensor:
        """Training loss and accuracy, test loss and accuracy, ``[4, G]``."""
        weights = self.state[0].detach()
        training = evaluate(self.network, weights, data.train_x, data.train_y)
        return torch.stack([*training, *evaluate(self.network, weights, data.test_x, data.test_y)])


def fit_stack(network: nn.Module, image_shape: Sequence[int], batch_size: int, device: str) -> int:
    """How many networks to stack: a few fill a processor's cache, a thousand a GPU."""
    most = 32 if device == "cpu" else 1024
    return min(most, max(1, BUDGET[device] // (4 * batch_size * largest_operand(network, image_shape))))


def make_stacks(plan: Plan, recipes: Sequence[Recipe]) -> list[Stack]:
    """Sorts networks by the operations that they run, and cuts each kind into stacks of equal size."""
    kinds = {}
    for place, recipe in enumerate(recipes):
        kind = (recipe.activation, recipe.dropout > 0, recipe.optimizer in ADAPTIVE)
        kinds.setdefault(kind, []).append(place)
    parts = (numpy.array_split(places, -(-len(places) // plan.stack)) for places in kinds.values())
    return [Stack(plan, recipes, part.tolist()) for kind in parts for part in kind]


class Wave:
    """Networks that advance together, epoch by epoch.

    Attributes:
        state: Weights and the two moments of the optimizer, ``[3, W, P]`` float32, on the CPU.
        epoch: The last one that is done; 0 is that of the initial weights, -1 none.
    """

    def __init__(self, plan: Plan, recipes: Sequence[Recipe]):
        self.recipes, self.epoch = recipes, -1
        self.stacks = make_stacks(plan, recipes)
        network = plan.build()
        layout = Layout.from_checkpoint(network)
        self.state = torch.zeros(3, len(recipes), layout.num_weights)
        for row, recipe in zip(self.state[0], recipes, strict=True):
            initialize(network, recipe.init, recipe.seed)
            row.copy_(layout.flatten(network.state_dict()))

    def load(self, data: TrainingData) -> None:
        """Hands the state over to the stacks, on the device of the data."""
        state = self.state.to(data.train_x.device)
        for stack in self.stacks:
            stack.load(state, max(self.epoch, 0) * (len(data.train_y) // stack.batch_size))

    def advance(self, data: TrainingData, pool: Executor) -> dict[str, object]:
        """Trains one more epoch; returns the properties of all networks at its end, one column each."""
        self.epoch += 1

        def train(stack: Stack) -> Tensor:
            if self.epoch > 0:
                stack.train_epoch(self.epoch, data)
            return stack.measure(data).cpu()

        measured = torch.empty(4, len(self.recipes), dtype=self.state.dtype)
        for stack, measures in zip(self.stacks, pool.map(train, self.stacks), strict=True):
            self.state[:, stack.members] = stack.state.detach().cpu()
            measured[:, stack.members] = measures
        return self._describe(measured)

    def _describe(self, measured: Tensor) -> dict[str, object]:
        columns = {name: [getattr(recipe, name) for recipe in self.recipes] for name in Recipe._fields}
        names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        measures = dict(zip(names, measured, strict=True))
        epochs = numpy.full(len(self.recipes), self.epoch, dtype=numpy.int32)
        measures["generalisation_gap"] = measures["train_accuracy"] - measures["test_accuracy"]
        return {"model": columns.pop("model"), "epoch": epochs} | columns | measures
