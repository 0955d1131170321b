"""Several networks at once: each in the order that fits the mean of the others (generalised Procrustes analysis)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastws.layout.layout import Layout
from fastws.matching.match import Norms, batch_size, match
from fastws.symmetry.symmetry import Symmetry

LEAST_GAIN = 1e-6  # of the summed objective, as a share of it
MOST_ROUNDS = 100


class Together(NamedTuple):
    """Networks that are matched to each other."""

    permutations: Tensor  # int32 [n, S]
    mean: Tensor  # [P] float64, of the networks in their order
    rounds: int  # after the first, that were kept


def match_to_mean(
    read: Callable[[Tensor], Tensor],
    count: int,
    reference: Tensor,
    symmetry: Symmetry,
    layout: Layout,
    *,
    flips: Tensor,
    sweeps: int = 100,
    restarts: int = 1,
    norms: Norms = "exclude",
) -> Together:
    """Matches networks to a reference, then each to the mean of the others, until they hardly gain.

    What rises is the sum of the inner products of all pairs, norm statistics left out as in ``objective``. All networks
    of a round are matched to the means of the round before; a round that does not gain a millionth of the sum is the
    last, and is not kept if it loses. Weights are averaged, never permutations.

    Args:
        read: Gives the networks ``[k, P]`` of some numbers in ``[0, count)``, int64 ``[k]``; once a round each.
        count: Networks, from 1.
        reference: That all are matched to at first, ``[P]``.
        symmetry: Of their architecture.
        layout: What they were flattened with.
        flips: Whose units may change their sign, bool ``[count]``, on the CPU.
        sweeps: As in ``match``.
        restarts: As in ``match``.
        norms: As in ``match``.
    """
    counted = torch.ones(layout.num_weights, dtype=torch.float64, device=reference.device)
    for entry in layout.entries:
        if entry.role == "norm statistic" and norms == "exclude":
            counted[entry.offset : entry.offset + entry.numel] = 0
    options = {"sweeps": sweeps, "restarts": restarts, "norms": norms}

    def advance(before: Tensor | None, total: Tensor | None, name: str) -> tuple[Tensor, Tensor, float]:
        """Permutations, the sum of the networks, and the sum of the inner products of all pairs after a round."""
        rows, after, squares = [], torch.zeros_like(counted), 0.0
        with tqdm(total=count, desc=name, unit=" networks") as bar:
            for part in torch.arange(count).split(batch_size(symmetry)):
                flat = read(part)
                if before is None:
                    found = match(flat, reference, symmetry, layout, flips=flips[part], **options)
                else:
                    aligned = symmetry.permute(flat, before[part].to(flat.device), layout)
                    others = ((total - aligned) / (count - 1)).to(flat.dtype)
                    found = match(aligned, others, symmetry, layout, flips=flips[part], **options)
                    found = symmetry.compose(before[part].to(flat.device), found)
                moved = symmetry.permute(flat, found, layout).double()
                rows.append(found.cpu())
                after += moved.sum(0)
                squares += float((moved.square() @ counted).sum())
                bar.update(len(part))
        return torch.cat(rows), after, float((after.square() * counted).sum()) - squares

    rows, total, value = advance(None, None, "align to one")
    rounds = 0
    while count > 1 and rounds < MOST_ROUNDS:
        found, moved, reached = advance(rows, total, f"align to the mean, round {rounds + 1}")
        gain = reached - value
        if gain > 0:
            rows, total, value, rounds = found, moved, reached, rounds + 1
        if not gain > LEAST_GAIN * abs(reached):
            break
    return Together(rows, total / count, rounds)
