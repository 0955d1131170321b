"""A profiler's trace of 20 steps of SANE on ResNet-18 weights: where the time goes, and whether the device idles.

Run: python -m fastws.benchmarks.trace_sane FOLDER [SIZE]    # SIZE as of fastws train sane, by default resnet18
Writes FOLDER/sane-trace.json, for chrome://tracing or Perfetto, and prints what took longest.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastws.benchmarks.harness import DEVICE
from fastws.benchmarks.zoo import TOKEN_SIZE, resnet18
from fastws.nn.sane import PRESETS, SANE
from fastws.train import loop
from fastws.train.sane import train as sane
from fastws.windows.population import Kind, make_population
from fastws.windows.zoos import Group

STEPS = 20
NETWORKS = 8  # in the zoo, of random weights
LINES = 25  # of the table


def make_step(size: str, batch: int = 32) -> Callable[[int], None]:
    """A step of training, from its number."""
    layout, symmetry = resnet18()
    config = sane.Config(out="", zoo="", size=size, batch_size=batch, token_size=TOKEN_SIZE, clip=1.0)
    weights = torch.randn(NETWORKS, layout.num_weights, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kind, begins = torch.zeros(NETWORKS, dtype=torch.int64), torch.arange(NETWORKS) * layout.num_weights * 4
    content, kinds = weights.flatten().view(torch.uint8), [Kind.of(layout, symmetry)]
    population = make_population(kinds, kind, content, begins, dtypes=[torch.float32])
    groups = (Group("random", torch.arange(NETWORKS), kind[:0]),)
    source = sane.Source(population, groups, PRESETS[size]["window"], None)
    torch.manual_seed(0)
    with torch.device(DEVICE):  # a CPU would take half a minute to draw 800 million weights
        model = SANE(sane.model_config(config, source))
    optimizer = loop.adamw(model, config)

    def step(number: int) -> None:
        loop.set_one_cycle(optimizer, config, number)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            metrics = sane.losses(config, model, sane.draw(config, source, "train", number))
        loop.differentiate(metrics["loss"], model, optimizer, config.clip)
        optimizer.step()

    return step


def run_steps(step: Callable[[int], None], first: int, count: int) -> float:
    """Steps per second."""
    begin = time.perf_counter()
    for number in range(first, first + count):
        step(number)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begin)


def main(folder: str, size: str = "resnet18", batch: int = 32, steps: int = STEPS) -> None:
    step = make_step(size, batch)
    run_steps(step, 0, 3)  # kernels are loaded and compiled
    print(f"{run_steps(step, 3, steps):.2f} steps per second without the profiler")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities) as profiler:
        run_steps(step, 3 + steps, steps)
    path = Path(folder, "sane-trace.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    print(profiler.key_averages().table(sort_by=f"self_{DEVICE}_time_total", row_limit=LINES))
    print(f"trace: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
