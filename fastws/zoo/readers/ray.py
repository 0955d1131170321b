"""The raw layout of the published model zoos: what Ray Tune leaves behind when it trains a grid of networks.

<zoo>/<trial>/result.json                      a line of JSON per iteration: losses, accuracies, configuration
<zoo>/<trial>/checkpoint_000050/checkpoints    the state dict; older zoos have no leading zeros
"""

import codecs
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from json import JSONDecoder
from pathlib import Path

from tqdm import tqdm

from fastws.files import json
from fastws.files.limits import open_regular
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.readers.collect import Population, ReadOptions, collect, find_expected, name_models, printable, unique
from fastws.zoo.readers.record import Skipped, check_new
from fastws.zoo.readers.states import Like, StateReader

RESULTS, STATE = "result.json", "checkpoints"
CONFIG, DECODER = '"config": ', JSONDecoder()  # as json.dumps writes it
REPLACED = "\ufffd"  # stands where bytes are no text
CHECKPOINT = re.compile(r"checkpoint_(\d{1,18})")
OWN_NAMES = {  # name in published zoos: name in the zoos that fastws makes
    "train_acc": "train_accuracy",
    "val_acc": "val_accuracy",
    "test_acc": "test_accuracy",
    "ggap": "generalisation_gap",
    "model::nlin": "activation",
    "model::dropout": "dropout",
    "model::init_type": "init",
    "optim::optimizer": "optimizer",
    "optim::lr": "lr",
    "optim::wd": "weight_decay",
}
BOOKKEEPING = {  # of Ray Tune, in every line
    *("config", "date", "done", "episodes_total", "experiment_id", "experiment_tag", "hostname", "node_ip", "pid"),
    *("iterations_since_restore", "should_checkpoint", "time_since_restore", "time_this_iter_s", "time_total_s"),
    *("timestamp", "timesteps_since_restore", "timesteps_total", "training_iteration", "trial_id", "warmup_time"),
}


@dataclass(frozen=True)
class Trial:
    """One network: its states, and what is known of each."""

    states: list[str]
    epochs: list[int]
    lines: list[Mapping]  # the line of each state, or nothing
    configs: list[Mapping]  # numbers and strings of the configuration of each state


def read_ray(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    epochs: Sequence[int] | None = None,
    properties: Sequence[str] | None = None,
    skip: Callable[[Path], bool] | None = None,
    like: Like | None = None,
    options: ReadOptions | None = None,
) -> Zoo:
    """Reads raw zoos into a zoo folder; the same call goes on where a killed one was.

    The properties of epoch e are those of the line whose ``training_iteration`` is e, whether or not the network was
    evaluated before training. Their names are those of zoos that fastws makes (``OWN_NAMES``); the generalisation gap
    is train minus test accuracy. Networks and epochs are those of the folders: what results or configuration call
    ``model`` or ``epoch`` is left out, and so is what the configuration repeats of the results. Numbers of modules are
    ranked, so networks with and without dropout layers are of one architecture. Of sparsified twins the weights are
    read as they were trained, before clipping; their variances are left out, and counted.

    Args:
        paths: Folders of raw zoos, whose networks are sorted by name, or folders of single networks, in any order.
        out: The zoo folder to write.
        epochs: To read; by default all that are there.
        properties: Columns to keep, by either name; by default all numbers and strings of results and configuration.
        skip: Networks to leave out, by their folder.
        like: A checkpoint of the architecture, or its layout; by default the first that can be read.
        options: What all readers have in common.

    Raises:
        ValueError: If there is nothing to read, or as ``options`` say.
    """
    check_new(out)
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    folders = unique(folder for path in paths for folder in find_trials(Path(path)))
    folders = [folder for folder in folders if skip is None or not skip(folder)]
    options = options or ReadOptions()
    with ThreadPoolExecutor(options.threads or os.cpu_count()) as pool:
        found = pool.map(lambda folder: read_trial(folder, epochs), folders)
        trials = list(tqdm(found, total=len(folders), unit=" results", disable=len(folders) < 100))
    states = [state for trial in trials for state in trial.states]
    columns = to_columns(trials, name_models(folders))
    if properties is not None:
        wanted = {OWN_NAMES.get(name, name) for name in properties}
        if unknown := sorted(wanted - columns.keys()):
            raise ValueError(f"zoo read: --properties must be some of {', '.join(columns)}, got {unknown[0]!r}")
        columns = {name: column for name, column in columns.items() if name in wanted | {"model", "epoch"}}
    expected = find_expected(states, like, options.key)
    source = {"kind": "ray", "paths": [str(path) for path in paths]}
    for name, chosen in (("epochs", epochs), ("properties", properties)):
        source[name] = None if chosen is None else list(chosen)
    skipped = [skip for path in paths for skip in skipped_trials(Path(path))]
    reader = StateReader(expected, options.key)
    return collect(out, Population(states, columns, reader, expected.layout, source, skipped=skipped), options)


def is_trial(path: Path) -> bool:
    return (path / RESULTS).is_file() or any(CHECKPOINT.fullmatch(name) for name in os.listdir(path))


def find_trials(path: Path) -> list[Path]:
    """The folders of networks in a raw zoo, sorted; or the folder itself, if it is that of a network.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: raw zoo must be a folder, got {'a file' if path.is_file() else 'nothing'}")
    if is_trial(path):
        return [path]
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and is_trial(folder))


def skipped_trials(path: Path) -> list[Skipped]:
    """The folders of a raw zoo that are no networks."""
    folders = [] if is_trial(path) else sorted(folder for folder in path.iterdir() if folder.is_dir())
    what = f"folder of a network must hold {RESULTS} or checkpoint_<epoch>, got neither"
    return [Skipped(printable(str(folder)), what) for folder in folders if not is_trial(folder)]


def read_trial(folder: Path, epochs: Sequence[int] | None) -> Trial:
    names = {}
    for name in sorted(os.listdir(folder)):
        if found := CHECKPOINT.fullmatch(name):
            # both styles of one epoch: that without leading zeros, as the published reader does
            names[int(found[1])] = f"checkpoint_{int(found[1])}" if int(found[1]) in names else name
    chosen = sorted(names) if epochs is None else list(epochs)
    states = [os.path.join(folder, names.get(epoch, f"checkpoint_{epoch}"), STATE) for epoch in chosen]
    lines, configs = read_results(folder / RESULTS)
    numbered = [line["training_iteration"] for line in lines if isinstance(line.get("training_iteration"), int)]
    if len(numbered) < len(lines):
        numbered = range(0 if 0 in names else 1, len(lines) + 1)
    by_epoch = dict(zip(numbered, zip(lines, configs, strict=True), strict=False))
    nothing = {}, next((config for config in configs if config), None) or flatten(read_config(folder))
    found = [by_epoch.get(epoch, nothing) for epoch in chosen]
    return Trial(states, chosen, [line for line, _ in found], [config or nothing[1] for _, config in found])


def read_results(path: Path) -> tuple[list[dict], list[Mapping]]:
    """All whole lines, and the configuration of each; the last line of a trial that was killed may not be whole.

    Every line repeats the configuration, which is most of it, so what is equal to the last one's is cut out unread. A
    trial that was restored, or whose schedule mutates it, changes its configuration from some line on.
    """
    lines, configs, config, repeated = [], [], {}, None
    try:
        with open_regular(path) as file:
            for text in texts_of(io.BufferedReader(file)):
                try:
                    line = json.parse(text.replace(repeated, CONFIG + "0") if repeated else text, "line")
                except ValueError:
                    continue
                if not isinstance(line, dict):
                    continue
                if isinstance(line.get("config"), dict):
                    config, repeated = flatten(line["config"]), find_config(text)
                lines.append(line)
                configs.append(config)
    except OSError:
        return lines, configs  # a network without results is still a network
    return lines, configs


def texts_of(file: io.BufferedReader) -> Iterator[str]:
    """The lines of a text, without those that have bytes which are no text; its byte order mark says what it is in."""
    wide = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    for text in io.TextIOWrapper(file, encoding="utf-16" if wide else "utf-8-sig", errors="replace"):
        if REPLACED not in text:
            yield text


def find_config(text: str) -> str | None:
    begin = text.find(CONFIG)
    return text[begin : DECODER.raw_decode(text, begin + len(CONFIG))[1]] if begin >= 0 else None


def read_config(folder: Path) -> dict:
    try:
        config = json.read(folder / "params.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def flatten(config: Mapping, prefix: str = "") -> dict:
    """Numbers and strings of a nested configuration."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}::")
        elif isinstance(value, str | int | float):
            flat[prefix + name] = value
    return flat


def to_columns(trials: Sequence[Trial], models: Sequence[str]) -> dict[str, list]:
    """Properties of all states, one column each; None where a network does not have one."""
    results = dict.fromkeys(
        name
        for trial in trials
        for line in trial.lines
        for name, value in line.items()
        if name not in BOOKKEEPING and isinstance(value, str | int | float)
    )
    configs = dict.fromkeys(name for trial in trials for config in trial.configs for name in config)
    columns = {
        "model": [model for model, trial in zip(models, trials, strict=True) for _ in trial.states],
        "epoch": [epoch for trial in trials for epoch in trial.epochs],
    }
    found = {name: [line.get(name) for trial in trials for line in trial.lines] for name in results}
    add_columns(columns, found)
    add_columns(columns, {name: [config.get(name) for trial in trials for config in trial.configs] for name in configs})
    return add_gap(columns)


def add_columns(columns: dict[str, list], found: Mapping[str, list]) -> None:
    """Adds columns under the names of zoos that fastws makes; those that are there stay, identities above all."""
    for name, column in found.items():
        columns.setdefault(OWN_NAMES.get(name, name), column)


def add_gap(columns: Mapping[str, list]) -> dict[str, list]:
    """With the generalisation gap, where both accuracies are known."""
    columns = dict(columns)
    if {"train_accuracy", "test_accuracy"} <= columns.keys() and "generalisation_gap" not in columns:
        pairs = zip(columns["train_accuracy"], columns["test_accuracy"], strict=True)
        gaps = [as_number(train) - as_number(test) for train, test in pairs]
        columns["generalisation_gap"] = [None if math.isnan(gap) else gap for gap in gaps]
    return columns


def as_number(value: object) -> float:
    """A property as a number, nan if it is none or has more digits than numbers have."""
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else math.nan
