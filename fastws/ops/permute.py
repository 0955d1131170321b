"""Permute: neuron permutations of flat checkpoints, and the random permutations themselves."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from fastws import _native
from fastws.checks import check_permutations, check_table
from fastws.devices import to_device
from fastws.random.philox import check_stream, philox_reference
from fastws.signed import split
from fastws.table import table_rows


def permute(flat: Tensor, table: Tensor, permutations: Tensor) -> Tensor:
    """Permutes the rows and input units of every tensor of flat checkpoints.

    For tensor l, row c and weight f of the row, with ``period = units * block``::

        permuted[b, offset + c * R + f] = flat[b, offset + out[c] * R + f // period * period
                                                  + in[f % period // block] * block + f % block]

    where ``out`` and ``in`` are vectors in ``permutations[b]`` (identity where the table has -1). An entry ``~p`` in
    place of p negates what it moves; what both axes negate keeps its sign. Exact. Differentiable in ``flat``; the
    gradient is permuted back. ``Symmetry.permute`` calls this with the right table.

    Args:
        flat: Flat checkpoints, ``[B, P]``, floating point.
        table: ``symmetry.tensor_table(layout)``, ``[L, 11]``, int64, on the device of ``flat``: a row for every tensor,
            in order, without gaps.
        permutations: ``symmetry.random(B)``, ``[B, S]``, int32. On a GPU both are trusted, unless FASTWS_CHECK=1.

    Returns:
        Permuted checkpoints, ``[B, P]``.

    Raises:
        ValueError: If a shape, dtype or device does not fit; with FASTWS_CHECK=1 also if a vector is no permutation.
        RuntimeError: On a CPU, if ``table`` is that of other weights, or a permutation is out of range.

    Example:
        >>> layout = fastws.Layout.from_checkpoint({"a.weight": torch.zeros(2, 2)})
        >>> table = layout.tensor_table.clone()
        >>> fastws.table.table_columns(table).first_out[0] = 0  # the row permutation begins at index 0
        >>> fastws.permute(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), table, torch.tensor([[1, 0]], dtype=torch.int32))
        tensor([[3., 4., 1., 2.]])
    """
    if flat.dim() != 2 or not flat.is_floating_point():
        raise ValueError(f"permute: flat must be [B, P] floating point, got {list(flat.shape)} {flat.dtype}")
    check_table("permute", table, flat.device)
    check_permutations("permute", permutations, len(flat), table)
    return torch.ops.fastws.permute(flat, table, permutations)


def random_permutations(
    group_sizes: Tensor | Sequence[int], batch: int, seed: int, offset: int = 0, *, device: torch.device | None = None
) -> Tensor:
    """Draws uniform permutations of several groups, ``batch`` of them, the groups of one draw in one row.

    Fisher-Yates, inside out: for i from 0 to size - 1 and ``j = word * (i + 1) >> 32``, entry i becomes entry j and
    entry j becomes i, where ``word`` is Philox word ``b * S + start + i`` of the stream. The bias of a draw is below
    ``size / 2**32``. The same numbers on every device. Not differentiable: integers.

    Args:
        group_sizes: Sizes of the groups, ``[G]``, from 1 each; integers.
        batch: Number of draws, ``B``, from 0.
        seed: Names the stream of random numbers, in ``[0, 2**63)``.
        offset: Names the draw within the stream, in ``[0, 2**63)``; training steps count it up.
        device: Where to draw; by default the CPU, or the device of ``group_sizes``.

    Returns:
        Permutations, ``[B, S]``, int32, with ``S = sum(group_sizes)``; entries count from 0 in each group.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> fastws.random_permutations([3, 2], batch=2, seed=0)
        tensor([[0, 1, 2, 0, 1],
                [2, 1, 0, 1, 0]], dtype=torch.int32)
    """
    if isinstance(group_sizes, Tensor):
        device = device or group_sizes.device
        group_sizes = group_sizes.tolist()
    smallest = min(group_sizes, default=1)
    if batch < 0 or smallest < 1:
        got = f"{batch} and {smallest}"
        raise ValueError(f"random_permutations: batch must be at least 0 and sizes at least 1, got {got}")
    check_stream("random_permutations", seed, offset)
    starts = group_starts(tuple(group_sizes), torch.empty(0, device=device).device)
    return torch.ops.fastws.random_permutations(starts, sum(group_sizes), batch, seed, offset)


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def group_starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where groups begin in a row, and where the last one ends, ``[G + 1]``; kept, so that no draw copies them anew."""
    return to_device(torch.tensor([0, *accumulate(sizes)]), device)


def permute_reference(flat: Tensor, table: Tensor, permutations: Tensor, inverse: bool = False) -> Tensor:
    permuted = flat.clone(memory_format=torch.contiguous_format)
    for row in table_rows(table):
        shape = len(flat), row.rows, row.row_length // (row.units * row.block), row.units, row.block
        weights = slice(row.weight_offset, row.weight_offset + row.rows * row.row_length)
        layer = flat[:, weights].reshape(shape)
        for first, size, axis in [(row.first_out, row.rows, 1), (row.first_in, row.units, 3)]:
            if first >= 0:
                index, negative = split(permutations[:, first : first + size].long())
                if inverse:
                    index = index.argsort(1)
                    negative = negative.gather(1, index)
                wide = [size if a == axis else len(flat) if a == 0 else 1 for a in range(5)]
                layer = layer.gather(axis, index.view(wide).expand(shape)) * (1 + 2 * negative.view(wide)).to(flat)
        permuted[:, weights] = layer.flatten(1)
    return permuted


def random_permutations_reference(starts: Tensor, total: int, batch: int, seed: int, offset: int) -> Tensor:
    """All groups and draws side by side; ``starts`` are the group boundaries, ``[G + 1]``."""
    words = philox_reference(seed, offset, batch * total, starts.device).view(batch, total)
    permutations = torch.zeros(batch, total, dtype=torch.int32, device=starts.device)
    sizes = starts.diff()
    for i in range(int(sizes.max()) if len(sizes) else 0):
        first = starts[:-1][sizes > i]
        here = (first + i).expand(batch, -1)
        there = first + (words.gather(1, here) * (i + 1) >> 32)
        permutations.scatter_(1, here, permutations.gather(1, there))
        permutations.scatter_(1, there, i)
    return permutations


torch.library.define(
    "fastws::permute", "(Tensor flat, Tensor table, Tensor permutations, bool inverse=False) -> Tensor"
)
torch.library.define(
    "fastws::random_permutations", "(Tensor starts, SymInt total, SymInt batch, SymInt seed, SymInt offset) -> Tensor"
)
torch.library.register_kernel("fastws::permute", "default", permute_reference)
torch.library.register_kernel("fastws::random_permutations", "default", random_permutations_reference)


@torch.library.register_fake("fastws::permute")
def permute_fake(flat, table, permutations, inverse=False):
    return torch.empty_like(flat, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastws::random_permutations")
def random_permutations_fake(starts, total, batch, seed, offset):
    return starts.new_empty(batch, total, dtype=torch.int32)


def permute_setup_context(ctx, inputs, output):
    _, table, permutations, ctx.inverse = inputs
    ctx.save_for_backward(table, permutations)


def permute_backward(ctx, grad_permuted):
    grad_flat = torch.ops.fastws.permute(grad_permuted, *ctx.saved_tensors, not ctx.inverse)
    return grad_flat, None, None, None


torch.library.register_autograd("fastws::permute", permute_backward, setup_context=permute_setup_context)
_native.register_without_gradient("random_permutations")
_native.register_triton("permute", file="permute")
_native.register_triton("random_permutations", file="permute")
