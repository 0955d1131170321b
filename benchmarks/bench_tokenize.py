"""fastws.tokenize and detokenize of a ResNet-18 against their references.

Predicted: 44.7 MB of weights are read, 61.7 (norm layers kept, mostly padding) or 45.1 MB of tokens written: at the
20 GB/s with which one core copies in place 5.3 and 4.5 ms. A new tensor of this size is fresh memory, which the system
clears page by page; in pages of 4 KiB that takes five times as long as the copy, in pages of 2 MiB, which the kernel
asks for, about as long. So about 11 ms, twice as fast as ``clone`` or better.

Run: python benchmarks/bench_tokenize.py
"""

import torch
from harness import race
from zoo import TOKEN_SIZE, resnet18

from fastws.ops.tokenize import detokenize_reference, tokenize_reference
from fastws.testing import assert_equal

for norm in ("keep", "skip"):
    layout, _ = resnet18(norm)
    num_bytes = 4 * (int(layout.lengths.sum()) + layout.num_tokens * TOKEN_SIZE)

    def make_flat(device, layout=layout):
        return torch.randn(1, layout.num_weights, device=device), layout.table.to(device), TOKEN_SIZE, layout.num_tokens

    def make_tokens(device, layout=layout):
        tokens = torch.randn(1, layout.num_tokens, TOKEN_SIZE, device=device)
        return tokens, layout.table.to(device), layout.num_weights

    # the references loop over layers; of 81 the compiler makes a program of minutes, of 41 one of seconds
    compiled = norm == "skip"
    for op, reference, make_args in (
        ("tokenize", tokenize_reference, make_flat),
        ("detokenize", detokenize_reference, make_tokens),
    ):
        race(op, f"resnet18 norm={norm}", reference, assert_equal, make_args, num_bytes, compiled=compiled)
