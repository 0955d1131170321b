"""``read.json``: how far the reading of a zoo is, and what of its source is not in it."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from fastws.files.atomic import write_json
from fastws.files.json import parse
from fastws.files.limits import read_bytes
from fastws.zoo.format.manifest import MANIFEST

REPORT = "read.json"  # beside zoo.json


class Bad(NamedTuple):
    """A state that was left out."""

    batch: int
    state: str
    reason: str


class Aside(NamedTuple):
    """What is in the files of some states of a batch, and not in the zoo."""

    batch: int
    what: str
    states: int


class Skipped(NamedTuple):
    """What lies in a source and was not taken for a state."""

    path: str
    reason: str


@dataclass
class Report:
    """How far reading is; kept in ``read.json``, so that the same call goes on after it was killed."""

    digest: str  # of what was asked for
    source: str  # of what was found in the batches so far, see fingerprints
    states: int
    batches: int = 0  # that are in the zoo, if it has as many states as submitted
    submitted: int = 0
    bad: list[Bad] = field(default_factory=list)
    aside: list[Aside] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @classmethod
    def begin(cls, path: Path, digest: str, found: Sequence[str], states: int) -> None:
        """Claims a folder before the zoo is begun, which is then known as this call's whenever it is killed."""
        check_new(path)
        if not (path / REPORT).exists():
            cls(digest, found[0], states).write(path)

    @classmethod
    def resume(cls, path: Path, digest: str, found: Sequence[str], states: int, submitted: int) -> "Report":
        report = cls(**read_content(path))
        if report.digest != digest:
            raise ValueError(f"{path}: folder must be new or empty, got what another call has read; remove it")
        # what was not read yet may change: a state that was refused may have been mended
        if report.states != states or report.batches >= len(found) or report.source != found[report.batches]:
            what = "files or results that have changed or come since"
            raise ValueError(f"{path}: source must be what it was when it was read, got {what}; give another --out")
        # written before the batch itself: a reader that died between the two reads it again
        batches = report.batches if report.submitted == submitted else report.batches - 1
        bad = [Bad(*entry) for entry in report.bad if entry[0] < batches]
        aside = [Aside(*entry) for entry in report.aside if entry[0] < batches]
        return cls(digest, found[batches], states, batches, submitted, bad, aside)

    def write(self, path: Path) -> None:
        write_json(path / REPORT, self.__dict__)

    def __str__(self) -> str:
        counts = Counter(entry.reason.partition(":")[0] for entry in self.bad)
        what = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        return f"{len(self.bad):,} of {self.states:,} states left out" + (f": {what}" if what else "")

    def told(self) -> list[str]:
        """What a user should know: which states were left out, and what of the others is not in the zoo."""
        counts: Counter[str] = Counter()
        for entry in self.aside:
            counts[entry.what] += entry.states
        lines = [f"states with {what}, which are not in the zoo: {count:,}" for what, count in counts.most_common()]
        return ([str(self)] if self.bad else []) + lines


def read_report(path: str | os.PathLike) -> Report:
    """What was left out when a zoo was read, and why."""
    content = read_content(Path(path))
    kinds = {"bad": Bad, "aside": Aside, "skipped": Skipped}
    return Report(**content | {name: [kind(*entry) for entry in content[name]] for name, kind in kinds.items()})


def read_content(path: Path) -> dict[str, object]:
    names = [part.name for part in fields(Report)]
    file = path / REPORT
    try:
        content = {"aside": [], "skipped": [], **parse(read_bytes(file), "file")}
        checked = {name: content[name] for name in names}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: file must be that of zoo read, got {error!r}; remove {path}") from error
    wrong = find_wrong(checked)
    if wrong:
        raise ValueError(f"{file}: file must be that of zoo read, got {wrong}; remove {path}")
    return checked


def find_wrong(content: Mapping[str, object]) -> str:
    """What is not as ``Report.write`` writes it; "" if nothing is."""
    if not isinstance(content["digest"], str) or not isinstance(content["source"], str):
        return "a digest that is no string"
    for name in ("states", "batches", "submitted"):
        if type(content[name]) is not int or content[name] < 0:
            return f"{name} that is no whole number from 0"
    if not is_list_of(content["bad"], (int, str, str)):
        return "states left out that are no lists of a batch, a name and a reason"
    if not is_list_of(content["aside"], (int, str, int)):
        return "tensors left out that are no lists of a batch, their names and how many states have them"
    if not is_list_of(content["skipped"], (str, str)):
        return "skipped files that are no lists of a path and a reason"
    return ""


def is_list_of(value: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(x, list) and (*map(type, x),) == kinds for x in value)


def check_new(out: str | os.PathLike) -> None:
    """Fails early where a zoo is already that no reader has begun."""
    if (Path(out) / MANIFEST).exists() and not (Path(out) / REPORT).exists():
        raise ValueError(f"{out}: folder must be new or empty, got a zoo that was not read from elsewhere")
