"""The loss barrier between two networks: on the line between them, as they are and after alignment."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from fastws import pages
from fastws.compare import barrier_page
from fastws.compare.aligning import Aligned, Aligner, Matching, require_function
from fastws.compare.evaluating import Data, Precision, load_examples, require_inputs, with_images
from fastws.compare.lines import Mixer, barrier_of, line, statistics_of
from fastws.compare.modules import Checkpoint, Network, Words, require_fit, require_network
from fastws.files.atomic import write_file, write_json
from fastws.runs.begun import begin
from fastws.runs.stages import stage
from fastws.terminal import json_alone, tell
from fastws.zoo.making.recipes import Part

Parts = Literal["test", "train", "both"]


@dataclass(frozen=True, kw_only=True)
class Config(Words, Matching, Data):
    """Measures the loss barrier between two networks, as they are and after alignment.

    fastws barrier a.safetensors b.safetensors --architecture cifar-resnet20-a --data cifar10 --out runs/barrier
    fastws barrier a.pt b.pt --architecture own_networks:small --data own_networks:text

    Networks at equally spaced points of the line between both are evaluated. The barrier is how far the largest loss
    lies above the line between the losses of the ends (Git Re-Basin, arXiv 2209.04836): near 0, both lie in one
    basin and can be averaged. Statistics of batch norms are averaged with the weights (stored), or computed anew
    (reset); of layers without one they are set to the mean of both ends (repaired, REPAIR, arXiv 2211.08403).

    A function given as data returns training inputs and targets, and those for testing; targets are classes [n], or
    [n, length] for each position of a sequence, -100 where none counts.
    """

    a: Annotated[str, tyro.conf.Positional]  # checkpoint or Hugging Face folder whose coordinates are taken
    b: Annotated[str, tyro.conf.Positional]  # checkpoint or Hugging Face folder that is aligned

    points: int = 25  # networks on the line, both ends included
    parts: Parts = "test"  # of the data on which networks are evaluated
    precision: Precision = "fp32"  # of what is computed; bf16 is faster where processors have it
    json: bool = False  # prints all numbers as JSON in place of the table
    out: str | None = None  # folder for report.html and results.json, in which a stopped run goes on

    def __post_init__(self):
        super().__post_init__()
        if self.points < 3:
            raise ValueError(f"barrier: points must be at least 3, got {self.points}")


def run(config: Config) -> None:
    if config.out is not None:
        pages.require_matplotlib("barrier")
    with json_alone(config.json):
        results = barrier(config)
    tell(results, lines_of(config, results), config.json)


def barrier(config: Config) -> dict[str, Any]:
    """Evaluates the networks between two, before and after alignment; what the command of this name does.

    Returns:
        ``curves``: of each alignment, treatment of statistics and part of the data the losses (nats) and accuracies
        along the line, and the barriers; ``cosine`` of both networks before and after; numbers of images.

    Raises:
        ValueError: If the networks are of two architectures, or do not fit their module or the data.
        OSError: If a file cannot be read or written.
    """
    examples = load_examples("barrier", config)
    ends = [Checkpoint.open_whole(path) for path in (config.a, config.b)]
    network = require_network(ends[0], with_images(config, examples))
    require_fit(ends[1], network)
    require_inputs("barrier", network, examples)
    folder = None if config.out is None else Path(config.out)
    if folder is not None:
        begin("barrier", folder, config, may_change=("json", "out"))
    x = examples.calibrating(config.statistics).x
    moved = align_ends(config, network, ends, x)
    results = {"a": config.a, "b": config.b, "data": examples.name, "module": network.name, "points": config.points}
    results |= {"images": {"test": len(examples.test.x), "train": len(examples.train.x), "statistics": len(x)}}
    cosines = {"as they are": moved["permuted"].raw.cosine} | {name: one.aligned.cosine for name, one in moved.items()}
    results |= {"cosine": cosines, "curves": []}
    for alignment, state in {"as they are": ends[1].state, **{name: one.state for name, one in moved.items()}}.items():
        mixer = Mixer(network, [ends[0].state, state], x)
        for statistics in statistics_of(network, x):
            for part in ("test", "train") if config.parts == "both" else (config.parts,):
                found = {"alignment": alignment, "statistics": statistics, "part": part}
                work = partial(curve, mixer, config, found, getattr(examples, part))
                name = "-".join(found.values()).replace(" ", "_")
                results["curves"].append(work() if folder is None else stage(folder, name, work)["result"])
    if folder is not None:
        write_json(folder / "results.json", results)
        title = f"{Path(config.a).name} to {Path(config.b).name}"
        write_file(folder / "report.html", pages.document(title, barrier_page.body(results)).encode())
    return results


def align_ends(config: Config, network: Network, ends: Sequence[Checkpoint], x: Tensor) -> dict[str, Aligned]:
    """The second network in coordinates of the first, by permutations and signs, and, if asked, at the whole group."""
    ways = {"permuted": replace(config, continuous=False)} | ({"whole group": config} if config.continuous else {})
    moved = {}
    for name, way in ways.items():
        moved[name] = Aligner(network, way, x).pair(*(end.state for end in ends))
        require_function(str(ends[1].path), network, ends[1].state, moved[name])
    return moved


def curve(mixer: Mixer, config: Config, found: dict[str, str], part: Part) -> dict[str, Any]:
    """Loss and accuracy along the line, and the barriers."""
    options = {"precision": config.precision, "name": ", ".join(found.values())}
    scores = line(mixer, config.points, found["statistics"], part, **options)
    loss, accuracy = (list(values) for values in zip(*scores, strict=True))
    return found | {"barrier": barrier_of(scores)._asdict(), "loss": loss, "accuracy": accuracy}


def lines_of(config: Config, results: dict[str, Any]) -> Iterator[str]:
    """The table of the command line."""
    images, cosine = results["images"], results["cosine"]
    yield f"{results['points']} networks from {results['a']} to {results['b']}"
    yield f"{results['data']}: {images['test']:,} test and {images['train']:,} training inputs"
    yield "cosine of the weights: " + ", ".join(f"{name} {value:.3f}" for name, value in cosine.items())
    yield " ".join(f"{name:>{width}}" for name, width in barrier_page.COLUMNS)
    for row in map(barrier_page.cells, results["curves"]):
        yield " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(row, barrier_page.COLUMNS, strict=True))
    if config.out is not None:
        yield f"report: {Path(config.out) / 'report.html'}"
