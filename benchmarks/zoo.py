"""What the token benchmarks work on: ResNet-18 of the CIFAR-10 zoos, and the published way to cut views of it."""

from functools import cache

import torch
from torch import Tensor

import fastws
from fastws.nn.resnet import ResNet
from fastws.signed import split

TOKEN_SIZE, WINDOW, VIEWS, MODELS = 288, 256, 64, 32
UNSIGNED: dict[int, tuple[Tensor, Tensor]] = {}  # by id, permutations, which are kept so that it stays theirs


@cache
def resnet18() -> tuple[fastws.Layout, fastws.Symmetry]:
    return resnet18_layout(), fastws.Symmetry.trace(ResNet(18), torch.randn(1, 3, 8, 8))


def without_signs(permutations: Tensor) -> Tensor:
    """The permutations of signed ones; made once, so that a race does not time it."""
    if id(permutations) not in UNSIGNED:
        UNSIGNED[id(permutations)] = permutations, split(permutations)[0]
    return UNSIGNED[id(permutations)][1]


def with_signs(permutations: Tensor) -> Tensor:
    """The same permutations, half of the units negated."""
    negated = torch.rand(permutations.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    return torch.where(negated, ~permutations, permutations)


@cache
def resnet18_layout(norm: str = "keep") -> fastws.Layout:
    return fastws.Layout.from_checkpoint(ResNet(18), TOKEN_SIZE, norm)


def published_views(
    layout: fastws.Layout, symmetry: fastws.Symmetry, zoo: Tensor, model: Tensor, start: Tensor, permutations: Tensor
) -> Tensor:
    """Network by network and tensor by tensor: permute the whole network, tokenize all of it, keep one window.

    The steps of the published code (index_select per axis; per layer a view, the bias column, a buffer of zeros for the
    padding, mask and positions; one concatenation), written anew.
    """
    views = []
    for b in range(len(model)):
        state = layout.unflatten(zoo[model[b]])
        state = symmetry.permute_state(state, permutations[b])
        tokens, masks, positions = [], [], []
        for layer, (name, bias) in enumerate(layout.layers):
            weight = state[name].reshape(state[name].shape[0], -1)
            if bias:
                weight = torch.cat([weight, state[bias][:, None]], 1)
            chunks = -(-weight.shape[1] // TOKEN_SIZE)
            padded, mask = torch.zeros(2, weight.shape[0], chunks * TOKEN_SIZE)
            padded[:, : weight.shape[1]], mask[:, : weight.shape[1]] = weight, 1
            tokens.append(padded.view(-1, TOKEN_SIZE))
            masks.append(mask.view(-1, TOKEN_SIZE).bool())
            positions += [(layer, row) for row in range(weight.shape[0]) for _ in range(chunks)]
        tokens, masks, _ = torch.cat(tokens), torch.cat(masks), torch.tensor(positions)
        views.append(tokens[start[b] : start[b] + WINDOW])
    return torch.stack(views)
