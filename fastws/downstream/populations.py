"""How good many networks are: all of them at once on the same images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fastws.ops.small_cnn_step import small_cnn_logits
from fastws.small_cnn.table import ACTIVATIONS
from fastws.zoo.making.recipes import Part, Plan

GROUP = 16  # networks of one call on a CPU: what the widest vectors hold
IMAGES = 2000  # of one call
MANY = 256  # networks of one call on a GPU


class Measured(NamedTuple):
    """What networks do on images."""

    loss: Tensor  # mean cross-entropy, [S] float64
    accuracy: Tensor  # [S] float64
    predictions: Tensor  # classes, [S, n] uint8 or int16
    mean_logits: Tensor  # over the networks, [n, num_classes] float64: what an ensemble of all of them says


def measure(weights: Tensor, plan: Plan, activations: Sequence[str], part: Part, *, progress: bool = True) -> Measured:
    """Loss, accuracy and predictions of S networks of one plan.

    Small networks run side by side, one in each lane of a vector; networks that cannot, one after the other.

    Args:
        weights: ``[S, P]``, on the device of the images.
        plan: Their architecture.
        activations: The activation of each.
        part: Images and labels.
        progress: Shows a bar.
    """
    try:
        layers = plan.layers().to(weights.device)
    except ValueError:
        layers = None
    order = sorted(range(len(weights)), key=lambda row: activations[row])
    size = 1 if layers is None else MANY if weights.is_cuda else GROUP
    groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
    dtype = torch.uint8 if plan.num_classes <= 256 else torch.int16
    found = Measured(
        torch.zeros(len(weights), dtype=torch.float64),
        torch.zeros(len(weights), dtype=torch.float64),
        torch.zeros(len(weights), len(part.y), dtype=dtype),
        torch.zeros(len(part.y), plan.num_classes, dtype=torch.float64),
    )

    def run(members: list[int]) -> tuple[list[int], Tensor, Tensor, list[Tensor]]:
        loss, guesses, sums = torch.zeros(len(members), dtype=torch.float64), [], []
        for x, y in zip(part.x.split(IMAGES), part.y.split(IMAGES), strict=True):
            logits = logits_of(weights[members], plan, [activations[row] for row in members], x, layers)
            target = y.expand(len(members), -1)
            loss += (
                cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
                .view(len(members), -1)
                .double()
                .sum(1)
                .cpu()
            )
            guesses.append(logits.argmax(2).to(dtype).cpu())
            sums.append(logits.double().sum(0).cpu())
        return members, loss / len(part.y), torch.cat(guesses, 1), sums

    # threads compute groups side by side, each by kernels of one thread; large networks get all threads instead
    before = torch.get_num_threads()
    threads = before if layers is not None and not weights.is_cuda else 1
    bar = tqdm(total=len(weights), desc="evaluate", unit=" networks", disable=not progress)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(before // threads,)) as pool:
        for members, loss, guesses, sums in pool.map(run, groups):
            found.loss[members], found.predictions[members] = loss, guesses
            found.mean_logits.add_(torch.cat(sums))
            bar.update(len(members))
    torch.set_num_threads(before)
    bar.close()
    found.accuracy.copy_((found.predictions == part.y.cpu()).double().mean(1))
    found.mean_logits.div_(max(1, len(weights)))
    return found


@torch.no_grad()
def logits_of(weights: Tensor, plan: Plan, activations: Sequence[str], x: Tensor, layers: Tensor | None) -> Tensor:
    """Logits of some networks, ``[G, n, num_classes]``."""
    if layers is not None:
        codes = torch.tensor([list(ACTIVATIONS).index(name) for name in activations], dtype=torch.int32)
        return small_cnn_logits(weights.contiguous(), x, layers, codes.to(weights.device))
    outputs = []
    for flat, activation in zip(weights, activations, strict=True):
        network = plan.build(activation).to(weights.device)
        outputs.append(load_flat(network, flat)(x))
    return torch.stack(outputs)


def load_flat(network: torch.nn.Module, flat: Tensor) -> torch.nn.Module:
    """A network with the floating tensors of a flat vector, in the order of its state dict, in eval mode."""
    begin = 0
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()
    return network.eval()
