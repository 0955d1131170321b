"""A folder of safetensors files of any architectures as one population: headers are read, no module is built.

Files stay as they are and where they are: windows are cut from their bytes. Which tensor is a layer, and which a bias,
follows from names and shapes as in every layout. Numbers that are no floats have no tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastws.files.arena import PAGE, map_files
from fastws.files.checkpoints import is_safetensors, read_index
from fastws.files.limits import DAMAGED
from fastws.files.names import plain_names
from fastws.files.safetensors import Contents, Header, read_contents
from fastws.files.state_dict import is_quantised
from fastws.layout.entries import NATIVE, Entry, Span
from fastws.layout.layout import Layout
from fastws.layout.roles import bias_name, infer_roles
from fastws.table import table_columns
from fastws.terminal import shorten
from fastws.windows.duplicates import find_duplicates
from fastws.windows.measured import Measured
from fastws.windows.population import OFFSETS, Kind, Population
from fastws.zoo.readers.checkpoints import find_checkpoints
from fastws.zoo.readers.collect import printable

TOKEN_SIZE = 288  # weights per token unless it is said: published for networks of many sizes


class File(NamedTuple):
    """Where the numbers of a file of a network are."""

    path: Path
    data: int  # byte at which they begin
    size: int  # of the file


class Model(NamedTuple):
    """A network, as the headers of its files tell of it."""

    name: str  # path in the folder
    files: tuple[File, ...]
    begin: int  # byte of the first file, a multiple of 8, from which places are counted
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    places: tuple[int, ...]  # first byte of each tensor; each file begins at a page behind the one before


class Hub(NamedTuple):
    """The models of a folder."""

    path: Path
    models: tuple[str, ...]  # paths in the folder, in the order of the population's networks
    population: Population
    left_out: dict[str, str]  # what is not among the models, and why
    digest: str  # of the names, shapes, dtypes and places of all tensors

    @property
    def usual(self) -> int:
        """The architecture that most models have, the first of several."""
        return int(self.population.kind.bincount().argmax())

    def describe(self) -> list[str]:
        """What there is, and a line for everything that is left out."""
        kinds = self.population.kinds
        architectures = len({kind.layout.fingerprint for kind in kinds})
        known = sum(kinds[number].symmetry is not None for number in self.population.kind.tolist())
        count = len(self.models)
        about = f"hub: {count:,} models of {architectures:,} architectures; permutations are known for {known:,} of "
        about += f"them, none for {count - known:,}; left out: {len(self.left_out):,}"
        return [about, *(f"left out: {name}: {reason}" for name, reason in self.left_out.items())]


def open_hub(
    folder: str | Path,
    *,
    token_size: int | None = None,
    norm: Literal["keep", "skip"] = "skip",
    span: Span = "row",
    standardize: bool = True,
) -> Hub:
    """Opens all safetensors files of a folder and those in it; checkpoints of several files by their index.

    Args:
        folder: Files in folders whose names begin with a dot are left out.
        token_size: Weights per token, 288 by default.
        norm: Whether norm layers have tokens.
        span: What a token may span, at most a layer.
        standardize: Whether the layers of each network get mean 0 and std 1; see ``Measured``.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If no file of it can be read.
    """
    root, token_size = Path(folder), TOKEN_SIZE if token_size is None else token_size
    if span == "network" or token_size < 1:
        got = f"{span} and {token_size}"
        raise ValueError(f"{root}: span must be row or layer, and token_size at least 1, for a hub, got {got}")
    models, left_out = read_models(root)
    groups: dict[tuple, list[Model]] = {}
    for model in models:
        groups.setdefault((model.tensors, model.places), []).append(model)
    layouts: dict[tuple, Layout] = {}
    kept, kinds = [], []
    for (tensors, _), members in groups.items():
        try:
            if tensors not in layouts:
                layouts[tensors] = make_layout(tensors, token_size, norm, span)
        except ValueError as error:
            left_out |= {model.name: str(error).removeprefix("layout: ") for model in members}
            continue
        twins = find_duplicates([[(file.path, file.data) for file in model.files] for model in members])
        left_out |= {members[a].name: f"holds the same numbers as {members[b].name}" for a, b in twins.items()}
        kept.append([model for number, model in enumerate(members) if number not in twins])
        kinds.append(Kind.of(layouts[tensors]))
    if not kept:
        why = "".join(f"; {name}: {reason}" for name, reason in list(left_out.items())[:1])
        raise ValueError(f"{root}: hub must hold a safetensors file that can be read, got none{why}")
    population = join(kinds, kept, standardize)
    models = list(chain(*kept))
    digest = hashlib.sha256(repr([(model.name, model.tensors, model.places) for model in models]).encode()).hexdigest()
    return Hub(root, tuple(model.name for model in models), population, dict(sorted(left_out.items())), digest)


def split_models(hub: Hub) -> tuple[Tensor, Tensor]:
    """Models to train and to validate on, int64 each: of three or more one in seven is for validation.

    Which it is follows from names, so that a model most likely stays where it was when others come or go.
    """
    order = sorted(range(len(hub.models)), key=lambda row: hashlib.sha256(hub.models[row].encode()).digest())
    val = sorted(order[: -(-len(order) // 7) if len(order) > 2 else 0])
    rows = torch.arange(len(order))
    return rows[~torch.isin(rows, torch.tensor(val, dtype=torch.int64))], torch.tensor(val, dtype=torch.int64)


# --- what the headers tell


def read_models(root: Path) -> tuple[list[Model], dict[str, str]]:
    """The networks of a folder by the headers of their files, sorted by name, and what cannot be read, and why."""
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing"
        raise FileNotFoundError(f"{root}: hub must be a folder of safetensors files, got {got}")
    search = find_checkpoints(root)
    left_out = {name_in(root, Path(skip.path)): skip.reason for skip in search.skipped}
    models, others = [], []
    for path in search.files:
        name = name_in(root, path)
        if not is_safetensors(path):
            others.append(name)
            continue
        try:
            models.append(read_model(name, path))
        except (OSError, *DAMAGED) as error:
            left_out[name] = " ".join(str(error).removeprefix(f"{path}: ").split()) or "damaged"
    what = "must be a safetensors file; fastws.load_checkpoint and safetensors.torch.save_file make one of it"
    return models, left_out | {name: what for name in others}


def name_in(root: Path, path: Path) -> str:
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix())


def read_model(name: str, path: Path) -> Model:
    """Raises ValueError, or OSError, if files are damaged or hold what has no tokens."""
    index = read_index(path) if path.suffix == ".json" else None
    paths = [path] if index is None else list(dict.fromkeys(index.values()))
    contents = {file: read_contents(file) for file in paths}
    files, begins, end = [], {}, 0
    for file, one in contents.items():
        files.append(File(file, one.data, one.size))
        begins[file] = end
        end += -(-one.size // PAGE) * PAGE
    begin = files[0].data & -8 if files else 0
    tensors, places = [], []
    for (old, header, file), plain in zip(found := list(list_tensors(contents, index)), plain_of(found), strict=True):
        check_tensor(old, header)
        if header.dtype in NATIVE:
            tensors.append((plain, header.shape, header.dtype))
            places.append(begins[file] + header.begin - begin)
    return Model(name, tuple(files), begin, tuple(tensors), tuple(places))


def list_tensors(
    contents: Mapping[Path, Contents], index: Mapping[str, Path] | None
) -> Iterator[tuple[str, Header, Path]]:
    if index is None:
        ((file, one),) = contents.items()
        yield from ((name, header, file) for name, header in one.headers.items())
        return
    for name, file in index.items():
        if name not in contents[file].headers:
            raise ValueError(f"{shorten(name)!r} must be in {file.name}, which does not hold it")
        yield name, contents[file].headers[name], file


def plain_of(found: Sequence[tuple[str, Header, Path]]) -> list[str]:
    plain = plain_names(name for name, _, _ in found)
    return [plain[name] for name, _, _ in found]


def check_tensor(name: str, header: Header) -> None:
    """Raises ValueError if numbers are no weights as they stand, or lie where they cannot be read in place."""
    dtype, floating = header.dtype, header.dtype.is_floating_point
    if is_quantised(name, dtype, len(header.shape)) or (floating and dtype not in NATIVE):
        got = f"{shorten(name)!r} of {dtype}; dequantise it where it was made"
        raise ValueError(f"weights must not be quantised, got {got}")
    if dtype.is_complex:
        raise ValueError(f"weights must be real numbers, got {shorten(name)!r} of {dtype}")
    if dtype in NATIVE and header.begin % dtype.itemsize and header.end > header.begin:
        what = f"at a multiple of {dtype.itemsize} bytes, got byte {header.begin}; save it with safetensors again"
        raise ValueError(f"numbers of {shorten(name)!r} must begin {what}")


def make_layout(tensors: Sequence[tuple], token_size: int, norm: Literal["keep", "skip"], span: Span) -> Layout:
    """The layout of named shapes and dtypes; a bias of another dtype than its weight has tokens of its own."""
    dtypes = {name: dtype for name, _, dtype in tensors}
    roles = infer_roles({name: shape for name, shape, _ in tensors})
    for name, dtype in dtypes.items():
        if roles[name].endswith("weight") and dtypes.get(bias_name(name), dtype) != dtype:
            roles[bias_name(name)] = "other"
    entries, offset = [], 0
    for name, shape, dtype in tensors:
        entries.append(Entry(name, shape, dtype, roles[name], offset))
        offset += entries[-1].numel
    layout = Layout(tuple(entries), {}, token_size, norm, span=span)
    if not layout.num_tokens:
        raise ValueError("network must have a layer beside norm layers, got none")
    return layout


# --- from headers to a population


def join(kinds: Sequence[Kind], members: Sequence[Sequence[Model]], standardize: bool) -> Population:
    """Maps the files of all networks, those of a kind one behind the other, and puts tables together."""
    dtypes = [dtypes_of(kind.layout) for kind in kinds]
    known = list(dict.fromkeys(chain(*dtypes)))
    where = torch.tensor([known.index(dtype) for dtype in chain(*dtypes)])
    table = torch.cat([place(kind, some[0]) for kind, some in zip(kinds, members, strict=True)])
    columns = table_columns(table)
    zeros = int((columns.rows * columns.row_length).max()) * max(dtype.itemsize for dtype in known)
    models = list(chain(*members))
    arena = map_files([file.path for model in models for file in model.files], zeros if len(known) > 1 else 0)
    first = torch.tensor([len(model.files) for model in models]).cumsum(0).roll(1)
    first[0] = 0
    begins = arena.begins[first] + torch.tensor([model.begin for model in models])
    counts = torch.tensor([len(kind.layout.table) for kind in kinds])
    ends = counts.cumsum(0)
    kind = torch.arange(len(kinds)).repeat_interleave(torch.tensor([len(some) for some in members]))
    layers = torch.stack([ends - counts, ends], 1)[kind]
    return Population(
        tuple(kinds),
        kind,
        tuple(arena.bytes.view(dtype) for dtype in known),
        tuple(in_entries(table, dtype, where == number) for number, dtype in enumerate(known)),
        tuple(begins // dtype.itemsize for dtype in known),
        where,
        layers,
        torch.ones(len(table)),
        torch.zeros(len(table)),
        arena=arena,
        measured=Measured([model.name for model in models], layers, standardize),
    )


def dtypes_of(layout: Layout) -> list[torch.dtype]:
    dtypes = {entry.name: entry.dtype for entry in layout.entries}
    return [dtypes[name] for name, _ in layout.layers]


def place(kind: Kind, model: Model) -> Tensor:
    """The table of a kind with the bytes at which the numbers of a network of it begin, for entries."""
    layout = kind.layout
    table = (layout.table if kind.symmetry is None else kind.symmetry.table(layout)).clone()
    begins = dict(zip((name for name, _, _ in model.tensors), model.places, strict=True))
    names = [[begins[weight], -1 if bias is None else begins[bias]] for weight, bias in layout.layers]
    table[:, OFFSETS] = torch.tensor(names)
    return table


def in_entries(table: Tensor, dtype: torch.dtype, own: Tensor) -> Tensor:
    """A table that counts in entries of a dtype, where layers are of it; others begin at 0."""
    table, offsets = table.clone(), table[:, OFFSETS]
    there = torch.where(own[:, None], offsets // dtype.itemsize, 0)
    table[:, OFFSETS] = torch.where(offsets < 0, offsets, there)
    return table
