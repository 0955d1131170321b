"""Small descriptions of networks that no permutation or sign of their neurons changes, to find those that may match.

Norms and spectra do not tell relatives from strangers, because one recipe gives one spectrum. Inner products over axes
whose order is fixed (pixels, tokens, classes) do, and so do outputs for random inputs, which nothing changes that
leaves the function as it is. Both say something only beside what they are among strangers, so that pairs are measured
by the median and the spread of all pairs of a folder.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from fastws.compare.moving import Mover
from fastws.symmetry.copies import FAILURES, Inputs, example_of
from fastws.symmetry.symmetry import Symmetry
from fastws.symmetry.tracer import tensors_in

VECTORS = 16  # Gaussian ones, on which fixed axes are projected
EXAMPLES = 16  # random inputs, where inputs are floating
FARTHEST = 8.0  # spreads from the median, of one number of a sketch
OUTPUTS = 4096  # of a network that are kept, at most


def fixed_axes(symmetry: Symmetry) -> dict[str, int]:
    """Weights of which one axis moves and the others stay, and that axis."""
    found = {}
    for name, axes in symmetry.axes.items():
        moving = [
            axis for axis, segments in enumerate(axes) if segments and any(one[0] is not None for one in segments)
        ]
        if len(axes) > 1 and len(moving) == 1:
            found[name] = moving[0]
    return found


def gram_sketch(state: Mapping[str, Tensor], axes: Mapping[str, int]) -> list[Tensor]:
    """Of each such weight the inner products over its moving axis of 16 random mixtures of the fixed ones, ``[136]``.

    Where the fixed axes have no more than 16 entries there is no need to mix them.
    """
    sketches = []
    for number, (name, axis) in enumerate(axes.items()):
        rows = state[name].transpose(0, axis).reshape(state[name].shape[axis], -1).double()
        if rows.shape[1] > VECTORS:
            random = torch.Generator().manual_seed(number)
            rows = rows @ torch.randn(rows.shape[1], VECTORS, generator=random, dtype=torch.float64)
        gram = rows.T @ rows
        upper = torch.triu_indices(len(gram), len(gram))
        sketches.append(gram[upper[0], upper[1]])
    return sketches


class Outputs:
    """What a module answers to random inputs: the same for all that have the same function."""

    def __init__(self, module: nn.Module, inputs: Inputs):
        self.module, self.inputs = module, inputs
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            random = torch.Generator().manual_seed(0)
            self.inputs = torch.randn(EXAMPLES, *inputs.shape[1:], generator=random, dtype=inputs.dtype)
            try:
                with torch.no_grad():
                    module(self.inputs)
            except FAILURES:  # some take one example at a time
                self.inputs = inputs

    def sketch(self, state: Mapping[str, Tensor]) -> Tensor:
        """Outputs less their mean over the last axis, float64 ``[at most 4096]``."""
        dtypes = {name: tensor.dtype for name, tensor in self.module.state_dict().items()}
        state = {name: tensor.to(dtypes[name]) for name, tensor in state.items() if name in dtypes}
        with torch.no_grad():
            answer = tensors_in(functional_call(self.module, state, *example_of(self.module, self.inputs)))
        flat = [(x - x.mean(-1, keepdim=True)).flatten() for x in answer if x.is_floating_point() and x.dim()]
        return torch.cat(flat)[:OUTPUTS].double()


def sketch_all(
    states: Sequence[Mapping[str, Tensor]], mover: Mover, progress: bool = False
) -> list[list[list[Tensor]]]:
    """Of each network two sketches: Grams of its weights in canonical form, and its outputs."""
    axes, outputs = fixed_axes(mover.symmetry), Outputs(mover.network.module, mover.network.inputs)
    bar = tqdm(states, desc="sketch", unit=" networks", disable=not progress or len(states) < 100, leave=False)
    return [[gram_sketch(mover.canonical(state), axes), [outputs.sketch(state)]] for state in bar]


def closeness(sketches: Sequence[Sequence[Tensor]]) -> Tensor:
    """How much closer each pair of sketches is than the median pair, in spreads of all pairs, float64 ``[M, M]``.

    Of each number of a sketch the median over networks is taken off, and it is divided by its median absolute
    deviation; of a pair the logarithm of the mean distance over tensors counts, of unit vectors. The spread is that of
    the pairs that are farther than the median.
    """
    count, distances = len(sketches), 0.0
    for part in zip(*sketches, strict=True):
        numbers = torch.stack(part).nan_to_num(0.0, 0.0, 0.0)
        numbers = numbers - numbers.median(0).values
        spread = numbers.abs().median(0).values
        numbers = (numbers / spread.clamp(min=1e-30)).clamp(-FARTHEST, FARTHEST)[:, spread > 0]
        distances = distances + pair_distances(numbers)
    if isinstance(distances, float):
        return torch.zeros(count, count, dtype=torch.float64)
    logs = (distances / len(sketches[0])).clamp(min=1e-24).log() / 2
    pairs = logs[torch.triu_indices(count, count, offset=1).unbind()]
    middle = pairs.median()
    far = pairs[pairs > middle]  # relatives are near, and so do not widen the spread of these
    spread = 1.4826 * float((far - middle).median()) if len(far) else 0.0
    return (middle - logs) / spread if spread > 0 else torch.zeros_like(logs)


def nearest_pairs(close: Tensor, count: int, least: float) -> Tensor:
    """Of each network the nearest other, and up to ``count`` that are closer than ``least``: bool ``[M, M]``."""
    nearest = close.clone().fill_diagonal_(-torch.inf).topk(min(count, len(close) - 1), dim=1)
    wanted = nearest.values > least
    wanted[:, 0] = True
    picked = torch.zeros(close.shape, dtype=torch.bool).scatter_(1, nearest.indices, wanted)
    return picked | picked.T


def pair_distances(numbers: Tensor) -> Tensor:
    """Squared distances of unit vectors."""
    numbers = nn.functional.normalize(numbers, dim=1)
    return torch.cdist(numbers, numbers, compute_mode="donot_use_mm_for_euclid_dist").square()
