"""Work in stages, each kept as a file when it is done, so that the same command goes on where a stopped one was."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

from fastws.files import json
from fastws.files.atomic import write_json
from fastws.terminal import shorten

TIMES = ("seconds", "cpu_seconds", "attempts")


def stage(folder: Path, name: str, work: Callable[[], dict]) -> dict:
    """Does the work of a stage, or reads what it found when it was done before.

    Returns:
        ``result`` of the work, its ``seconds`` and ``cpu_seconds``, and how many ``attempts`` it took: the times are
        those of the last one.
    """
    path, begun = folder / f"{name}.json", folder / f"{name}.begun.json"
    if path.exists():
        print(f"      done before: {path}")
        return read(path, "result", *TIMES)
    folder.mkdir(exist_ok=True)
    attempts = 1 + (read(begun, "attempts")["attempts"] if begun.exists() else 0)
    write_json(begun, {"attempts": attempts})
    wall, processor = perf_counter(), process_time()
    result = work()
    times = {"seconds": perf_counter() - wall, "cpu_seconds": process_time() - processor}
    write_json(path, {"result": result, "attempts": attempts} | times)
    return read(path)


def read(path: Path, *keys: str) -> dict:
    try:
        content = json.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, and its stage is done again") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        what = (
            f"an object with {', '.join(keys)}, got {shorten(str(content))}"
            if keys
            else f"an object, got a {type(content).__name__}"
        )
        raise ValueError(f"{path}: file must hold {what}; remove it, and its stage is done again")
    return content
