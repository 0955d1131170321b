"""States from anywhere into a zoo folder: in batches, by several threads, resumable, bad ones left out and named."""

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow
import torch
from torch import Tensor
from tqdm import tqdm

from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.version import __version__
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.readers.names import Expected
from fastws.zoo.readers.reasons import BadState
from fastws.zoo.readers.record import REPORT, Aside, Bad, Report, Skipped
from fastws.zoo.readers.states import Like, read_expected

BATCH = 2**26  # bytes of weights that are written at once
PIECE = 64  # states that a thread reads in one go


@dataclass(frozen=True)
class ReadOptions:
    """What all readers have in common.

    Attributes:
        on_bad: Leave bad states out and name them, or stop at the first one.
        threshold: States with a weight of larger magnitude are bad.
        threads: That read; 0 takes one per processor core.
        splits: Model ids of each split; by default networks are dealt 70/15/15.
        symmetry: Of the architecture, which ``zoo align`` needs; kept with the zoo.
        key: Under which torch files hold the network; by default the only or the usual one.
        activation: Of all networks: the property of this name where the source has none.
    """

    on_bad: Literal["drop", "raise"] = "drop"
    threshold: float = float("inf")
    threads: int = 0
    splits: Mapping[str, Sequence[str]] | None = None
    symmetry: Symmetry | None = None
    key: str | None = None
    activation: str | None = None

    def __post_init__(self):
        if self.on_bad not in ("drop", "raise"):
            raise ValueError(f"zoo read: --on-bad must be 'drop' or 'raise', got {self.on_bad!r}")
        if not self.threshold > 0:
            raise ValueError(f"zoo read: --threshold must be more than 0, got {self.threshold}")
        if self.threads < 0:
            raise ValueError(f"zoo read: --threads must be at least 0, got {self.threads}")


@dataclass(frozen=True)
class Population:
    """What a reader has found.

    Attributes:
        states: Whatever ``fill`` understands, one per state; ``str`` of it names it in messages.
        columns: Properties, a column each, with ``model``.
        fill: ``fill(state, row)`` writes a state into a row and says what of it is not there, or raises ``BadState``.
        layout: What a row means.
        source: What was read, for the provenance: anything that JSON can hold.
        splits: Model ids of each split, if the source has splits.
        files: That were read beside those which are states.
        skipped: What lies in the source and was not taken for a state.
    """

    states: Sequence
    columns: Mapping[str, Sequence]
    fill: Callable[[object, Tensor], Iterable[str]]
    layout: Layout
    source: Mapping
    splits: Mapping[str, Sequence[str]] | None = None
    files: Sequence[str | Path] = ()
    skipped: Sequence[Skipped] = ()


class Found(NamedTuple):
    """What became of neighbouring states."""

    states: int
    bad: list[tuple[int, str]]  # places of those that are left out, and the reasons
    aside: Counter[str]  # what is in their files and not in the zoo, and in how many of them


def collect(out: str | os.PathLike, population: Population, options: ReadOptions) -> Zoo:
    """Writes a population into a zoo folder; the same call goes on where a killed one was.

    Raises:
        ValueError: If there is nothing to read, a state is bad and ``on_bad="raise"``, or the folder holds something
            else.
    """
    out, count = Path(out), len(population.states)
    if count == 0:
        where = ", ".join(map(str, population.source["paths"]))
        raise ValueError(f"zoo read: source must hold states, got none in {where}")
    if options.activation is not None:
        stated = {"activation": [options.activation] * count}
        population = replace(population, columns=stated | dict(population.columns))
    table = to_table(population.columns)
    provenance = {"made_by": f"fastws {__version__}", "torch": torch.__version__, "source": dict(population.source)}
    splits = options.splits or population.splits
    layout, symmetry = population.layout, options.symmetry
    found = fingerprints(population)
    read = digest(population, options), found, count
    if symmetry is not None:
        symmetry.require_same(layout)
    Report.begin(out, *read)
    with ZooWriter(out, layout, symmetry, provenance, layout.dtype, splits=splits) as writer:
        report = Report.resume(out, *read, writer.submitted)
        report.skipped = list(population.skipped)
        for number, rows, became in read_batches(population, options, report.batches):
            first, bad = number * batch_rows(layout), became.bad
            good = torch.ones(len(rows), dtype=torch.bool)
            good[[place - first for place, _ in bad]] = False
            report.bad += [Bad(number, str(population.states[place]), reason) for place, reason in bad]
            report.aside += [Aside(number, what, count) for what, count in became.aside.items()]
            report.batches, report.submitted = number + 1, writer.submitted + int(good.sum())
            report.source = found[report.batches]
            report.write(out)
            part = table.slice(first, len(rows)).filter(pyarrow.array(good.numpy()))
            columns = {name: part[name].combine_chunks() for name in part.column_names}
            writer.append(rows if not bad else rows[good], columns)
    if told := report.told():
        warnings.warn(f"{out}: {'; '.join(told)}; {REPORT} names them", stacklevel=3)
    zoo = Zoo.open(out)
    if len(zoo) == 0:
        _, state, reason = report.bad[0]
        raise ValueError(f"zoo read: source must hold states that can be used, got none: {report}; {state}: {reason}")
    return zoo


def digest(population: Population, options: ReadOptions) -> str:
    """Equal for two calls that ask for the same."""
    symmetry = options.symmetry and options.symmetry.to_dict()
    what = [dict(population.source), options.threshold, symmetry, options.key, options.activation]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]


def fingerprints(population: Population) -> list[str]:
    """What the first n batches of a source are, for each n: equal if their states, properties and files are.

    Of a file the size and the time of its last change are compared, not the content.
    """
    size, count = batch_rows(population.layout), len(population.states)
    found = hashlib.sha256(population.layout.fingerprint.encode())
    add_files(found, population.files)
    prints = [found.hexdigest()[:16]]
    for first in range(0, count, size):
        columns = {name: list(column[first : first + size]) for name, column in population.columns.items()}
        found.update(json.dumps(columns, default=str).encode())
        add_files(found, population.states[first : first + size])
        prints.append(found.hexdigest()[:16])
    return prints


def add_files(found: "hashlib._Hash", files: Sequence) -> None:
    for name in files:
        try:
            stat = os.stat(name) if isinstance(name, str | Path) else None
        except OSError:  # it is named when its turn comes
            stat = None
        told = f"{name} {stat and (stat.st_size, stat.st_mtime_ns)}\n"
        found.update(told.encode(errors="surrogateescape"))  # file names may be anything


def batch_rows(layout: Layout) -> int:
    return max(1, min(BATCH // (layout.num_weights * layout.dtype.itemsize), 2**16))


def read_batches(population: Population, options: ReadOptions, begun: int) -> Iterator[tuple[int, Tensor, Found]]:
    """Number and rows of each batch from ``begun`` on, and what was found; the next is read while one is written."""
    count, size = len(population.states), batch_rows(population.layout)
    batches = range(begun, -(-count // size))
    threads = options.threads or os.cpu_count() or 1
    bar = tqdm(total=count, initial=min(begun * size, count), unit=" states", disable=count < 2, smoothing=0.05)
    pool = ThreadPoolExecutor(threads)
    try:
        started = start(population, options, batches[0], pool) if batches else None
        for number in batches:
            rows, pieces = started
            started = start(population, options, number + 1, pool) if number + 1 in batches else None
            whole = Found(len(rows), [], Counter())
            for piece in pieces:
                found = piece.result()
                whole.bad.extend(found.bad)
                whole.aside.update(found.aside)
                bar.update(found.states)
            yield number, rows, whole
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def start(population: Population, options: ReadOptions, number: int, pool: Executor) -> tuple[Tensor, list[Future]]:
    size = batch_rows(population.layout)
    first, end = number * size, min((number + 1) * size, len(population.states))
    rows = torch.empty(end - first, population.layout.num_weights, dtype=population.layout.dtype)
    pieces = [
        pool.submit(read_piece, population, options, place, rows[place - first : place - first + PIECE])
        for place in range(first, end, PIECE)
    ]
    return rows, pieces


def read_piece(population: Population, options: ReadOptions, first: int, rows: Tensor) -> Found:
    """Reads neighbouring states, of which ``first`` is the number of the first."""
    bad, aside = {}, Counter()
    for place, row in enumerate(rows.unbind(), first):
        try:
            notes = population.fill(population.states[place], row)
            check_values(row, options.threshold)
            aside.update(notes)
        except BadState as error:
            if options.on_bad == "raise":
                what = f"{population.states[place]}: state must be usable, got {error}"
                raise ValueError(f"{what}; say --on-bad drop to leave such states out") from error
            bad[place] = str(error)
    return Found(len(rows), sorted(bad.items()), aside)


def check_values(row: Tensor, threshold: float) -> None:
    """Raises BadState for a weight that is not finite or too large."""
    largest = float(row.abs().max())  # NaN and infinity show in it
    if not math.isfinite(largest):
        raise BadState("not finite", f"weights must be finite, got {int((~row.isfinite()).sum()):,} that are not")
    if largest > threshold:
        raise BadState("above threshold", f"weights must be at most {threshold:.4g} (--threshold), got {largest:.4g}")


# --- what readers need


def find_expected(states: Sequence[str], like: Like | None, key: str | None = None) -> Expected:
    """The architecture of ``like``, or of the first checkpoint that can be read."""
    if like is not None:
        return read_expected(like, key)
    first = None
    for state in states:
        try:
            return read_expected(state, key)
        except (OSError, ValueError) as error:
            first = first or error
    if first is None:
        raise ValueError("zoo read: source must hold checkpoints, got none")
    raise ValueError(f"zoo read: one checkpoint at least must be readable, got {first}") from first


def to_table(columns: Mapping[str, Sequence]) -> pyarrow.Table:
    """Columns of one type each, without those that are empty everywhere."""
    arrays = {name: to_array(column) for name, column in columns.items()}
    return pyarrow.table({name: array for name, array in arrays.items() if array.null_count < len(array)})


def to_array(column: Sequence) -> pyarrow.Array:
    try:
        return pyarrow.array(column)
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.array([None if value is None else str(value) for value in column], "string")


def unique(paths: Iterable[Path]) -> list[Path]:
    """Each folder or file once, where it is named first."""
    return list({path.absolute(): path for path in paths}.values())


def name_models(paths: Sequence[Path]) -> list[str]:
    """Names of folders or files without the part that all share."""
    paths = [path.absolute() for path in paths]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return [printable(path.relative_to(common).as_posix()) for path in paths]


def printable(name: str) -> str:
    """File names that are no UTF-8 with escapes for what is not."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
