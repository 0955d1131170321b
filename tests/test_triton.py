"""Compiles every Triton kernel for GPUs that need not be here: the interpreter accepts what the compiler refuses."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

KERNELS = {  # file and kernel: its arguments; T and I stand for the dtypes and the integer types, numbers are constants
    "tokenize._tokenize_kernel": {
        "flat": "*T",
        "table": "*i64",
        "tokens": "*T",
        "num_weights": "I",
        "num_tokens": "I",
        "num_layers": "i32",
        "token_size": "i32",
        "BLOCK": 512,
        "INVERSE": False,
    },
    "permute._permute_kernel": {
        "flat": "*T",
        "table": "*i64",
        "permutations": "*i32",
        "target": "*T",
        "num_weights": "I",
        "num_layers": "i32",
        "indices": "i32",
        "BLOCK": 1024,
        "INVERSE": False,
        "WIDE": False,
    },
    "permute._random_permutations_kernel": {
        "starts": "*i64",
        "permutations": "*i32",
        "total": "I",
        "groups": "i32",
        "seed": "I",
        "offset": "I",
    },
    "token_views._token_views_kernel": {
        "weights": "*T",
        "table": "*i64",
        "base": "*i64",
        "layers": "*i64",
        "start": "*i64",
        "permutations": "*i32",
        "scale": "*fp32",
        "shift": "*fp32",
        "values": "*T",
        "lengths": "*i32",
        "positions": "*i32",
        "indices": "i32",
        "token_size": "i32",
        "window": "i32",
        "noise": "fp32",
        "erase_threshold": "I",
        "seed": "I",
        "offset": "I",
        "BLOCK": 512,
        "PERMUTE": True,
        "SCALE": True,
        "SHIFT": True,
        "NOISE": True,
        "ERASE": True,
    },
    "coordinate_mlp._coordinate_mlp_kernel": {
        "layer_table": "*T",
        "filter_table": "*T",
        "channel_table": "*T",
        "grid": "*i64",
        "ends": "*i64",
        "rows": "*i64",
        "hidden_weights": "*T",
        "hidden_biases": "*T",
        "out_weight": "*T",
        "out_bias": "*T",
        "scratch": "*T",
        "predictions": "*T",
        "count": "I",
        "num_layers": "i32",
        "depth": "i32",
        "width": "i32",
        "outputs": "i32",
        "ACTIVATION": 3,
        "ROWS": 64,
        "COLUMNS": 64,
        "DEPTH": 16,
    },
    "layer_statistics._layer_statistics_kernel": {
        "flat": "*T",
        "offsets": "*i64",
        "statistics": "*fp64",
        "num_weights": "I",
        "num_layers": "i32",
        "BLOCK": 1024,
        "BITS": 32,
    },
    "layerwise_mse._layer_sums_kernel": {
        "prediction": "*T",
        "target": "*T",
        "offsets": "*i64",
        "sigma": "*fp32",
        "sums": "*fp32",
        "num_weights": "I",
        "num_layers": "i32",
        "clip": "fp32",
        "CLIP": True,
        "BLOCK": 1024,
    },
    "layerwise_mse._layer_gradients_kernel": {
        "grad": "*fp32",
        "prediction": "*T",
        "target": "*T",
        "offsets": "*i64",
        "sigma": "*fp32",
        "share": "*fp32",
        "grad_prediction": "*T",
        "num_weights": "I",
        "num_layers": "i32",
        "clip": "fp32",
        "CLIP": True,
        "BLOCK": 1024,
    },
    "masked_mse._token_sums_kernel": {
        "prediction": "*T",
        "target": "*T",
        "lengths": "*i32",
        "sums": "*fp32",
        "rows": "I",
        "size": "I",
        "MOMENTS": 1,
        "BLOCK": 512,
    },
    "masked_mse._scaled_errors_kernel": {
        "grad": "*T",
        "prediction": "*T",
        "target": "*T",
        "lengths": "*i32",
        "divisor": "*fp32",
        "grad_prediction": "*T",
        "size": "I",
        "BLOCK": 512,
    },
    "nt_xent._logsumexp_kernel": {
        "u": "*fp32",
        "logsumexp": "*fp32",
        "positives": "*fp32",
        "scale": "*fp32",
        "count": "I",
        "size": "I",
        "BLOCK": 64,
        "CHUNK": 32,
    },
    "nt_xent._grad_rows_kernel": {
        "u": "*fp32",
        "logsumexp": "*fp32",
        "grad": "*fp32",
        "scale": "*fp32",
        "count": "I",
        "size": "I",
        "BLOCK": 64,
        "CHUNK": 32,
    },
    "random_subset._random_integers_kernel": {
        "integers": "*i64",
        "bound": "I",
        "first": "I",
        "count": "I",
        "seed": "I",
        "offset": "I",
        "BLOCK": 256,
    },
    "weighted_sample._weighted_sample_kernel": {
        "columns": "*i64",
        "sample": "*i64",
        "num_columns": "I",
        "first": "I",
        "count": "I",
        "seed": "I",
        "offset": "I",
        "BLOCK": 256,
    },
    "feature_distance._sums_kernel": {
        "student": "*T",
        "teacher": "*T",
        "sums": "*fp64",
        "size": "I",
        "chunks": "I",
        "BLOCK": 1024,
        "CHUNK": 16384,
    },
    "feature_distance._distance_kernel": {
        "parts": "*fp64",
        "sums": "*fp64",
        "distance": "*fp64",
        "batch": "I",
        "chunks": "I",
        "BLOCK": 32,
    },
    "feature_distance._gradient_kernel": {
        "scale": "*fp64",
        "student": "*T",
        "teacher": "*T",
        "sums": "*fp64",
        "gradient": "*T",
        "size": "I",
        "chunks": "I",
        "BLOCK": 1024,
    },
}


def test_triton_kernels_compile():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, __file__], check=True, env=environment)


def test_every_triton_kernel_is_listed():
    files = (Path(__file__).parents[1] / "kernels").glob("[!_]*.py")
    found = {f"{file.stem}.{name}" for file in files for name in re.findall(r"^def (_\w+)", file.read_text(), re.M)}
    assert found == set(KERNELS)


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget

    for name, arguments in KERNELS.items():
        module, kernel = name.split(".")
        function = getattr(import_module(f"fastws.kernels.{module}"), kernel)
        constants = {argument: value for argument, value in arguments.items() if isinstance(value, int)}
        for dtype in ("fp32", "bf16"):
            for integer in ("i32", "i64"):  # Triton compiles anew when an argument outgrows 32 bits
                types = {
                    argument: "constexpr" if argument in constants else kind.replace("T", dtype).replace("I", integer)
                    for argument, kind in arguments.items()
                }
                source = triton.compiler.ASTSource(function, types, constants)
                triton.compile(source, target=GPUTarget("cuda", 90, 32))


if __name__ == "__main__":
    compile_all()
