"""Storing a network in a NeRN (Ashkenazi, Rimon, Vainshtein et al., ICLR 2023, arXiv 2212.13554).

Per step: predict all kernels, those of a batch with gradient. Minimise the error of the weights, and, unless these
losses are off, the distance of the feature maps and of the logits of the network with predicted kernels, the student,
from those of the original, the teacher, on a batch of images. Labels are for evaluation only.
"""

from copy import deepcopy
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastws.files.atomic import write_json
from fastws.nern import losses
from fastws.nern.checkpoint import describe
from fastws.nern.convolutions import LearnKernels, chosen_kernels
from fastws.nern.images import ImageSet, open_images, uniform_images
from fastws.nern.optimizer import clip_each, learning_rate, make_optimizer, set_learning_rate
from fastws.nern.orders import content_key
from fastws.nern.teachers import FeatureTaps, check_network, load_teacher
from fastws.nn.nern import NeRN
from fastws.runs import processes
from fastws.runs.begun import plain
from fastws.train import files, loop
from fastws.train.nern.config import Config, distils, loss_weights
from fastws.train.nern.setting import Job, evaluate_part, make_job, make_model, predict, student_weights

SMALLEST_LR = 1e-6  # where schedules end
MOST_SKIPPED = 100  # batches in a row


class Batch(NamedTuple):
    chosen: Tensor | None  # numbers of the kernels to learn from; None: all
    images: Tensor | None  # None while nothing is distilled
    weights: tuple[float, float, float]  # of the losses: reconstruction, features, distillation


def run(config: Config) -> None:
    with processes.join(config.device) as device:
        teacher = load_teacher(config.architecture, config.weights, key=config.key)
        images = None
        if config.images is not None:
            held_out = {"validation": 0} if config.select == "test" else {}
            images = open_images(config.images, size=config.image_size, augment=config.augment, **held_out)
        nern, metrics = train(config, teacher, images, device)
        if processes.rank() == 0:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(numbers or f"all {config.steps} steps were done before")
            for name in ("best.pt", "checkpoint.pt", "log.jsonl", "results.json"):
                if (Path(config.out) / name).exists():
                    print(f"{name}: {Path(config.out) / name}")


def train(
    config: Config, teacher: nn.Module, images: ImageSet | None, device: torch.device
) -> tuple[NeRN, dict[str, float]]:
    """Stores a network; see ``loop.train``.

    Args:
        config: What is to be done; its ``weights``, ``architecture`` and ``images`` are not read again.
        teacher: The network, any module; a copy in float32 is stored.
        images: To distil on and to evaluate on; None with ``data_free``, or for reconstruction alone.
        device: To work on.

    Returns:
        The NeRN as it is after the last step, and its last metrics.
    """
    if config.batch_size % processes.world():
        count = processes.world()
        raise ValueError(f"train nern: batch_size must be a multiple of {count} processes, got {config.batch_size}")
    files.make_folder(config.out)
    teacher = deepcopy(teacher).float().eval()
    job = make_job(config, teacher, images, device)
    if images is not None or (config.data_free and distils(config)):
        classes = images.num_classes if images is not None else 0
        check_network(job.teacher, job.shape, classes, maps=distils(config) and config.feature_weight > 0)
    torch.manual_seed(config.seed)
    model = make_model(config, job, teacher).to(device)
    optimizer = make_optimizer(
        config.optimizer,
        model.parameters(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        centralize=config.centralize,
    )
    optimizer.register_step_pre_hook(
        lambda *_: clip_each(list(model.parameters()), config.clip_each, config.clip_value)
    )
    watch = Watch(config, device)
    weights = [tensor.cpu() for tensor in job.originals]
    extra = {"key": content_key(weights, config.order, config.improve), "learned": job.learned}
    extra |= describe(model, job.stored)
    keep = partial(watch.keep, model=model, extra=extra)
    part = config.select if images is not None and config.select in images.parts else None

    def evaluate(model: nn.Module) -> loop.Metrics:
        found = evaluate_part(job, getattr(model, "module", model), part, config.batch_size)
        keep(found)
        return found | ({"skipped": watch.carried["skipped"].float()} if config.data_free else {})

    metrics = loop.train(
        config,
        model=model,
        optimizer=optimizer,
        batch=lambda step: draw(config, job, step, device),
        loss=lambda model, batch: compute_losses(config, job, model, batch),
        evaluate=evaluate,
        extra=extra,
        carried=watch.carried,
        set_rates=set_rate,
        evaluate_now=watch.improves,
        skip=partial(watch.skips, model=model) if config.data_free else None,
    )
    report(config, job, model, device)
    return model, metrics


def set_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    set_learning_rate(optimizer, learning_rate(config.schedule, step, config.steps, config.lr, SMALLEST_LR))


# --- losses


def draw(config: Config, job: Job, step: int, device: torch.device) -> Batch:
    """The kernels of a step, and this process's share of its images, where anything is distilled on them."""
    chosen, weights = job.kernels.draw(step), loss_weights(config, step)
    if not weights[1] and not weights[2]:
        return Batch(chosen, None, weights)
    if config.data_free:
        images = uniform_images(job.shape, config.batch_size, config.seed, step, device)
    else:
        images = job.images.batch(config.batch_size, config.seed, step, device)
    return Batch(chosen, images[processes.share(config.batch_size)], weights)


def compute_losses(config: Config, job: Job, model: nn.Module, batch: Batch) -> loop.Metrics:
    """The weighted sum of the losses that are on, and each of them; networks are run for those of them only."""
    weights = job.stored.weights(predict(job, model, batch.chosen))
    metrics, loss = {}, 0.0
    reconstruction, features, distillation = batch.weights
    if reconstruction:
        metrics["reconstruction"] = losses.RECONSTRUCTION[config.reconstruction](list(weights.values()), job.originals)
        loss = reconstruction * metrics["reconstruction"]
    if features or distillation:
        inner = getattr(model, "module", model)  # of DistributedDataParallel
        student = student_weights(job, inner, weights)
        with LearnKernels(student, chosen_kernels(job.stored.layers, batch.chosen)):
            teacher, student = run_networks(config, job, student, batch.images, maps=features > 0)
    if features:
        metrics["features"] = losses.FEATURES[config.features](student.maps, teacher.maps, student.weights)
        loss = loss + features * metrics["features"]
    if distillation:
        metrics["distillation"] = losses.DISTILLATION[config.distillation](student.logits, teacher.logits)
        loss = loss + distillation * metrics["distillation"]
    return {"loss": loss} | metrics


class Outputs(NamedTuple):
    logits: Tensor
    maps: list[Tensor]
    weights: list[int]  # how often each map counts


def run_networks(
    config: Config, job: Job, weights: dict[str, Tensor], images: Tensor, maps: bool
) -> tuple[Outputs, Outputs]:
    """Teacher and student on the same images."""
    images = images.contiguous(memory_format=job.format)
    with torch.no_grad():
        teacher = run_network(config, job.teacher, {}, images, maps)
    return teacher, run_network(config, job.teacher, weights, images, maps)


def run_network(config: Config, network: nn.Module, weights: dict[str, Tensor], images: Tensor, maps: bool) -> Outputs:
    if not maps:
        return Outputs(functional_call(network, weights, images).float(), [], [])
    with FeatureTaps(after=config.maps == "doubled_after", doubled=config.maps != "clean") as taps:
        logits = functional_call(network, weights, images)
    return Outputs(logits.float(), taps.maps, taps.weights)


# --- evaluation


class Watch:
    """What a run remembers from step to step: the best evaluation, recent losses, and batches left out."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.carried = {
            "best": torch.tensor(-torch.inf, dtype=torch.float64),
            "window": torch.full((config.greedy_window,), torch.inf),
            "seen": torch.tensor(0),
            "skipped": torch.zeros((), dtype=torch.int64, device=device),  # batches, in all
            "skipped_in_a_row": torch.zeros((), dtype=torch.int64, device=device),
        }
        self.steps = 0  # since the run was begun or resumed

    def keep(self, found: loop.Metrics, *, model: nn.Module, extra: dict[str, Any]) -> None:
        """Writes best.pt if no evaluation before was as good: by accuracy, without images by the error of weights.

        Distillation on noise lets that error grow and has no other measure; then the latest weights count as the best.
        """
        score = float(found["accuracy"] if "accuracy" in found else -found["relative_error"])
        latest = "accuracy" not in found and distils(self.config)
        if found["relative_error"].isfinite() and (latest or score > self.carried["best"]):
            self.carried["best"].fill_(score)
            if processes.rank() == 0:
                state = {"config": plain(self.config), "extra": extra, "model": model.state_dict()}
                files.save(Path(self.config.out) / "best.pt", state)

    def improves(self, done: int, metrics: loop.Metrics) -> bool:
        """Whether distillation is at most what it was at the last times, by which the published code evaluates.

        Waits for the device, every ``greedy_every`` steps: what comes next depends on it.
        """
        window, seen = self.carried["window"], self.carried["seen"]
        if not len(window) or (done - 1) % self.config.greedy_every or "distillation" not in metrics:
            return False
        terms = processes.average({name: metrics[name] for name in ("features", "distillation") if name in metrics})
        if not isfinite(sum(terms.values())):  # of a batch that was left out
            return False
        window[int(seen) % len(window)] = sum(terms.values())
        seen += 1
        return bool(seen >= len(window) and sum(terms.values()) <= window.min())

    def skips(self, metrics: loop.Metrics, *, model: nn.Module) -> Tensor:
        """Whether a batch of noise is to be left out because its loss or a gradient is not finite: bool, ``[]``."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        finite = torch.stack([x.isfinite().all() for x in (metrics["loss"], *gradients)]).all()
        bad = processes.total((~finite).float()) > 0
        self.carried["skipped"] += bad
        self.carried["skipped_in_a_row"].copy_((self.carried["skipped_in_a_row"] + 1) * bad)
        self.steps += 1
        # only now and then, because asking waits for the device
        if self.steps % MOST_SKIPPED == 0 and self.carried["skipped_in_a_row"] >= MOST_SKIPPED:
            got = f"{MOST_SKIPPED} batches in a row where they are not"
            raise FloatingPointError(f"train nern: loss and gradients must be finite, got {got}; lower lr")
        return bad


def report(config: Config, job: Job, model: nn.Module, device: torch.device) -> None:
    """Writes results.json: how good the best and the last weights are on the test images, which chose nothing."""
    best = Path(config.out) / "best.pt"
    if job.images is None or "test" not in job.images.parts or not best.exists():
        return
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = {
        "weights": job.stored.num_weights,
        "nern": sum(x.numel() for x in last.values()),
        "select": config.select,
    }
    for name, state in (("best", files.load(best)["model"]), ("last", last)):
        model.load_state_dict(state)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=loop.uses_bf16(config, device)):
            found = evaluate_part(job, model, "test", config.batch_size)
        results[name] = {key: float(value) for key, value in found.items()}
    if processes.rank() == 0:
        write_json(Path(config.out) / "results.json", results)
