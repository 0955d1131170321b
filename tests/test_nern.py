"""The NeRN module against its plain statement: encodings of all coordinates, then linear layers."""

from math import pi

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastws.nn.nern import NeRN, NeRNConfig, encode_axis, load
from fastws.testing import devices

GRID = [(4, 3), (6, 4), (2, 6)]
COORDINATES = [
    (layer, f, c) for layer, (filters, channels) in enumerate(GRID) for f in range(filters) for c in range(channels)
]
ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "hardswish": F.hardswish, "gelu": F.gelu, "relu6": F.relu6}


def encode_position(p, levels=40, base=0.76):
    angles = [p * base**k * pi for k in range(levels)]
    return torch.tensor([f(a) for a in map(torch.tensor, angles) for f in (torch.sin, torch.cos)])


def plain_encoding(config, coordinate):
    if config.encoding == "ffn":
        drawn = torch.randn(3 * config.levels, 3, generator=torch.Generator().manual_seed(0))
        angles = 2 * pi * (drawn * torch.tensor([1, 0.1, 0.1])) @ torch.tensor(coordinate).float()
        return torch.stack([angles.sin(), angles.cos()], 1).flatten()
    parts = [encode_position(p, config.levels, config.base) for p in coordinate]
    return torch.cat(parts) if config.fusion == "concat" else sum(parts)


def plain_predictions(nern):
    """Every coordinate encoded by itself, one linear layer after the other."""
    x = torch.stack([plain_encoding(nern.config, coordinate) for coordinate in COORDINATES])
    for layer in nern.layers:
        x = ACTIVATIONS[nern.config.activation](layer(x))
    return nern.final_linear_layer(x)


def test_encoding_has_the_published_values():
    encoded = torch.cat([encode_axis(NeRNConfig(hidden=8), 8)[p] for p in (3, 5, 7)])
    golden = [0, -1, 0.770513, 0.637424, -0.744265, 0.667885, -0.839117, -0.54395]
    torch.testing.assert_close(encoded[:8], torch.tensor(golden), rtol=0, atol=2e-6)
    golden = [0, -1, -0.587785, 0.809017, 0.344643, -0.938734]
    torch.testing.assert_close(encoded[80:86], torch.tensor(golden), rtol=0, atol=2e-6)
    torch.testing.assert_close(encoded[236:], torch.tensor([0.00065, 1, 0.000494, 1]), rtol=0, atol=2e-6)


def test_encoding_is_computed_in_the_published_order():
    frequencies = 0.76 ** torch.arange(40)
    for p in (1, 63, 511):
        angles = torch.tensor(p).unsqueeze(-1) * frequencies * torch.pi
        row = torch.dstack([torch.sin(angles), torch.cos(angles)]).flatten()
        assert torch.equal(encode_axis(NeRNConfig(hidden=8), 512)[p], row)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    "changes",
    [{}, {"fusion": "sum"}, {"encoding": "ffn"}, {"activation": "gelu", "blocks": 3}, {"base": 1.25, "levels": 5}],
)
def test_predictions_are_those_of_encoded_coordinates(device, changes):
    torch.manual_seed(0)
    nern = NeRN(NeRNConfig(hidden=33, **changes), GRID)
    expected = plain_predictions(nern)
    nern, rows = nern.to(device), torch.tensor([47, 0, 12, 12, 35], device=device)
    torch.testing.assert_close(nern().cpu(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(nern(rows).cpu(), expected[rows.cpu()], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"fusion": "sum"}, {"encoding": "ffn"}])
def test_gradients_are_those_of_the_plain_statement(changes):
    torch.manual_seed(0)
    nern = NeRN(NeRNConfig(hidden=16, **changes), GRID)
    expected = torch.autograd.grad(plain_predictions(nern).square().sum(), list(nern.parameters()))
    actual = torch.autograd.grad(nern().square().sum(), list(nern.parameters()))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_its_dtype_and_returns_float32():
    torch.manual_seed(0)
    nern = NeRN(NeRNConfig(hidden=64), GRID)
    with torch.autocast("cpu", torch.bfloat16):
        half = nern()
    assert half.dtype == torch.float32
    error = (half - nern()).norm() / nern().norm()
    assert 1e-5 < error < 0.02
    assert nern.double()().dtype == torch.float64


@pytest.mark.parametrize("hidden, numbers", [(140, 94_229), (180, 142_749), (320, 388_169), (1256, 5_050_385)])
def test_sizes_are_the_published_ones(hidden, numbers):
    with torch.device("meta"):
        nern = NeRN(NeRNConfig(hidden=hidden), GRID)
    assert sum(parameter.numel() for parameter in nern.parameters()) == numbers


def test_published_state_loads():
    class Published(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(240, 20), *(nn.Linear(20, 20) for _ in range(3))])
            self.final_linear_layer = nn.Linear(20, 9)

    torch.manual_seed(0)
    published = Published()
    nern = NeRN.from_state(published.state_dict(), GRID, NeRNConfig(hidden=1))
    assert nern.config == NeRNConfig(hidden=20) and list(nern.state_dict()) == list(published.state_dict())
    x = torch.stack([plain_encoding(nern.config, coordinate) for coordinate in COORDINATES])
    for layer in published.layers:
        x = F.relu(layer(x))
    torch.testing.assert_close(nern(), published.final_linear_layer(x), rtol=0, atol=1e-6)


def test_bad_states_and_sizes_are_named():
    state = NeRN(NeRNConfig(hidden=20), GRID).state_dict()
    with pytest.raises(ValueError, match=r"layers.0.weight must be \[20, 120\], got \[20, 240\]; was it of another"):
        NeRN.from_state(state, GRID, NeRNConfig(hidden=1, levels=20))
    with pytest.raises(ValueError, match="state must have the names of a NeRN, got"):
        NeRN.from_state({"conv.weight": torch.zeros(1)}, GRID, NeRNConfig(hidden=1))
    with pytest.raises(ValueError, match="NeRN: hidden must be positive, got 0"):
        NeRNConfig(hidden=0)
    with pytest.raises(ValueError, match="fusion must be concat with the encoding ffn, got sum"):
        NeRNConfig(hidden=8, encoding="ffn", fusion="sum")
    for grid in ([], [(3, 0)]):
        with pytest.raises(ValueError, match="grid must hold filters and channels of layers, at least 1"):
            NeRN(NeRNConfig(hidden=8), grid)


def test_checkpoints_with_more_layers_are_refused():
    state = NeRN(NeRNConfig(hidden=8, blocks=6), [(2, 3)]).state_dict()
    with pytest.raises(
        ValueError, match="layers.4.weight must not be there, got more than 5 blocks; of another preset"
    ):
        load(NeRN(NeRNConfig(hidden=8), [(2, 3)]), state)
