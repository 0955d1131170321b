"""The zoo folder: many checkpoints of one architecture as rows of one memory-mapped matrix, with their properties.

    zoo.json                    layout, symmetry, provenance, splits by model id, and which files hold which rows
    weights-00000.safetensors   a tensor "weights" [rows, P] per file; one file unless the zoo exceeds 1 GiB
    models.parquet              one row per state: model id, epoch, seed, hyperparameters, accuracies ...

A zoo that is being written has more and smaller files. ``zoo.json`` is replaced last, and nothing counts that it does
not list: so a writer may die at any byte, and readers may come at any time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from torch import Tensor

from fastws.files.safetensors import DTYPES
from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.format.manifest import MANIFEST, read_manifest
from fastws.zoo.format.parts import CHUNK, find_nonfinite, is_number, map_weights, read_models

ODD = ("tanh", "sin", "erf", "softsign", "hardtanh", "identity")  # activations that pass a sign on


@dataclass(frozen=True, eq=False)
class Zoo:
    """Trained networks of one architecture, open for reading.

    Attributes:
        path: The folder.
        layout: What a row means.
        symmetry: Which neurons may be permuted, if the zoo knows.
        dtype: Of the stored weights.
        provenance: Where the networks come from, as written.
        splits: Model ids of ``train``, ``val`` and ``test``, also of models that are still to come.
        shards: Memory-mapped weights ``[rows, P]``, one tensor per file. Pages are read when they are touched; what is
            written into them stays private.
        dropped: States that were left out when the zoo was written, because they were not finite.
        bad_rows: Rows that ``on_bad="drop"`` found; ``split`` leaves them out.
        weight_files: The file of each shard.
    """

    path: Path
    layout: Layout
    symmetry: Symmetry | None
    dtype: torch.dtype
    provenance: dict
    splits: dict[str, list[str]]
    shards: tuple[Tensor, ...]
    model_files: tuple[dict, ...]
    dropped: int
    bad_rows: Tensor
    weight_files: tuple[Path, ...] = ()

    @classmethod
    def open(cls, path: str | os.PathLike, on_bad: Literal["drop", "raise"] | None = None) -> "Zoo":
        """Opens a zoo folder; reads ``zoo.json`` and the headers of the weight files, no weights.

        Args:
            path: The folder. It may be written to at the same time; the zoo is what was there when it was opened.
            on_bad: What to do about rows that hold NaN or infinite weights. ``"drop"`` leaves them out of every
                split, ``"raise"`` refuses the zoo; both read all weights. The default trusts the writer, which lets no
                such row in.

        Raises:
            FileNotFoundError: If there is no zoo, or a file that it lists is missing.
            ValueError: If a file is damaged or does not fit, or ``on_bad="raise"`` found something.

        Example:
            >>> zoo = fastws.Zoo.open("zoos/digits")  # doctest: +SKIP
            >>> weights = zoo.rows(zoo.split("train")[:64])  # [64, P]  # doctest: +SKIP
        """
        if on_bad not in (None, "drop", "raise"):
            raise ValueError(f"Zoo.open: on_bad must be 'drop', 'raise' or None, got {on_bad!r}")
        path = Path(path)
        check_path(path)
        manifest = read_manifest(path)
        while True:
            try:
                zoo = cls._of(path, manifest)
                break
            except FileNotFoundError:
                newer = read_manifest(path)
                if newer == manifest:
                    raise
                manifest = newer  # a writer has merged files since
        return zoo if on_bad is None else zoo._checked(on_bad)

    @classmethod
    def _of(cls, path: Path, manifest: dict) -> "Zoo":
        try:
            layout = Layout.from_dict(manifest["layout"])
            symmetry = manifest["symmetry"] and Symmetry.from_dict(manifest["symmetry"])
            if symmetry:
                symmetry.require_same(layout)
        except ValueError as error:
            raise ValueError(f"{path / MANIFEST}: file must describe a zoo, got {error}; restore it") from error
        dtype, models = DTYPES[manifest["dtype"]], tuple(manifest["models"])
        files = [(path / file["file"], (file["rows"], layout.num_weights)) for file in manifest["weights"]]
        shards = tuple(map_weights(file, expected, dtype) for file, expected in files)
        for file in models:
            if not (path / file["file"]).is_file():
                raise FileNotFoundError(f"{path / file['file']}: file must be there, {MANIFEST} lists it; restore it")
        empty = torch.empty(0, dtype=torch.int64)
        told = manifest["provenance"], manifest["splits"]
        names = tuple(file for file, _ in files)
        return cls(path, layout, symmetry, dtype, *told, shards, models, manifest["dropped"], empty, names)

    def __len__(self) -> int:
        """States in the zoo, ``M``."""
        return sum(len(shard) for shard in self.shards)

    def __repr__(self) -> str:
        return f"Zoo({str(self.path)!r}, {len(self):,} states, {self.layout!r})"

    @property
    def weights(self) -> Tensor:
        """All weights, memory-mapped ``[M, P]``; for zoos of one file.

        Raises:
            ValueError: If the zoo has several files; ``rows`` reads from all zoos.
        """
        if len(self.shards) > 1:
            raise ValueError(
                f"{self.path}: zoo must have one file of weights to be one tensor, got {len(self.shards)}; "
                "take zoo.rows(indices), or zoo.shards"
            )
        return self.shards[0] if self.shards else torch.empty(0, self.layout.num_weights, dtype=self.dtype)

    def rows(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Copies of rows ``[k, P]``, in the order of ``indices`` (integers in ``[0, M)``), in the dtype of the zoo.

        Raises:
            IndexError: If an index is out of range.
        """
        indices = torch.as_tensor(indices, dtype=torch.int64).flatten()
        if indices.numel() and not 0 <= indices.min() <= indices.max() < len(self):
            bounds = f"[{indices.min()}, {indices.max()}]"
            raise IndexError(f"rows: indices must be in [0, {len(self)}), got some in {bounds}")
        if len(self.shards) == 1:
            return self.shards[0][indices]
        rows = torch.empty(len(indices), self.layout.num_weights, dtype=self.dtype)
        first = 0
        for shard in self.shards:
            here = ((indices >= first) & (indices < first + len(shard))).nonzero().flatten()
            rows[here] = shard[indices[here] - first]
            first += len(shard)
        return rows

    def checkpoint(self, row: int) -> dict[str, Tensor]:
        """The state dict of one row."""
        return self.layout.unflatten(self.rows([row])[0])

    @cached_property
    def properties(self) -> pyarrow.Table:
        """One row per state, in the order of the weights: ``model`` (string), ``epoch``, and what the maker knew."""
        files = self.model_files
        while True:
            try:
                tables = [read_models(self.path / file["file"], file["rows"]) for file in files]
                break
            except FileNotFoundError:
                newer = tuple(read_manifest(self.path)["models"])
                if newer == files:
                    raise
                files = newer  # a writer has merged files since; rows are only ever added at the end
        empty = pyarrow.table({"model": pyarrow.array([], "string")})
        return pyarrow.concat_tables(tables).slice(0, len(self)) if tables else empty

    def count_models(self, split: str) -> int:
        """Models of a split that have states here."""
        return len(self.properties["model"].take(self.split(split).numpy()).unique())

    def numbers(self, name: str) -> numpy.ndarray:
        """A property as float64 ``[M]``, nan where it is unknown; the caller may write into it.

        Raises:
            ValueError: If it is not a number.
        """
        column = self.properties[name]
        if not is_number(column.type):
            raise ValueError(f"{self.path}: property {name!r} must be a number, got {column.type}")
        return column.cast("float64", safe=False).to_numpy().copy()  # large seeds are rounded

    @cached_property
    def may_flip(self) -> Tensor:
        """Which networks keep their function when units change their sign as ``symmetry.flips`` allows, bool ``[M]``.

        Those whose ``activation`` is odd; none where the zoo does not know activations, or its symmetry no signs.
        """
        known = "activation" in self.properties.column_names and self.symmetry is not None and any(self.symmetry.flips)
        names = self.properties["activation"].to_pylist() if known else [None] * len(self)
        return torch.tensor([name in ODD for name in names], dtype=torch.bool)

    def split(self, name: str) -> Tensor:
        """Rows of a split, int64 ``[m]``, ascending. All states of a model are in the same split.

        Raises:
            ValueError: If there is no such split.
        """
        if name not in self.splits:
            raise ValueError(f"split: name must be one of {', '.join(self.splits)}, got {name!r}")
        members = pyarrow.array(self.splits[name], "string")
        inside = pyarrow.compute.is_in(self.properties["model"].cast("string"), value_set=members)
        chosen = torch.from_numpy(inside.to_numpy(zero_copy_only=False).copy())
        chosen[self.bad_rows] = False
        return chosen.nonzero().flatten()

    def _checked(self, on_bad: str) -> "Zoo":
        bad, first = [], 0
        for shard in self.shards:
            for part in shard.split(max(1, CHUNK // (4 * self.layout.num_weights))):
                bad.append(find_nonfinite(part) + first)
                first += len(part)
        bad_rows = torch.cat(bad) if bad else self.bad_rows
        if on_bad == "raise" and len(bad_rows):
            raise ValueError(
                f"{self.path}: weights must be finite, got NaN or infinity in {len(bad_rows)} of {len(self)} rows, "
                f'first in row {int(bad_rows[0])}; open it with on_bad="drop"'
            )
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Zoo(**fields | {"bad_rows": bad_rows})


def check_path(path: Path) -> None:
    """torch and pyarrow open files by names in UTF-8 only."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"zoo: path must be in UTF-8, got {os.fsencode(path)!r}; take another folder") from error
