"""Where aligned networks are written, and what is kept of how."""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastws.files import json
from fastws.files.checkpoints import FOLDER_FILES
from fastws.runs.begun import require_same
from fastws.zoo.readers.checkpoints import SUFFIXES

RECORD = "aligned.json"  # what was done, in a folder that was written; of a file its own name comes first


def is_model_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in FOLDER_FILES)


def model_paths(command: str, models: Sequence[str], base: str | None) -> list[Path]:
    """The checkpoints that a user names: files, folders that hold one, and all but the base in any other folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = []
    for path in map(Path, models):
        if path.name.endswith(".index.json"):
            path = path.parent
        if not path.is_dir() or is_model_folder(path):
            found.append(path)
            continue
        inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
        inside = [one for one in inside if is_model_folder(one) or (one.is_file() and one.suffix in SUFFIXES)]
        inside = [one for one in inside if base is None or os.path.realpath(one) != os.path.realpath(base)]
        if not inside:
            beside = "" if base is None else f" beside {base}"
            raise FileNotFoundError(f"{command}: {path} must be a checkpoint or hold some, got none{beside}")
        found += inside
    return [*dict.fromkeys(found)]


def places_of(command: str, paths: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Where each model is written: the folder of the only one becomes ``out`` itself.

    Raises:
        ValueError: If two have one name, or a model would be written over itself.
    """
    alone = len(paths) == 1 and paths[0].is_dir()
    places = {path: out if alone else out / Path(os.path.realpath(path)).name for path in paths}
    taken: dict[Path, Path] = {}
    for path, place in places.items():
        if (first := taken.setdefault(place, path)) != path:
            raise ValueError(f"{command}: models must have names of their own, got {first} and {path}; rename one")
        if os.path.realpath(place) == os.path.realpath(path):
            raise ValueError(f"{command}: out must be another folder than that of {path}, got {out}")
    return places


def record_of(place: Path, folder: bool, name: str = RECORD) -> Path:
    return place / name if folder else place.with_name(f"{place.name}.{name}")


@contextmanager
def reading(command: str, record: Path) -> Iterator[None]:
    """Says in one sentence that a record that was found is not what this version writes.

    Raises:
        ValueError: If something that a report has is missing, or of another kind.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"the record that this version of fastws {command} writes, got one with {error!r}; give another --out"
        raise ValueError(f"{record}: file must be {what}") from error


def begun(
    command: str, config: Any, place: Path, folder: bool, *, name: str = RECORD, may_change: Collection[str] = ("out",)
) -> dict[str, Any] | None:
    """The report of a model that was written by the same command before; None if it was not.

    Raises:
        ValueError: If something else is there.
    """
    record = record_of(place, folder, name)
    if not record.is_file():
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise FileExistsError(f"{command}: {place} must be new, got one that is there; give another --out")
        return None
    done = json.read(record)
    if not isinstance(done, dict) or not isinstance(done.get("report"), dict):
        raise ValueError(f"{record}: file must be what fastws {command} wrote, got another one; give another --out")
    require_same(command, place, config, done.get("config"), may_change)
    return done["report"] if folder or place.is_file() else None
