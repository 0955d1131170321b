"""fastws.token_views: 64 windows of 256 tokens from 32 ResNet-18, permuted, with and without noise.

Predicted: 13.7 MB of weights are read from anywhere in 1.4 GB and 18.9 MB written: at 20 GB/s 1.6 ms. Units of 36 bytes
are gathered in random order, two or three moves each, 380,000 of them: 1 ms, which memory hides in part. Noise: 3.4
million normals, 0.4 ns for the word and 0.7 for logarithm, sine and cosine on 8 lanes: 3.8 ms more. The published way
permutes and tokenizes 64 whole networks, 120 ms each.

Run: fastws bench token_views
"""

from collections.abc import Iterator
from functools import partial

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.benchmarks.zoo import MODELS, TOKEN_SIZE, VIEWS, WINDOW, published_views, resnet18
from fastws.ops.token_views import token_views_reference
from fastws.table import table_columns


def make_args(dtype: torch.dtype, noise: float, models: int, views: int) -> tuple:
    layout, symmetry = resnet18()
    rng = torch.Generator().manual_seed(0)
    zoo = torch.randn(models, layout.num_weights, generator=rng).to(dtype)
    model = torch.randint(0, models, (views,), generator=rng)
    start = torch.randint(0, layout.num_tokens - WINDOW + 1, (views,), generator=rng)
    layers = torch.tensor([[0, len(layout.table)]]).expand(views, 2)
    permutations, nothing = symmetry.random(views, seed=1), torch.empty(0)
    tensors = zoo, symmetry.table(layout), model * layout.num_weights, layers, start, permutations, nothing, nothing
    return *[x.to(DEVICE) for x in tensors], TOKEN_SIZE, WINDOW, noise, 0, 1, 2, dtype


def num_bytes(zoo, table, base, layers, start, *args):
    """Weights that are read, and tokens, padding included, that are written."""
    lengths = resnet18()[0].lengths
    read = sum(int(lengths[first : first + WINDOW].sum()) for first in start.tolist())
    return zoo.itemsize * (read + len(start) * WINDOW * TOKEN_SIZE)


def published(zoo, table, base, layers, start, permutations, *args):
    return (published_views(*resnet18(), zoo, base // zoo.shape[1], start, permutations),)


def copy_slices(zoo, table, base, layers, start, *args):
    """As many bytes from the same places, cut but neither permuted nor padded."""
    layout, size = resnet18()[0], WINDOW * TOKEN_SIZE
    columns = table_columns(layout.table)
    places = columns.weight_offset[layout.positions[start.cpu(), 1]]
    places = places.clamp(max=layout.num_weights - size).tolist()
    models = (base // zoo.shape[1]).tolist()
    return torch.stack([zoo[model, place : place + size] for model, place in zip(models, places, strict=True)])


def check(actual, reference, zoo, *args):
    accuracy = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[zoo.dtype]
    for x, y in zip(actual, reference(zoo, *args), strict=False):
        torch.testing.assert_close(x, y, rtol=accuracy, atol=accuracy)


def cases(options: Options) -> Iterator[Case]:
    sizes = (2, 4) if options.small else (MODELS, VIEWS)
    for dtype in (torch.float32, torch.bfloat16):
        for noise in (0.0, 0.1):
            rivals = {"copy slices": copy_slices}
            if DEVICE == "cpu" and dtype == torch.float32 and noise == 0 and not options.quick:
                rivals["published"] = published
            yield operator_case(
                "token_views",
                f"resnet18 {str(dtype)[6:]} noise={noise}",
                token_views_reference,
                check,
                partial(make_args, dtype, noise, *sizes),
                num_bytes,
                rivals,
            )
