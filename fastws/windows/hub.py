"""A folder of safetensors files of any architectures as one population: headers are read, no module is built.

Files stay as they are and where they are: windows are cut from their bytes. Which tensor is a layer, and which a bias,
follows from names and shapes as in every layout. Numbers that are no floats have no tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastws.files.arena import map_files
from fastws.layout.entries import Entry, Span
from fastws.layout.layout import Layout
from fastws.layout.roles import bias_name, infer_roles
from fastws.symmetry.symmetry import Symmetry
from fastws.table import table_columns
from fastws.windows.duplicates import find_duplicates
from fastws.windows.headers import Model, read_models
from fastws.windows.measured import Measured
from fastws.windows.population import OFFSETS, Kind, Population

TOKEN_SIZE = 288  # weights per token unless it is said: published for networks of many sizes


Trace = Callable[[str, Layout], Symmetry]  # from the text of config.json; raises ValueError where none is known


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
    trace: Trace | None = None,
) -> Hub:
    """Opens all safetensors files of a folder and those in it; checkpoints of several files by their index.

    Args:
        folder: Files in folders whose names begin with a dot are left out.
        token_size: Weights per token, 288 by default.
        norm: Whether norm layers have tokens.
        span: What a token may span, at most a layer.
        standardize: Whether the layers of each network get mean 0 and std 1; see ``Measured``.
        trace: Finds the symmetry of an architecture, once for each, from the ``config.json`` beside a file.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If no file of it can be read.
    """
    root, token_size = Path(folder), TOKEN_SIZE if token_size is None else token_size
    if span == "network" or token_size < 1:
        got = f"{span} and {token_size}"
        raise ValueError(f"{root}: span must be row or layer, and token_size at least 1, for a hub, got {got}")
    models, left_out = read_models(root, with_configs=trace is not None)
    groups: dict[tuple, list[Model]] = {}
    for model in models:
        groups.setdefault((model.tensors, model.places, model.config), []).append(model)
    layouts: dict[tuple, Layout] = {}
    kept, kinds, symmetries = [], [], {}
    for (tensors, _, config), members in groups.items():
        try:
            if tensors not in layouts:
                layouts[tensors] = make_layout(tensors, token_size, norm, span)
        except ValueError as error:
            left_out |= {model.name: str(error).removeprefix("layout: ") for model in members}
            continue
        twins = find_duplicates([[(file.path, file.data) for file in model.files] for model in members])
        left_out |= {members[a].name: f"holds the same numbers as {members[b].name}" for a, b in twins.items()}
        kept.append([model for number, model in enumerate(members) if number not in twins])
        if config and (tensors, config) not in symmetries:
            symmetries[tensors, config] = find_symmetry(trace, members[0], layouts[tensors])
        kinds.append(Kind.of(layouts[tensors], symmetries.get((tensors, config))))
    if not kept:
        why = "".join(f"; {name}: {reason}" for name, reason in list(left_out.items())[:1])
        raise ValueError(f"{root}: hub must hold a safetensors file that can be read, got none{why}")
    population = join(kinds, kept, standardize)
    models = list(chain(*kept))
    digest = hashlib.sha256(repr([(model.name, model.tensors, model.places) for model in models]).encode()).hexdigest()
    return Hub(root, tuple(model.name for model in models), population, dict(sorted(left_out.items())), digest)


def find_symmetry(trace: Trace, model: Model, layout: Layout) -> Symmetry | None:
    try:
        return trace(model.config, layout)
    except ValueError as error:
        print(f"note: permutations of {model.name} and those like it are not known: {error}")
        return None


def split_models(hub: Hub) -> tuple[Tensor, Tensor]:
    """Models to train and to validate on, int64 each: of three or more one in seven is for validation.

    Which it is follows from names, so that a model most likely stays where it was when others come or go.
    """
    order = sorted(range(len(hub.models)), key=lambda row: hashlib.sha256(hub.models[row].encode()).digest())
    val = sorted(order[: -(-len(order) // 7) if len(order) > 2 else 0])
    rows = torch.arange(len(order))
    return rows[~torch.isin(rows, torch.tensor(val, dtype=torch.int64))], torch.tensor(val, dtype=torch.int64)


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
