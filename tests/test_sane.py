import doctest
import sys

import pytest
import torch

from fastws.nn import sane
from fastws.nn.sane import PRESETS, PUBLISHED, SANE, SANEConfig

SMALL = SANEConfig(token_size=9, window=6, max_positions=(20, 4, 7), width=16, heads=2, depth=2, latent=5)
BLOCK = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
KEYS = [  # the names in published checkpoints
    *("tokenizer.weight", "tokenizer.bias", "encoder_comp.weight", "encoder_comp.bias"),
    *("decoder_comp.weight", "decoder_comp.bias", "detokenizer.weight", "detokenizer.bias"),
    *(f"transformer_encoder.transformer.{n}.{part}.weight" for n in (0, 1) for part in BLOCK),
    *(f"transformer_decoder.transformer.{n}.{part}.weight" for n in (0, 1) for part in BLOCK),
    *("pe.pe1.weight", "pe.pe2.weight", "pe.pe3.weight"),
    *("projection_head.head.0.weight", "projection_head.head.1.weight", "projection_head.head.1.bias"),
    *("projection_head.head.3.weight", "projection_head.head.4.weight", "projection_head.head.4.bias"),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SANE(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and norms that matter
    return model


def windows(*batch, window=6):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(*batch, window, 9, generator=generator)
    places = [torch.randint(0, count, (*batch, window), generator=generator) for count in SMALL.max_positions]
    return values, torch.stack(places, -1).int()


def test_names_are_the_published_ones(model):
    assert sorted(model.state_dict()) == sorted(KEYS)


@pytest.mark.parametrize("name, count", [("cnn", 202_539_421), ("resnet18", 865_050_012)])  # 202.5 M and 865.1 M
def test_published_sizes(name, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in SANE(PUBLISHED[name]).parameters()) == count


def test_forward_by_hand(model):
    """The paper's formulas, written out for one window without any module."""
    values, positions = windows(1)
    state = {name: weight.double() for name, weight in model.state_dict().items()}
    token, layer, unit = positions[0].long().unbind(-1)
    position = torch.cat(
        [state["pe.pe1.weight"][token] + state["pe.pe2.weight"][layer], state["pe.pe3.weight"][unit]], 1
    )

    def normalize(x, weight, bias=0.0):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight + bias

    def transform(x, side):
        for n in (0, 1):
            matrix = {part: state[f"transformer_{side}.transformer.{n}.{part}.weight"] for part in BLOCK}
            query, key, value = (normalize(x, matrix["ln_1"]) @ matrix["attn.c_attn"].T).split(16, dim=1)
            heads = []
            for head in (slice(0, 8), slice(8, 16)):
                attention = (query[:, head] @ key[:, head].T / 8**0.5).softmax(-1)
                heads.append(attention @ value[:, head])
            x = x + torch.cat(heads, 1) @ matrix["attn.c_proj"].T
            hidden = normalize(x, matrix["ln_2"]) @ matrix["mlp.c_fc"].T
            x = x + (hidden * (1 + (hidden / 2**0.5).erf()) / 2) @ matrix["mlp.c_proj"].T
        return x

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    z = linear(transform(linear(values[0].double(), "tokenizer") + position, "encoder"), "encoder_comp")
    prediction = linear(transform(linear(z, "decoder_comp") + position, "decoder"), "detokenizer")
    head = {name.removeprefix("projection_head.head."): x for name, x in state.items() if "head.head" in name}
    projection = normalize(z.flatten() @ head["0.weight"].T, head["1.weight"], head["1.bias"]).relu()
    projection = normalize(projection @ head["3.weight"].T, head["4.weight"], head["4.bias"]).relu()

    actual = model.double()(values.double(), positions)
    for ours, expected in zip(actual, (z, prediction, projection), strict=True):
        torch.testing.assert_close(ours[0], expected, rtol=1e-10, atol=1e-10)
    assert z.std() > 0.1 and prediction.std() > 0.1


def test_views_share_positions(model):
    values, positions = windows(2, 5)
    outputs = model(values, positions[0])
    for view in (0, 1):
        for together, alone in zip(outputs, model(values[view], positions[0]), strict=True):
            torch.testing.assert_close(together[view], alone, rtol=1e-5, atol=1e-6)
    shared = model(values, positions[0, 0])
    repeated = model(values, positions[0, 0].expand(5, 6, 3))
    for ours, expected in zip(shared, repeated, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_forward_is_encode_decode_project(model):
    values, positions = windows(3)
    z, prediction, projection = model(values, positions)
    torch.testing.assert_close(model.encode(values, positions), z)
    torch.testing.assert_close(model.decode(z, positions), prediction)
    assert projection.shape == (3, 30) and (projection >= 0).all()


@pytest.mark.parametrize("window", [1, 6, 19])
def test_encoder_takes_any_window(model, window):
    values, positions = windows(2, window=window)
    z = model.encode(values, positions)
    assert z.shape == (2, window, 5) and model.decode(z, positions).shape == values.shape


def test_every_axis_of_the_position_matters(model):
    values, positions = windows(1)
    z = model.encode(values, positions)
    for axis in range(3):
        moved = positions.clone()
        moved[..., axis] = (moved[..., axis] + 1) % SMALL.max_positions[axis]
        assert (model.encode(values, moved) - z).abs().max() > 0.01


def test_every_parameter_gets_a_gradient(model):
    z, prediction, projection = model(*windows(4))
    (z.square().sum() + prediction.square().sum() + projection.square().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0] == []


def test_initial_weights():
    torch.manual_seed(0)
    config = SANEConfig(token_size=64, window=8, max_positions=(64, 64, 64), width=64, heads=4, depth=8, latent=64)
    for name, weight in SANE(config).named_parameters():
        if weight.dim() < 2:
            assert (weight == (0 if name.endswith("bias") else 1)).all()
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) is 4
            assert weight.std().item() == pytest.approx(expected, rel=0.08), name


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "model._orig_mod."])
def test_published_checkpoints_load(model, prefix, tmp_path):
    state = {prefix + name: weight for name, weight in model.state_dict().items()}
    torch.save({"model": state, "optimizer": {}}, tmp_path / "state.pt")
    loaded = SANE.from_published(tmp_path / "state.pt", heads=2)
    assert loaded.config == SMALL
    values, positions = windows(2)
    torch.testing.assert_close(loaded(values, positions), model(values, positions), rtol=0, atol=0)


def test_presets_are_sizes():
    for preset in PRESETS.values():
        assert SANEConfig(token_size=8, max_positions=(1, 1, 1), **preset).width == preset["width"]


def test_docstring_example_runs():
    result = doctest.testmod(sys.modules[sane.__name__])
    assert result.attempted > 0 and result.failed == 0


# --- bad input


def test_config_is_checked():
    with pytest.raises(ValueError, match="SANE: width must be even and a multiple of heads=3, got 16"):
        SANEConfig(token_size=9, window=6, max_positions=(1, 1, 1), width=16, heads=3)
    with pytest.raises(ValueError, match=r"SANE: max_positions must be positive, got \(5, 0, 1\)"):
        SANEConfig(token_size=9, window=6, max_positions=(5, 0, 1))


def test_foreign_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"SANE: state must have the names of a SANE, got \['fc.weight'\]"):
        SANE.from_state({"fc.weight": torch.zeros(2, 2)}, heads=1)
