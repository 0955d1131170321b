"""What sets of networks are judged in: the zoo that they were made from, its images, and networks held out of it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastws.devices import find_device
from fastws.downstream.evaluate import activations_of, job_of
from fastws.downstream.judging.baselines import Set, baselines
from fastws.downstream.judging.config import Config
from fastws.downstream.judging.judged import ENSEMBLE, Judged, Known, Replicates, behave, ensemble_gain, judge
from fastws.downstream.judging.memorisation import SCREENED, Judge
from fastws.downstream.populations import Measured, measure
from fastws.downstream.representation import load
from fastws.downstream.sampling.anchors import BY, Anchors
from fastws.matching.match import match
from fastws.zoo.alignment import aligned_rows
from fastws.zoo.format.rows import last_rows, rows_of_epochs
from fastws.zoo.format.zoo import ODD, Zoo
from fastws.zoo.making.make import Job
from fastws.zoo.making.recipes import Part

SMALLEST = 10  # held-out networks
PLAIN = ("noise", "average", "PCA + Gaussian", "PCA + flow")  # groups of baselines, of which the nearest are screened


class Scene(NamedTuple):
    """What sets are judged in."""

    zoo: Zoo
    job: Job
    activation: str
    device: torch.device
    judged_by: Judge
    part: Part  # images that predictions are compared on
    known: Known
    gain: float  # of ten held-out networks as an ensemble

    def measure(self, flat: Tensor) -> Measured:
        return measure_on(flat, self.job, self.activation, self.part, self.device)

    def judge(self, one: Set) -> tuple[Judged, Replicates, Measured]:
        novelty = self.judged_by.novelty(one.flat, SCREENED if one.group in PLAIN else None)
        found = self.measure(one.flat)
        gain = ensemble_gain(self.measure(one.flat[:ENSEMBLE]), self.known.y)
        told = judge(self.judged_by, self.known, one.name, one.group, one.flat, novelty, found, gain, self.gain)
        return *told, found


def require_activation(one: Zoo, zoo: Zoo, activation: str | None) -> None:
    if "activation" in one.properties.column_names:
        others = set(one.properties["activation"].to_pylist()) - {activation}
        if others:
            what = f"activation {activation}, the commonest of {zoo.path}, got {', '.join(map(str, others))}"
            raise ValueError(f"zoo compare: samples {one.path} must have {what}")


def flips_of(zoo: Zoo, anchors: Anchors) -> tuple[bool, ...]:
    return tuple(flip and anchors.activation in ODD for flip in zoo.symmetry.flips)


def set_scene(config: Config, zoo: Zoo, anchors: Anchors) -> tuple[Scene, Tensor]:
    """What sets are judged in, and the rows of the training states: all that the samples were learned from."""
    device = find_device(config.device)
    job = job_of(zoo, limit=None, device=str(device.type))
    rows = states_of(zoo, "train", anchors.activation)
    rows = rows_of_epochs(zoo, rows, config.epochs, "zoo compare")
    held_out = states_of(zoo, "test", anchors.activation, last=True)
    if len(held_out) < SMALLEST:  # models are not trained on those of val, of which only a flow asks when to stop
        held_out = torch.cat([held_out, states_of(zoo, "val", anchors.activation, last=True)])
    by = next((name for name in BY if name in zoo.properties.column_names), None)
    if config.best < 1 and by is not None:  # as accurate as the anchors have to be
        values = torch.from_numpy(zoo.numbers(by))
        held_out = held_out[values[held_out] >= values[anchors.rows].min()]
    held_out = held_out[: config.count]
    if len(held_out) < SMALLEST:
        what = f"{SMALLEST} networks of activation {anchors.activation} in its test and val splits, got {len(held_out)}"
        raise ValueError(f"zoo compare: zoo must have at least {what}; take a larger zoo")
    training, others = aligned_rows(zoo, rows).float(), aligned_rows(zoo, held_out).float()
    judged_by = Judge(training, others, zoo.symmetry, zoo.layout, flips_of(zoo, anchors))
    x, y = job.data.test
    spaced = torch.linspace(0, len(y) - 1, min(len(y), config.images)).long()
    part = Part(x[spaced.to(x.device)], y[spaced.to(y.device)])
    activation = anchors.activation or activations_of(zoo, job.plan)[0]
    predictions = measure_on(training, job, activation, part, device).predictions
    found = measure_on(others, job, activation, part, device)
    known = Known(part.y.cpu(), predictions, found, None)
    known = known._replace(behaviour=behave(known, found, judged_by.nearest(others)[1]))
    gain = ensemble_gain(measure_on(others[:ENSEMBLE], job, activation, part, device), known.y)
    return Scene(zoo, job, activation, device, judged_by, part, known, gain), rows


def measure_on(flat: Tensor, job: Job, activation: str, part: Part, device: torch.device) -> Measured:
    return measure(flat.to(device), job.plan, [activation] * len(flat), part, progress=False)


def sets_of(config: Config, scene: Scene, samples: list[Zoo], anchors: Anchors, rows: Tensor) -> Iterator[Set]:
    """All networks that are judged: held-out ones, untrained ones, reconstructed anchors, samples and baselines."""
    zoo, judged_by = scene.zoo, scene.judged_by

    def aligned(flat: Tensor) -> Tensor:
        found = match(flat, judged_by.mean, zoo.symmetry, zoo.layout, flips=anchors.activation in ODD)
        return zoo.symmetry.permute(flat, found, zoo.layout)

    yield Set("held-out networks", "held-out", judged_by.held_out)
    untrained = states_of(zoo, "train", anchors.activation, untrained=True)[: config.count]
    if len(untrained) > 1:
        yield Set("untrained networks", "untrained networks", aligned(zoo.rows(untrained).float()))
    if config.model is not None:
        representation = load(config.model, scene.device).suit(zoo, "zoo compare")
        some = anchors.rows[: config.count]
        flat = (aligned_rows(zoo, some) if representation.aligned else zoo.rows(some)).float().to(scene.device)
        made = representation.decode(representation.encode(flat), like=flat).cpu()
        yield Set("reconstructed anchors", "reconstructed anchors", aligned(made))
    for one in samples:
        yield Set(one.path.name, one.path.name, aligned(one.rows(torch.arange(len(one))).float()))
    if config.baselines:
        last = set(last_rows(zoo).values())
        ends = anchors.rows[[row in last for row in anchors.rows.tolist()]]
        picked = aligned_rows(zoo, ends if len(ends) else anchors.rows).float()
        validation = states_of(zoo, "val", anchors.activation, last=True)
        stopping = aligned_rows(zoo, validation).float() if len(validation) else judged_by.training[:0]
        options = {"count": config.count, "flow": config.flow, "seed": config.seed}
        yield from baselines(judged_by.training, picked, stopping, zoo.layout, **options)


def states_of(zoo: Zoo, split: str, activation: str | None, last: bool = False, untrained: bool = False) -> Tensor:
    """Rows of a split, of one activation: all states after training has begun, each network's last, or untrained."""
    rows = zoo.split(split)
    kept = set(last_rows(zoo).values()) if last else None
    column = zoo.properties["activation"].to_pylist() if activation is not None else None
    epochs = zoo.numbers("epoch") if "epoch" in zoo.properties.column_names else None
    if epochs is None and untrained:
        return rows[:0]
    chosen = [
        row
        for row in rows.tolist()
        if (kept is None or row in kept)
        and (column is None or column[row] == activation)
        and (epochs is None or (epochs[row] == 0 if untrained else epochs[row] > 0))
    ]
    return torch.tensor(chosen, dtype=torch.int64)
