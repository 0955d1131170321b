"""What an autoencoder of whole networks sees: their weights, with neurons permuted, noise added, and parts erased."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import fastws
from fastws.devices import to_device
from fastws.layout.layout import Layout
from fastws.random.integers import epoch_rows
from fastws.random.philox import philox_reference
from fastws.symmetry.symmetry import Symmetry

# where the draws of each kind begin in the stream of random numbers
VALIDATION, ADDITIVE, CODE, BLOCKS, PERMUTATION, ORDER = 2**57, 2**58, 2**59, 2**60, 2**61, 2**62
TRIES = 10  # of a block that would pass the end
SHORTEST, LONGEST = 0.02, 0.33  # parts of a network that a block erases
CPU = torch.device("cpu")


class Augmentation(NamedTuple):
    """How the two views of a network differ from it."""

    permute: bool  # neurons of both views, each its own way
    noise: float  # std of the factors around 1 that weights are multiplied by
    additive: float  # std of what is added, in units of ``sigma``
    erase: float  # share of the weights that become 0
    block_erase: float  # probability that a block of following weights becomes 0


class Source(NamedTuple):
    """The networks to learn from; tensors on the device."""

    weights: Tensor  # [m, P]
    rows: dict[str, Tensor]  # split: its rows of weights, int64, on the CPU
    layout: Layout
    symmetry: Symmetry | None
    sigma: Tensor  # of each weight, that of its layer, [P]


class Batch(NamedTuple):
    views: Tensor  # [2B, P], the second views of all networks behind the first
    target: Tensor  # [2B, P]
    code_noise: Tensor | None  # [2B, E]


def choose(source: Source, split: str, batch: int, seed: int, step: int) -> Tensor:
    """Rows of the networks of a batch, ``[B]``; every pass over the split visits each once."""
    rows = source.rows[split]
    return rows[epoch_rows(len(rows), batch, seed, ORDER, step)]


def view(source: Source, model: Tensor, augmentation: Augmentation, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Two views of each network, and the same without noise and erasing: two ``[2B, P]``.

    Both are functions of ``seed`` and ``step``. The weights of a permuted network are in the order that the permutation
    gives them, and blocks are counted in that order.
    """
    flat = source.weights[to_device(model, source.weights.device)].repeat(2, 1)
    if augmentation.permute:
        permutations = source.symmetry.random(len(flat), seed, PERMUTATION + step, device=flat.device)
        flat = source.symmetry.permute(flat, permutations, source.layout)
    views = flat
    if augmentation.noise > 0 or augmentation.erase > 0:
        views = whole(views, seed=seed, offset=step, noise=augmentation.noise, erase=augmentation.erase)
    if augmentation.additive > 0:
        ones = torch.ones_like(views)
        views = views + (whole(ones, seed=seed, offset=ADDITIVE + step, noise=augmentation.additive) - 1) * source.sigma
    if augmentation.block_erase > 0:
        views = erase_blocks(views, augmentation.block_erase, seed, BLOCKS + step)
    return views, flat


def whole(flat: Tensor, **options: float) -> Tensor:
    """Vectors ``[B, P]`` with the noise of ``fastws.token_views``, each vector one token."""
    batch, size = flat.shape
    table, numbers = one_token(size, flat.device), torch.arange(batch, device=flat.device)
    return fastws.token_views(flat, table, size, numbers, torch.zeros_like(numbers), 1, **options).values[:, 0]


@lru_cache(maxsize=4)
def one_token(size: int, device: torch.device) -> Tensor:
    """The table of vectors that are one token each; kept on the device."""
    return to_device(torch.tensor([[0, -1, 1, size, 1, size, 1, 0, -1, -1, -1]]), device)


def erase_blocks(flat: Tensor, probability: float, seed: int, offset: int) -> Tensor:
    """Sets a block of following weights of some vectors to 0 (random erasing of vectors, arXiv 2110.15288).

    A vector of P weights is erased with ``probability``: up to ten times a length ``int(P * u)``, u uniform in [0.02,
    0.33], and a start, uniform in [0, P), are drawn; the first block that ends before the end of the vector is erased.
    """
    batch, size = flat.shape
    words = philox_reference(seed, offset, batch * (1 + 2 * TRIES), CPU).view(batch, -1)
    uniform = (words >> 8).double() * 2**-24
    lengths = (size * (SHORTEST + (LONGEST - SHORTEST) * uniform[:, 1 : 1 + TRIES])).long()
    starts = (size * uniform[:, 1 + TRIES :]).long()
    fits = starts + lengths < size
    first = fits.long().argmax(1, keepdim=True)
    erased = (uniform[:, :1] < probability) & fits.any(1, keepdim=True)
    start = starts.gather(1, first)
    end = torch.where(erased, start + lengths.gather(1, first), start)
    place = torch.arange(size, device=flat.device)
    inside = (place >= to_device(start, flat.device)) & (place < to_device(end, flat.device))
    return flat.masked_fill(inside, 0)
