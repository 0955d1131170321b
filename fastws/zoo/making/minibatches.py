"""Initial weights and minibatches: which random numbers decide them.

``seeded``: weights are a function of a network's seed, the order of an epoch one of seed and epoch.

``published``: one generator per network, as in the published code (ModelZoos/ModelZooDataset, ``NNmodule`` and
``FastTensorDataLoader``). After ``manual_seed(seed)`` it draws, in this order: the default weights and biases of all
layers, which are overwritten; their weights by the init of the recipe; an order of the training images that is only
evaluated; and for each epoch the order of the training images, then the masks of the dropout layers of each step. The
masks themselves are not used here, because ``small_cnn_step`` has its own; drawing them makes all later orders right,
on processors for which torch draws as it did where a zoo was published.
"""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor, nn

from fastws.small_cnn.table import DROPOUT, rows_of
from fastws.zoo.making.architectures import initialize
from fastws.zoo.making.recipes import Plan, Recipe


class Orders:
    """Draws the initial weights and the order of the images of each network.

    Attributes:
        state: What has to be kept with the weights to go on: states of the generators, uint8 ``[G, n]``.
    """

    def __init__(self, plan: Plan, recipes: Sequence[Recipe], num_images: int):
        self.plan, self.recipes, self.num_images = plan, recipes, num_images
        self.generators = []
        if plan.order == "published":
            self.generators = [torch.Generator().manual_seed(recipe.seed) for recipe in recipes]
            self.units = [torch.Size(row.out_shape).numel() for row in rows_of(plan.layers()) if row.kind == DROPOUT]

    def initialize(self, member: int, network: nn.Module) -> None:
        """Draws the weights of one network; before its first order."""
        recipe = self.recipes[member]
        if not self.generators:
            initialize(network, recipe.init, torch.Generator().manual_seed(recipe.seed))
            return
        for parameter in network.parameters():
            torch.empty_like(parameter).uniform_(generator=self.generators[member])
        initialize(network, recipe.init, self.generators[member])
        torch.randperm(self.num_images, generator=self.generators[member])

    def next(self, member: int, epoch: int) -> Tensor:
        """The training images in the order of an epoch, ``[n]`` int64; epochs are asked for one after the other."""
        recipe = self.recipes[member]
        if not self.generators:
            random = numpy.random.default_rng([recipe.seed, epoch])
            return torch.from_numpy(random.permutation(self.num_images))
        generator = self.generators[member]
        order = torch.randperm(self.num_images, generator=generator)
        if recipe.dropout > 0:
            for begin in range(0, self.num_images, self.plan.batch_size):
                count = min(self.plan.batch_size, self.num_images - begin)
                for units in self.units:
                    torch.empty(count, units).bernoulli_(1 - recipe.dropout, generator=generator)
        return order

    @property
    def state(self) -> Tensor:
        states = [generator.get_state() for generator in self.generators]
        return torch.stack(states) if states else torch.empty(len(self.recipes), 0, dtype=torch.uint8)

    @state.setter
    def state(self, states: Tensor) -> None:
        for generator, state in zip(self.generators, states, strict=False):
            generator.set_state(state.clone())  # torch reads a view from the beginning of its storage
