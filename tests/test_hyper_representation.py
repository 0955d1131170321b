import doctest
from itertools import pairwise

import pytest
import torch
from torch import nn

import fastws
from fastws.nn import hyper_representation
from fastws.nn.hyper_representation import HyperRepresentation, HyperRepresentationConfig, rows_of
from fastws.nn.weight_tokens import NeuronDebedder, NeuronEmbedder, Rows, token_entries
from fastws.zoo.making.architectures import build

CNN = tuple(  # a CNN-s on images of one channel: first weight, first bias, rows, weights of a row
    Rows(*row)
    for row in [(0, 200, 8, 25), (208, 1408, 6, 200), (1414, 1510, 4, 24), (1514, 2234, 20, 36), (2254, 2454, 10, 20)]
)
SMALL = (Rows(0, 12, 4, 3), Rows(16, 24, 2, 4))  # a perceptron of 3, 4 and 2 units


def small(**options):
    torch.manual_seed(0)
    sizes = {"size": 26, "layers": SMALL, "latent": 5, "width": 16, "heads": 2, "feed_forward": 24, "dropout": 0.0}
    return HyperRepresentation(HyperRepresentationConfig(**sizes | {"projection": 3} | options)).eval()


def embed_by_loops(module, layers, x, outgoing):
    """Row by row: the weights, the bias, then for every row of the next layer the block that reads this row."""
    tokens = []
    for number, (layer, linear) in enumerate(zip(layers, module.layer_lst, strict=True)):
        weight, bias, rows, length = layer
        for row in range(rows):
            parts = [x[:, weight + row * length : weight + (row + 1) * length], x[:, bias + row : bias + row + 1]]
            if outgoing and number + 1 < len(layers):
                after = layers[number + 1]
                matrix = x[:, after.weight_offset :][:, : after.rows * after.row_length].unflatten(1, (after.rows, -1))
                block = after.row_length // rows
                parts.append(matrix[:, :, row * block : (row + 1) * block].flatten(1))
            tokens.append(linear(torch.cat(parts, 1)))
    return torch.stack(tokens, 1)


def attend(module, x):
    """Softmax attention of every head, written out."""
    query, key, value = (
        f(x).unflatten(-1, (module.heads, -1)) for f in (module.q_linear, module.k_linear, module.v_linear)
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return module.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(-2))


def norm(module, x):
    return module.alpha * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + module.bias


def run_blocks(blocks, x):
    for block in blocks:
        x = x + attend(block.attn, norm(block.norm_1, x))
        hidden = block.ff.linear_1(norm(block.norm_2, x)).clamp(min=0)
        x = x + block.ff.linear_2(hidden)
    return x


def test_rows_are_those_of_the_layout():
    layout = fastws.Layout.from_checkpoint(build("cnn-s", (1, 28, 28)))
    assert rows_of(layout) == CNN and layout.num_weights == 2464


@pytest.mark.parametrize("outgoing", [False, True])
def test_neurons_are_embedded_row_by_row(outgoing):
    embedder = NeuronEmbedder(CNN, 8, outgoing).double()
    x = torch.randn(3, 2464, dtype=torch.float64)
    torch.testing.assert_close(embedder(x), embed_by_loops(embedder, CNN, x, outgoing), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outgoing", [False, True])
def test_tokens_become_weights_in_their_places(outgoing):
    """A weight in two tokens gets the average of both, as a sum of all tokens' values divided by their number."""
    debedder = NeuronDebedder(CNN, 8, 2464, outgoing, 1, 0.0).double()
    x = torch.randn(3, 48, 8, dtype=torch.float64)
    total, count, token = torch.zeros(3, 2464, dtype=torch.float64), torch.zeros(2464), 0
    for rows, linear in zip(token_entries(CNN, outgoing), debedder.layer_lst, strict=True):
        for entries in rows:
            total[:, entries] += linear(x[:, token])
            count[entries] += 1
            token += 1
    assert count.min() == 1 and count.max() == 1 + outgoing
    torch.testing.assert_close(debedder(x), total / count, rtol=1e-12, atol=1e-12)


def test_layers_that_overlap_are_written_in_order():
    """The published table of one architecture lets layers overlap and leaves a gap, which is decoded as 0."""
    layers = (Rows(0, 4, 2, 2), Rows(5, 7, 1, 2))
    debedder = NeuronDebedder(layers, 8, 10, False, 1, 0.0)
    x = torch.randn(1, 3, 8)
    first, second, third = (debedder.layer_lst[layer](x[0, token]) for token, layer in enumerate((0, 0, 1)))
    expected = torch.cat([first[:2], second[:2], first[2:], third, torch.zeros(2)])
    torch.testing.assert_close(debedder(x)[0], expected)


@pytest.mark.parametrize("compression", ["token", "average", "linear"])
@pytest.mark.parametrize("decompression", ["linear", "repeat"])
@pytest.mark.parametrize("bounded", [False, True])
def test_transformer_is_what_the_paper_describes(compression, decompression, bounded):
    model = small(compression=compression, decompression=decompression, bounded=bounded, decoder_bias=True).double()
    x = torch.randn(6, 26, dtype=torch.float64)
    encoder, decoder = model.encoder, model.decoder
    tokens = encoder.token_embeddings(x)
    if compression == "token":
        tokens = torch.cat([encoder.comp_token.expand(6, 1, 16), tokens], 1)
    tokens = run_blocks(encoder.layers, tokens + encoder.position_embeddings.weight)
    code = {"token": tokens[:, 0], "average": tokens.mean(1), "linear": tokens.flatten(1)}[compression]
    z = encoder.vec2neck[0](code)
    z = z.tanh() if bounded else z
    y = decoder.nec2vec(z + decoder.decoder_bias)
    y = y[:, None].expand(6, 6, 16) if decompression == "repeat" else y.view(6, 6, 16)
    y = decoder.token_debeddings(run_blocks(decoder.layers, y + decoder.position_embeddings.weight))
    found = model(x)
    torch.testing.assert_close(found[0], z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.decode(model.encode(x)), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "vector"},
        {"encoding": "vector", "hidden": (20, 10), "layer_norm": True, "activation": "gelu", "bounded": False},
        {"encoding": "vector", "residual_blocks": 2, "residual_depth": 3},
        {"encoding": "weight"},
        {"encoding": "neuron_in_out"},
        {"bottleneck_depth": 2},
        {"debedder_depth": 3},
        {"embedder": "attn", "embedder_width": 8, "embedder_heads": 2},
        {"head_depth": 0},
    ],
    ids=str,
)
def test_every_kind_trains(options):
    """A few steps on two networks bring the error down, and every parameter has a gradient."""
    model = small(**options).train()
    x = torch.randn(2, 26)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    for _ in range(30):
        z, y, projection = model(x)
        error = (y - x).square().mean()
        optimizer.zero_grad()
        (error + 1e-3 * projection.square().mean() + 1e-3 * z.square().mean()).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0]
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_one_network_is_embedded_as_among_others():
    """Also by attention over its own weights, which the published embedder takes from other networks of the batch."""
    for options in ({"encoding": "weight"}, {"embedder": "attn", "embedder_width": 8}, {"encoding": "vector"}):
        model, x = small(**options), torch.randn(4, 26)
        assert model.decode(model.encode(x[:1])).shape == (1, 26)
        torch.testing.assert_close(model.encode(x[:1]), model.encode(x)[:1], rtol=1e-5, atol=1e-6)


def test_scale_is_undone():
    model, x = small(encoding="vector"), torch.randn(3, 26)
    before = model(x)[:2]
    model.shift.fill_(2.0), model.scale.fill_(3.0)
    z, y, _ = model(3 * x + 2)
    torch.testing.assert_close(z, before[0])
    torch.testing.assert_close(y, 3 * before[1] + 2)


def test_noise_of_the_code_has_the_scale_of_the_code():
    model, x = small(encoding="vector", bounded=False), torch.randn(9, 26)
    z = model.encode(x)
    noise = torch.randn_like(z)
    torch.testing.assert_close(model(x, noise)[1], model.decode(z + noise * z.std(0, correction=0)))


def published_names(model):
    """The state dict as the published code has it: no scale, and nothing that is computed from the table."""
    return {name: value for name, value in model.state_dict().items() if name not in ("shift", "scale")}


@pytest.mark.parametrize("token", [True, False])
def test_published_configuration_loads(token):
    table = {"idx_start": [0, 16], "kernel_no": [4, 2], "kernel_size": [1, 1], "channels_in": [3, 4]}
    config = {
        "model::type": "transformer", "model::encoding": "neuron", "model::index_dict": table, "model::i_dim": 26,
        "model::N_attention_blocks": 2, "model::dim_attention_embedding": 16, "model::N_attention_heads": 2,
        "model::attention_hidden_dim": 24, "model::latent_dim": 5, "model::dropout": 0.1, "model::normalize": True,
        "model::projection_head_layers": 3, "model::projection_head_hdim": 50, "model::projection_head_odim": 3,
    }  # fmt: skip
    model = small(compression="token" if token else "linear", depth=2)
    loaded = HyperRepresentation.from_published(config, published_names(model))
    x = torch.randn(3, 26)
    for expected, found in zip(model(x), loaded(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    headless = {name: x for name, x in published_names(model).items() if not name.startswith("projection_head")}
    assert torch.equal(HyperRepresentation.from_published(config, headless)(x)[1], model(x)[1])
    with pytest.raises(ValueError, match=r"state must fit the configuration, got one without \['encoder.layers.2"):
        HyperRepresentation.from_published(config | {"model::N_attention_blocks": 3}, published_names(model))


def test_published_perceptron_has_widths_of_equal_steps():
    config = {"model::type": "vanilla", "model::i_dim": 100, "model::h_layers": 3, "model::latent_dim": 10}
    state = published_names(
        HyperRepresentation(
            HyperRepresentationConfig(
                size=100, layers=SMALL, latent=10, encoding="vector", hidden=(77, 55, 32), dropout=0.2, head_depth=0
            )
        )
    )
    model = HyperRepresentation.from_published(config | {"model::dropout": 0.2}, state)
    linears = [module for module in model.encoder.encoder if isinstance(module, nn.Linear)]
    assert [linear.out_features for linear in linears] == [77, 55, 32, 10]
    assert isinstance(model.encoder.encoder[-1], nn.Tanh) and not isinstance(model.decoder.decoder[-1], nn.Tanh)
    assert all(a.out_features == b.in_features for a, b in pairwise(linears))


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match="width must be a multiple of heads=3, got 16"):
        small(heads=3)
    with pytest.raises(ValueError, match="rows of layer 1 must be a multiple of the 4 units of layer 0"):
        small(layers=(Rows(0, 12, 4, 3), Rows(16, 22, 2, 3)), encoding="neuron_in_out")
    with pytest.raises(ValueError, match="activation must be one of elu, celu"):
        small(activation="swish")
    with pytest.raises(ValueError, match="width must be a multiple of embedder_width=12"):
        small(embedder="attn", embedder_width=12)


def test_example_runs():
    result = doctest.testmod(hyper_representation)
    assert result.attempted > 0 and result.failed == 0
