"""ZooWriter: adds states to a zoo folder so that it is a valid zoo at every moment. See ``format`` for the folder."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from fastws.files.atomic import sync_folder, write_json
from fastws.files.lock import release_lock, take_lock
from fastws.files.safetensors import DTYPES
from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.format.manifest import FORMAT, MANIFEST, read_manifest
from fastws.zoo.format.parts import (
    CHUNK,
    check_columns,
    find_nonfinite,
    map_weights,
    read_models,
    to_table,
    write_models,
    write_weights,
)
from fastws.zoo.format.splits import SPLITS, deal, find_shared, find_splits
from fastws.zoo.format.zoo import Zoo, check_path

MODELS = "models.parquet"
OWN = r"(weights-\d{5,}\.safetensors|models-\d{5,}\.parquet)"
HALF = rf"({OWN}|models\.parquet|zoo\.json|resume\.safetensors|read\.json)\.[0-9a-f]+\.tmp"
OWN_FILES = re.compile(f"{OWN}|{HALF}")
MERGE = 64  # files of one append each, after which they become one


class ZooWriter:
    """Writes a zoo folder, or adds to one.

    Each ``append`` is on disk and visible to readers when it returns; a writer that dies loses only the one that it
    was in. ``close`` merges the files. As a context manager it closes when the block ends without error.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        layout: Layout,
        symmetry: Symmetry | None = None,
        provenance: Mapping | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        on_bad: Literal["drop", "raise"] = "drop",
        splits: Mapping[str, Sequence[str]] | None = None,
        models: Sequence[str] = (),
        seed: int = 42,
        shard_bytes: int = 2**30,
    ):
        """Opens a zoo for writing; it is created if there is none.

        Args:
            path: The folder.
            layout: What a row means.
            symmetry: Of the architecture; kept with the zoo.
            provenance: Anything that JSON can hold: data set, configuration, versions.
            dtype: Of the stored weights: float32, bfloat16, float16 or float64.
            on_bad: What to do about rows with NaN or infinite weights: leave them out and count them, or refuse.
            splits: Model ids of each split. By default 70 % of the models go to ``train``, 15 % to ``val`` and 15 % to
                ``test``: the new ones of each append in an order that ``seed`` shuffles, each to the split that
                lacks most.
            models: Ids of models that will come, which are dealt when the zoo is created: then splits do not depend on
                how they come. None if splits are given.
            seed: Of the splits.
            shard_bytes: Largest file of weights after ``close``.

        Raises:
            OSError: If the folder cannot be written.
            BlockingIOError: If another writer has it open.
            ValueError: If the folder holds a zoo of another architecture or dtype, or an argument is out of range.
        """
        if on_bad not in ("drop", "raise"):
            raise ValueError(f"ZooWriter: on_bad must be 'drop' or 'raise', got {on_bad!r}")
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"ZooWriter: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        if splits is not None and len(models):
            raise ValueError(f"ZooWriter: models must be none where splits are given, got {len(models)}")
        if shared := find_shared(splits or {}):
            raise ValueError(f"ZooWriter: a model must be in one split, got {shared}")
        self.path, self.layout, self.dtype = Path(path), layout, dtype
        self.on_bad, self.seed, self.shard_bytes = on_bad, seed, shard_bytes
        check_path(self.path)
        self._lock = take_lock(self.path)
        try:
            self._manifest = self._open(symmetry, provenance, splits, models)
            self._remove_unlisted()
        except BaseException:
            release_lock(self.path, self._lock)
            raise
        self._split_of = find_splits(self._manifest["splits"])
        # files before these are not merged until close
        self._merged = {key: len(self._manifest[key]) for key in ("weights", "models")}

    def _open(self, symmetry, provenance, splits, models) -> dict:
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            # all that it lists must be there, or what it does not list would be removed for a mistake in it
            Zoo.open(self.path).layout.require_same(self.layout, str(self.path))
            if DTYPES.get(manifest["dtype"]) != self.dtype:
                raise ValueError(f"{self.path}: dtype must be that of the zoo, {manifest['dtype']}, got {self.dtype}")
            return manifest
        manifest = {
            "format": FORMAT,
            "dtype": next(name for name, known in DTYPES.items() if known == self.dtype),
            "fingerprint": self.layout.fingerprint,
            "layout": self.layout.to_dict(),
            "symmetry": None if symmetry is None else symmetry.to_dict(),
            "provenance": dict(provenance or {}),
            "given_splits": splits is not None,
            "splits": deal(splits or dict.fromkeys(SPLITS, ()), models, self.seed),
            "weights": [],
            "models": [],
            "submitted": 0,
            "dropped": 0,
            "next_file": 0,
        }
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def __len__(self) -> int:
        """States in the zoo."""
        return sum(file["rows"] for file in self._manifest["weights"])

    @property
    def submitted(self) -> int:
        """States that were ever given to ``append``, with those that were left out."""
        return self._manifest["submitted"]

    @property
    def dropped(self) -> int:
        """States that were left out because they were not finite."""
        return self._manifest["dropped"]

    @property
    def provenance(self) -> dict:
        """As written when the zoo was created."""
        return self._manifest["provenance"]

    def append(self, rows: Tensor, properties: Mapping[str, object]) -> int:
        """Adds states.

        Args:
            rows: Weights ``[k, P]``, floating point, in the order of the layout; stored in the dtype of the zoo.
            properties: Columns of k entries each; ``model`` is the id, strings or integers, of the network that a
                state belongs to. Every append has the same columns.

        Returns:
            How many were added; the others are not finite.

        Raises:
            ValueError: If a shape, a dtype or a column does not fit, or with ``on_bad="raise"`` if a row is not finite.
            OSError: If the disk is full; the zoo is then what it was before.
        """
        expected = [len(rows) if rows.dim() else 0, self.layout.num_weights]
        if list(rows.shape) != expected or not rows.is_floating_point():
            what = f"[k, {self.layout.num_weights}] floating point"
            raise ValueError(f"append: rows must be {what}, got {list(rows.shape)} {rows.dtype}")
        if len(rows) == 0:
            return 0
        first = self._manifest["models"][:1]
        schema = pyarrow.parquet.read_schema(self.path / first[0]["file"]) if first else None
        table = to_table(properties, len(rows), schema)
        check_columns(self.path, table)
        stored = rows.detach().to("cpu", self.dtype)
        bad = find_nonfinite(stored)
        if len(bad):
            if self.on_bad == "raise":
                first = f"{len(bad)} of {len(rows)}, first in row {int(bad[0])}"
                raise ValueError(f"append: rows must be finite in {self.dtype}, got NaN or infinity in {first}")
            good = torch.ones(len(rows), dtype=torch.bool)
            good[bad] = False
            stored, table = stored[good], table.filter(pyarrow.array(good.numpy()))
        manifest = dict(self._manifest)
        manifest["submitted"] += len(rows)
        manifest["dropped"] += len(bad)
        if len(stored):
            self._add_files(manifest, stored, table)
        self._commit(manifest)
        for key, merge in (("weights", self._merge_weights), ("models", self._merge_models)):
            if len(self._manifest[key]) - self._merged[key] >= MERGE:
                merge(self._manifest[key][self._merged[key] :])
                self._merged[key] = len(self._manifest[key])
        return len(stored)

    def close(self) -> None:
        """Merges the files and lets other writers in."""
        if self._lock.closed:
            return
        try:
            for group in self._groups():
                self._merge_weights(group)
            if [file["file"] for file in self._manifest["models"]] not in ([], [MODELS]):
                self._merge_models(self._manifest["models"], MODELS)
        finally:
            self._release()

    def __enter__(self) -> "ZooWriter":
        return self

    def __exit__(self, error, *_) -> None:
        if error is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        if not self._lock.closed:
            release_lock(self.path, self._lock)

    # --- one append

    def _add_files(self, manifest: dict, rows: Tensor, table: pyarrow.Table) -> None:
        number = manifest["next_file"]
        weights, models = f"weights-{number:05}.safetensors", f"models-{number:05}.parquet"
        manifest["splits"] = self._deal(table["model"].to_pylist())
        write_weights(self.path / weights, [rows], tuple(rows.shape), self.dtype)
        write_models(self.path / models, table)
        manifest["weights"] = [*manifest["weights"], {"file": weights, "rows": len(rows)}]
        manifest["models"] = [*manifest["models"], {"file": models, "rows": len(rows)}]
        manifest["next_file"] = number + 1

    def _deal(self, models: list[str]) -> dict[str, list[str]]:
        """The splits with the new models of an append."""
        new = [model for model in dict.fromkeys(models) if model not in self._split_of]
        if not new:
            return self._manifest["splits"]
        if self._manifest["given_splits"]:
            raise ValueError(f"append: model must be in one of the splits that were given, got {new[0]!r}")
        return deal(self._manifest["splits"], new, self.seed)

    def _commit(self, manifest: dict) -> None:
        write_json(self.path / MANIFEST, manifest)
        if manifest["splits"] is not self._manifest["splits"]:
            self._split_of = find_splits(manifest["splits"])
        self._manifest = manifest

    # --- fewer files

    def _groups(self) -> list[list[dict]]:
        """Neighbouring files that fit into one."""
        bytes_per_row = self.layout.num_weights * self.dtype.itemsize
        groups, size = [], 0
        for file in self._manifest["weights"]:
            size += file["rows"] * bytes_per_row
            if groups and size <= self.shard_bytes:
                groups[-1].append(file)
            else:
                groups.append([file])
                size = file["rows"] * bytes_per_row
        return groups

    def _merge_weights(self, files: list[dict]) -> None:
        if len(files) < 2:
            return
        rows = sum(file["rows"] for file in files)
        merged = {"file": f"weights-{self._manifest['next_file']:05}.safetensors", "rows": rows}
        step = max(1, CHUNK // (self.layout.num_weights * self.dtype.itemsize))
        shape = self.layout.num_weights
        mapped = (map_weights(self.path / file["file"], (file["rows"], shape), self.dtype) for file in files)
        parts = (part for shard in mapped for part in shard.split(step))
        write_weights(self.path / merged["file"], parts, (rows, shape), self.dtype)
        self._replace("weights", files, merged)

    def _merge_models(self, files: list[dict], name: str | None = None) -> None:
        """Merges files into one, ``models.parquet`` if these are all, else a numbered one."""
        table = pyarrow.concat_tables([read_models(self.path / file["file"], file["rows"]) for file in files])
        name = name or f"models-{self._manifest['next_file']:05}.parquet"
        # a reader that comes before the manifest finds the rows that it expects at the beginning of models.parquet
        write_models(self.path / name, table.combine_chunks())
        self._replace("models", files, {"file": name, "rows": len(table)})

    def _replace(self, key: str, files: list[dict], merged: dict) -> None:
        """Lists one file in place of its parts, which are removed."""
        listed = self._manifest[key]
        first = listed.index(files[0])
        changed = {key: [*listed[:first], merged, *listed[first + len(files) :]]}
        self._commit(self._manifest | changed | {"next_file": self._manifest["next_file"] + 1})
        self._remove_unlisted()

    def _remove_unlisted(self) -> None:
        """Removes what a dead writer left, and files that were merged; mapped ones stay readable."""
        listed = {file["file"] for key in ("weights", "models") for file in self._manifest[key]}
        for file in self.path.iterdir():
            if OWN_FILES.fullmatch(file.name) and file.name not in listed:
                file.unlink()
        sync_folder(self.path)


def store_symmetry(path: str | os.PathLike, symmetry: Symmetry) -> None:
    """Gives a symmetry to a zoo that was written without one, or with the same one without signs.

    Raises:
        ValueError: If the zoo has another symmetry, or other tensors than the symmetry.
        OSError: If the folder cannot be written.
        BlockingIOError: If another process is writing it.
    """
    path = Path(path)
    lock = take_lock(path)
    try:
        manifest, layout = read_manifest(path), Zoo.open(path).layout
        try:
            symmetry.require_same(layout)
        except ValueError as error:
            raise ValueError(f"{path}: zoo must be of the given architecture, got another one: {error}") from None
        known = manifest["symmetry"] and Symmetry.from_dict(manifest["symmetry"])
        if known is None or known == symmetry.unsigned():  # a zoo of before signs were known gets them
            write_json(path / MANIFEST, manifest | {"symmetry": symmetry.to_dict()})
        elif known != symmetry:
            raise ValueError(f"{path}: zoo must have no symmetry or the same one, got another; leave architecture out")
    finally:
        release_lock(path, lock)
