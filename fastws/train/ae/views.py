"""What an autoencoder of whole networks sees: their weights, with neurons permuted, noise added, and parts erased."""

from typing import NamedTuple

import torch
from torch import Tensor

import fastws
from fastws.devices import to_device
from fastws.layout.layout import Layout
from fastws.layout.spread import weight_std
from fastws.random.integers import epoch_rows
from fastws.symmetry.symmetry import Symmetry
from fastws.table import table_columns

# where the draws of each kind begin in the stream of random numbers; views take those of fastws.token_views from 0 on
VALIDATION, CODE, PERMUTATION, ORDER = 2**57, 2**59, 2**61, 2**62


class Augmentation(NamedTuple):
    """How the two views of a network differ from it."""

    permute: bool  # neurons of both views, each its own way
    noise: float = 0.0  # std of the factors around 1 that weights are multiplied by
    additive: float = 0.0  # std of what is added, in units of ``sigma``
    erase: float = 0.0  # share of the weights that become ``erase_value``
    block_erase: float = 0.0  # probability that a block of following weights becomes ``erase_value``
    erase_value: float | None = 0.0  # None: a standard normal for each
    flips: bool = True  # signs of neurons, at random where they are permuted and keep the function


class Source(NamedTuple):
    """The networks to learn from; tensors on the device."""

    weights: Tensor  # [m, P]
    rows: dict[str, Tensor]  # split: its rows of weights, int64, on the CPU
    layout: Layout
    table: Tensor  # of networks as one token, in the order of the flat vector; with permutations if there are any
    symmetry: Symmetry | None
    may_flip: Tensor | None  # which networks keep their function when neurons change their sign, bool [m]; None: none
    sigma: Tensor  # of each row of the table, the std of its layer, [L]

    @classmethod
    def of(
        cls,
        weights: Tensor,
        rows: dict[str, Tensor],
        layout: Layout,
        symmetry: Symmetry | None,
        may_flip: Tensor,
    ) -> "Source":
        """The source of networks ``[m, P]``, and of which of them may flip, bool ``[m]``."""
        whole, device = layout.with_tokens(None, "keep", "network"), weights.device
        sigma = weight_std(weights[: len(rows["train"])], layout)
        table = whole.table if symmetry is None else symmetry.table(whole)
        sigma = sigma[table_columns(table).weight_offset.to(device)]
        may_flip = may_flip.to(device) if may_flip.any() else None
        return cls(weights, rows, layout, table.to(device), symmetry, may_flip, sigma)


class Batch(NamedTuple):
    views: Tensor  # [2B, P], the second views of all networks behind the first
    target: Tensor  # [2B, P]
    code_noise: Tensor | None  # [2B, E]


def choose(source: Source, split: str, batch: int, seed: int, step: int) -> Tensor:
    """Rows of the networks of a batch, ``[B]``; every pass over the split visits each once."""
    rows = source.rows[split]
    return rows[epoch_rows(len(rows), batch, seed, ORDER, step)]


def view(source: Source, model: Tensor, augmentation: Augmentation, seed: int, step: int) -> Tensor:
    """Two views of each network, ``[2B, P]``, functions of ``seed`` and ``step``.

    The weights of a permuted network are in the order that the permutation gives them, and blocks are counted in that
    order; their lengths are the published ones, 2 to 33 % of the network (arXiv 2110.15288).
    """
    weights = source.weights
    model, permutations = to_device(model, weights.device).repeat(2), None
    if augmentation.permute:
        flips = augmentation.flips and source.may_flip is not None and source.may_flip[model]
        permutations = source.symmetry.random(len(model), seed, PERMUTATION + step, device=weights.device, flips=flips)
    additive = augmentation.additive * source.sigma if augmentation.additive > 0 else 0.0
    return fastws.token_views(
        weights,
        source.table,
        source.layout.num_weights,
        model,
        torch.zeros_like(model),
        1,
        permutations,
        noise=fastws.Noise(augmentation.noise, additive),
        erase=fastws.Erasing(augmentation.erase, augmentation.block_erase, value=augmentation.erase_value),
        seed=seed,
        offset=step,
    ).values[:, 0]
