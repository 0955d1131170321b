"""SANE trained on a zoo that does not fit into the memory it is given, against the same zoo in memory.

A zoo of ResNet-18, three times what ``--memory`` allows, of which no page is in the page cache when an epoch begins.
Steps of width 64 and depth 2, batches of 32 windows of 256 tokens in two views, two threads.

Predicted: a step takes 0.7 s. The first view of a batch reads 9.4 MB in 32 stretches, asked for ahead. The second is of
permuted rows: 32 x 256 pieces of 1.2 kB from anywhere in layers of up to 9.4 MB, of which nearly each is a page of its
own that is read when it is needed, one after the other: 8,192 times 60 to 100 us of a disk, 0.5 to 0.8 s. Both are
done by a thread while the step before computes, so it is the longer of the two: 0.7 to 0.8 of the speed where a
processor is free for the thread, and as much less as it is not. Both turned out shorter, the step because attention
has a kernel now; RESULTS.md has the times.

Rows: ``resident`` and ``streamed`` are steps with their data path; ``.., data`` is the data path alone.

Run: fastws bench streaming --threads 2 [--quick]
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from fastws.benchmarks.harness import Options, spread
from fastws.benchmarks.zoo import TOKEN_SIZE, WINDOW, resnet18
from fastws.files.arena import PAGE, C
from fastws.nn.sane import SANE
from fastws.train import loop
from fastws.train.sane import train as sane
from fastws.train.sane.batches import draw, make_source
from fastws.windows.ahead import Ahead
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo

BATCH, DROP = 32, 4  # DROP: MADV_DONTNEED
NETWORKS = {"asked": 64, "quick": 32, "small": 4}
EPOCHS = {"asked": 10, "quick": 3, "small": 1}
BUDGET = {"resident": 64.0, "streamed": None}  # gigabytes; None: a third of the zoo


def make_zoo(folder: Path, count: int) -> Zoo:
    layout, symmetry = resnet18()
    names = [f"network-{number:03}" for number in range(count)]
    numbers = torch.randn(layout.num_weights, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    with ZooWriter(folder, layout, symmetry, splits={"train": names, "val": [], "test": []}) as writer:
        for name in tqdm(names, desc="making", leave=False):
            numbers = numbers.roll(1009)
            writer.append(numbers[None], {"model": [name]})
    os.sync()
    return Zoo.open(folder)


class Run:
    """Steps of training with networks in memory, or read from their files."""

    def __init__(self, zoo: Zoo, memory: float, batch: int):
        options = {"size": "small", "width": 64, "depth": 2, "window": WINDOW, "token_size": TOKEN_SIZE}
        # scales want a pass over all networks first, whoever reads them
        self.config = sane.Config(
            out="unused",
            zoo=(str(zoo.path),),
            batch_size=batch,
            memory=memory,
            standardize=False,
            device="cpu",
            **options,
        )
        self.zoo, self.done = zoo, 0
        self.source = make_source(self.config, [zoo], torch.device("cpu"))
        torch.manual_seed(0)
        self.model = SANE(sane.model_config(self.config, self.source))
        self.optimizer = loop.adamw(self.model, self.config)
        cut = partial(draw, self.config, self.source, "train", rows=self.source.rows("train"))
        self.ahead = Ahead(cut, self.source.population, torch.device("cpu"))
        self.steps = -(-len(zoo) // batch)

    def epoch(self, train: bool) -> float:
        """Seconds of a step."""
        evict(self)
        begin = time.perf_counter()
        for _ in range(self.steps):
            # alone, a batch is cut now and not ahead: nothing computes meanwhile
            batch = self.ahead(self.done) if train else self.ahead.draw(self.done)
            self.done += 1
            if train:
                loss = sane.losses(self.config, self.model, batch)["loss"]
                loop.differentiate(loss, self.model, self.optimizer, None)
                self.optimizer.step()
        return (time.perf_counter() - begin) / self.steps


def evict(run: Run) -> None:
    """Drops the files from the page cache, once no page of them is mapped; for networks in memory nothing changes."""
    arena = run.source.population.arena
    for mapped in [run.zoo.weights] if arena is None else [run.zoo.weights, arena.bytes]:
        before = mapped.data_ptr() % PAGE
        C.madvise(mapped.data_ptr() - before, mapped.nbytes + before, DROP)
    for path in run.zoo.path.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def rows(options: Options) -> Iterator[dict]:
    size = "small" if options.small else "quick" if options.quick else "asked"
    with tempfile.TemporaryDirectory() as root:
        zoo = make_zoo(Path(root, "zoo"), NETWORKS[size])
        budget = len(zoo) * zoo.layout.num_weights * 4 / 3e9
        runs = {name: Run(zoo, memory or budget, min(BATCH, len(zoo))) for name, memory in BUDGET.items()}
        seconds = {(name, train): [] for train in (True, False) for name in runs}
        for _ in range(EPOCHS[size]):
            for name in runs:
                seconds[name, True].append(runs[name].epoch(True))
        for _ in range(EPOCHS[size]):
            for name in runs:
                seconds[name, False].append(runs[name].epoch(False))
        for run in runs.values():
            run.ahead.__exit__(None, None, None)
        medians = {key: statistics.median(some) for key, some in seconds.items()}
        for (name, train), some in seconds.items():
            row = {"us": medians[name, train] * 1e6, "iqr": spread(some) * 1e6}
            row["of resident"] = medians["resident", train] / medians[name, train]
            case = f"{len(zoo)} ResNet-18, budget {budget:.1f} GB"
            yield {"op": "streaming", "implementation": name if train else f"{name}, data", "case": case} | row
