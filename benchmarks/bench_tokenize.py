"""fastws.tokenize and detokenize of a ResNet-18 against their references.

Predicted: 44.7 MB of weights are read, 61.7 (norm layers kept, mostly padding) or 45.1 MB of tokens written: at the
20 GB/s with which one core copies in place 5.3 and 4.5 ms. A new tensor of this size is fresh memory, which the system
clears page by page; in pages of 4 KiB that takes five times as long as the copy, in pages of 2 MiB, which the kernel
asks for, about as long. So about 11 ms, twice as fast as ``clone`` or better.

Into memory that is there already, with ``out=`` (``tokenize_out``): the weights, 44.7 MB, are read and the tokens, 61.7
MB, moved twice, because a processor reads what it is about to overwrite. That is 168 MB, where a copy of as many bytes
moves 160: 0.95 of a copy in place. Without norm layers both move 135 MB. ``detokenize`` reads no padding: 134 and 134.

Run: fastws bench tokenize
"""

from collections.abc import Iterator
from functools import partial

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.benchmarks.zoo import TOKEN_SIZE, resnet18_layout
from fastws.ops import tokenize as references
from fastws.testing import assert_equal


def make_args(op: str, norm: str) -> tuple:
    layout = resnet18_layout(norm)
    flat, table = torch.randn(1, layout.num_weights, device=DEVICE), layout.table.to(DEVICE)
    tokens = torch.randn(1, layout.num_tokens, TOKEN_SIZE, device=DEVICE)
    return {
        "tokenize": (flat, table, TOKEN_SIZE, layout.num_tokens),
        "tokenize_out": (flat, table, TOKEN_SIZE, tokens),
        "detokenize": (tokens, table, layout.num_weights),
        "detokenize_out": (tokens, table, flat),
    }[op]


def num_bytes(op: str, norm: str) -> int:
    """Padding is written, but nobody needs to read it."""
    layout = resnet18_layout(norm)
    weights = int(layout.lengths.sum())
    return 4 * (weights + (weights if op.startswith("detokenize") else layout.num_tokens * TOKEN_SIZE))


def check_out(actual: None, reference, *args) -> None:
    """The last argument is where the result is."""
    result, expected = args[-1].clone(), torch.zeros_like(args[-1])
    reference(*args[:-1], expected)
    assert torch.equal(result, expected)
    args[-1].fill_(torch.nan)  # what writes nothing is not taken for right


def cases(options: Options) -> Iterator[Case]:
    for norm in ("keep", "skip"):
        for op in ("tokenize", "detokenize", "tokenize_out", "detokenize_out"):
            into = op.endswith("_out")
            yield operator_case(
                op,
                f"resnet18 norm={norm}",
                getattr(references, f"{op}_reference"),
                check_out if into else assert_equal,
                partial(make_args, op, norm),
                lambda *args, op=op, norm=norm: num_bytes(op, norm),
                # the references loop over layers; of 81 the compiler makes a program of minutes, of 41 one of seconds
                compiled=norm == "skip" and not into,
            )
