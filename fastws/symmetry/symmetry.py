"""Symmetry: which axes of which tensors one permutation moves without changing the function of the network."""

import copy
import itertools
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from fastws.devices import to_device
from fastws.files.names import plain_names, unwrap_names
from fastws.layout.layout import Layout
from fastws.layout.roles import load_state, storage_key
from fastws.ops.permute import permute, random_permutations
from fastws.random.philox import philox_reference
from fastws.signed import split
from fastws.symmetry.copies import Inputs, example_of
from fastws.symmetry.influence import Groups, Place, without_influence
from fastws.symmetry.notes import UNSEEN, Dropped, by_reason, sentences
from fastws.symmetry.rules import PASSING, RULES
from fastws.symmetry.segments import (
    FORMAT,
    Segments,
    arrange,
    group_names,
    parse,
    plan,
    unit_size,
    unstorable,
    with_sign,
)
from fastws.symmetry.signs import Negated
from fastws.symmetry.trace import trace
from fastws.symmetry.verify import Check
from fastws.table import table_columns

MOVES = ("sizes", "names", "shapes", "aliases", "axes")  # the attributes that say what moves


class Symmetry:
    """Permutations of the units of an architecture that leave the function of every checkpoint as it is.

    ``Symmetry.trace`` is the way to get one. A *group* is a set of units that may change places (the channels of a
    layer and of all layers that share a residual stream with it, the heads of an attention layer). A row of
    permutations ``[S]`` holds one permutation of each group, one after the other, and behind them the *composite* ones:
    what they make of axes that consist of several groups or of blocks of one. Moving by ``perm`` means
    ``new[c] = old[perm[c]]``.

    Attributes:
        sizes: Units of each group.
        names: A name for each group: the first weight whose rows it moves.
        starts: Where each group begins in a row of permutations, and where the last one ends.
        axes: For every floating tensor and each of its axes None, or the segments that it consists of: a segment
            ``(group, count, block, negated)`` is ``count * block`` consecutive entries in which the group moves blocks
            of ``block`` entries, which change their sign with their unit if ``negated``; those of group None stay.
            Repeated segments move alike. Segments whose count is less than the size of their group are consecutive
            parts of it, between which units move too.
        flips: Of each group, whether its units may be negated, whatever their places.
        unpermuted: Sentences that say what stays because an operation forbids it or is not understood, because the
            examples do not reach it, or because tables cannot say how it moves.
        fixed: Sentences that say what stays by nature (inputs and outputs have an order, and so do neighbours), or with
            something that ``unpermuted`` lists.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        names: tuple[str, ...],
        shapes: dict[str, tuple[int, ...]],
        aliases: dict[str, str],
        axes: dict[str, tuple[Segments | None, ...]],
        unpermuted: list[str],
        fixed: Sequence[str] = (),
    ):
        self.sizes, self.names, self.shapes, self.aliases = sizes, names, shapes, aliases
        axes = {name: tuple(part and tuple(map(with_sign, part)) for part in found) for name, found in axes.items()}
        self.axes, self.unpermuted, self.fixed = axes, unpermuted, list(fixed)
        self.starts = (0, *accumulate(sizes))
        negated = {group for found in axes.values() for part in found for group, *_, sign in part or () if sign}
        self.flips = tuple(group in negated for group in range(len(sizes)))
        moved = [(k, segments) for found in axes.values() for k, segments in enumerate(found) if segments]
        self._composites = plan([(segments, unit_size(segments) if k else 1) for k, segments in moved], sizes)
        self._devices: dict[torch.device, tuple[Tensor, ...]] = {}
        self._tables: dict[torch.device, tuple[Layout, Tensor]] = {}  # the last layout on each device, and its table

    @classmethod
    def trace(cls, module: nn.Module, example_inputs: Inputs, *more: Inputs, inside: bool = True) -> "Symmetry":
        """Finds the symmetry of a module by watching a forward pass, and checks it.

        A copy of the module is run in eval mode. Batch size 1 and small images do, as long as they pass through. An
        axis that meets an operation which is not understood stays unpermuted and is listed in ``unpermuted``. So is
        what no example reaches: rows of a table of positions behind the length of the input, layers that are skipped,
        units that change no output.

        Args:
            module: Any module; it is not changed.
            example_inputs: The arguments of its forward, on its device: a tensor, a tuple of positional arguments, or a
                mapping of arguments by name. Arguments may be lists and mappings of tensors. Modules that make other
                dtypes on their way run in float64 throughout, or, if they cannot, in their own dtypes.
            more: Further examples, for parts of the module that the first does not reach.
            inside: Whether channels move inside the groups of grouped convolutions, all groups alike, where that gives
                more permutations than moving whole groups.

        Raises:
            ValueError: If the module does not run, cannot be copied, returns no tensor, is random in eval mode, if its
                outputs do not depend on its weights, or if random permutations change its function.

        Example:
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> print(fastws.Symmetry.trace(mlp, torch.randn(1, 4)).describe())
            8 units, 0.weight: 0.weight axis 0, 0.bias axis 0, 2.weight axis 1
            0.weight axis 1 stay: inputs, constants or others that stay go along with it
            2.weight axis 0, 2.bias axis 0 stay: the outputs have an order
        """
        examples = [example_of(module, inputs) for inputs in (example_inputs, *more)]
        traced = trace(module, examples, RULES, PASSING, inside)
        state = {k: v for k, v in load_state(module).items() if k in traced.axes}
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        first: dict[tuple, str] = {}
        tied = {name: first.setdefault(storage_key(name, tensor), name) for name, tensor in state.items()}
        aliases = {name: tied_to for name, tied_to in tied.items() if tied_to != name}

        def of_all_but(dropped: dict[int, Dropped], negated: Negated) -> tuple[list[int], Symmetry]:
            families, axes = arrange(traced.axes, traced.sizes, dropped, negated)
            sizes = tuple(traced.sizes[family] for family in families)
            reasons = sentences(traced.axes, traced.notes, dropped)
            return families, cls(sizes, group_names(axes, len(sizes)), shapes, aliases, axes, *reasons)

        dropped = unstorable(traced.axes, traced.sizes, traced.negated)
        families, symmetry = of_all_but(dropped, traced.negated)
        if not (families or traced.random):
            return symmetry
        checks = [Check(module, example) for example in examples]
        if traced.random:
            for check in checks:
                check.require_repeatable()
        unseen = without_influence(checks, symmetry._places())
        if unseen:
            dropped |= {families[group]: Dropped(UNSEEN) for group in unseen}
            _, symmetry = of_all_but(dropped, traced.negated)
        if any(symmetry.flips):
            try:
                symmetry._require_same_function(checks)
                return symmetry
            except ValueError:  # permutations alone may do
                _, symmetry = of_all_but(dropped, {})
                symmetry.unpermuted.append("all units keep their sign: outputs changed when some were negated")
        symmetry._require_same_function(checks)
        return symmetry

    def unsigned(self) -> "Symmetry":
        """The same permutations, without signs."""
        axes = {
            name: tuple(part and tuple((*segment[:3], False) for segment in part) for part in found)
            for name, found in self.axes.items()
        }
        return Symmetry(self.sizes, self.names, self.shapes, self.aliases, axes, self.unpermuted, self.fixed)

    # --- rows of permutations

    @property
    def num_indices(self) -> int:
        """Length of a row of permutations, ``S``."""
        return self.starts[-1] + len(self._composites.source)

    def random(
        self,
        batch: int,
        seed: int = 0,
        offset: int = 0,
        device: torch.device | str | None = None,
        *,
        flips: bool | Tensor = False,
    ) -> Tensor:
        """Uniform random permutations, int32 ``[B, S]``; ``offset`` names the draw within the stream ``seed``.

        Args:
            batch: Number of draws, ``B``.
            seed: Of the stream, in ``[0, 2**63)``.
            offset: Of the draw, in ``[0, 2**63)``.
            device: Where to draw; by default the CPU.
            flips: Whether units of the groups that ``flips`` says change their sign too, each with a chance of one
                half: of all draws, or bool ``[B]``, of each. Unit u of draw b does where bit ``u % 32`` of Philox word
                ``b * W + u // 32`` of the stream ``seed ^ 2**62`` is set, ``W = ceil(sum(sizes) / 32)``; the
                permutations are those that are drawn without.
        """
        groups = random_permutations(self.sizes, batch, seed, offset, device=device)
        if any(self.flips) and (isinstance(flips, Tensor) or flips):
            groups = groups ^ self._signs(batch, seed, offset, groups.device, flips)
        return self.expand(groups)

    def _signs(self, batch: int, seed: int, offset: int, device: torch.device, flips: bool | Tensor) -> Tensor:
        total = self.starts[-1]
        words = philox_reference(seed ^ 2**62, offset, batch * -(-total // 32), device).view(batch, -1, 1)
        bits = (words >> torch.arange(32, device=device) & 1).flatten(1)[:, :total]
        *_, may_flip = indices_on(self, device)
        signs = -(bits.int() & may_flip)
        return signs if not isinstance(flips, Tensor) else signs * flips.to(device)[:, None].int()

    def identity(self, batch: int = 1, device: torch.device | str | None = None) -> Tensor:
        """The permutations that move nothing, int32 ``[B, S]``."""
        *_, unit, _ = indices_on(self, torch.empty(0, device=device).device)
        return self.expand(unit.repeat(batch, 1))

    def enumerate(self) -> Tensor:
        """All permutations, int32 ``[count, S]``, in lexicographic order: the first moves nothing. Signs stay.

        Raises:
            ValueError: If there are more than 100,000.
        """
        digits = sum(math.lgamma(size + 1) for size in self.sizes) / math.log(10)
        if digits > 5:
            raise ValueError(f"symmetry: permutations must be at most 100,000 to be enumerated, got 10**{digits:.1f}")
        orders = [itertools.permutations(range(size)) for size in self.sizes]
        rows = [sum(row, ()) for row in itertools.product(*orders)]
        return self.expand(torch.tensor(rows, dtype=torch.int32))

    def expand(self, groups: Tensor) -> Tensor:
        """Appends the composite permutations to those of the groups: int32 ``[.., sum(sizes)]`` -> ``[.., S]``."""
        total = self.starts[-1]
        if groups.shape[-1] not in (total, self.num_indices) or groups.dtype != torch.int32:
            expected = f"[.., {total}] or [.., {self.num_indices}] int32"
            raise ValueError(f"symmetry: permutations must be {expected}, got {list(groups.shape)} {groups.dtype}")
        groups = groups[..., :total]
        if groups.device.type == "cpu" and not torch.compiler.is_compiling():
            self._require_flips(groups)
        if self.num_indices == total:
            return groups
        source, base, lookup, signed, *_ = indices_on(self, groups.device)
        # a composite index is where the unit lies along its axis, and a unit that stays looks up its own place
        index, negative = split(torch.nn.functional.pad(groups, (0, 1))[..., source])
        return torch.cat([groups, lookup[index + base] ^ (negative & signed)], -1)

    def _require_flips(self, groups: Tensor) -> None:
        """Raises ValueError if units of a group that may not are negated."""
        if not (groups < 0).any():
            return
        parts = zip(self.names, self.flips, groups.split(self.sizes, -1), strict=True)
        for name, flips, units in parts:
            if not flips and (units < 0).any():
                got = int(units.min())
                raise ValueError(f"symmetry: units of group {name} must keep their sign, got {got}, which negates one")

    def inverse(self, permutations: Tensor) -> Tensor:
        """The permutations that undo ``permutations``."""
        permutations = self.expand(permutations)
        groups = permutations[..., : self.starts[-1]]
        index, negative = split(groups)
        *_, first, unit, _ = indices_on(self, groups.device)
        return self.expand(torch.empty_like(groups).scatter_(-1, index + first, unit ^ negative))

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """The permutations that do what ``first`` and then ``second`` do: ``first[second[c]]``, signs multiplied."""
        first, second = self.expand(first), self.expand(second)
        total = self.starts[-1]
        *_, begin, _, _ = indices_on(self, first.device)
        index, negative = split(second[..., :total])
        return self.expand(first[..., :total].gather(-1, index + begin) ^ negative)

    # --- checkpoints

    def permute(self, flat: Tensor, permutations: Tensor, layout: Layout) -> Tensor:
        """Permutes flat checkpoints: another set of weights, the same function. Exact, differentiable in ``flat``.

        Args:
            flat: ``[P]`` or ``[B, P]``, floating point.
            permutations: ``[S]`` or ``[B, S]``, int32, or only the groups of them.
            layout: What ``flat`` was flattened with. Its tensors may lie in any order: they are found by name.

        Returns:
            ``[B, P]``; ``[P]`` if neither argument is a batch.

        Raises:
            ValueError: If a shape or dtype does not fit, or the layout holds other tensors than the symmetry.
        """
        length = layout.num_weights
        if flat.dim() not in (1, 2) or flat.shape[-1] != length or not flat.is_floating_point():
            got = f"{list(flat.shape)} {flat.dtype}"
            raise ValueError(f"symmetry: flat must be [{length}] or [B, {length}] floating point, got {got}")
        rows = self.expand(permutations)
        counts = {len(x) for x in (flat, rows) if x.dim() == 2} - {1} or {1}
        if rows.dim() > 2 or rows.device != flat.device or len(counts) > 1:
            got = f"{list(rows.shape)} on {rows.device} for flat {list(flat.shape)}"
            raise ValueError(f"symmetry: permutations must be [S] or [B, S] on {flat.device}, got {got}")
        (count,) = counts
        rows = rows.expand(count, -1).contiguous()
        permuted = permute(flat.expand(count, -1).contiguous(), table_on(self, layout, flat.device), rows)
        return permuted if flat.dim() == 2 or permutations.dim() == 2 else permuted[0]

    def permute_state(self, state: Mapping[str, Tensor], permutations: Tensor) -> dict[str, Tensor]:
        """Permutes a state dict, axis by axis: slow, and obviously what is meant. ``permutations``: ``[S]``.

        Raises ValueError if a tensor is missing, other than one of several that are tied, or has another shape.
        """
        held = unwrap_names(state)
        self._require_tensors("state", {name: tuple(held[name].shape) for name in self.axes if name in held})
        row = self.expand(permutations)
        return {name: self.permute_tensor(plain, state[name], row) for name, plain in plain_names(state).items()}

    def permute_tensor(self, name: str, tensor: Tensor, row: Tensor) -> Tensor:
        """Permutes one tensor of a state dict. ``row``: permutations ``[S]``."""
        for axis, segments in enumerate(self.axes.get(name, ())):
            if segments is not None:
                first, units, block = self._place(segments, rows=axis == 0)
                index, negative = split(row[first : first + units].long()[:, None].expand(-1, block))
                index = index * block + torch.arange(block, device=row.device)
                tensor = tensor.index_select(axis, index.flatten().to(tensor.device))
                if negative.any():
                    wide = [-1 if a == axis else 1 for a in range(tensor.dim())]
                    tensor = tensor * (1 + 2 * negative).flatten().view(wide).to(tensor)
        return tensor

    def table(self, layout: Layout) -> Tensor:
        """``layout.table`` with the permutations of rows, input units and biases filled in, int64 ``[L, 11]``."""
        return self._filled(layout, layout.table, layout.layers)

    def tensor_table(self, layout: Layout) -> Tensor:
        """``layout.tensor_table`` with the permutations filled in: one row per tensor, int64."""
        names = [(entry.name, None) for entry in layout.entries if entry.offset >= 0 and entry.numel]
        return self._filled(layout, layout.tensor_table, names)

    def require_same(self, layout: Layout) -> None:
        """Raises ValueError, naming the first tensor that differs, unless the layout has the tensors of the symmetry.

        Names and shapes count, the order does not. Of tensors that the symmetry knows as tied the layout may hold one
        or all; of those that only the layout knows as tied, the axes must be permuted alike.
        """
        theirs = {entry.name: entry.shape for entry in layout.entries if entry.offset >= 0 and entry.numel}
        tied = {alias: name for alias, name in layout.aliases.items() if name in theirs and alias in self.axes}
        for alias, name in tied.items():
            if self.axes[alias] != self.axes[name]:
                raise ValueError(
                    f"symmetry: layout must hold {alias} untied, got it tied to {name}, which moves otherwise"
                )
        self._require_tensors("layout", theirs | {alias: theirs[name] for alias, name in tied.items()})

    def _require_tensors(self, what: str, theirs: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless names and shapes are those of the symmetry; one of several that are tied does."""
        for name, shape in theirs.items():
            if self.shapes.get(name) != shape:
                expected = f"{name} {list(self.shapes[name])}" if name in self.shapes else f"no tensor {name}"
                raise ValueError(f"symmetry: {what} must hold {expected}, got {name} {list(shape)}")
        held = {self.aliases.get(name, name) for name in theirs}
        for name, shape in self.shapes.items():
            if math.prod(shape) and self.aliases.get(name, name) not in held:
                raise ValueError(f"symmetry: {what} must hold {name} {list(shape)}, got no tensor of this name")

    def _filled(self, layout: Layout, table: Tensor, layers) -> Tensor:
        self.require_same(layout)
        table = table.clone()
        columns = table_columns(table)
        for number, (weight, bias) in enumerate(layers):
            for axis, segments in enumerate(self.axes[weight]):
                if segments is None:
                    continue
                first, units, block = self._place(segments, rows=axis == 0)
                if axis == 0:
                    columns.first_out[number] = first
                else:
                    columns.block[number] = block * math.prod(self.shapes[weight][axis + 1 :])
                    columns.units[number], columns.first_in[number] = units, first
            rows = self.axes[bias or weight][:1]
            columns.first_bias[number] = -1 if rows in ((), (None,)) else self._place(rows[0], rows=True)[0]
        return table

    # --- checks

    def verify(
        self, module: nn.Module, inputs: Inputs, trials: int = 2, seed: int = 0, *, only: int | None = None
    ) -> float:
        """The largest error that random permutations make in the outputs of a module, in float64 if it can.

        Fresh copies of the module in eval mode get random weights first, others in each trial: a fresh network hides
        mistakes, because its biases and norm layers are all alike. The error of each entry of an output is relative to
        what the weights change in this entry. The module is not changed.

        Args:
            module: The module that was traced, or one of the same architecture.
            inputs: The arguments of its forward, as ``trace`` takes them.
            trials: Permutations to try, each with weights of its own.
            seed: Of weights and permutations.
            only: A group; the others stay.

        Raises:
            ValueError: If the module does not run, or its outputs are not finite or do not depend on its weights, or on
                the only group.
        """
        check = Check(module, example_of(module, inputs), seed, max(2, trials))
        if only is not None:
            self._require_influence([check], {only: self._places()[only]})
        rows = self._trials(trials, seed, range(len(self.sizes)) if only is None else [only])
        return max((check.error(number, self._permuting(row)) for number, row in enumerate(rows)), default=0.0)

    def _trials(self, trials: int, seed: int, moving: Iterable[int]) -> Tensor:
        """Random permutations of some groups; in the first trial they move every unit, in all others most of them."""
        rows, total = self.random(trials, seed, flips=True), self.starts[-1]
        moved = self.compose(self.compose(rows, self._next_units(trials)), self.inverse(rows))[:, :total]
        rows, identity, moving = rows[:, :total], self.identity(trials)[:, :total], set(moving)
        for group, (first, size) in enumerate(zip(self.starts, self.sizes, strict=False)):
            here, still = rows[:, first : first + size], identity[:, first : first + size]
            few = (here == still).sum(1) * 2 >= size
            few[:1] = True
            here[few] = moved[few, first : first + size]
            if size == 1 and self.flips[group]:
                here[:1] = -1  # a unit that is alone can be negated only
            if group not in moving:
                here[:] = still
        return self.expand(rows)

    def _next_units(self, batch: int) -> Tensor:
        """The permutations that put every unit of a group in the place of the one before it."""
        row = [(unit + 1) % size for size in self.sizes for unit in range(size)]
        return self.expand(torch.tensor(row, dtype=torch.int32).repeat(batch, 1))

    def check(self, module: nn.Module, *examples: Inputs) -> None:
        """Raises a ValueError that names the error and a guilty group if permutations change the outputs.

        So it does if the outputs do not depend on a group: then nothing could be seen.
        """
        if not self.sizes:
            return
        checks = [Check(module, example_of(module, inputs)) for inputs in examples]
        self._require_influence(checks, self._places())
        self._require_same_function(checks)

    def _require_influence(self, checks: Sequence[Check], groups: Groups) -> None:
        for group in without_influence(checks, groups):
            named = self._named(group)
            raise ValueError(f"symmetry: outputs must depend on {named} to be checked, got the same for other weights")

    def _require_same_function(self, checks: Iterable[Check]) -> None:
        def guilty(wrong: Callable[[Tensor], bool]) -> str:
            counts = range(1, len(self.sizes) + 1)
            last = bisect(counts, False, key=lambda count: wrong(self._trials(1, 0, range(count))[0]))
            if last == len(self.sizes) or not wrong(self._trials(1, 0, [last])[0]):
                return "all groups together"
            return self._named(last)

        for check in checks if self.sizes else ():
            check.require_same_function(self._trials(2, 0, range(len(self.sizes))), self._permuting, guilty)

    def _permuting(self, row: Tensor) -> Callable[[nn.Module], None]:
        """What permutes the weights of a module by a row, in place."""

        def permute_module(module: nn.Module) -> None:
            done = set()
            for name, tensor in load_state(module).items():
                if storage_key(name, tensor) not in done:
                    done.add(storage_key(name, tensor))
                    tensor.copy_(self.permute_tensor(name, tensor, row))

        return permute_module

    def _places(self) -> dict[int, list[Place]]:
        """Of each group the entries that it moves."""
        places: dict[int, list[Place]] = {group: [] for group in range(len(self.sizes))}
        for name, axes in self.axes.items():
            for axis, segments in enumerate(axes):
                if segments and name not in self.aliases:
                    owner = torch.cat([torch.full((n * width,), -1 if g is None else g) for g, n, width, _ in segments])
                    for group in {g for g, *_ in segments} - {None}:
                        places[group].append(Place(name, axis, (owner == group).nonzero().flatten()))
        return places

    def _named(self, group: int) -> str:
        return f"group {group}, {self.names[group]}"

    def describe(self) -> str:
        """One line per group, with every axis that it moves, and lines that say what stays, and why."""
        lines = []
        for group, (size, name) in enumerate(zip(self.sizes, self.names, strict=True)):
            places = [
                f"{tensor} axis {axis}"
                for tensor, axes in self.axes.items()
                for axis, segments in enumerate(axes)
                if segments and any(g == group for g, *_ in segments)
            ]
            units = "1 unit" if size == 1 else f"{size} units"
            what = f"{units} of either sign" if self.flips[group] else units
            lines.append(f"{what}, {name}: {', '.join(places)}")
        return "\n".join(lines + by_reason(self.fixed) + self.unpermuted)

    def to_dict(self) -> dict:
        """Lists, numbers and strings, for JSON."""
        return {"format": FORMAT} | {key: copy.deepcopy(getattr(self, key)) for key in (*MOVES, "unpermuted", "fixed")}

    @classmethod
    def from_dict(cls, fields: Mapping) -> "Symmetry":
        """The symmetry that ``to_dict`` wrote; raises ValueError for anything else."""
        return cls(**parse(fields))

    def __eq__(self, other: object) -> bool:
        """Whether the same units move in the same tensors; reasons why others stay do not count."""
        return isinstance(other, Symmetry) and all(getattr(self, key) == getattr(other, key) for key in MOVES)

    def __hash__(self) -> int:
        return hash((self.sizes, self.names))

    def __repr__(self) -> str:
        return f"Symmetry({len(self.sizes)} groups, {self.starts[-1]} units, {len(self.axes)} tensors)"

    # --- where permutations lie in a row

    def _place(self, segments: Segments, rows: bool) -> tuple[int, int, int]:
        """Where the permutation of an axis begins in a row of permutations, its length, and entries per unit."""
        block = 1 if rows else unit_size(segments)
        units = sum(count * width for _, count, width, _ in segments) // block
        return self._composites.first[segments, block], units, block


# functions, not methods: see tables_on in layout.py


@torch.compiler.assume_constant_result
def indices_on(symmetry: Symmetry, device: torch.device) -> tuple[Tensor, ...]:
    """Of the composites source, base, lookup and signed; of each unit first index of its group, number and sign bit."""
    if device not in symmetry._devices:
        sizes = torch.tensor(symmetry.sizes, dtype=torch.int64)
        first = torch.tensor(symmetry.starts[:-1], dtype=torch.int64).repeat_interleave(sizes)
        unit = (torch.arange(symmetry.starts[-1]) - first).int()
        flips = torch.tensor(symmetry.flips, dtype=torch.int32).repeat_interleave(sizes)
        made = symmetry._composites
        symmetry._devices[device] = tuple(
            to_device(x, device) for x in (made.source, made.base, made.lookup, made.signed, first, unit, flips)
        )
    return symmetry._devices[device]


@torch.compiler.assume_constant_result
def table_on(symmetry: Symmetry, layout: Layout, device: torch.device) -> Tensor:
    """``tensor_table`` on a device; that of the last layout is kept, because it takes longer than permuting."""
    kept = symmetry._tables.get(device)
    if kept is None or kept[0] is not layout:
        kept = symmetry._tables[device] = layout, to_device(symmetry.tensor_table(layout), device)
    return kept[1]
