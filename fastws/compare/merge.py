"""The mean of networks as an ordinary checkpoint, and what it loses."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastws import pages
from fastws.compare.align_files import begun, model_paths, reading, record_of
from fastws.compare.aligning import Matching
from fastws.compare.evaluating import Data, Examples, Precision, load_examples, measure, require_inputs, with_images
from fastws.compare.lines import Statistics, mixed
from fastws.compare.merging import Merged, merge_networks, shares_of
from fastws.compare.modules import Checkpoint, Network, Words, require_fit, require_network
from fastws.compare.running import load_state
from fastws.files.atomic import write_file, write_json
from fastws.files.rewrite import rewrite_file, rewritten_folder
from fastws.runs.begun import plain
from fastws.terminal import json_alone, tell
from fastws.zoo.readers.checkpoints import SUFFIXES

RECORD, PAGE = "merged.json", "merged.html"  # beside what is written; of a file its own name comes first


@dataclass(frozen=True, kw_only=True)
class Config(Words, Matching, Data):
    """Aligns networks, averages their weights, and writes an ordinary checkpoint, with names and files of the first.

    fastws merge a.safetensors b.safetensors --architecture cifar-resnet20-a --data cifar10 --out merged.safetensors
    fastws merge llama-one llama-two llama-three --weights 0.5 0.25 0.25 --out merged-llama

    With data, statistics of batch norms are computed anew and layers without one repaired (REPAIR, arXiv 2211.08403),
    whichever has the least loss on training inputs, and the loss of the merged network on test inputs is reported
    beside those of the networks and of their mean without alignment. Without data it is not evaluated.

    A function given as data returns training inputs and targets, and those for testing; targets are classes [n], or
    [n, length] for each position of a sequence, -100 where none counts.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]  # checkpoints or Hugging Face folders, the first the base
    out: str  # folder to write; of checkpoint files also a file

    weights: tuple[float, ...] = ()  # of each model; by default all are equal
    align: bool = True  # brings the networks into one order of units before
    merged_statistics: Statistics | Literal["best"] = "best"  # stored, reset, repaired, or the best on training inputs
    precision: Precision = "fp32"  # of what is computed; bf16 is faster where processors have it
    json: bool = False  # prints all numbers as JSON in place of sentences

    def __post_init__(self):
        super().__post_init__()
        shares_of(self.weights, len(self.models))


def run(config: Config) -> None:
    with json_alone(config.json):
        report = merge_files(config)
    place = place_of(Path(config.models[0]), Path(config.out))
    with reading("merge", record_of(place, place.is_dir(), RECORD)):
        tell(report, lines_of(report), config.json)


def merge_files(config: Config) -> dict[str, Any]:
    """Merges checkpoints and writes the result; what the command of this name does.

    Returns:
        The report: ``merged`` and its ``statistics``, ``weights``, cosines before and after alignment, and the loss
        (nats) and accuracy of everything on test inputs, or ``"not evaluated"``.

    Raises:
        ValueError: If a model is quantised, or they do not fit a module and each other.
        OSError: If a file cannot be read or written.
    """
    paths = model_paths("merge", config.models, None)
    shares = shares_of(config.weights, len(paths))
    place = place_of(paths[0], Path(config.out))
    done = begun("merge", config, place, paths[0].is_dir(), name=RECORD, may_change=("out", "json"))
    if done is not None:
        return done
    examples = load_examples("merge", config) if config.data is not None else None
    models = [Checkpoint.open_whole(path) for path in paths]
    network = require_network(models[0], with_images(config, examples))
    for model in models[1:]:
        require_fit(model, network)
    if examples is not None:
        require_inputs("merge", network, examples)
    merged = merge_networks(
        [model.state for model in models],
        network,
        weights=shares,
        align=config.align,
        matching=config,
        data=None if examples is None else examples.calibrating(config.statistics),
        statistics=config.merged_statistics,
        precision=config.precision,
    )
    report = {"merged": str(place), "models": [str(path) for path in paths], "weights": list(shares)}
    report |= {"module": network.name, "statistics": merged.statistics, "aligned": config.align}
    report["cosines"] = [{"raw": one.raw.cosine, "aligned": one.aligned.cosine} for one in merged.aligned]
    report["training"] = {name: one._asdict() for name, one in merged.scores.items()}
    report["test"] = evaluated(config, network, models, merged, examples, shares)
    write(config, models[0], merged, place, report)
    return report


def evaluated(
    config: Config,
    network: Network,
    models: Sequence[Checkpoint],
    merged: Merged,
    examples: Examples | None,
    shares: Sequence[float],
) -> dict[str, Any] | str:
    """Loss and accuracy on test inputs of the merged network, the networks, and their mean as they are."""
    if examples is None:
        return "not evaluated"
    states = {str(model.path): model.state for model in models}
    named = {"merged": merged.state, "mean without alignment": mixed([*states.values()], shares)} | states
    loads = [partial(load_state, state=state) for state in named.values()]
    found = measure(network, loads, examples.test, precision=config.precision)
    return {"data": examples.name, "inputs": len(examples.test.x)} | {
        "scores": {name: one._asdict() for name, one in zip(named, found, strict=True)}
    }


def place_of(first: Path, out: Path) -> Path:
    """What is written: the folder or file ``out``, or a file in it with the name of the first model."""
    return out if first.is_dir() or out.suffix in SUFFIXES else out / first.name


def write(config: Config, first: Checkpoint, merged: Merged, place: Path, report: dict[str, Any]) -> None:
    fields = {"config": plain(config), "report": report}
    if not first.path.is_dir():
        write_report(*(record_of(place, False, name) for name in (RECORD, PAGE)), fields)
        rewrite_file(first.path, place, merged.state)
        return
    with rewritten_folder(first.path, place, merged.state) as (folder, report["left_out"]):
        write_report(folder / RECORD, folder / PAGE, fields)


def write_report(record: Path, page: Path, fields: dict[str, Any]) -> None:
    write_json(record, fields)
    if find_spec("matplotlib") and fields["report"]["test"] != "not evaluated":
        write_file(page, pages.document("a merged network", body(fields["report"])).encode())


# --- what is said


def lines_of(report: dict[str, Any]) -> Iterator[str]:
    cosines = ", ".join(f"{one['raw']:.3f} now {one['aligned']:.3f}" for one in report["cosines"][1:])
    yield f"merged {len(report['models'])} networks with weights {', '.join(f'{x:.3g}' for x in report['weights'])}"
    yield f"cosine of their weights: {cosines}" if cosines else "taken as they are, without alignment"
    yield f"statistics of activations: {report['statistics']}"
    if report["test"] == "not evaluated":
        yield "loss of the merged network: not evaluated; give --data"
    else:
        yield f"on {report['test']['inputs']:,} test inputs of {report['test']['data']}:"
        for name, one in report["test"]["scores"].items():
            yield f"  loss {one['loss']:.4f}, accuracy {one['accuracy']:.4f}  {name}"
    yield f"written: {report['merged']}"


def body(report: dict[str, Any]) -> Iterator[str]:
    scores, test = report["test"]["scores"], report["test"]
    yield "<h1>A merged network</h1>"
    yield from (f"<p>{html.escape(row)}</p>" for row in lines_of(report) if not row.startswith("  "))
    drawn, axes = pages.make_figure(2)
    places = range(len(scores))  # models of several folders have one name
    for axis, what in zip(axes, ("loss", "accuracy"), strict=True):
        colours = [pages.ORANGE if name == "merged" else pages.GREY for name in scores]
        axis.barh(places, [one[what] for one in scores.values()], color=colours)
        axis.set_yticks(places, [Path(name).name for name in scores])
        axis.invert_yaxis()
        axis.set(xlabel=f"test {what}")
    yield pages.figure(drawn, f"Loss (nats) and accuracy on {test['inputs']:,} test inputs of {test['data']}.")
    rows = ([name, *(f"{one[what]:.4f}" for what in ("loss", "accuracy"))] for name, one in scores.items())
    yield pages.table(("network", "loss", "accuracy"), rows)
