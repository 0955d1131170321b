"""fastws.token_views: windows of 32 ResNet-18, and two views of each of 500 small CNNs.

64 windows of 256 tokens, permuted, with and without noise, and with signs.

Predicted: 13.7 MB of weights are read from anywhere in 1.4 GB and 18.9 MB written: at 20 GB/s 1.6 ms. Units of 36 bytes
are gathered in random order, two or three moves each, 380,000 of them: 1 ms, which memory hides in part. Noise: 3.4
million normals, 0.4 ns for the word and 0.7 for logarithm, sine and cosine on 8 lanes: 3.8 ms more. The published way
permutes and tokenizes 64 whole networks, 120 ms each. Signs of half of the units are an XOR of what is moved: 0.95 to 1
of the speed without.

Two views of each of 500 CNN-s, a network of 2,464 weights one token, units permuted and negated, a block erased in
every other view: 4.9 MB read twice and 9.9 MB written: 1 ms at 20 GB/s. 48 rows and 360 units a view are moved, most of
them 4 to 100 bytes long, at 2 to 3 ns: 1 ms more. A plain gather reads an index of 8 bytes for each of the 2.5 million
weights, 20 MB, and each weight for itself, 1.2 ns: 3 ms, and 1 to 2 ms for its copies and the mask of the blocks. The
published way turns a list of 2,464 numbers into an index for each view: 0.25 ms, 1,000 times.

Run: fastws bench token_views
"""

from collections.abc import Iterator
from functools import cache, partial
from random import choices

import torch
from torch import Tensor

import fastws
from fastws.benchmarks.harness import DEVICE, Case, Options, operator_case
from fastws.benchmarks.zoo import (
    MODELS,
    TOKEN_SIZE,
    VIEWS,
    WINDOW,
    published_views,
    resnet18,
    with_signs,
    without_signs,
)
from fastws.ops.token_views import draw_blocks, token_views_reference
from fastws.table import table_columns
from fastws.testing import assert_equal
from fastws.zoo.making.architectures import build


def make_args(dtype: torch.dtype, noise: float, models: int, views: int, signed: bool = False) -> tuple:
    layout, symmetry = resnet18()
    rng = torch.Generator().manual_seed(0)
    zoo = torch.randn(models, layout.num_weights, generator=rng).to(dtype)
    model = torch.randint(0, models, (views,), generator=rng)
    start = torch.randint(0, layout.num_tokens - WINDOW + 1, (views,), generator=rng)
    layers = torch.tensor([[0, len(layout.table)]]).expand(views, 2)
    permutations, nothing = symmetry.random(views, seed=1), torch.empty(0)
    permutations = with_signs(permutations) if signed else permutations
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


def unsigned(zoo, table, base, layers, start, permutations, *args):
    return torch.ops.fastws.token_views(zoo, table, base, layers, start, without_signs(permutations), *args)


# --- two views of each of many small networks


@cache
def cnn_s() -> tuple[fastws.Layout, fastws.Symmetry]:
    """A network is one token; units of tanh may be negated."""
    network = build("cnn-s", (1, 28, 28), activation="tanh")
    layout = fastws.Layout.from_checkpoint(network, span="network")
    return layout, fastws.Symmetry.trace(network, torch.randn(1, 1, 28, 28))


def make_small_args(networks: int) -> tuple:
    layout, symmetry = cnn_s()
    size, views, nothing = layout.num_weights, 2 * networks, torch.empty(0)
    zoo = torch.randn(networks, size, generator=torch.Generator().manual_seed(0))
    base, layers = torch.arange(networks).repeat(2) * size, torch.tensor([[0, len(layout.table)]]).expand(views, 2)
    permutations = symmetry.random(views, seed=1, flips=True)
    tensors = zoo, symmetry.table(layout), base, layers, torch.zeros_like(base), permutations, nothing, nothing
    erasing = None, 0.0, 2**31, round(0.02 * 2**24), round(0.33 * 2**24)
    return *[x.to(DEVICE) for x in tensors], size, 1, 0.0, 0, 1, 2, torch.float32, *erasing


@cache
def indices_of(permutations: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Where each weight of each view comes from, signs left out: int64 ``[2B, P]``, and the same as lists."""
    layout, symmetry = cnn_s()
    places = torch.arange(layout.num_weights, dtype=torch.float64).expand(len(permutations), -1).contiguous()
    index = symmetry.permute(places, without_signs(permutations).cpu(), layout).long()
    return index.to(permutations.device), index.tolist()


@cache
def blocks_of(table: Tensor, layers: Tensor) -> Tensor:
    return draw_blocks(table, layers, 1, 2, 2**31, round(0.02 * 2**24), round(0.33 * 2**24))


def plain_gather(zoo, table, base, layers, start, permutations, scale, shift, size, *args):
    """Signs left out, indices and blocks made beforehand."""
    index, block = indices_of(permutations)[0], blocks_of(table, layers)
    views = zoo.repeat(2, 1).gather(1, index)
    place = torch.arange(size, device=zoo.device)
    return views.masked_fill_((place >= block[:, :1]) & (place < block[:, 1:]), 0)


def published_pairs(zoo, table, base, layers, start, permutations, scale, shift, size, *args):
    """Network by network, views by lists of indices, as the published code does; signs left out, blocks beforehand."""
    lists, block = indices_of(permutations)[1], blocks_of(table, layers).tolist()
    count, views = len(zoo), torch.empty(len(permutations), size)
    for network in range(count):
        choices(list(range(25_000)), k=2)  # which of the permutations it has made beforehand
        for view in (network, network + count):
            vector = zoo[network][lists[view]]
            vector[block[view][0] : block[view][1]] = 0
            views[view] = vector
    return views


def check_pairs(actual, reference, *args):
    """The plain ways leave signs out."""
    expected = reference(*args)
    if isinstance(actual, Tensor):
        assert torch.equal(actual.abs(), expected[0][:, 0].abs())
    else:
        assert_equal(actual[0], lambda: expected[0])


def small_cases(options: Options) -> Iterator[Case]:
    networks = 4 if options.small else 500
    rivals = {"plain gather": plain_gather}
    if DEVICE == "cpu" and not options.quick:
        rivals["published"] = published_pairs
    yield operator_case(
        "token_views",
        f"two views of {networks} CNN-s",
        token_views_reference,
        check_pairs,
        partial(make_small_args, networks),
        lambda zoo, *args: 4 * zoo.nbytes,
        rivals,
        compiled=False,
    )


def cases(options: Options) -> Iterator[Case]:
    yield from small_cases(options)
    sizes = (2, 4) if options.small else (MODELS, VIEWS)
    yield operator_case(
        "token_views",
        "resnet18 float32 signs",
        token_views_reference,
        check,
        partial(make_args, torch.float32, 0.0, *sizes, True),
        num_bytes,
        {"without signs": unsigned, "copy slices": copy_slices},
        compiled=False,
    )
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
