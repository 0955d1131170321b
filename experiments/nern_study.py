"""What the NeRN experiments share: a network stored with several widths, and curves of its orders.

Writes into --out: a folder for each run of ``fastws train nern``, which a second call of the same command resumes;
results.json; accuracy.png, by size; curves.png, the error of the weights by step for each order.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from torch import nn

from fastws.files.atomic import write_json
from fastws.nern.checkpoint import load_nern
from fastws.nern.export import PRECISIONS, answers, compare, measure, reconstruct, relative_error
from fastws.nern.images import ImageSet, open_images
from fastws.nern.presets import fields_of
from fastws.nern.teachers import load_teacher
from fastws.runs import processes
from fastws.train import files, loop
from fastws.train.nern import train as nern

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402  after the choice of how to draw

POINTS = 100  # of a curve
SMOKE = {"hidden": 8, "batch_size": 4, "kernel_batch": 64, "exclude": ("layer[234].*", "layer1.[12].*")}  # of each run


@dataclass(frozen=True, kw_only=True)
class Config:
    """Stores a network in NeRNs of several widths, and compares the orders of its kernels."""

    weights: str  # checkpoint of the network
    images: str | None = None  # to distil on and to evaluate on; without, on noise, and nothing is evaluated
    out: str  # folder of the runs and results

    architecture: str
    preset: str  # published runs without width and order, as cifar10-resnet20
    hidden: tuple[int, ...]  # widths, stored in the order crossfilter
    seeds: tuple[int, ...] = (0,)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of training: auto is bf16 on CUDA, fp32 elsewhere
    objective: Literal["joint", "phases"] = "joint"  # after the warm-up
    steps: int | None = None  # of each run; by default as published
    warmup: int | None = None  # steps of reconstruction alone; by default as published
    curve_hidden: int  # width of the curves
    curve_steps: int = 1500  # of reconstruction alone; 0: no curves
    curve_orders: tuple[Literal["crossfilter", "infilter", "none", "improved"], ...] = (
        "crossfilter",
        "infilter",
        "none",
        "improved",
    )
    image_size: int | None = None  # of folders of large images
    smoke: bool = False  # few layers, steps and images, to see that everything works; its numbers mean nothing
    device: str | None = None

    def __post_init__(self):
        if self.smoke:
            tiny = {"hidden": self.hidden[:1], "steps": 2, "warmup": 1, "curve_steps": 2}
            for name, value in tiny.items():
                object.__setattr__(self, name, value)


def run(config: Config) -> dict[str, Any]:
    with processes.join(config.device) as device:
        teacher = load_teacher(config.architecture, config.weights)
        images = None
        if config.images is not None:
            augment = fields_of(f"{config.preset}-{config.hidden[0]}-crossfilter")["augment"]
            limit = 8 if config.smoke else None
            images = open_images(config.images, size=config.image_size, limit=limit, augment=augment)
        out = files.make_folder(config.out)
        results = {"config": {"weights": config.weights, "architecture": config.architecture, "smoke": config.smoke}}
        results |= files.describe(device) | {"curves": {}, "stored": []}
        for order in config.curve_orders if config.curve_steps else ():
            results["curves"][order] = curve(config, teacher, order, device)
            write_json(out / "results.json", results)
        for hidden, seed in ((hidden, seed) for hidden in config.hidden for seed in config.seeds):
            results["stored"].append(store(config, teacher, images, hidden, seed, device))
            write_json(out / "results.json", results)
    written = [out / "results.json"]
    if results["stored"] and images is not None:
        written.append(draw_accuracies(out / "accuracy.png", results["stored"]))
    if results["curves"]:
        written.append(draw_curves(out / "curves.png", results["curves"]))
    print_results(results, written)
    return results


def training(config: Config, name: str, hidden: int, order: str, **fields) -> nern.Config:
    if config.smoke:
        fields |= SMOKE
    return nern.Config(
        preset=f"{config.preset}-{hidden}-crossfilter",
        weights=config.weights,
        architecture=config.architecture,
        image_size=config.image_size,
        precision=config.precision,
        order="crossfilter" if order == "improved" else order,
        improve=order == "improved",
        out=str(Path(config.out, name)),
        **fields,
    )


def curve(config: Config, teacher: nn.Module, order: str, device: torch.device) -> list[tuple[int, float]]:
    """Steps and relative errors of the weights, trained for these alone."""
    fields = {"steps": config.curve_steps, "warmup": config.curve_steps}
    fields["eval_every"] = max(config.curve_steps // POINTS, 1)
    one = training(config, f"curve-{order}", config.curve_hidden, order, **fields)
    nern.train(one, teacher, None, device)
    return [(line["step"], line["val/relative_error"]) for line in log(one) if "val/relative_error" in line]


def store(
    config: Config, teacher: nn.Module, images: ImageSet | None, hidden: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Trains one NeRN; its size, time, and how good the stored network is on the test images, by precision."""
    fields = {"objective": config.objective, "images": config.images, "data_free": images is None, "seed": seed}
    fields |= {"steps": config.steps, "warmup": config.warmup}
    one = training(config, f"{hidden}-crossfilter-{seed}", hidden, "crossfilter", **fields)
    nern.train(one, teacher, images, device)
    predictor, stored, learned = load_nern(Path(one.out, "best.pt"))
    rate = next(line["steps_per_second"] for line in reversed(log(one)) if "train/loss" in line)
    row = {"hidden": one.hidden, "seed": seed, "steps": one.steps, "warmup": one.warmup, "objective": one.objective}
    row |= {"training": "bf16" if loop.uses_bf16(one, device) else "fp32"}
    row |= {"hours": one.steps / rate / 3600, "precisions": {}}
    if images is not None:
        theirs, labels = answers(teacher.to(device), images.batches("test", 250, device)), images.parts["test"].labels
        teacher.cpu()
    for precision in PRECISIONS:
        network = reconstruct(predictor, stored, teacher, precision, learned)
        found = {"share": measure(predictor, stored, precision).share}
        found["relative_error"] = relative_error(network, teacher, stored)
        if images is not None:
            found |= compare(answers(network.to(device), images.batches("test", 250, device)), theirs, labels)
        row["precisions"][precision] = found
    return row


def log(config: nern.Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(config.out, "log.jsonl").read_text().splitlines()[1:]]


# --- what is shown


def draw_curves(path: Path, curves: dict[str, list[tuple[int, float]]]) -> Path:
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for order, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=order)
    axes.set(xlabel="step", ylabel="relative error of the weights")
    axes.legend(title="order")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path


def draw_accuracies(path: Path, stored: list[dict[str, Any]]) -> Path:
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for precision in PRECISIONS:
        found = [row["precisions"][precision] for row in stored]
        axes.plot([one["share"] for one in found], [one["accuracy"] for one in found], "o", label=precision)
    axes.axhline(stored[0]["precisions"]["fp32"]["original_accuracy"], color="gray", label="original")
    axes.legend(title="predictor")
    axes.set(xlabel="bytes of predictor and order over those of the stored weights", ylabel="test accuracy")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return path


def print_results(results: dict[str, Any], written: list[Path]) -> None:
    for order, points in results["curves"].items():
        print(f"{order:12} relative error {points[-1][1]:.4f} after {points[-1][0]} steps of reconstruction")
    for row in results["stored"]:
        print(f"width {row['hidden']}, seed {row['seed']}: {row['steps']} steps in {row['hours']:.2f} h")
        for precision, found in row["precisions"].items():
            numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
            print(f"  {precision}: {numbers}")
    print(f"results: {', '.join(map(str, written))}")
