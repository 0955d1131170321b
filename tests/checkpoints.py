"""Small checkpoints for tests: by hand, and drawn by hypothesis."""

import torch
from hypothesis import strategies as st
from torch import Tensor

import fastws
from fastws.table import table_columns, table_rows


def small_checkpoint(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A convolution with norm, a depthwise one without bias, and a linear layer behind a flatten of 2 x 2 maps."""
    rng = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    return {
        "conv.weight": rand(4, 3, 3, 3),
        "conv.bias": rand(4),
        "bn.weight": rand(4),
        "bn.bias": rand(4),
        "bn.running_mean": rand(4),
        "bn.running_var": rand(4).abs(),
        "bn.num_batches_tracked": torch.tensor(7),
        "depthwise.weight": rand(4, 1, 5, 5),
        "fc.weight": rand(6, 16),
        "fc.bias": rand(6),
        "scale": rand(3),
    }


def permuted_tables(layout: fastws.Layout, rng: torch.Generator) -> tuple[Tensor, Tensor, list[int]]:
    """The two tables of a layout with a group of its own for every axis that a table can permute, and the group sizes.

    Such permutations change the function; for moving weights that does not matter.
    """
    sizes: list[int] = []
    places: dict[tuple[int, int], int] = {}

    def place(offset: int, axis: int, size: int) -> int:
        if (offset, axis) not in places:
            skip = size == 1 or torch.rand((), generator=rng) < 0.25
            places[offset, axis] = -1 if skip else sum(sizes)
            sizes.extend([] if skip else [size])
        return places[offset, axis]

    tables = layout.tensor_table.clone(), layout.table.clone()
    for table in tables:
        columns = table_columns(table)
        for number, row in enumerate(table_rows(table)):
            columns.first_out[number] = place(row.weight_offset, 0, row.rows)
            columns.first_in[number] = place(row.weight_offset, 1, row.units)
            columns.first_bias[number] = place(row.bias_offset, 0, row.rows) if row.bias_offset >= 0 else -1
    return *tables, sizes


@st.composite
def checkpoints(draw) -> dict[str, Tensor]:
    """Random layers: kernels of several sizes, with and without bias, norm layers and stray vectors between them."""
    state = {}
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "linear", "norm", "vector", "scalar"]))
        rows, units, kernel = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3, 5]))
        if kind in ("conv", "linear"):
            shape = (rows, units, kernel, kernel) if kind == "conv" else (rows, units)
            state[f"{i}.weight"] = torch.randn(shape, generator=rng)
            if draw(st.booleans()):
                state[f"{i}.bias"] = torch.randn(rows, generator=rng)
        elif kind == "norm":
            for name in ("weight", "bias", "running_mean", "running_var"):
                state[f"{i}.{name}"] = torch.randn(rows, generator=rng)
            state[f"{i}.num_batches_tracked"] = torch.tensor(i)
        else:
            state[f"{i}.gamma"] = torch.randn((rows,) if kind == "vector" else (), generator=rng)
    state.setdefault("last.weight", torch.randn(2, 3, generator=rng))
    return state
