"""What networks do on images: where all losses and accuracies come from, while a zoo is made and afterwards."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastws.ops.small_cnn_step import small_cnn_logits
from fastws.small_cnn.table import ACTIVATIONS
from fastws.zoo.making.recipes import Part, Plan

SIDE_BY_SIDE = 2000  # images of one call for networks that run side by side
ALONE = 500  # for networks that run one by one
PIXELS, TOKENS = 2**22, 2**12  # of a batch: 27 images of 3 x 224 x 224, and logits of a large vocabulary in 1 GB
Logits = Callable[[Tensor], Tensor]  # images [n, C, H, W] to logits of all networks [G, n, num_classes]


class Tally(NamedTuple):
    """What G networks do on n images."""

    loss: Tensor  # mean cross-entropy, [G] float64
    accuracy: Tensor  # [G] float64
    predictions: Tensor  # classes, [G, n] int64
    summed: Tensor | None  # logits summed over the networks, [n, num_classes] float64, where that is asked for


@torch.no_grad()
def tally(logits_of: Logits, part: Part, *, images: int = SIDE_BY_SIDE, summed: bool = False) -> Tally:
    """Loss, accuracy and predictions of networks.

    Args:
        logits_of: The networks.
        part: Images and labels.
        images: Of one call.
        summed: Also gives the sum of logits over the networks.
    """
    loss, guesses, sums = 0.0, [], []
    for x, y in zip(part.x.split(images), part.y.split(images), strict=True):
        logits = logits_of(x)
        target = y.expand(len(logits), -1)[..., None]
        loss += (logits.logsumexp(2, keepdim=True) - logits.gather(2, target)).double().sum((1, 2))
        guesses.append(logits.argmax(2))
        sums += [logits.double().sum(0)] if summed else []
    predictions = torch.cat(guesses, 1)
    accuracy = (predictions == part.y).double().mean(1)
    return Tally(loss / len(part.y), accuracy, predictions, torch.cat(sums) if summed else None)


def disagreement(predictions: Tensor) -> Tensor:
    """Share of different predictions of pairs of networks ``[G, n]``, float64 ``[]``; NaN for fewer than two."""
    count = len(predictions)
    if count < 2:
        return torch.full((), torch.nan, dtype=torch.float64, device=predictions.device)
    # a class at a time, for a thousand networks on ten thousand images
    votes = torch.stack([(predictions == label).sum(0) for label in range(int(predictions.max()) + 1)]).double()
    return 1 - ((votes * (votes - 1)).sum(0) / (count * (count - 1))).mean()


def side_by_side(weights: Tensor, layers: Tensor, activation: Tensor) -> Logits:
    """Small networks ``[G, P]`` of one table, at once; ``activation`` holds the code of each, int32 ``[G]``."""
    return lambda x: small_cnn_logits(weights, x, layers, activation)


def codes_of(activations: Sequence[str]) -> Tensor:
    return torch.tensor([list(ACTIVATIONS).index(name) for name in activations], dtype=torch.int32)


def one_by_one(networks: Sequence[nn.Module]) -> Logits:
    """Networks that cannot run side by side, one after the other."""
    return lambda x: torch.stack([network(x) for network in networks])


def load_networks(weights: Tensor, plan: Plan, activations: Sequence[str]) -> list[nn.Module]:
    """Networks with the floating tensors of flat vectors ``[G, P]``, in the order of their state dict, in eval mode."""
    networks = []
    for flat, activation in zip(weights, activations, strict=True):
        network, begin = plan.build(activation).to(weights.device), 0
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
                    begin += tensor.numel()
        networks.append(network.eval())
    return networks


@torch.no_grad()
def condition_batch_norm(network: nn.Module, images: Tensor) -> None:
    """Computes the running statistics of all batch norms anew, as means over batches of images ``[n, C, H, W]``.

    Weights that were sampled, averaged or decoded have other activations than the networks that their statistics are
    of. Everything else of the network stays in eval mode.
    """
    norms = norms_of(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    for (x,) in in_batches(images):
        network(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def in_batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches for networks that run one by one: tensors ``[n, ..]`` in parts that belong together, of about one size.

    Images or sequences that are large come in smaller batches, but never alone, for batch norms need two.
    """
    x = tensors[0]
    room = (PIXELS if x.is_floating_point() else TOKENS) // max(1, x[:1].numel())
    count = max(1, len(x) // max(2, min(ALONE, room)))
    return zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)


def norms_of(network: nn.Module) -> list[nn.Module]:
    """The layers that keep running statistics of batches."""
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
