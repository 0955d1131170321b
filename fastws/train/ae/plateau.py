"""A learning rate that falls when the loss of a pass over the data no longer does."""

import torch
from torch import Tensor

from fastws.runs import processes
from fastws.train import loop

FACTOR = 0.3
PATIENCE = 10  # passes without a new best loss that are borne
THRESHOLD = 1e-4  # by which share a new best is better


class Plateau:
    """``ReduceLROnPlateau`` of the mean training loss of each pass, with numbers that a resumed run gets back."""

    def __init__(self, steps_per_pass: int, device: torch.device):
        self.steps = steps_per_pass
        self.carried = {
            "loss_sum": torch.zeros((), dtype=torch.float64, device=device),
            "loss_best": torch.tensor(torch.inf, dtype=torch.float64),
            "bad_passes": torch.zeros((), dtype=torch.int64),
            "rate": torch.ones((), dtype=torch.float64),
        }

    def see(self, loss: Tensor) -> None:
        """Adds the loss of a step; the device is waited for at the end of a pass only."""
        self.carried["loss_sum"] += loss.detach().double()

    def set_rates(self, optimizer: torch.optim.Optimizer, config: loop.Config, step: int) -> None:
        carried = self.carried
        if step > 0 and step % self.steps == 0:
            mean = processes.average({"loss": carried["loss_sum"] / self.steps})["loss"]
            carried["loss_sum"].zero_()
            if mean < carried["loss_best"] * (1 - THRESHOLD):
                carried["loss_best"].fill_(mean)
                carried["bad_passes"].zero_()
            else:
                carried["bad_passes"] += 1
            if carried["bad_passes"] > PATIENCE:
                carried["rate"] *= FACTOR
                carried["bad_passes"].zero_()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * carried["rate"].item()
