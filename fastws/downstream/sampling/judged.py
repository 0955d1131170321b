"""What is done with images while networks are sampled: batch norms get their statistics, candidates are judged."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastws.downstream.evaluate import ANY, conditioning_images, job_of
from fastws.downstream.populations import condition_norms, measure
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.recipes import Part, Plan


class Bench(NamedTuple):
    """Architecture and images of networks that are sampled; without a plan nothing is done with them."""

    plan: Plan | None = None
    activation: str = ANY
    images: Tensor | None = None  # for the statistics of batch norms
    part: Part | None = None  # that candidates are judged on

    def condition(self, weights: Tensor) -> Tensor:
        """Networks ``[S, P]`` with statistics of batch norms computed anew, or as they are."""
        if self.images is None:
            return weights
        return condition_norms(weights.float(), self.plan, [self.activation] * len(weights), self.images)

    def accuracy(self, weights: Tensor) -> Tensor:
        """Of networks ``[S, P]``: ``[S]`` float64."""
        return measure(weights.float(), self.plan, [self.activation] * len(weights), self.part).accuracy


def set_up(config: Any, zoo: Zoo, activation: str | None, device: torch.device) -> Bench:
    """What the options ``condition``, ``candidates`` and ``judged_on`` of ``fastws sample`` need.

    Raises:
        FileNotFoundError: If the images are not there.
        ValueError: If the zoo does not say what its networks are, has no validation images, or no batch norms.
    """
    if not (config.condition or config.candidates):
        return Bench()
    job = job_of(zoo, config.data, device=str(device), architecture=config.architecture, where="sample")
    if activation is None and ":" not in job.plan.architecture:
        what = "given for networks whose zoo does not say theirs"
        raise ValueError(f"sample: activation must be {what}, got none for {zoo.path}; give --activation")
    images = conditioning_images(zoo, job, config.condition, "sample") if config.condition else None
    part = job.data.train if config.judged_on == "train" else job.data.val
    if config.candidates and part is None:
        what = f"train for {zoo.path}, which was made without validation images"
        raise ValueError(f"sample: judged_on must be {what}, got val; give --judged-on train")
    return Bench(job.plan, activation or ANY, images, part)
