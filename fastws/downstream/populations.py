"""How good many networks are: all of them at once on the same images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastws.runs.threads import map_on_threads
from fastws.zoo.making.measuring import (
    ALONE,
    SIDE_BY_SIDE,
    Logits,
    codes_of,
    condition_batch_norm,
    load_networks,
    one_by_one,
    side_by_side,
    tally,
)
from fastws.zoo.making.recipes import Part, Plan

GROUP = 16  # networks of one call on a CPU: what the widest vectors hold
MANY = 256  # networks of one call on a GPU


class Measured(NamedTuple):
    """What networks do on images."""

    loss: Tensor  # mean cross-entropy, [S] float64
    accuracy: Tensor  # [S] float64
    predictions: Tensor  # classes, [S, n] uint8 or int16
    mean_logits: Tensor  # over the networks, [n, num_classes] float64: what an ensemble of all of them says


def measure(
    weights: Tensor,
    plan: Plan,
    activations: Sequence[str],
    part: Part,
    *,
    condition: Tensor | None = None,
    progress: bool = True,
) -> Measured:
    """Loss, accuracy and predictions of S networks of one plan.

    Small networks run side by side, one in each lane of a vector; networks of any other architecture one by one, as
    many at a time as there are threads: stacked by ``torch.func`` they were no faster on a CPU.

    Args:
        weights: ``[S, P]``, on the device of the images.
        plan: Their architecture.
        activations: The activation of each.
        part: Images and labels.
        condition: Images ``[n, C, H, W]`` on which the running statistics of batch norms are computed anew; by default
            they stay as they are.
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

    def run(members: list[int]) -> tuple[Tensor, ...]:
        logits = logits_of(weights[members], plan, [activations[row] for row in members], layers, condition)
        done = tally(logits, part, images=ALONE if layers is None else SIDE_BY_SIDE, summed=True)
        return done.loss.cpu(), done.accuracy.cpu(), done.predictions.to(dtype).cpu(), done.summed.cpu()

    done = map_on_threads(run, groups, 1 if weights.is_cuda else None)
    with tqdm(total=len(weights), desc="evaluate", unit=" networks", disable=not progress) as bar:
        for members, (loss, accuracy, predictions, summed) in zip(groups, done, strict=True):
            found.loss[members], found.accuracy[members] = loss, accuracy
            found.predictions[members] = predictions
            found.mean_logits.add_(summed)
            bar.update(len(members))
    found.mean_logits.div_(max(1, len(weights)))
    return found


def logits_of(
    weights: Tensor, plan: Plan, activations: Sequence[str], layers: Tensor | None, condition: Tensor | None = None
) -> Logits:
    """What gives the logits of some networks ``[G, P]``; ``layers`` is their table, if they have one."""
    if layers is not None:
        return side_by_side(weights.contiguous(), layers, codes_of(activations).to(weights.device))
    networks = load_networks(weights, plan, activations)
    if condition is not None:
        for network in networks:
            condition_batch_norm(network, condition)
    return one_by_one(networks)


def condition_norms(weights: Tensor, plan: Plan, activations: Sequence[str], images: Tensor) -> Tensor:
    """Networks ``[G, P]`` whose batch norms have statistics computed anew on images ``[n, C, H, W]``: ``[G, P]``."""
    found = []
    for network in load_networks(weights, plan, activations):
        condition_batch_norm(network, images)
        found.append(torch.cat([x.flatten() for x in network.state_dict().values() if x.is_floating_point()]))
    return torch.stack(found)
