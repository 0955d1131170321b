"""The mean of several networks of one architecture (Git Re-Basin, arXiv 2209.04836; REPAIR, arXiv 2211.08403)."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

from fastws.compare.aligning import Aligned, Aligner, Matching, require_function, unmoved
from fastws.compare.evaluating import Precision, Scores, measure
from fastws.compare.lines import Mixer, Statistics, mixed, statistics_of
from fastws.compare.modules import Network
from fastws.compare.states import State
from fastws.symmetry.copies import Inputs
from fastws.zoo.making.recipes import Part


class Merged(NamedTuple):
    """A merged network."""

    state: dict[str, Tensor]  # names, shapes and dtypes of the first network
    statistics: Statistics  # what was done about statistics of activations
    aligned: list[Aligned]  # the networks in coordinates that fit each other; empty if they were taken as they are
    scores: dict[str, Scores]  # of each treatment of statistics, on the inputs that statistics are of; empty without


def merge(
    states: Sequence[State],
    module: nn.Module,
    example_inputs: Inputs,
    *,
    weights: Sequence[float] | None = None,
    align: bool = True,
    matching: Matching | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    statistics: Statistics | Literal["best"] = "best",
    precision: Precision = "fp32",
) -> Merged:
    """Aligns networks and takes their weighted mean.

    Two networks: the second is matched to the first. More: generalised Procrustes analysis, each to the mean of the
    others, in the coordinates of the first. Weights are averaged in float32 and rounded once. Averages have less
    variance in their units than what they are averages of; where there are data, that is mended: statistics of batch
    norms are computed anew, and layers without one get the mean of the moments of all networks (REPAIR).

    Args:
        states: At least two state dicts of ``module``.
        module: Of all networks; neither its weights nor its mode matter.
        example_inputs: Of the module, as ``Symmetry.trace`` takes them.
        weights: One for each network; they are divided by their sum. By default all are equal.
        align: Whether the networks are aligned before.
        matching: How; by default by weights, with signs.
        data: Training inputs ``[n, ..]`` and targets, int64 ``[n]`` or ``[n, length]``.
        statistics: ``"stored"`` averages statistics as weights, ``"reset"`` computes those of batch norms anew,
            ``"repaired"`` is REPAIR; ``"best"`` takes what has the least loss on ``data``, without them ``"stored"``.
        precision: Of what is computed to find the best.

    Raises:
        ValueError: If networks are of several architectures, alignment would change a function, weights do not fit,
            or statistics cannot be had.

    Example:
        >>> module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> symmetry, layout = fastws.Symmetry.trace(module, torch.randn(1, 4)), fastws.Layout.from_checkpoint(module)
        >>> other = layout.unflatten(symmetry.permute(layout.flatten(module), symmetry.random(1)[0], layout))
        >>> merged = fastws.merge([module.state_dict(), other], module, torch.randn(1, 4))
        >>> all(torch.allclose(merged.state[name], x) for name, x in module.state_dict().items())
        True
    """
    network = Network(deepcopy(module).eval().requires_grad_(False), example_inputs, "merge")
    return merge_networks(states, network, weights, align, matching, data, statistics, precision)


def merge_networks(
    states: Sequence[State],
    network: Network,
    weights: Sequence[float] | None,
    align: bool,
    matching: Matching | None,
    data: tuple[Tensor, Tensor] | None,
    statistics: Statistics | Literal["best"],
    precision: Precision,
) -> Merged:
    """``merge`` of networks whose module is in eval mode, without gradients."""
    shares = shares_of(weights, len(states))
    states = [{name: tensor.detach() for name, tensor in state.items()} for state in states]
    x = None if data is None else data[0]
    aligned = align_all(network, states, matching or Matching(), x) if align else []
    mixer = Mixer(network, [one.state for one in aligned] or states, x)
    possible = ["stored"] if x is None else statistics_of(network, x)
    if statistics not in (*possible, "best"):
        must = f"one of {', '.join(possible)}, which data and module allow"
        raise ValueError(f"merge: statistics must be {must}, got {statistics!r}")
    tried = possible if statistics == "best" else [statistics]
    if "repaired" in tried:
        mixer.prepare()
    scores = {}
    if data is not None:
        loads = [partial(mixer.load, weights=shares, statistics=one) for one in tried]
        found = measure(network, loads, Part(*data), precision=precision, name="merge")
        scores = dict(zip(tried, found, strict=True))
    best = min(scores, key=lambda one: scores[one].loss) if scores else "stored"
    if best == "stored":
        state = mixed(mixer.states, shares)
    else:
        mixer.load(changed := deepcopy(network.module), shares, best)
        state = mixer.states[0] | changed.state_dict()
    return Merged(as_first(state, states[0]), best, aligned, scores)


def shares_of(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights that sum to 1."""
    if count < 2:
        raise ValueError(f"merge: networks must be at least 2, got {count}")
    if not weights:
        return (1 / count,) * count
    if len(weights) != count or abs(sum(weights)) < 1e-6:
        raise ValueError(f"merge: weights must be {count} with a sum that is not 0, got {list(weights)}")
    return tuple(weight / sum(weights) for weight in weights)


def align_all(network: Network, states: Sequence[State], how: Matching, x: Tensor | None) -> list[Aligned]:
    """The networks in coordinates that fit each other, each with its function as it was."""
    aligner = Aligner(network, how, x)
    found = [unmoved(states[0]), aligner.pair(*states)] if len(states) == 2 else aligner.together(states)
    for number, (one, state) in enumerate(zip(found, states, strict=True)):
        if one.unmatched:
            raise ValueError(f"merge: networks must have the same shapes to be averaged, but {one.unmatched[0]}")
        require_function(f"merge: network {number}", network, state, one)
    return found


def as_first(state: State, first: State) -> dict[str, Tensor]:
    """A merged network with the names and dtypes of the first; tied tensors once for each name."""
    result = {name: state.get(name, tensor).to(tensor.dtype) for name, tensor in first.items()}
    for name, tensor in result.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"merge: weights of the mean must be finite, got others in {name!r} as {tensor.dtype}")
    return result
