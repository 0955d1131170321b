"""What is in a zoo."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import pyarrow

from fastws import pages
from fastws.runs.begun import former_names
from fastws.zoo.alignment import Alignment, find_alignment
from fastws.zoo.format.parts import is_number
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.survey import report
from fastws.zoo.survey.diversity import draw_sample, find_duplicates, measure_functions, measure_weights
from fastws.zoo.survey.progress import find_unfinished


@former_names(report="out")
@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints what is in a zoo; writes a report with figures where one is asked for.

    fastws zoo info --zoo zoos/digits
    fastws zoo info --zoo zoos/digits --out digits.html
    """

    zoo: str  # folder of the zoo

    out: str | None = None  # HTML file to write, a report: accuracies, weights, distances, agreement, duplicates
    aligned: bool = False  # networks in the order that fastws zoo align found, in the report
    models: int = 200  # networks that the report draws and compares, at random
    seed: int = 0  # of the draw of the networks that are compared
    data: str | None = None  # images to compare predictions on, as in zoo make; by default those of the zoo
    images: int = 2000  # test images, at most, evenly spaced, that predictions are compared on

    def __post_init__(self):
        for name, least in (("models", 2), ("seed", 0), ("images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"zoo info: {name} must be at least {least}, got {getattr(self, name)}")


def run(config: Config) -> None:
    if config.out is not None:
        pages.require_matplotlib("zoo info")
        if Path(config.out).is_dir():
            raise ValueError(f"zoo info: out must be a file to write, got the folder {config.out}")
    zoo = Zoo.open(config.zoo)
    if config.aligned:
        Alignment.open(zoo)  # says what is wrong before anything is printed
    describe(zoo)
    if config.out is not None:
        write_report(config, zoo)
        print(f"report: {config.out}   (open it in a browser)")


def describe(zoo: Zoo) -> None:
    models = zoo.properties["model"].unique()
    print(zoo)
    print(f"models: {len(models):,}, states: {len(zoo):,}, left out as not finite: {zoo.dropped:,}")
    unfinished = find_unfinished(zoo)
    print(f"finished: no, {unfinished}; run the command that writes it again" if unfinished else "finished: yes")
    print(f"aligned: {describe_alignment(zoo)}")
    print(f"weights: {zoo.dtype}, {len(zoo.shards)} file(s); symmetry: {zoo.symmetry or 'unknown'}")
    sizes = {name: f"{zoo.count_models(name):,} models, {len(zoo.split(name)):,} states" for name in zoo.splits}
    print("splits: " + "; ".join(f"{name} {size}" for name, size in sizes.items()))
    describe_properties(zoo)
    print("tensors:")
    print(zoo.layout.describe())


def describe_alignment(zoo: Zoo) -> str:
    if find_alignment(zoo) is None:
        return "no; fastws zoo align does that"
    try:
        found = Alignment.open(zoo)
    except ValueError as error:
        return f"no, {error}"
    before, after = found.before.mean(), found.after.mean()
    missing = set(zoo.properties["model"].cast("string").unique().to_pylist()) - set(found.models)
    to = "the mean" if found.method == "mean" else "the reference"
    words = [f"{found.method}, reference model {found.reference}, {found.chosen}"]
    words += [f"mean inner product with {to} {before:.4g} as stored, {after:.4g} aligned"]
    words += [f"{len(missing):,} models were added since: run fastws zoo align again"] if missing else []
    return "; ".join(words)


def describe_properties(zoo: Zoo) -> None:
    """Quantiles of all states and, where networks have several, of the last of each."""
    table, last = zoo.properties, sorted(last_rows(zoo).values()) if len(zoo) else []
    print(f"{'property':<18} {'min':>10} {'25 %':>10} {'50 %':>10} {'75 %':>10} {'max':>10}")
    for name in table.column_names:
        kind = table[name].type
        if is_number(kind):
            values = zoo.numbers(name)
            print(f"{name:<18} {quantiles(values)}")
            if len(last) < len(zoo) and not constant_in_models(zoo, values):
                print(f"{'  of last states':<18} {quantiles(values[last])}")
        elif pyarrow.types.is_nested(kind):
            print(f"{name:<18} {kind}")
        elif name != "model":
            print(f"{name:<18} {', '.join(sorted(map(str, table[name].unique().to_pylist())))}")


def quantiles(values: numpy.ndarray) -> str:
    values = values[numpy.isfinite(values)]
    found = numpy.quantile(values, [0, 0.25, 0.5, 0.75, 1]) if len(values) else numpy.full(5, numpy.nan)
    return " ".join(f"{value:>10.4g}" for value in found)


def constant_in_models(zoo: Zoo, values: numpy.ndarray) -> bool:
    """Whether all states of each network have one value, as hyperparameters do."""
    models = zoo.properties["model"].cast("string").to_pylist()
    _, first, member = numpy.unique(models, return_index=True, return_inverse=True)
    return bool(numpy.array_equal(values, values[first][member], equal_nan=True))


def write_report(config: Config, zoo: Zoo) -> None:
    """Measures and writes.

    Raises:
        ValueError: If the zoo is empty, or ``data`` was given and predictions cannot be compared on it.
        OSError: If the file cannot be written.
    """
    if len(zoo) == 0:
        raise ValueError(f"zoo info: zoo must hold networks for a report, got none in {zoo.path}")
    sample = draw_sample(zoo, config.models, config.seed)
    functions, reason = None, ""
    try:
        functions = measure_functions(zoo, sample, config.data, config.images)
    except (ValueError, OSError) as error:
        if config.data is not None:
            raise
        reason = str(error)
    findings = (measure_weights(zoo, sample, config.aligned), find_duplicates(zoo), functions, reason)
    report.write(Path(config.out), report.Findings(zoo, sample, config.seed, *findings))
