"""How far scores can be trusted: percentile bootstrap over networks, all states of one together.

The network is the unit of observation: its states are alike, and to draw them one by one makes intervals too narrow.
"""

import numpy
from torch import Tensor

RESAMPLES = 2000
BOUNDS = (0.025, 0.975)
ROWS_AT_ONCE = 1024


def draw_networks(models: list, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of each row the number of its network ``[n]``, and how often each network is drawn, ``[RESAMPLES, G]``."""
    _, member = numpy.unique(models, return_inverse=True)
    count = member.max() + 1 if len(member) else 0
    if count == 0:
        return member, numpy.zeros((RESAMPLES, 0), dtype=numpy.int64)
    return member, numpy.random.default_rng(seed).multinomial(count, numpy.full(count, 1 / count), RESAMPLES)


def r2_interval(prediction: Tensor, target: Tensor, models: list, seed: int = 0) -> list[float] | None:
    """95 % interval of R^2, ``[low, high]``; None where a resample has no variance.

    Args:
        prediction: float64 ``[n]``.
        target: float64 ``[n]``.
        models: The network of each.
        seed: Of the resamples.
    """
    member, drawn = draw_networks(models, seed)
    y, error = target.numpy(), (target - prediction).square().numpy()
    sums = numpy.stack([numpy.bincount(member, weights) for weights in (numpy.ones(len(y)), y, y**2, error)])
    total, first, second, squares = sums @ drawn.T  # [RESAMPLES] each
    variance = second / total - (first / total) ** 2
    if not (variance > 1e-12).all():
        return None
    return numpy.quantile(1 - squares / total / variance, BOUNDS).tolist()


def mean_interval(values: Tensor, models: list, seed: int = 0) -> list[float] | None:
    """95 % interval of the mean of ``values`` ``[n]`` over all rows; None without rows."""
    member, drawn = draw_networks(models, seed)
    if not len(member):
        return None
    sums = [numpy.bincount(member, weights) for weights in (numpy.ones(len(member)), values.double().numpy())]
    total, value = numpy.stack(sums) @ drawn.T
    return numpy.quantile(value / total, BOUNDS).tolist()


def tau_interval(prediction: Tensor, target: Tensor, models: list, seed: int = 0) -> list[float] | None:
    """95 % interval of Kendall's tau-b; None where a resample has ties alone. Arguments as of ``r2_interval``.

    With ``w`` how often each network is drawn, tau-b is ``w' C w / sqrt(w' X w * w' Y w)``, where C, X and Y ``[G, G]``
    sum ``sign(dx) sign(dy)``, ``|sign(dx)|`` and ``|sign(dy)|`` over the pairs of rows of two networks: a row that is
    drawn twice is tied with itself. So all resamples are three products of matrices.
    """
    member, drawn = draw_networks(models, seed)
    order = numpy.argsort(member, kind="stable")
    member, x, y = member[order], prediction.numpy()[order], target.numpy()[order]
    count, weights = drawn.shape[1], drawn.astype(numpy.float64)
    sums = numpy.zeros((3, len(drawn)))
    for begin in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        dx, dy = numpy.sign(x[rows, None] - x), numpy.sign(y[rows, None] - y)
        first = numpy.flatnonzero(numpy.diff(member, prepend=-1))
        here = weights[:, member[rows]]
        for number, signs in enumerate((dx * dy, numpy.abs(dx), numpy.abs(dy))):
            between = numpy.add.reduceat(signs, first, axis=1)  # [rows, G]
            sums[number] += numpy.einsum("br,br->b", here, weights @ between.T)
    concordant, untied_x, untied_y = sums
    if count == 0 or not (untied_x * untied_y > 0).all():
        return None
    return numpy.quantile(concordant / numpy.sqrt(untied_x * untied_y), BOUNDS).tolist()
