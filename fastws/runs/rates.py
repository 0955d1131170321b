"""Learning rates and momenta as functions of the step, so that a resumed run needs no state to find them."""

from math import cos, pi


def one_cycle(largest: float, step: int, steps: int) -> tuple[float, float]:
    """Learning rate and momentum of ``torch.optim.lr_scheduler.OneCycleLR`` with its defaults (arXiv 1708.07120).

    The rate rises from a 25th of the largest one for 30 % of the steps, then falls to 4e-6 of it; the momentum falls
    from 0.95 to 0.85 meanwhile, and rises again; both along half a cosine.

    Args:
        largest: Learning rate at the peak.
        step: In ``[0, steps)``.
        steps: In all.
    """
    peak, last = 0.3 * steps - 1, steps - 1
    if step <= peak:
        part, rates, momenta = step / peak, (largest / 25, largest), (0.95, 0.85)
    else:
        part, rates, momenta = (step - peak) / (last - peak), (largest, largest / 25e4), (0.85, 0.95)
    share = (1 + cos(pi * part)) / 2  # of what this half of the cycle begins with
    return rates[1] + (rates[0] - rates[1]) * share, momenta[1] + (momenta[0] - momenta[1]) * share
