"""The equivariant baseline: a network of networks that sees weights and statistics, trained to foretell properties."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import nan

import torch
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from fastws.downstream.probes.features import layer_statistics
from fastws.downstream.probes.ridge import Probe, Splits, r_squared
from fastws.layout.layout import Layout
from fastws.nn.equivariant import EquivariantNetwork
from fastws.symmetry.symmetry import Symmetry

SPLITS = ("train", "val", "test")
PATIENCE = 10  # epochs without a better rank correlation on the validation split
TOGETHER = 256  # networks of a forward pass without gradient


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the network of networks is made and trained; the defaults are those that hundreds of networks suffice for."""

    channels: tuple[int, ...] = (8, 8)
    head: int = 256
    epochs: int = 50  # at most
    batch_size: int = 32
    lr: float = 1e-3  # of Adam
    seed: int = 0


def fit_equivariant(
    features: Splits,
    targets: Splits,
    *,
    layout: Layout,
    symmetry: Symmetry,
    may_flip: Tensor,
    training: Training,
    device: torch.device,
) -> list[Probe]:
    """Binary cross-entropy of all targets at once, each between its bounds; the validation split says when to stop.

    Kept is the epoch of the largest Kendall's tau, on average over targets. Statistics of weights and biases of each
    layer are known of each network beside its weights. Networks whose units may change their sign do so at random in
    training.

    Args:
        features: ``train``, ``val`` and ``test``: flat weights ``[n, P]``.
        targets: Likewise ``[n, K]``; what is not finite does not count.
        layout: Of the networks.
        symmetry: Of their architecture.
        may_flip: Of the training split, whether each network keeps its function under signs, bool ``[n]``.
        training: Sizes and rates.
        device: Where to train.
    """
    flat = {split: x.float().to(device) for split, x in features.items()}
    low, high = bounds_of(targets["train"])
    wanted = ((targets["train"] - low) / (high - low)).float().to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        sizes = {"channels": training.channels, "head": training.head}
        statistics = layer_statistics(flat["train"], layout, apart=True)
        network = EquivariantNetwork(layout, symmetry, wanted.shape[1], known=statistics.shape[1], **sizes).to(device)
    network.set_scales(flat["train"], statistics)

    def predict(flat: Tensor) -> Tensor:
        """``[n, K]`` float64, in units of the targets."""
        with torch.no_grad():
            parts = [network(x, known_of(x, layout)).sigmoid() for x in flat.to(device).float().split(TOGETHER)]
        found = torch.cat(parts).double().cpu() if parts else torch.zeros(0, wanted.shape[1], dtype=torch.float64)
        return low + (high - low) * found

    chooses = "val" if len(targets["val"]) else "train"
    best, since, kept = -torch.inf, 0, deepcopy(network.state_dict())
    bar = tqdm(train(network, flat["train"], wanted, may_flip, layout, symmetry, training), total=training.epochs)
    for loss in bar:
        tau = mean_tau(targets[chooses], predict(flat[chooses]))
        bar.set_description("equivariant")
        bar.set_postfix(loss=f"{loss:.4f}", tau=f"{tau:.4f}")
        since += 1
        if tau > best:
            best, since, kept = tau, 0, deepcopy(network.state_dict())
        if since == PATIENCE:
            break
    bar.close()
    network.load_state_dict(kept)
    predicted = {split: predict(x) for split, x in flat.items()}
    return [probe_of(targets, predicted, target, predict) for target in range(wanted.shape[1])]


def train(
    network: EquivariantNetwork,
    flat: Tensor,
    wanted: Tensor,
    may_flip: Tensor,
    layout: Layout,
    symmetry: Symmetry,
    training: Training,
) -> Iterator[float]:
    """Trains the network, one epoch each time it is asked for the mean loss of the next."""
    optimizer = torch.optim.Adam(network.parameters(), lr=training.lr)
    generator, flips = torch.Generator().manual_seed(training.seed), any(symmetry.flips) and bool(may_flip.any())
    drawn = 0
    for _ in range(training.epochs):
        losses = []
        for rows in torch.randperm(len(flat), generator=generator).split(training.batch_size):
            x, y = flat[rows], wanted[rows]
            if flips:
                signed = symmetry.random(len(rows), training.seed, drawn, x.device, flips=may_flip[rows])
                x, drawn = symmetry.permute(x, signed, layout), drawn + 1
            known = y.isfinite()
            logits = network(x, known_of(x, layout))
            loss = binary_cross_entropy_with_logits(logits[known], y[known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).nanmean())
        if not torch.isfinite(torch.tensor(mean)):
            raise FloatingPointError(f"predict: loss of the equivariant probe must be finite, got {mean}; lower lr")
        yield mean


def known_of(flat: Tensor, layout: Layout) -> Tensor:
    return layer_statistics(flat, layout, apart=True).to(flat.dtype)


def bounds_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    """What is 0 and what is 1 of each target: 0 and 1 where all are between them, else the least and the largest."""
    known = targets.isfinite()
    low = targets.where(known, torch.inf).amin(0)
    high = targets.where(known, -torch.inf).amax(0)
    shares = (low >= 0) & (high <= 1)
    low, high = low.where(~shares, 0), high.where(~shares, 1)
    return low, high.where(high > low, low + 1)


def mean_tau(targets: Tensor, predictions: Tensor) -> float:
    """Kendall's tau, on average over the targets that are not constant."""
    found = []
    for target, prediction in zip(targets.T, predictions.T, strict=True):
        known = target.isfinite()
        found.append(kendalltau(target[known].numpy(), prediction[known].numpy()).statistic)
    taus = torch.tensor(found, dtype=torch.float64)
    return float(taus.nanmean().nan_to_num(0))


def probe_of(targets: Splits, predicted: Splits, target: int, predict: Callable[[Tensor], Tensor]) -> Probe:
    known = {split: targets[split][:, target].isfinite() for split in SPLITS}
    y = {split: targets[split][known[split], target].double() for split in SPLITS}
    found = {split: predicted[split][known[split], target] for split in SPLITS}
    scores = [float(r_squared(found[split][:, None], y[split][:, None])) for split in SPLITS]
    tau = float(kendalltau(y["test"].numpy(), found["test"].numpy()).statistic)
    return Probe(nan, False, *scores, tau, found["test"], lambda x: predict(x)[:, target])
