"""Wrong tables, indices, shapes and lengths on a CPU: a sentence, never a read or write past the end of a tensor.

Most calls are of ``torch.ops``, which pass by the checks in Python, as those of ``torch.compile`` do.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import fuzz_operators
import pytest
import torch
from torch import nn

import fastws
from fastws import _native, ops
from fastws.small_cnn.table import POOLING, Row

ops.register_all()
TRUSTING = {"tokenize", "detokenize", "permute", "token_views", "masked_mse"}
pytestmark = pytest.mark.skipif(not _native.COMPILED["cpu"] >= TRUSTING, reason="PyTorch checks what the references do")
EXAMPLES = fuzz_operators.examples()
NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 5))
LAYOUT = fastws.Layout.from_checkpoint(NETWORK, token_size=16)
SYMMETRY = fastws.Symmetry.trace(NETWORK, torch.zeros(1, 3, 8, 8))
P, N = LAYOUT.num_weights, LAYOUT.num_tokens
VALUES = (-(2**62), -2, -1, 0, 1, 3, 7, 9, 2**31, 2**40, 2**62)


def views(zoo, table, permutations, window=4, **options):
    places = {"model": torch.tensor([2, 0]), "start": torch.tensor([0, N - window])}
    return fastws.token_views(zoo, table, 16, **places, window=window, permutations=permutations, **options)


@pytest.mark.parametrize("span", ["row", "layer", "network"])
@pytest.mark.parametrize("op", ["tokenize", "detokenize", "permute", "token_views"])
def test_tables_with_one_wrong_number_are_refused_or_harmless(op, span):
    zoo, permutations, layout = torch.randn(3, P), SYMMETRY.random(3), LAYOUT.with_tokens(16, span=span)
    table = SYMMETRY.tensor_table(layout) if op == "permute" else SYMMETRY.table(layout)
    count, model, start = layout.num_tokens, torch.tensor([2, 0]), torch.tensor([0, layout.num_tokens - 4])
    calls = {
        "tokenize": lambda table: fastws.tokenize(zoo, table, 16, count),
        "detokenize": lambda table: fastws.detokenize(torch.randn(3, count, 16), table, P),
        "permute": lambda table: fastws.permute(zoo, table, permutations),
        "token_views": lambda table: fastws.token_views(zoo, table, 16, model, start, 4, permutations[:2]),
    }
    refused = 0
    for row, column, value in itertools.product(range(len(table)), range(11), VALUES):
        wrong = table.clone()
        wrong[row, column] = value
        try:
            calls[op](wrong)
        except (RuntimeError, ValueError) as error:
            assert f"{op}: " in str(error), (row, column, value)
            refused += 1
    assert refused > 100
    calls[op](table)


@pytest.mark.parametrize("length", [1, 5, P - 1, P + 1, 2 * P])
def test_flat_vectors_of_another_length_are_refused(length):
    flat, permutations = torch.randn(3, length), SYMMETRY.random(3)
    if length < P:
        with pytest.raises(RuntimeError, match=f"tokenize: table must be of vectors of {length} weights"):
            fastws.tokenize(flat, LAYOUT.table, 16)
        with pytest.raises(RuntimeError, match="token_views: table must be"):
            views(flat, LAYOUT.table, None)
    with pytest.raises(RuntimeError, match="permute: table must cover vectors of"):
        fastws.permute(flat, SYMMETRY.tensor_table(LAYOUT), permutations)


def test_tokens_of_another_size_or_number_are_refused():
    with pytest.raises(RuntimeError, match="tokenize: table must be made for tokens of 17, got row 1 of others"):
        fastws.tokenize(torch.randn(3, P), LAYOUT.table, 17)
    for count in (N - 1, N + 1):
        with pytest.raises(RuntimeError, match=f"tokenize: tokens must be {N}, as the table says, got {count}"):
            fastws.tokenize(torch.randn(3, P), LAYOUT.table, 16, count)
        with pytest.raises(RuntimeError, match=f"detokenize: tokens must be {N}, as the table says, got {count}"):
            fastws.detokenize(torch.randn(3, count, 16), LAYOUT.table, P)


@pytest.mark.parametrize("value", [-9, -(2**31), 8, 10**9])  # ~8 is -9
@pytest.mark.parametrize("width", [SYMMETRY.num_indices, 3])
def test_permutations_out_of_range_are_refused(value, width):
    zoo, wrong = torch.randn(3, P), SYMMETRY.random(3)[:, :width].clone()
    wrong[1, 2] = value
    sentence = (
        rf"permutations\[1, 2\] must be in \[0, 7\], or ~ of that, got {value}"
        if width > 3
        else "permutations of 3 entries"
    )
    with pytest.raises(RuntimeError, match=f"permute: .*{sentence}"):
        fastws.permute(zoo, SYMMETRY.tensor_table(LAYOUT), wrong)
    with pytest.raises(RuntimeError, match="token_views: .*permutations"):
        views(zoo, SYMMETRY.table(LAYOUT), wrong[1:])


@pytest.mark.parametrize("start", [10**6, 2**31, 2**59 + 1, 2**60 - 3, 2**62 - 110, 2**62])  # times 16 they wrap around
def test_views_behind_the_end_are_padding(start):
    arguments = EXAMPLES["token_views"] | {"start": torch.tensor([0, start, start])}
    values, lengths, positions = torch.ops.fastws.token_views(*arguments.values())
    assert lengths[0].all() and not lengths[1:].any() and not positions[1:].any() and not values[1:].any()


def test_networks_past_the_end_of_a_zoo_of_several_architectures_are_refused():
    zoo, several = torch.randn(3 * P), {"base": torch.tensor([0, P, 2 * P])}
    several["layers"] = torch.tensor([[0, len(LAYOUT.table)]] * 3)
    views(zoo, LAYOUT.table, None, **several)
    for base in (-1, 2 * P + 1, 2**62):
        wrong = several | {"base": torch.tensor([0, P, base])}
        with pytest.raises(RuntimeError, match="token_views: table must be of networks of"):
            views(zoo, LAYOUT.table, None, **wrong)


@pytest.mark.parametrize("length", [-1, 5, 2**31 - 1])
def test_lengths_out_of_range_are_refused(length):
    lengths = torch.tensor([[1, 4, length]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"masked_mse: lengths must be in \[0, 4\], got {length}"):
        fastws.masked_mse(torch.randn(1, 3, 4), torch.randn(1, 3, 4), lengths)


def changed(x, entry, value):
    x = x.clone()
    x[entry] = value
    return x


def refused(op, argument, value, sentence):
    """A wrong value of one argument, a function of the right one, and the sentence that it gets."""
    return pytest.param(op, argument, value, sentence, id=f"{op}-{argument}-{sentence.split(' must ')[-1]}")


def with_stride(layers):
    """A pooling of 2 x 2 blocks, one in every column: it would read past the end of its input."""
    layers = layers.clone()
    assert Row(*layers[1]).kind == POOLING
    Row(*layers.unbind(1)).stride_width[1] = 1
    return layers


CNN = "small_cnn_step", "variational_cnn_step"
MLP = "coordinate_mlp", "coordinate_mlp_backward"
REFUSED = [
    refused("weighted_sample", "first", lambda _: -1, "first and count must be at least 0"),
    refused("weighted_sample", "count", lambda _: -1, "first and count must be at least 0"),
    refused("alias_table", "weights", lambda x: x.int(), "weights must be [*] Long on a CPU, got [30] Int"),
    refused("random_subset", "count", lambda _: 51, "count must be in [0, 50], got 51"),
    refused("complement", "indices", lambda x: changed(x, 3, 50), "indices must be in [0, 50), got 50"),
    refused("complement", "indices", lambda x: changed(x, 3, -1), "indices must be in [0, 50), got -1"),
    refused("complement", "population", lambda _: -1, "population must be in [0, 2**40], got -1"),
    refused("random_permutations", "starts", lambda x: changed(x, 1, 8), "starts must be of groups of 0 to 2**31 - 1"),
    refused("random_permutations", "total", lambda _: 8, "starts must go from 0 to total, 8, got others"),
    refused("attention", "heads", lambda _: 4, "qkv must hold query, key and value of 4 heads, got [2, 5, 18]"),
    refused("attention", "heads", lambda _: 0, "qkv must hold query, key and value of 0 heads, got [2, 5, 18]"),
    refused("attention_backward", "grad", lambda x: x[:, 1:], "grad must be [2, 5, 6] Float on a CPU, got [2, 4, 6]"),
    refused("attention_backward", "logsumexp", lambda x: x[:1], "logsumexp must be [2, 2, 5] Float on a CPU, got [1,"),
    refused("masked_mse_backward", "lengths", lambda x: changed(x, (1, 2), 5), "lengths must be in [0, 4], got 5"),
    refused("masked_mse_backward", "lengths", lambda x: changed(x, (1, 2), -1), "lengths must be in [0, 4], got -1"),
    refused("masked_mse_backward", "target", lambda x: x[:, 1:], "target must be [2, 6, 4] Float on a CPU"),
    refused("layerwise_mse", "offsets", lambda x: changed(x, (2, 1), 161), "offsets[2] must have"),
    refused("layerwise_mse_backward", "offsets", lambda x: changed(x, (0, 0), -1), "offsets[0] must have"),
    refused("layerwise_mse_backward", "share", lambda x: x[:2], "share must be [3] Float on a CPU, got [2] Float"),
    refused(
        "layer_statistics", "offsets", lambda x: changed(x, (2, 1), 10**9), "offsets[2] must have 0 <= begin <= end"
    ),
    refused("layer_statistics", "offsets", lambda x: x.flip(1), "offsets[0] must have 0 <= begin <= end <= 160"),
    refused("nt_xent", "z_j", lambda x: x[:4], "z_j must be [5, 7] Float on a CPU, got [4, 7] Float"),
    refused("nt_xent_backward", "logsumexp", lambda x: x[:9], "logsumexp must be [10] Float on a CPU, got [9] Float"),
    refused("feature_distance", "teacher", lambda x: x.double(), "teacher must be [3, 20] Float on a CPU"),
    refused("feature_distance_backward", "sums", lambda x: x[:2], "sums must be [3, 3] Double on a CPU, got [2, 3]"),
    refused("kernel_order", "rows", lambda x: changed(x, (1, 3, 2), torch.inf), "rows must be of length 1 or 0"),
    refused("kernel_order", "rows", lambda x: changed(x, (1, 3, 2), torch.nan), "rows must be of length 1 or 0"),
    refused("kernel_gradients", "kernels", lambda x: changed(x, 2, 12), "kernels must be in [0, 12), got 12"),
    refused("kernel_gradients", "kernels", lambda x: changed(x, 2, -7), "kernels must be in [0, 12), got -7"),
    refused("kernel_gradients", "stride", lambda _: 3, "stride must be 1 or 2, got 3"),
    refused(
        "kernel_gradients", "grad", lambda x: x[:, 1:], "grad must be [2, 3, 3, *] Float on a CPU, got [2, 2, 3, 4]"
    ),
    refused("matched_distance", "candidates", lambda x: changed(x, (0, 1), 2), "candidates must be in [0, 2), got 2"),
    refused("matched_distance", "groups", lambda x: changed(x, (1, 2), 21), "groups must be of networks of 40 weights"),
    refused("matched_distance", "parts", lambda x: changed(x, (1, 1), 5), "parts must lie in the 5 weights of a unit"),
    refused("tokenize_out", "out", lambda x: x[:, :, 1:], "out must be [3, *, 16] Float on a CPU, got [3,"),
    refused("tokenize_out", "out", lambda x: torch.stack([x, x], -1)[..., 0], "out must be contiguous"),
    refused("detokenize_out", "out", lambda x: x.double(), "out must be [3, *] Float on a CPU, got [3,"),
    refused("token_views", "start", lambda x: changed(x, 1, -1), "start must be in [0, 2**62], got -1"),
    refused("token_views", "base", lambda x: changed(x, 1, -1), "table must be of networks of"),
    refused("token_views", "additive", lambda x: x[1:], "additive must be ["),
    refused("token_views", "shortest", lambda _: 2**23, "shortest and longest must be in [0, 2**24] and ascend"),
    refused("token_views", "longest", lambda _: 2**25, "shortest and longest must be in [0, 2**24] and ascend"),
    refused("token_views", "layers", lambda x: changed(x, (1, 1), 9), "layers"),
    refused("small_cnn_logits", "activation", lambda x: changed(x, 1, 4), "activation must be in [0, 4), got 4"),
    *(
        refused(op, "layers", with_stride, "layers must be a table for such images")
        for op in (*CNN, "small_cnn_logits")
    ),
    *(refused(op, "labels", lambda x: changed(x, 1, 5), "labels must be in [0, 5), got 5") for op in CNN),
    *(refused(op, "labels", lambda x: changed(x, 1, -1), "labels must be in [0, 5), got -1") for op in CNN),
    *(refused(op, "batches", lambda x: changed(x, (1, 1, 1), 6), "batches must be in [0, 6), got 6") for op in CNN),
    *(refused(op, "activation", lambda x: changed(x, 1, 77), "activation must be in [0, 4), got 77") for op in CNN),
    *(refused(op, "optimizer", lambda x: changed(x, 1, 4), "optimizer must be in [0, 4), got 4") for op in CNN),
    *(refused(op, "seed", lambda x: x[:8], "seed must be [9] Long on a CPU, got [8] Long") for op in CNN),
    *(refused(op, "rows", lambda x: changed(x, 1, 35), "rows must be in [0, 35), got 35") for op in MLP),
    *(refused(op, "rows", lambda x: changed(x, 1, -5), "rows must be in [0, 35), got -5") for op in MLP),
    *(refused(op, "grid", lambda x: changed(x, (1, 0), 6), "grid must have 1 to 5 filters and 1 to 7") for op in MLP),
    *(refused(op, "hidden_weights", lambda x: x[:, 1:], "hidden_weights must be [2, 9, 9] Float") for op in MLP),
    refused("coordinate_mlp_backward", "kept", lambda x: x[1:], "kept must be [6, 32, 96] Float on a CPU"),
]


@pytest.mark.parametrize("op, argument, value, sentence", REFUSED)
def test_wrong_values_are_refused_in_one_sentence(op, argument, value, sentence):
    arguments = EXAMPLES[op]
    getattr(torch.ops.fastws, op)(*arguments.values())
    wrong = arguments | {argument: value(arguments[argument])}
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {sentence}")):
        getattr(torch.ops.fastws, op)(*wrong.values())


def test_every_compiled_operator_refuses_something_and_is_fuzzed():
    assert set(EXAMPLES) == _native.COMPILED["cpu"]
    assert {case.values[0] for case in REFUSED} | TRUSTING == _native.COMPILED["cpu"]


@pytest.mark.parametrize("op, argument, value, sentence", REFUSED[:: len(REFUSED) // 6])
def test_compiled_calls_refuse_wrong_values(op, argument, value, sentence):
    arguments = EXAMPLES[op]
    wrong = arguments | {argument: value(arguments[argument])}
    call = torch.compile(getattr(torch.ops.fastws, op), backend="aot_eager")
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {sentence}")):
        call(*wrong.values())


def test_random_arguments_are_computed_or_refused():  # in a process of its own, which may crash
    command = [sys.executable, Path(fuzz_operators.__file__), "--calls", "1500", "--seed", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    calls, operators, computed, refused = map(int, re.findall(r"\d+", run.stdout))
    assert calls == computed + refused == 1500 and operators == len(EXAMPLES) and computed > 300 < refused


def test_pooling_whose_stride_is_not_its_kernel_is_refused():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 2))
    layers, weights = fastws.layer_table(network, (1, 8, 8)), torch.zeros(1, 86)
    images, activation = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int32)
    assert fastws.small_cnn_logits(weights, images, layers, activation).shape == (1, 1, 2)
    with pytest.raises(ValueError, match=r"small_cnn_logits: layers\[1\] must fit"):
        fastws.small_cnn_logits(weights, images, with_stride(layers), activation)
