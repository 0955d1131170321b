"""fastws.token_views: 64 windows of 256 tokens from 32 ResNet-18, permuted, with and without noise.

Predicted: 13.7 MB of weights are read from anywhere in 1.4 GB and 18.9 MB written: at 20 GB/s 1.6 ms. Units of 36 bytes
are gathered in random order, two or three moves each, 380,000 of them: 1 ms, which memory hides in part. Noise: 3.4
million normals, 0.4 ns for the word and 0.7 for logarithm, sine and cosine on 8 lanes: 3.8 ms more. The published way
permutes and tokenizes 64 whole networks, 120 ms each.

Run: python benchmarks/bench_token_views.py
"""

import torch
from harness import DEVICE, race
from zoo import MODELS, TOKEN_SIZE, VIEWS, WINDOW, published_views, resnet18

import fastws
from fastws.ops.token_views import token_views_reference

layout, symmetry = resnet18()
zoo = torch.randn(MODELS, layout.num_weights)
rng = torch.Generator().manual_seed(0)
model = torch.randint(0, MODELS, (VIEWS,), generator=rng)
start = torch.randint(0, layout.num_tokens - WINDOW + 1, (VIEWS,), generator=rng)
permutations = symmetry.random(VIEWS, seed=1)
table = symmetry.table(layout)
lengths = fastws.token_views(zoo, table, TOKEN_SIZE, model, start, WINDOW).lengths
num_bytes = 4 * (int(lengths.sum()) + VIEWS * WINDOW * TOKEN_SIZE)


def published(*args):
    return (published_views(layout, symmetry, zoo, model, start, permutations),)


def copy_slices(weights, *args):
    """As many bytes from the same places, cut but neither permuted nor padded."""
    begin, size = (
        layout.table[:, 0].repeat_interleave(layout.table[:, 2] * layout.table[:, 6])[start],
        WINDOW * TOKEN_SIZE,
    )
    begin = begin.clamp(max=layout.num_weights - size).tolist()
    return torch.stack([weights[m, b : b + size] for m, b in zip(model.tolist(), begin, strict=True)])


for dtype in (torch.float32, torch.bfloat16):
    for noise in (0.0, 0.1):

        def make_args(device, dtype=dtype, noise=noise):
            nothing = torch.empty(0)
            layers = torch.tensor([[0, len(table)]]).expand(VIEWS, 2)
            tensors = zoo.to(dtype), table, model * layout.num_weights, layers, start, permutations, nothing, nothing
            return *[x.to(device) for x in tensors], TOKEN_SIZE, WINDOW, noise, 0, 1, 2, dtype

        def check(actual, reference, *args):
            accuracy = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[args[0].dtype]
            for x, y in zip(actual, reference(*args), strict=False):
                torch.testing.assert_close(x, y, rtol=accuracy, atol=accuracy)

        rivals = {"copy slices": copy_slices}
        if DEVICE == "cpu" and dtype == torch.float32 and noise == 0:
            rivals["published"] = published
        case = f"resnet18 {str(dtype)[6:]} noise={noise}"
        race("token_views", case, token_views_reference, check, make_args, num_bytes * dtype.itemsize // 4, rivals)
