"""Layout: an architecture's weights as one flat vector and a grid of tokens. docs/design.md tells the whole story."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastws.files.atomic import write_file
from fastws.files.json import read as read_json
from fastws.files.state_dict import EXTRA, is_quantised
from fastws.layout.entries import (
    Entry,
    Span,
    check_offsets,
    find_layers,
    flat_dtype,
    flat_order,
    make_table,
    parse_entry,
    row_length,
)
from fastws.layout.roles import describe_source, load_parts, load_state
from fastws.ops.tokenize import detokenize, tokenize
from fastws.table import count_tokens, table_columns, table_rows
from fastws.tokens import Tokens

CPU = torch.device("cpu")
FORMAT = 2  # of files; 1 knew no spans


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each number of a checkpoint lies in a flat vector ``[P]`` and in a grid of tokens ``[N, T]``.

    Made from names, shapes and dtypes alone. ``Layout.from_checkpoint`` is the way to get one.

    Attributes:
        entries: The tensors of a checkpoint, in order.
        aliases: Names of tied tensors, and the entry that each is tied to.
        token_size: Entries per token, ``T``.
        aside: Names in the checkpoint of what is no tensor of numbers (``_extra_state``, packed weights), and how many
            numbers each holds; of no account for what a layout is equal to.
        norm: ``"keep"`` tokenizes norm layers, ``"skip"`` leaves their weights, biases and statistics out.
        span: What a token may span: see ``from_checkpoint``.
        num_weights: Length of the flat vector, ``P``.
        num_tokens: Tokens per checkpoint, ``N``.
        dtype: The smallest one that holds every number of the checkpoint exactly.
        layers: Names of the tensors behind each row of ``table``: a weight, and its bias if it has one.
        table: int64 ``[L, 11]``, one row per tokenized tensor; docs/design.md says what the columns mean.
        tensor_table: The same columns with one row per tensor, biases too: it covers the flat vector without gaps.
    """

    entries: tuple[Entry, ...]
    aliases: dict[str, str]
    token_size: int
    norm: Literal["keep", "skip"] = "keep"
    aside: dict[str, int] = field(default_factory=dict)
    span: Span = "row"

    @classmethod
    def from_checkpoint(
        cls,
        source: Mapping[str, Tensor] | nn.Module | str | os.PathLike,
        token_size: int | None = None,
        norm: Literal["keep", "skip"] = "keep",
        span: Span = "row",
    ) -> "Layout":
        """Makes the layout of a checkpoint.

        Roles follow from shapes and names, so that a module, its state dict and its file are taken alike: a tensor of
        two or more axes is a weight, a vector named ``weight`` is that of a norm layer, a vector named like a weight
        with ``bias`` for ``weight`` is its bias, which becomes the last entry of the weight's rows. All others have
        tokens of their own. ``describe()`` prints every decision.

        Args:
            source: A state dict, a module, or a file: safetensors or ``*.safetensors.index.json``, of which only the
                headers are read, or anything that ``torch.load`` reads with ``weights_only=True``; or a folder that
                ``save_pretrained`` of transformers or diffusers wrote.
            token_size: Entries per token; by default the longest row, so that each row is one token, or with span
                "network" all, so that the network is one.
            norm: ``"keep"`` or ``"skip"`` norm layers in tokens; the flat vector holds them either way.
            span: ``"row"``: each row, its bias behind it, begins a token (the sparse tokens of SANE). ``"layer"``: the
                rows of a layer follow each other, and each layer begins a token (dense tokens). ``"network"``: all
                tensors follow each other, in the order of the flat vector.

        Raises:
            ValueError: If the source holds no floating tensor, is damaged, or an argument is out of range.

        Example:
            >>> layout = fastws.Layout.from_checkpoint(torch.nn.Linear(3, 2))
            >>> layout.num_weights, layout.num_tokens, layout.token_size
            (8, 2, 4)
        """
        check_choices(norm, span)
        shapes, aliases, roles, aside = describe_source(source)
        entries, offset = [], 0
        for name, (shape, dtype) in shapes.items():
            if dtype.is_complex:
                raise ValueError(f"layout: {name!r} must be of real numbers, got {dtype}")
            if dtype.is_floating_point:
                entries.append(Entry(name, shape, dtype, roles[name], offset))
                offset += math.prod(shape)
            else:
                entries.append(Entry(name, shape, dtype, "other", -1))
        layout = cls(tuple(entries), aliases, 1, norm, aside, span)
        if lost := layout.lost:
            what = f"{lost:,} quantised numbers of the checkpoint are not in it; describe() names them"
            warnings.warn(f"layout: {what}; dequantise the network where it was made", stacklevel=2)
        return layout.with_tokens(token_size)

    def with_tokens(
        self, token_size: int | None = None, norm: Literal["keep", "skip"] | None = None, span: Span | None = None
    ) -> "Layout":
        """The same architecture with another token size, span, or treatment of norm layers."""
        norm, span = norm or self.norm, span or self.span
        check_choices(norm, span)
        if token_size is None:
            layers = find_layers(self.entries, norm)
            if span == "network":
                token_size = sum(entry.numel for entry, _ in flat_order(layers)) or 1
            else:
                token_size = max((row_length(*layer) for layer in layers), default=1)
        if isinstance(token_size, bool) or not isinstance(token_size, int) or token_size < 1:
            raise ValueError(f"layout: token_size must be a whole number from 1, got {token_size!r}")
        return replace(self, token_size=token_size, norm=norm, span=span)

    # --- tables

    def __post_init__(self):
        """The attributes above that follow from the entries; eager, because torch.compile cannot trace a cache."""
        check_offsets(self.entries)
        flat = [entry for entry in self.entries if entry.offset >= 0]
        layers = find_layers(self.entries, self.norm)
        layers = flat_order(layers) if self.span == "network" else layers
        table, held = make_table(layers, self.token_size, self.span), {entry for layer in layers for entry in layer}
        derived = {
            "layers": tuple((entry.name, bias and bias.name) for entry, bias in layers),
            "table": table,
            "tensor_table": make_table([(entry, None) for entry in flat if entry.numel], 1),
            "num_weights": sum(entry.numel for entry in flat),
            "num_tokens": count_tokens(table, self.token_size),
            "dtype": flat_dtype(entry.dtype for entry in flat),
            "_untokenized": tuple((e.offset, e.offset + e.numel) for e in flat if e not in held),
            "_on_device": {},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def lengths(self) -> Tensor:
        """Entries of each token that hold weights, int32 ``[N]``."""
        return self.on(CPU)[1]

    @property
    def positions(self) -> Tensor:
        """Number of the token, of its layer and of its output unit, int32 ``[N, 3]`` (arXiv 2406.09997, section 2).

        Where tokens span rows, the third is the number of the token in its layer, and a token that spans layers is of
        the first of them.
        """
        return self.on(CPU)[2]

    @property
    def mask(self) -> Tensor:
        """True where a token holds a weight, bool ``[N, T]``; made on demand."""
        return torch.arange(self.token_size, device="cpu") < self.lengths[:, None]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``table``, ``lengths`` and ``positions`` on a device."""
        return tables_on(self, device)

    # --- checkpoints and tokens

    def flatten(self, source: Mapping[str, Tensor] | nn.Module | str | os.PathLike) -> Tensor:
        """All floating tensors of a checkpoint as one vector, ``[P]``.

        Tensors may lie on any device, in any stride order; the dtype is the smallest that holds all of them exactly.
        Differentiable in the tensors.

        Raises:
            ValueError: If a tensor is missing, has another shape, is not floating point, or other than the one that it
                is tied to; it is named.
        """
        state = load_state(source)
        pieces = []
        for entry in self.entries:
            if entry.offset < 0:
                continue
            tensor = state.get(entry.name)
            if tensor is not None and tensor.is_meta:
                raise ValueError(
                    f"flatten: {entry.name!r} must hold numbers, got a meta tensor; load its weights first"
                )
            if tensor is None or tuple(tensor.shape) != entry.shape:
                got = "nothing" if tensor is None else list(tensor.shape)
                raise ValueError(f"flatten: {entry.name!r} must be a tensor {list(entry.shape)}, got {got}")
            if not tensor.is_floating_point():
                raise ValueError(f"flatten: {entry.name!r} must be floating point, got {tensor.dtype}")
            pieces.append(tensor)
        known = {entry.name for entry in self.entries} | set(self.aliases)
        extra = next((name for name, value in state.items() if name not in known and value.is_floating_point()), None)
        if extra is not None:
            raise ValueError(f"flatten: {extra!r} must be in the layout, which is that of another architecture")
        for alias, name in self.aliases.items():
            if alias in state and not is_same(state[alias], state[name]):
                raise ValueError(f"flatten: {alias!r} must be {name!r}, to which it is tied, got other values")
        dtype = flat_dtype(piece.dtype for piece in pieces)
        return torch.cat([piece.reshape(-1).to(dtype) for piece in pieces])

    def unflatten(self, flat: Tensor, like: Mapping[str, Tensor] | nn.Module | None = None) -> dict[str, Tensor]:
        """The checkpoint of a flat vector: original names, shapes and dtypes.

        Tensors are views of ``flat`` wherever no dtype changes. A batch ``[.., P]`` gives tensors ``[.., *shape]``, as
        ``torch.func.stack_module_state`` does. A ``flat`` that has not the dtype of the layout keeps its own.

        Args:
            flat: ``[.., P]``, floating point.
            like: Where to take from what is not in the flat vector (integers, flags, extra states). Without it step
                counters are zero and all else is left out.

        Raises:
            ValueError: If ``flat`` has another length or dtype, or ``like`` lacks a tensor.
        """
        self._check_flat("unflatten", flat)
        aside, others = (None, {}) if like is None else load_parts(like)
        state = {}
        for entry in self.entries:
            if entry.offset >= 0:
                tensor = flat[..., entry.offset : entry.offset + entry.numel].unflatten(-1, entry.shape or (1,))
                tensor = tensor if entry.shape else tensor.squeeze(-1)
                state[entry.name] = tensor.to(entry.dtype) if flat.dtype == self.dtype else tensor
            elif aside is not None:
                if entry.name not in aside or tuple(aside[entry.name].shape) != entry.shape:
                    raise ValueError(f"unflatten: like must hold {entry.name!r} {list(entry.shape)}, got another one")
                state[entry.name] = aside[entry.name]
            elif entry.name.endswith("num_batches_tracked"):
                state[entry.name] = torch.zeros(entry.shape, dtype=entry.dtype, device=flat.device)
        return state | {alias: state[name] for alias, name in self.aliases.items() if name in state} | others

    def tokenize(self, flat: Tensor) -> Tokens:
        """The tokens of flat checkpoints: values ``[.., N, T]``, lengths ``[N]``, positions ``[N, 3]``.

        Raises:
            ValueError: If ``flat`` has another length or is not floating point.
        """
        self._check_flat("tokenize", flat)
        table, lengths, positions = self.on(flat.device)
        batch = flat.reshape(-1, self.num_weights)
        values = tokenize(batch, table, self.token_size, self.num_tokens)
        return Tokens(values.view(*flat.shape[:-1], self.num_tokens, self.token_size), lengths, positions)

    def detokenize(self, values: Tensor, like: Tensor | None = None) -> Tensor:
        """The flat checkpoints ``[.., P]`` of tokens ``[.., N, T]``; padding is ignored.

        Args:
            values: Tokens.
            like: Flat checkpoint ``[P]`` or ``[.., P]`` that gives the weights which are in no token (norm layers
                with ``norm="skip"``); zeros without it.

        Raises:
            ValueError: If a shape does not fit.
        """
        if values.shape[-2:] != (self.num_tokens, self.token_size):
            expected = f"[.., {self.num_tokens}, {self.token_size}]"
            raise ValueError(f"detokenize: values must be {expected}, got {list(values.shape)}")
        table, _, _ = self.on(values.device)
        batch = values.reshape(-1, self.num_tokens, self.token_size)
        flat = detokenize(batch, table, self.num_weights)
        flat = flat.view(*values.shape[:-2], self.num_weights)
        if like is not None:
            self._check_flat("detokenize", like)
            flat = flat.clone()
            for begin, end in self._untokenized:
                flat[..., begin:end] = like[..., begin:end]
        return flat

    def _check_flat(self, where: str, flat: Tensor) -> None:
        if flat.dim() == 0 or flat.shape[-1] != self.num_weights or not flat.is_floating_point():
            expected = f"[.., {self.num_weights}] floating point"
            raise ValueError(f"{where}: flat must be {expected}, got {list(flat.shape)} {flat.dtype}")

    def count_nonfinite(self, flat: Tensor) -> dict[str, int]:
        """Tensors that hold NaN or infinite numbers, and how many, over all checkpoints of ``flat`` ``[.., P]``."""
        self._check_flat("count_nonfinite", flat)
        if flat.isfinite().all():
            return {}
        bad = (~flat.isfinite()).reshape(-1, self.num_weights).sum(0)
        counts = {e.name: int(bad[e.offset : e.offset + e.numel].sum()) for e in self.entries if e.offset >= 0}
        return {name: count for name, count in counts.items() if count}

    # --- identity

    @property
    def lost(self) -> int:
        """Numbers of a quantised network that are not in the flat vector: packed weights, and those of integers."""
        quantised = [e for e in self.entries if is_quantised(e.name, e.dtype, len(e.shape))]
        packed = sum(count for name, count in self.aside.items() if not name.endswith(EXTRA))
        return packed + sum(entry.numel for entry in quantised)

    @cached_property
    def fingerprint(self) -> str:
        """Names an architecture: equal for checkpoints with the same shapes and roles in the same order."""
        text = json.dumps([(entry.shape, entry.role) for entry in self.entries if entry.offset >= 0])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def require_same(self, other: "Layout", what: str = "checkpoint") -> None:
        """Raises ValueError, naming the first tensor that differs, unless both are of one architecture."""
        ours, theirs = ([e for e in x.entries if e.offset >= 0] for x in (self, other))
        for a, b in zip(ours, theirs, strict=False):
            if (a.shape, a.role) != (b.shape, b.role):
                raise ValueError(
                    f"{what}: architecture must be the same, but {a.name!r} {list(a.shape)} ({a.role}) "
                    f"meets {b.name!r} {list(b.shape)} ({b.role})"
                )
        if len(ours) != len(theirs):
            first = max(ours, theirs, key=len)[min(len(ours), len(theirs))].name
            raise ValueError(f"{what}: architecture must be the same, but only one of them has {first!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.token_size, self.norm))

    def __repr__(self) -> str:
        sizes = f"{self.num_weights:,} weights, {self.num_tokens:,} tokens of {self.token_size}"
        aside = f", kept aside: {len(self.aside)} ({sum(self.aside.values()):,} numbers)" if self.aside else ""
        aside += f", not in it: {self.lost:,} quantised numbers" if self.lost else ""
        return f"Layout({sizes}, norm={self.norm!r}, {len(self.entries)} tensors{aside})"

    def describe(self) -> str:
        """Every tensor with its role, its place in the flat vector and its tokens, line by line."""
        rows = {name: row for row, (name, _) in zip(table_rows(self.table), self.layers, strict=True)}
        hosts = {bias: weight for weight, bias in self.layers if bias}
        lines = [repr(self)]
        for entry in self.entries:
            if entry.name in rows:
                row = rows[entry.name]
                tokens = f"tokens {row.first_token}..{row.end_token(self.token_size) - 1}"
            elif entry.name in hosts:
                tokens = f"last entry of each row of {hosts[entry.name]}"
            else:
                tokens = "no token" if entry.offset >= 0 else "kept aside"
            place = f"flat {entry.offset}" if entry.offset >= 0 else "not in flat"
            dtype = str(entry.dtype).removeprefix("torch.")
            lines.append(f"{entry.name}  {list(entry.shape)} {dtype}  {entry.role}  {place}  {tokens}")
        lines += [f"{alias}  tied to {name}" for alias, name in self.aliases.items()]
        lines += [f"{name}  no tensor, {count:,} numbers  kept aside" for name, count in self.aside.items()]
        return "\n".join(lines)

    # --- files

    def to_dict(self) -> dict:
        entries = [asdict(e) | {"shape": list(e.shape), "dtype": str(e.dtype)[6:]} for e in self.entries]
        header = {"format": 1, "token_size": self.token_size, "norm": self.norm}
        if self.span != "row":
            header |= {"format": FORMAT, "span": self.span}
        return header | {"aliases": self.aliases, "entries": entries}

    @classmethod
    def from_dict(cls, described: Mapping) -> "Layout":
        """The layout that ``to_dict`` wrote; raises ValueError for anything else."""
        if not isinstance(described, Mapping) or described.get("format") not in (1, FORMAT):
            got = described.get("format") if isinstance(described, Mapping) else described
            raise ValueError(f"layout: format must be 1 or {FORMAT}, got {got!r}; it was written by another version")
        try:
            entries = tuple(parse_entry(fields) for fields in described["entries"])
            aliases, norm, token_size = dict(described["aliases"]), described["norm"], described["token_size"]
            unknown = set(aliases.values()) - {entry.name for entry in entries}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"layout: entries must be as to_dict writes them, got {error!r}") from error
        if unknown:
            raise ValueError(f"layout: aliases must be of entries, got {unknown}")
        check_choices(norm, described.get("span", "row"))
        return cls(entries, aliases, 1, norm, span=described.get("span", "row")).with_tokens(token_size)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the layout as JSON."""
        write_file(Path(path), json.dumps(self.to_dict(), indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Layout":
        """Reads a layout that ``save`` wrote."""
        try:
            return cls.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: file must be a layout that Layout.save wrote, got {error}") from error


# a function because torch.compile, which calls it while it traces and keeps the result, checks that the arguments of a
# function are the same objects; of a method it does not check the object, and would take the tables of another layout
@torch.compiler.assume_constant_result
def tables_on(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``table``, ``lengths`` and ``positions`` of a layout on a device, made at the first call."""
    if device not in layout._on_device:
        table, columns = layout.table, table_columns(layout.table)
        token, size = torch.arange(layout.num_tokens, device="cpu"), layout.token_size
        begins = columns.first_entry(size)
        layer, last = (torch.searchsorted(begins, token * size + e, right=True) - 1 for e in (0, size - 1))
        own, place = table_columns(table[layer]), token * size - begins[layer]
        row, entry = place // own.stride(size), place % own.stride(size)
        ends = begins + columns.rows * columns.stride(size)
        left = torch.where(own.dense, ends[last] - token * size, own.row_entries - entry)
        lengths = left.clamp(0, size).int()
        positions = torch.stack([token, layer, torch.where(own.dense, token - own.first_token, row)], -1).int()
        layout._on_device[device] = tuple(x.to(device) for x in (table, lengths, positions))
    return layout._on_device[device]


def check_choices(norm: str, span: str) -> None:
    if norm not in ("keep", "skip"):
        raise ValueError(f"layout: norm must be 'keep' or 'skip', got {norm!r}")
    if span not in get_args(Span):
        raise ValueError(f"layout: span must be one of {get_args(Span)}, got {span!r}")


def is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are one, or hold the same values, NaN among them."""
    if x.shape != y.shape or x.data_ptr() == y.data_ptr():
        return x.shape == y.shape
    if x.dtype == y.dtype and torch.equal(x, y.to(x.device)):
        return True
    return bool(torch.isclose(x.double(), y.double().to(x.device), rtol=0, atol=0, equal_nan=True).all())
