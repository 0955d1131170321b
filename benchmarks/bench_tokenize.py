"""fastws.tokenize and detokenize of a ResNet-18 against their references.

Predicted: 44.7 MB of weights are read, 61.7 (norm layers kept, mostly padding) or 45.1 MB of tokens written: at the
20 GB/s with which one core copies in place 5.3 and 4.5 ms. A new tensor of this size is fresh memory, which the system
clears page by page; in pages of 4 KiB that takes five times as long as the copy, in pages of 2 MiB, which the kernel
asks for, about as long. So about 11 ms, twice as fast as ``clone`` or better.

Run: fastws bench tokenize
"""

from collections.abc import Iterator

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.benchmarks.zoo import TOKEN_SIZE, resnet18_layout
from fastws.ops.tokenize import detokenize_reference, tokenize_reference
from fastws.testing import assert_equal


def cases(options: Options) -> Iterator[Case]:
    for norm in ("keep", "skip"):

        def make_flat(norm=norm):
            layout = resnet18_layout(norm)
            flat = torch.randn(1, layout.num_weights, device=DEVICE)
            return flat, layout.table.to(DEVICE), TOKEN_SIZE, layout.num_tokens

        def make_tokens(norm=norm):
            layout = resnet18_layout(norm)
            tokens = torch.randn(1, layout.num_tokens, TOKEN_SIZE, device=DEVICE)
            return tokens, layout.table.to(DEVICE), layout.num_weights

        def num_bytes(*args, norm=norm):
            return 4 * (int(resnet18_layout(norm).lengths.sum()) + resnet18_layout(norm).num_tokens * TOKEN_SIZE)

        for op, reference, make_args in (
            ("tokenize", tokenize_reference, make_flat),
            ("detokenize", detokenize_reference, make_tokens),
        ):
            # the references loop over layers; of 81 the compiler makes a program of minutes, of 41 one of seconds
            compiled, name = norm == "skip", f"resnet18 norm={norm}"
            yield operator_case(op, name, reference, assert_equal, make_args, num_bytes, compiled=compiled)
