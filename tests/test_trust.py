"""Wrong tables, permutations and lengths on a CPU: a sentence, never a read or write past the end of a tensor."""

import itertools

import pytest
import torch
from torch import nn

import fastws
from fastws import _native

TRUSTING = {"tokenize", "detokenize", "permute", "token_views", "masked_mse"}
pytestmark = pytest.mark.skipif(not _native.COMPILED["cpu"] >= TRUSTING, reason="PyTorch checks what the references do")
NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 5))
LAYOUT = fastws.Layout.from_checkpoint(NETWORK, token_size=16)
SYMMETRY = fastws.Symmetry.trace(NETWORK, torch.zeros(1, 3, 8, 8))
P, N = LAYOUT.num_weights, LAYOUT.num_tokens
VALUES = (-(2**62), -2, -1, 0, 1, 3, 7, 9, 2**31, 2**40, 2**62)


def views(zoo, table, permutations, window=4, **options):
    places = {"model": torch.tensor([2, 0]), "start": torch.tensor([0, N - window])}
    return fastws.token_views(zoo, table, 16, **places, window=window, permutations=permutations, **options)


@pytest.mark.parametrize("op", ["tokenize", "detokenize", "permute", "token_views"])
def test_tables_with_one_wrong_number_are_refused_or_harmless(op):
    zoo, permutations = torch.randn(3, P), SYMMETRY.random(3)
    table = SYMMETRY.tensor_table(LAYOUT) if op == "permute" else SYMMETRY.table(LAYOUT)
    calls = {
        "tokenize": lambda table: fastws.tokenize(zoo, table, 16, N),
        "detokenize": lambda table: fastws.detokenize(torch.randn(3, N, 16), table, P),
        "permute": lambda table: fastws.permute(zoo, table, permutations),
        "token_views": lambda table: views(zoo, table, permutations[:2]),
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


@pytest.mark.parametrize("value", [-1, 8, 10**9])
@pytest.mark.parametrize("width", [SYMMETRY.num_indices, 3])
def test_permutations_out_of_range_are_refused(value, width):
    zoo, wrong = torch.randn(3, P), SYMMETRY.random(3)[:, :width].clone()
    wrong[1, 2] = value
    sentence = rf"permutations\[1, 2\] must be in \[0, 7\], got {value}" if width > 3 else "permutations of 3 entries"
    with pytest.raises(RuntimeError, match=f"permute: .*{sentence}"):
        fastws.permute(zoo, SYMMETRY.tensor_table(LAYOUT), wrong)
    with pytest.raises(RuntimeError, match="token_views: .*permutations"):
        views(zoo, SYMMETRY.table(LAYOUT), wrong[1:])


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
