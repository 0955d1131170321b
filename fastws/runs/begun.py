"""The one rule by which runs begin and resume: a run goes on only with the configuration that it was begun with.

Where a run keeps it is its own business: in a file, in a checkpoint, in the manifest of a zoo. A field that is not in
what was kept is newer than the run, which therefore had its default.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

from fastws.files.atomic import write_json
from fastws.runs.stages import read


def begin(command: str, folder: Path, config: Any, may_change: Collection[str] = ()) -> None:
    """Makes the folder of a run, with its configuration in ``config.json``, or goes on with a run that is there.

    Raises:
        ValueError: If the run was begun with another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if path.exists():
        require_same(command, folder, config, read(path), may_change)
    write_json(path, plain(config))


def require_same(command: str, folder: Path, config: Any, begun: object, may_change: Collection[str] = ()) -> None:
    """Raises ValueError unless a run in ``folder`` may go on.

    Args:
        command: Begins the sentence of an error.
        folder: Of the run.
        config: A dataclass, with which the run is to go on.
        begun: What the run kept of the one that it was begun with, as JSON gives it back.
        may_change: Fields that do not change what a run does.
    """
    if not isinstance(begun, Mapping):
        raise ValueError(f"{command}: {folder} must be a folder that it wrote, got another one; give another --out")
    for name, value in plain(config).items():
        if name in may_change:
            continue
        before = begun[name] if name in begun else default_of(config, name)
        if before != value and [before] != value:  # what takes several now may have taken one then
            where = f"{command}: {name}"
            raise ValueError(
                f"{where} must be {before!r}, with which {folder} was begun, got {value!r}; give another --out"
            )


def default_of(config: Any, name: str) -> Any:
    """What a field of ``config`` would be if it had not been given: None where it must be."""
    (field,) = [field for field in fields(config) if field.name == name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    # a preset may fill in what is None, which making the dataclass anew does
    return None if default is MISSING else plain(replace(config, **{name: default}))[name]


def plain(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, as JSON gives them back."""
    return json.loads(json.dumps(asdict(config)))


def former_names(**names: str) -> Callable[[type], type]:
    """Lets the fields of a keyword-only dataclass be given by names that they had before; ``FORMER`` holds them.

    Args:
        names: The former name of a field, and its name.
    """

    def decorate(kind: type) -> type:
        init = kind.__init__

        @wraps(init)
        def __init__(self, **given):
            known = {names.get(name, name): value for name, value in given.items()}
            if len(known) < len(given):
                both = ", ".join(f"{name} and {names[name]}" for name in given if name in names)
                raise TypeError(f"{kind.__name__}: {both} must not both be given, which are one option")
            init(self, **known)

        kind.__init__, kind.FORMER = __init__, names
        return kind

    return decorate
