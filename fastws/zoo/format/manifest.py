"""The manifest of a zoo, ``zoo.json``: what the zoo is, and which files hold which of its rows."""

from pathlib import Path

from fastws.files import json
from fastws.files.safetensors import DTYPES
from fastws.zoo.format.splits import find_shared

FORMAT = 1
MANIFEST = "zoo.json"
KEYS = {
    "layout": (dict,),
    "symmetry": (dict, type(None)),
    "provenance": (dict,),
    "given_splits": (bool,),
    "splits": (dict,),
    "dtype": (str,),
    "weights": (list,),
    "models": (list,),
    "submitted": (int,),
    "dropped": (int,),
    "next_file": (int,),
}


def read_manifest(path: Path) -> dict:
    """Reads the manifest of a zoo folder, which may come from anybody.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or names files elsewhere.
    """
    file = path / MANIFEST
    if not file.is_file():
        what = "a folder without it" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{file}: zoo must be a folder with a {MANIFEST}, got {what}; see fastws zoo make")
    manifest = json.read(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{file}: format must be {FORMAT}, got {got!r}; it was written by another version")
    for key, kinds in KEYS.items():
        if key not in manifest:
            raise ValueError(f"{file}: file must have a key {key!r}, got none; restore it")
        if type(manifest[key]) not in kinds or (kinds == (int,) and manifest[key] < 0):
            what, got = " or ".join(kind.__name__ for kind in kinds), str(manifest[key])[:80]
            raise ValueError(f"{file}: {key!r} must be {what}, from 0 if a number, got {got}; restore it")
    if manifest["dtype"] not in DTYPES:
        raise ValueError(f"{file}: dtype must be one of {', '.join(DTYPES)}, got {manifest['dtype']!r}; restore it")
    for listed in (*manifest["weights"], *manifest["models"]):
        if not lists_rows(listed):
            what = "a file in the folder and its rows"
            raise ValueError(f"{file}: weights and models must each name {what}, got {listed}; restore it")
    described, weighed = (sum(listed["rows"] for listed in manifest[key]) for key in ("models", "weights"))
    if described != weighed:
        raise ValueError(f"{file}: models must have {weighed} rows like weights, got {described}; restore it")
    for name, members in manifest["splits"].items():
        if not isinstance(members, list) or not set(map(type, members)) <= {str}:
            raise ValueError(f"{file}: split {name!r} must be a list of model ids, got another thing; restore it")
    if shared := find_shared(manifest["splits"]):
        raise ValueError(f"{file}: a model must be in one split, got {shared}; restore it")
    return manifest


def lists_rows(listed: object) -> bool:
    if not isinstance(listed, dict) or listed.keys() != {"file", "rows"}:
        return False
    name, rows = listed["file"], listed["rows"]
    # a zoo from strangers names no files elsewhere
    return isinstance(name, str) and Path(name).name == name and type(rows) is int and rows >= 0
