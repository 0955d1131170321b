"""Storing a network in a NeRN (Ashkenazi, Rimon, Vainshtein et al., ICLR 2023, arXiv 2212.13554).

Per step: predict all kernels, those of a batch with gradient. Minimise the error of the weights, and, unless these
losses are off, the distance of the feature maps and of the logits of the network with predicted kernels, the student,
from those of the original, the teacher, on a batch of images. Labels are for evaluation only.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastws.files import load_checkpoint
from fastws.nern import losses
from fastws.nern.batching import KernelBatches, Method, learn_from
from fastws.nern.checkpoint import describe
from fastws.nern.convolutions import LearnKernels, chosen_kernels
from fastws.nern.folding import fold
from fastws.nern.images import ImageSet, open_images, uniform_images
from fastws.nern.layers import Reduction, StoredLayers, find_layers, rows_of
from fastws.nern.optimizer import Name, Schedule, clip_each, learning_rate, make_optimizer, set_learning_rate
from fastws.nern.orders import content_key, load_orders, network_orders
from fastws.nern.presets import fields_of
from fastws.nern.teachers import FeatureTaps, check_network, load_teacher
from fastws.nn.nern import NeRN, NeRNConfig, load
from fastws.ops.random_subset import complement
from fastws.train import files, loop, processes
from fastws.zoo.format import write_json

SMALLEST_LR = 1e-6  # where schedules end
FEW_CHANNELS = 16
CLASSIFIER = "classifier"  # name of the one weight of the student that may be learned as it is
MOST_SKIPPED = 100  # batches in a row


@dataclass(frozen=True, kw_only=True)
class Config(loop.Config):
    """Stores a network in a NeRN. What is left out is that of the preset, if one is given."""

    weights: str  # checkpoint of the network: safetensors or torch
    preset: str | None = None  # a published run, as cifar10-resnet20-180-crossfilter
    architecture: str | None = None  # of the network: cifar-resnet20-a, resnet18, torchvision:vgg16, timm:resnet10t
    images: str | None = None  # data set to distil on and to evaluate on: cifar10, or a folder
    data_free: bool = False  # distil on noise instead
    image_size: int | None = None  # of folders of large images, read as they are wanted, and of noise (by default 32)

    hidden: int | None = None  # width of the NeRN
    order: Literal["none", "infilter", "crossfilter"] | None = None  # of kernels; by default crossfilter
    improve: bool = False  # greedy orders by 2-opt and Or-opt
    orders: str | None = None  # folder of orders, made before; by default they are made, and kept in out/orders
    blocks: int = 5  # linear layers
    activation: Literal["relu", "leaky_relu", "hardswish", "gelu", "relu6", "elu"] = "relu"
    encoding: Literal["basic", "ffn"] = "basic"  # sines of each coordinate, or of random sums of all
    fusion: Literal["concat", "sum"] = "concat"  # of the encodings of layer, filter and channel
    levels: int = 40  # frequencies per coordinate
    base: float = 0.76  # ratio of one frequency to the one before
    init: str | None = None  # checkpoint of a NeRN to begin with, for instance a published one

    sizes: tuple[int, ...] | None = None  # of the kernels that are stored; by default all
    exclude: tuple[str, ...] = ()  # patterns of names of layers that are not stored
    linear: bool = False  # whether linear layers are stored, as 1x1 convolutions
    reduction: Reduction = "center"  # of predictions where kernels are smaller
    learn_classifier: bool = False  # train the last linear layer of the student as well, as it is

    steps: int | None = None  # in all, those before an interruption included
    batch_size: int | None = None  # images per step, over all processes
    kernel_batch: int | None = None  # kernels per step that gradients go into
    batching: Method = "random_weighted_batch"
    objective: Literal["joint", "phases"] = "joint"  # after the warm-up; phases: no longer the reconstruction
    warmup: int | None = None  # steps of reconstruction alone
    reconstruction: Literal["rmse", "mse"] = "rmse"
    features: Literal["image", "batch", "similarity"] = "image"
    distillation: Literal["stable_kl", "kl", "both_stable_kl", "temperature_kl"] = "stable_kl"
    reconstruction_weight: float = 1.0
    feature_weight: float | None = None  # 0: off
    distillation_weight: float | None = None  # 0: off
    maps: Literal["clean", "doubled", "doubled_after"] | None = None  # sums of blocks count twice; after activations

    optimizer: Name = "ranger"
    lr: float = 5e-3  # at the beginning
    schedule: Schedule = "cosine"  # down to 1e-6
    weight_decay: float = 1e-3
    centralize: bool = True  # gradients, in Ranger
    clip_each: float | None = None  # largest norm of the gradient of each parameter
    clip_value: float | None = None  # largest entry of the gradient

    eval_every: int | None = None  # steps
    greedy_window: int | None = None  # also evaluate when distillation is better than so many times before; 0: do not
    greedy_every: int | None = None  # steps between these times
    select: Literal["val", "test"] = "val"  # part of the images that the best weights are chosen on; published: test

    def __post_init__(self):
        for name, value in fields_of(self.preset).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("architecture", "hidden"):
            if getattr(self, name) is None:
                raise ValueError(f"train nern: {name} must be given, or a preset, got neither")
        super().__post_init__()
        for name in ("hidden", "kernel_batch", "greedy_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train nern: {name} must be at least 1, got {getattr(self, name)}")
        weights = "reconstruction_weight", "feature_weight", "distillation_weight"
        for name in (*weights, "weight_decay", "warmup", "greedy_window"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"train nern: {name} must be at least 0, got {getattr(self, name)}")
        for name in ("image_size", "clip_each", "clip_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train nern: {name} must be positive, or left out, got {value}")
        size_of(self, kernel=1)
        distilling = distils(self)
        if distilling and self.images is None and not self.data_free:
            raise ValueError("train nern: images must be given to distil on, or --data-free, or both weights 0")
        for step in (0, self.steps - 1):  # of either phase
            if not any(loss_weights(self, step)):
                raise ValueError(f"train nern: a loss must be on in each step, got weights that are 0 in step {step}")
        if self.orders is not None and self.order == "none":
            raise ValueError(f"train nern: orders must be left out with the order none, got {self.orders!r}")


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


class Batch(NamedTuple):
    chosen: Tensor | None  # numbers of the kernels to learn from; None: all
    images: Tensor | None  # None while nothing is distilled
    weights: tuple[float, float, float]  # of the losses: reconstruction, features, distillation


def run(config: Config) -> None:
    with processes.join(config.device) as device:
        teacher = load_teacher(config.architecture, config.weights)
        images = None
        if config.images is not None:
            held_out = {"validation": 0} if config.select == "test" else {}
            images = open_images(config.images, size=config.image_size, **held_out)
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
    extra = describe(model, job.stored) | {"learned": job.learned}
    extra |= {"key": content_key(weights, config.order, config.improve)}
    keep = partial(watch.keep, model=model, extra=extra)
    part = config.select if images is not None and config.select in images.parts else None

    def evaluate(model: nn.Module) -> loop.Metrics:
        found = evaluate_part(job, getattr(model, "module", model), part, config.batch_size)
        keep(found)
        return found

    metrics = loop.train(
        config,
        model=model,
        optimizer=optimizer,
        batch=lambda step: draw(config, job, step, device),
        loss=lambda model, batch: compute_losses(config, job, model, batch),
        evaluate=evaluate,
        extra=extra,
        memory=watch.memory,
        schedule=set_rate,
        early=watch.improves,
        skip=partial(watch.skips, model=model),
    )
    report(config, job, model, device)
    return model, metrics


def distils(config: Config) -> bool:
    return config.warmup < config.steps and bool(config.feature_weight or config.distillation_weight)


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


def loss_weights(config: Config, step: int) -> tuple[float, float, float]:
    if step < config.warmup:
        return config.reconstruction_weight, 0.0, 0.0
    reconstruction = config.reconstruction_weight if config.objective == "joint" else 0.0
    return reconstruction, config.feature_weight, config.distillation_weight


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


def predict(job: Job, model: nn.Module, chosen: Tensor | None) -> Tensor:
    """All kernels, ``[N, kernel**2]``, with gradient in those that were chosen."""
    rows = job.stored.rows
    if chosen is None:
        return model(rows)
    others = complement(chosen, len(rows))
    with torch.no_grad():
        rest = model(rows[others])
    batch = model(rows[chosen])
    predictions = torch.empty(len(rows), *batch.shape[1:], dtype=batch.dtype, device=batch.device)
    predictions[others], predictions[chosen] = rest, batch.detach()
    return learn_from(predictions, batch, chosen)


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


def student_weights(job: Job, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What takes the place of the teacher's tensors in the student."""
    weights = {name: x * job.factors[name] if name in job.factors else x for name, x in weights.items()}
    return weights | ({job.learned: model.get_parameter(CLASSIFIER)} if job.learned else {})


# --- evaluation


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


class Watch:
    """What a run remembers from step to step: the best evaluation, recent losses, and batches left out."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.memory = {
            "best": torch.tensor(-torch.inf),
            "window": torch.full((config.greedy_window,), torch.inf),
            "seen": torch.tensor(0),
            "skipped": torch.tensor(0),  # batches, in all
            "skipped_in_a_row": torch.tensor(0),
        }

    def keep(self, found: loop.Metrics, *, model: nn.Module, extra: dict[str, Any]) -> None:
        """Writes best.pt if no evaluation before was as good: by accuracy, without images by the error of weights."""
        score = found["accuracy"] if "accuracy" in found else -found["relative_error"]
        if found["relative_error"].isfinite() and score > self.memory["best"]:
            self.memory["best"].fill_(float(score))
            if processes.rank() == 0:
                state = {"config": loop.plain(self.config), "extra": extra, "model": model.state_dict()}
                files.save(Path(self.config.out) / "best.pt", state)

    def improves(self, done: int, metrics: loop.Metrics) -> bool:
        """Whether distillation is at most what it was at the last times, by which the published code evaluates."""
        window, seen = self.memory["window"], self.memory["seen"]
        if not len(window) or (done - 1) % self.config.greedy_every or "distillation" not in metrics:
            return False
        terms = processes.average({name: metrics[name] for name in ("features", "distillation") if name in metrics})
        window[int(seen) % len(window)] = sum(terms.values())
        seen += 1
        return bool(seen >= len(window) and sum(terms.values()) <= window.min())

    def skips(self, metrics: loop.Metrics, *, model: nn.Module) -> bool:
        """Whether a batch of noise is to be left out because its loss or a gradient is not finite."""
        if not self.config.data_free:
            return False
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        finite = torch.stack([x.isfinite().all() for x in (metrics["loss"], *gradients)]).all()
        bad = bool(processes.total((~finite).float()))
        self.memory["skipped"] += bad
        self.memory["skipped_in_a_row"].copy_((self.memory["skipped_in_a_row"] + 1) * bad)
        if self.memory["skipped_in_a_row"] >= MOST_SKIPPED:
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


# --- what a run works on


def make_job(config: Config, teacher: nn.Module, images: ImageSet | None, device: torch.device) -> Job:
    layers = find_layers(teacher, sizes=config.sizes, exclude=config.exclude, linear=config.linear)
    weights = [teacher.get_parameter(layer.name).detach() for layer in layers]
    rows = rows_of(layers, read_orders(config, weights)).to(device)
    kernel = max(max(layer.kernel) for layer in layers)
    stored = StoredLayers(tuple(layers), kernel, config.reduction, rows)
    folded, factors = fold(teacher)
    format = fast_format(teacher)
    folded = folded.to(device, memory_format=format)
    norms = stored.norms(teacher).to(device)
    kernels = KernelBatches(
        config.batching, config.kernel_batch, [layer.kernels for layer in layers], norms, config.seed
    )
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


def fast_format(network: nn.Module) -> torch.memory_format:
    """Channels last, but where oneDNN's strided 1x1 convolutions of few channels write past their memory in it.

    See https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    for module in network.modules():
        strided = isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1 < max(module.stride)
        if strided and module.in_channels // module.groups < FEW_CHANNELS:
            return torch.contiguous_format
    return torch.channels_last


def read_orders(config: Config, weights: list[Tensor]):
    if config.order == "none":
        return None
    if config.orders is not None:
        return load_orders(config.orders, weights, config.order)
    cache, first = Path(config.out) / "orders", processes.rank() == 0
    return network_orders(weights, config.order, improve=config.improve, cache=cache, progress=first)


def size_of(config: Config, kernel: int) -> NeRNConfig:
    names = ("hidden", "blocks", "activation", "encoding", "fusion", "levels", "base")
    return NeRNConfig(kernel=kernel, **{name: getattr(config, name) for name in names})


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
    names = [name for name, module in teacher.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError("train nern: learn_classifier must be off for a network without linear layers, got on")
    return f"{names[-1]}.weight"
