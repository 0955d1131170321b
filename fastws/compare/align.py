"""Networks written anew in the coordinates of one of them: the same functions, weights that can be averaged."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from fastws.compare.align_blocks import Aligning, goes_by_blocks
from fastws.compare.align_files import begun, model_paths, places_of, reading, record_of
from fastws.compare.aligning import Aligned, Aligner, Matching, require_function
from fastws.compare.evaluating import Data, load_examples, with_images
from fastws.compare.modules import Checkpoint, Words, difference, require_network
from fastws.compare.running import Checked
from fastws.files.atomic import write_json
from fastws.files.rewrite import rewrite_file, rewritten_folder
from fastws.runs.begun import plain


@dataclass(frozen=True, kw_only=True)
class Config(Words, Matching, Data):
    """Writes networks in the coordinates of another one: the same functions, files named and sharded as they came.

    fastws align other.safetensors --to base.safetensors --architecture cifar-resnet20-a --out aligned
    fastws align finetuned-llama --to base-llama --out aligned-llama

    The order and the signs of units are matched by weights or by activations (Git Re-Basin, arXiv 2209.04836), so that
    what comes out can be averaged with the base by any tool. Nothing is written before its outputs were compared with
    those of the network as it came.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]  # checkpoints, Hugging Face folders, or folders full
    out: str  # folder to write: the only model's folder itself, else a file or folder in it for each model

    by_blocks: bool | None = None  # of transformers a block at a time, where memory is short; by default of large ones
    to: str | None = None  # checkpoint whose coordinates are taken; by default those that fit the mean of all models

    def __post_init__(self):
        super().__post_init__()
        if not self.models:
            raise ValueError("align: models must be given before the options, got none; fastws align MODEL --to BASE")


def run(config: Config) -> None:
    for place, report in align(config).items():
        with reading("align", record_of(Path(place), Path(place).is_dir())):
            print(f"{place}: {sentence(report)}")
        for line in report["unmatched"]:
            print(f"  took no part: {line}")
        if report["left_out"]:
            print(f"  not written, for they hold weights of before: {', '.join(report['left_out'])}")


def align(config: Config) -> dict[str, dict[str, Any]]:
    """Aligns checkpoints, checks their functions, and writes them; what the command of this name does.

    A model that was written by the same command before is left as it is, so that a run that was stopped goes on.

    Returns:
        What was found of each model, by the place where it was written.

    Raises:
        ValueError: If a model is quantised, does not fit its module, or is of another architecture than the base; if
            its function would change.
        OSError: If a file cannot be read or written.
    """
    places = places_of("align", model_paths("align", config.models, config.to), Path(config.out))
    # what a mean is of decides where each model goes; to a base, each goes for itself
    may_change = ("out",) if config.to is None else ("out", "models")
    done = {}
    for path, place in places.items():
        report = begun("align", config, place, path.is_dir(), may_change=may_change)
        done |= {} if report is None else {path: report}
    if config.to is None and len(places) < 2:
        raise ValueError(f"align: --to must be given where there is one model, got none beside {config.models[0]}")
    if len(done) < len(places):
        done |= dict(aligned_models(config, places, done))
    return {str(place): done[path] for path, place in places.items()}


def aligned_models(
    config: Config, places: Mapping[Path, Path], done: Collection[Path]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Aligns, checks and writes one model after the other; gives their reports."""
    examples = load_examples("align", config) if config.data is not None else None
    x = None if examples is None else examples.calibrating(config.statistics).x
    words, together = with_images(config, examples), {}
    base = network = aligner = None
    if config.to is None:
        models = {path: Checkpoint.open_whole(path) for path in places}
        network = require_network(next(iter(models.values())), words)
        results = Aligner(network, config, x).together([model.state for model in models.values()])
        together = dict(zip(places, results, strict=True))
    else:
        base = Checkpoint.open_whole(config.to)
    for path in tqdm([path for path in places if path not in done], desc="align", unit=" networks"):
        model = Checkpoint.open_whole(path)
        if base and goes_by_blocks(config.by_blocks, model, words, config):
            yield path, write_by_blocks(config, base, model, places[path])
            continue
        # what has a name is one module for all networks that it fits, while config.json is that of one network
        if network is None or words.architecture is None or difference(model, network.module):
            network = require_network(model, words)
            aligner = base and Aligner(network, config, x)
        found = aligner.pair(base.state, model.state) if base else together[path]
        checked = require_function(str(path), network, model.state, found)
        yield path, write(config, model, found, checked, places[path])


def write(config: Config, model: Checkpoint, found: Aligned, checked: Checked, place: Path) -> dict[str, Any]:
    folder = model.path.is_dir()
    report = {"model": str(model.path), "to": config.to or "the mean of all models"}
    report |= {"raw": found.raw._asdict(), "aligned": found.aligned._asdict(), "moved": found.moved}
    report |= {"canonical": found.canonical and found.canonical._asdict(), "rounding": checked.rounding}
    report |= {"error": checked.error, "exact": found.exact, "unmatched": found.unmatched, "left_out": []}
    record, fields = record_of(place, folder), {"config": plain(config), "report": report}
    if not folder:
        write_json(record, fields)  # before its file, so that no file is without
        rewrite_file(model.path, place, found.state)
        return report
    with rewritten_folder(model.path, place, found.state) as (new, report["left_out"]):
        write_json(record_of(new, folder), fields)
    return report


def write_by_blocks(config: Config, base: Checkpoint, model: Checkpoint, place: Path) -> dict[str, Any]:
    """Aligns, checks and writes a network a block at a time; what was found of it."""
    aligned, folder = Aligning(base, model, config.continuous), model.path.is_dir()
    report = {"model": str(model.path), "to": config.to}
    with rewritten_folder(model.path, place, aligned) as (new, left):
        report |= aligned.report() | {"left_out": left}
        write_json(record_of(new, folder), {"config": plain(config), "report": report})
    return report


def sentence(report: dict[str, Any]) -> str:
    """What happened to a model."""
    before, after = report["raw"], report["aligned"]
    cosines = f"cosine {before['cosine']:.3f}, now {after['cosine']:.3f}"
    distances = f"distance {before['relative']:.3f}, now {after['relative']:.3f}"
    if report["canonical"] is not None:
        cosines += f", in canonical form {report['canonical']['cosine']:.3f}"
    rounding = "" if report["exact"] else f", rounding all weights changes {report['rounding']:.0e}"
    return (
        f"aligned to {report['to']}: {cosines}; {distances}; {report['moved']:.0%} of the units moved; "
        f"outputs are the same to {report['error']:.0e}{rounding}"
    )
