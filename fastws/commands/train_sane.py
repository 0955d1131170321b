"""``fastws train sane``, with what trainers know nothing of: networks that are sampled from what was learned so far."""

from typing import Any

from torch import Tensor, nn

import fastws
from fastws.commands.hub_symmetry import find_symmetry
from fastws.downstream.encoder import Encoder
from fastws.downstream.evaluate import ANY, conditioning_images, job_of
from fastws.downstream.populations import measure
from fastws.downstream.representation import Tokens
from fastws.downstream.sampling import sample
from fastws.downstream.sampling.anchors import BY, Choice, choose_anchors
from fastws.downstream.sampling.judged import Bench
from fastws.train import loop
from fastws.train.sane import train as sane
from fastws.train.sane.config import Config
from fastws.train.sane.train import Look
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.measuring import disagreement, norms_of

__all__ = ["Config", "run"]

COUNT = 20  # networks of a look
BEST = 0.3  # share of the training networks that are anchors
CONDITIONED = 2000  # training images, at most, from which batch norms get statistics


def run(config: Config) -> None:
    sane.run(config, make_look, find_symmetry)


def make_look(config: Config, zoo: Zoo, extra: dict[str, Any]) -> Look:
    """What is asked of a model while it is trained: how good networks are that a density of its codes gives.

    They are drawn around the best training networks and measured on validation images, never on test images. Their
    spread and disagreement are in units of those of the anchors, because networks that are all alike look good.

    Raises:
        FileNotFoundError: If the images of the zoo are not there.
        ValueError: If the zoo does not say what its networks are, or has no validation images.
    """
    job = job_of(zoo, device=config.device, where="train sane")
    if job.data.val is None:
        raise ValueError(f"train sane: sample_every must be left out for {zoo.path}, made without validation images")
    known = any(name in zoo.properties.column_names for name in BY)
    anchors = choose_anchors(Choice(config.epochs, BEST if known else 1.0, aligned=config.aligned), zoo)
    images = None
    if norms_of(job.plan.build()):
        images = conditioning_images(zoo, job, min(CONDITIONED, len(job.data.train.y)), "train sane")
    activation = anchors.activation or ANY
    bench = Bench(job.plan, activation, images, job.data.val)
    options = {"method": "kde", "density": "token", "count": COUNT, "seed": config.seed}
    sampling = sample.Config(zoo=str(zoo.path), out=config.out, **options)

    def behave(weights: Tensor) -> tuple[Tensor, Tensor]:
        found = measure(weights.float(), job.plan, [activation] * len(weights), job.data.val, progress=False)
        return found.accuracy, disagreement(found.predictions)

    some = anchors.read(zoo, anchors.rows[:COUNT]).to(job.data.val.x.device)
    spread, apart = some.std(0).mean(), behave(some)[1]

    def look(model: nn.Module) -> loop.Metrics:
        layout, device = fastws.Layout.from_dict(extra["layout"]), next(model.parameters()).device
        scale = 1 / extra["std"].to(device)
        representation = Tokens(Encoder(model, layout, scale, -extra["mean"].to(device) * scale), config.aligned)
        made = sample.make(sampling, zoo, representation, anchors, bench, device)
        accuracy, disagreed = behave(made.weights)
        return {
            "accuracy": accuracy.mean(),
            "accuracy_std": accuracy.std(),
            "accuracy_best": accuracy.max(),
            "spread": made.weights.std(0).mean() / spread,
            "disagreement": disagreed / apart.clamp(min=1e-12),
        }

    return look
