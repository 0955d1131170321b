"""Compiles every Triton kernel as it is launched, for GPUs that need not be here: the interpreter accepts what the
compiler refuses. ``python tests/test_triton.py`` compiles, in a process without the interpreter."""

import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from running import finish, run_script, start
from torch import Tensor

KERNELS = Path(__file__).parents[1] / "kernels"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHARED = 232_448  # bytes that a program may have in the shared memory of an H100
BEYOND = 2**32  # added to integers so that they outgrow 32 bits, but not their divisors


def launch_all(dtype: torch.dtype, size: int) -> Iterator[tuple[Callable, tuple]]:
    """Launchers and arguments that reach every kernel. Numbers in tensors do not matter, for nothing runs."""

    def real(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def whole(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.int64)

    def of(name: str) -> Callable:
        return getattr(import_module(f"fastws.kernels.{file}"), name)

    wide = torch.promote_types(dtype, torch.float32)
    x, grad, batch = real(size, 16 * size), real(), whole(size)
    table, permutations = whole(size, 11), torch.zeros(size, size, dtype=torch.int32)
    file = "tokenize"
    yield of("tokenize"), (x, table, size, size)
    yield of("detokenize"), (real(size, size, size), table, size)
    file = "permute"
    yield of("permute"), (x, table, permutations)
    yield of("permute"), (x, table, permutations, True)
    yield of("random_permutations"), (whole(size + 1), size, size, 3, 5)
    file = "token_views"
    for switched, noise in ((permutations, 0.1), (permutations[:, :0], 0.0)):
        scale = torch.zeros(len(table) if noise else 0)
        views = x, table, batch, whole(size, 2), batch, switched, scale, scale, size, size
        new = (torch.ones(size), 0.5, 2**31, 2**20, 2**22) if noise else ()
        yield of("token_views"), (*views, noise, round(noise * 2**32), 3, 5, dtype, *new)
    file = "coordinate_mlp"
    for activation in range(6) if (dtype, size) == (torch.float32, 16) else (3,):
        tables, grid = (real(size, 200),) * 3, whole(size, 2)
        layers = real(size, 200, 200), real(size, 200), real(9, 200), real(9)
        yield of("coordinate_mlp"), (*tables, grid, batch, *layers, activation, False)
    file = "layer_statistics"
    yield of("layer_statistics"), (x, whole(size, 2))
    yield of("layer_statistics"), (real(size, 20_000), whole(size, 2))
    file = "layerwise_mse"
    for clip in (2.5, float("inf")):
        scales = torch.ones(2, size, dtype=wide)
        yield of("layerwise_mse"), (x, x, whole(size, 2), *scales, clip)
        yield of("layerwise_mse_backward"), (grad, x, x, whole(size, 2), *scales, clip)
    file = "masked_mse"
    tokens, lengths = real(size, size, size), torch.ones(size, size, dtype=torch.int32)
    for normalize in range(3):
        yield of("masked_mse"), (tokens, tokens, lengths, normalize)
    yield of("masked_mse_backward"), (grad, tokens, tokens, lengths, torch.ones((), dtype=wide))
    file = "nt_xent"
    for entries in (size, 16 * size):
        z = real(5 * size, entries)
        yield of("nt_xent"), (z, z, 0.1)
        yield of("nt_xent_backward"), (grad, z, z, torch.zeros(10 * size, dtype=wide), 0.1)
    file = "random_subset"
    yield of("random_integers"), (whole(1), size, 0, size, 3, 5)
    file = "weighted_sample"
    yield of("weighted_sample"), (batch, 0, size, 3, 5)
    file = "feature_distance"
    yield of("feature_distance"), (x, x, 0.5)
    yield of("feature_distance_backward"), (grad, x, x, torch.zeros(size, 3, dtype=torch.float64), 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_kernels_compile_as_they_are_launched(dtype, tmp_path):
    pytest.importorskip("triton")
    words = str(dtype).removeprefix("torch."), tmp_path / "compiled"
    codes = finish(start(run_script, __file__, *words, said=tmp_path / "said", TRITON_INTERPRET="0"), timeout=600)
    assert codes == [0], (tmp_path / "said").read_text()[-2000:]
    found = {name for file in KERNELS.glob("[!_]*.py") for name in re.findall(r"^def (_\w+)", file.read_text(), re.M)}
    assert set((tmp_path / "compiled").read_text().split()) == found


class NoGPU:
    """What Triton asks a driver in order to compile."""

    def get_current_target(self):
        return import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(dtype: torch.dtype) -> set[str]:
    """Names of the kernels that were compiled; raises AssertionError for one that no GPU of this kind could launch."""
    jit = import_module("triton.runtime.jit").JITFunction
    import_module("triton.runtime.driver").driver.set_active(NoGPU())
    run, compiled, done = jit.run, set(), set()

    def compile_only(kernel, *args, grid, warmup, **options):
        if size != 16 and (kernel, size) in done:
            return  # sizes change how arguments are passed, which is the same whatever the flags of a kernel
        done.add((kernel, size))
        integers = [i for i, x in enumerate(args) if type(x) is int and not kernel.params[i].is_constexpr]
        larger = [x + BEYOND if i in integers else x for i, x in enumerate(args)]
        for values in (args, larger) if dtype == torch.float32 and size == 16 else (args,):
            made = run(kernel, *values, grid=grid, warmup=True, **options)
            assert made.metadata.shared <= SHARED, f"{kernel.__name__} wants {made.metadata.shared} bytes of {SHARED}"
        compiled.add(kernel.__name__)

    jit.run = compile_only
    for size in (16, 1, 19) if dtype == torch.float32 else (16,):  # divisible, a constant, and neither
        for launcher, args in launch_all(dtype, size):
            launcher(*args)
    return compiled


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(" ".join(compile_all(getattr(torch, sys.argv[1]))))
