"""What a run of ``fastws train nern`` works on, and how good the network with predicted kernels is."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastws.devices import fast_format
from fastws.files.checkpoints import load_checkpoint
from fastws.nern.batching import KernelBatches, learn_from
from fastws.nern.folding import fold
from fastws.nern.images import ImageSet
from fastws.nern.layers import StoredLayers, find_layers, rows_of
from fastws.nern.orders import load_orders, network_orders
from fastws.nn.nern import NeRN, load
from fastws.runs import processes
from fastws.train import loop
from fastws.train.nern.config import Config, size_of

CLASSIFIER = "classifier"  # name of the one weight of the student that may be learned as it is


class Job(NamedTuple):
    """What a run works on; tensors on the device."""

    teacher: nn.Module  # with folded batch norms
    factors: dict[str, Tensor]  # by which predicted weights are multiplied in it
    stored: StoredLayers
    originals: list[Tensor]
    kernels: KernelBatches
    images: ImageSet | None
    shape: tuple[int, int, int]  # of an image
    format: torch.memory_format  # of images and maps
    learned: str | None  # name of the weight of the student that is learned as it is
    answers: dict[str, list[Tensor]]  # of the teacher to the batches of a part of the images


def make_job(config: Config, teacher: nn.Module, images: ImageSet | None, device: torch.device) -> Job:
    layers = find_layers(teacher, sizes=config.sizes, exclude=config.exclude, linear=config.linear)
    weights = [teacher.get_parameter(layer.name).detach() for layer in layers]
    rows = rows_of(layers, read_orders(config, weights)).to(device)
    kernel = max(max(layer.kernel) for layer in layers)
    stored = StoredLayers(tuple(layers), kernel, config.reduction, rows)
    folded, factors = fold(teacher)
    format = fast_format(teacher)
    folded = folded.to(device, memory_format=format)
    norms, counts = stored.norms(teacher), [layer.kernels for layer in layers]
    kernels = KernelBatches(config.batching, config.kernel_batch, counts, norms, config.seed, device)
    size = config.image_size or 32
    channels = next((module.in_channels for module in teacher.modules() if isinstance(module, nn.Conv2d)), 3)
    shape = images.shape if images is not None else (channels, size, size)
    factors = {name: factor.to(device) for name, factor in factors.items()}
    learned = classifier_name(teacher) if config.learn_classifier else None
    if learned in [layer.name for layer in layers]:
        raise ValueError(
            f"train nern: exclude must name {learned.rpartition('.')[0]}, which is learned as it is, got it stored"
        )
    originals = [weight.to(device) for weight in weights]
    return Job(folded, factors, stored, originals, kernels, images, shape, format, learned, {})


def read_orders(config: Config, weights: list[Tensor]):
    if config.order == "none":
        return None
    if config.orders is not None:
        return load_orders(config.orders, weights, config.order)
    cache, first = Path(config.out) / "orders", processes.rank() == 0
    return network_orders(weights, config.order, improve=config.improve, cache=cache, progress=first)


def make_model(config: Config, job: Job, teacher: nn.Module) -> NeRN:
    model = NeRN(size_of(config, job.stored.kernel), job.stored.grid)
    if config.init is not None:
        load(model, load_checkpoint(config.init))
    if job.learned:
        model.register_parameter(CLASSIFIER, nn.Parameter(teacher.get_parameter(job.learned).detach().clone()))
    return model


def classifier_name(teacher: nn.Module) -> str:
    if processes.world() > 1:
        raise ValueError("train nern: learn_classifier must be off in several processes, got on")
    modules = list(teacher.named_modules())
    linear, convolutions = ([name for name, x in modules if isinstance(x, kind)] for kind in (nn.Linear, nn.Conv2d))
    return f"{(linear or convolutions)[-1]}.weight"


# --- the network with predicted kernels


def predict(job: Job, model: nn.Module, chosen: Tensor | None) -> Tensor:
    """All kernels, ``[N, kernel**2]``, with gradient in those that were chosen."""
    rows = job.stored.rows
    if chosen is None:
        return model(rows)
    batch = model(rows[chosen])
    with torch.no_grad():
        predictions = model(rows)  # all: how many others there are would have to be asked of the device
    predictions[chosen] = batch.detach()
    return learn_from(predictions, batch, chosen)


def student_weights(job: Job, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What takes the place of the teacher's tensors in the student."""
    weights = weights | ({job.learned: model.get_parameter(CLASSIFIER)} if job.learned else {})
    return {name: x * job.factors[name] if name in job.factors else x for name, x in weights.items()}


def evaluate_part(job: Job, model: nn.Module, part: str | None, size: int) -> loop.Metrics:
    """Relative error of the weights; on images also accuracy and cross-entropy of the student, and how often it agrees.

    Processes share the images.
    """
    weights = job.stored.weights(predict(job, model, None))
    pairs = list(zip(weights.values(), job.originals, strict=True))
    squares = [sum(x.double().square().sum() for x in xs) for xs in ([x - y for x, y in pairs], job.originals)]
    metrics = {"relative_error": (squares[0] / squares[1]).sqrt()}
    if part is None:
        return metrics
    student, answers = student_weights(job, model, weights), answers_of(job, part, size)
    sums = torch.zeros(5, dtype=torch.float64, device=squares[0].device)
    for number, (images, labels) in enumerate(job.images.batches(part, size, sums.device)):
        if number % processes.world() == processes.rank():
            logits = functional_call(job.teacher, student, images.contiguous(memory_format=job.format)).float()
            said, original = logits.argmax(1), answers[number]
            right = [(x == y).sum() for x, y in ((said, labels), (said, original), (original, labels))]
            entropy = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([*right, entropy, torch.tensor(len(labels)).to(entropy)]).double()
    *values, count = processes.total(sums)
    names = ("accuracy", "agreement", "original_accuracy", "cross_entropy")
    return metrics | {name: value / count for name, value in zip(names, values, strict=True)}


def answers_of(job: Job, part: str, size: int) -> list[Tensor]:
    """The classes that the teacher sees in each batch of a part; computed once."""
    if part not in job.answers:
        device = job.originals[0].device
        job.answers[part] = [job.teacher(images).argmax(1) for images, _ in job.images.batches(part, size, device)]
    return job.answers[part]
