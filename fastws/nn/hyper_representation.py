"""Hyper-representations: autoencoders of whole small networks (Schürholt et al., arXiv 2110.15288, 2209.14733).

A perceptron over the flat vector, or a transformer over tokens of weights or of neurons, maps a network to one code and
the code back to a network. Names of submodules are those of the published models, so that their checkpoints load.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastws.layout.layout import Layout
from fastws.nn.hyper_representation_published import published_fields, rename
from fastws.nn.perceptron import ACTIVATIONS, Hidden, VectorDecoder, VectorEncoder, linear_widths
from fastws.nn.weight_tokens import (
    AttentionEmbedder,
    Encoding,
    NeuronDebedder,
    NeuronEmbedder,
    Rows,
    WeightDebedder,
    WeightEmbedder,
)
from fastws.table import table_rows

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class HyperRepresentationConfig:
    """The size and the kind of an autoencoder of networks."""

    size: int  # weights of a network, P
    layers: tuple[Rows, ...]  # where their rows lie; see ``rows_of``
    latent: int  # entries of the code
    encoding: Encoding = "neuron"  # what a token is; "vector": none, a perceptron over all weights
    bounded: bool = True  # the code passes a tanh
    dropout: float = 0.1

    # of the perceptron over the vector
    hidden: tuple[int, ...] = (512,)  # widths of the encoder's hidden layers; the decoder has them in reverse
    activation: str = "leakyrelu"
    layer_norm: bool = False  # before each activation
    residual_blocks: int = 0  # at the width of the input
    residual_depth: int = 0  # linear layers of each

    # of the transformer over tokens
    width: int = 256  # of a token
    heads: int = 4  # of the attention
    depth: int = 2  # blocks, in the encoder and again in the decoder
    feed_forward: int = 512  # width of the hidden layer of each block
    normalize: bool = True  # norms before attention and feed-forward layer
    compression: Literal["token", "average", "linear"] = "token"  # what of the tokens becomes the code
    decompression: Literal["linear", "repeat"] = "linear"  # a token of its own for each place, or one for all
    bottleneck_depth: int = 0  # hidden layers between tokens and code; 0: one linear layer
    decoder_bias: bool = False  # what is added to each code, learned
    debedder_depth: int = 1  # layers from a token to its weights
    embedder: Literal["linear", "attn"] = "linear"  # how a neuron becomes a token
    embedder_width: int = 32  # of the attention embedder
    embedder_heads: int = 4

    # of the head whose output is contrasted; its absence is hidden layers of 0
    head_depth: int = 3  # hidden layers
    head_width: int = 50
    projection: int = 20  # outputs
    head_norm: bool = True  # batch norm in the hidden layers; the output always has one

    def __post_init__(self):
        for name in ("size", "latent", "width", "heads", "depth", "feed_forward", "debedder_depth", "projection"):
            if getattr(self, name) < 1:
                raise ValueError(f"HyperRepresentation: {name} must be positive, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"HyperRepresentation: width must be a multiple of heads={self.heads}, got {self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"HyperRepresentation: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        if self.encoding == "neuron_in_out" and self.embedder == "attn":
            raise ValueError('HyperRepresentation: embedder must be "linear" for neuron_in_out, got "attn"')

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return asdict(self) | {"layers": [list(rows) for rows in self.layers], "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        layers = tuple(Rows(*rows) for rows in fields["layers"])
        return cls(**{**fields, "layers": layers, "hidden": tuple(fields["hidden"])})

    @property
    def num_tokens(self) -> int:
        """Tokens of a network, without that of the compression."""
        return self.size if self.encoding == "weight" else sum(layer.rows for layer in self.layers)


def rows_of(layout: Layout) -> tuple[Rows, ...]:
    """The rows of the layers of an architecture, for ``HyperRepresentationConfig.layers``."""
    return tuple(Rows(x.weight_offset, x.bias_offset, x.rows, x.row_length) for x in table_rows(layout.table))


class Norm(nn.Module):
    """``alpha * (x - mean) / (std + 1e-6) + bias`` with the unbiased std, which is not LayerNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, -1, keepdim=True)
        return torch.addcmul(self.bias, self.alpha * (x - mean), 1 / (std + EPSILON))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_linear, self.v_linear, self.k_linear, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_linear, self.k_linear, self.v_linear)
        )
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.linear_1, self.dropout = nn.Linear(width, hidden), nn.Dropout(dropout)
        self.linear_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.dropout(F.relu(self.linear_1(x))))


class Block(nn.Module):
    def __init__(self, config: HyperRepresentationConfig):
        super().__init__()
        self.norm_1, self.norm_2 = (Norm(config.width) if config.normalize else nn.Identity() for _ in range(2))
        self.attn = Attention(config.width, config.heads, config.dropout)
        self.ff = FeedForward(config.width, config.feed_forward, config.dropout)
        self.dropout_1, self.dropout_2 = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout_1(self.attn(self.norm_1(x)))
        return x + self.dropout_2(self.ff(self.norm_2(x)))


class TokenEncoder(nn.Module):
    def __init__(self, config: HyperRepresentationConfig):
        super().__init__()
        self.compression = config.compression
        tokens = config.num_tokens + (config.compression == "token")
        self.token_embeddings = make_embedder(config)
        if config.compression == "token":
            self.comp_token = nn.Parameter(torch.randn(1, 1, config.width))
        self.position_embeddings = nn.Embedding(tokens, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        inputs = config.width * (tokens if config.compression == "linear" else 1)
        if config.bottleneck_depth:
            widths = linear_widths(inputs, config.latent, config.bottleneck_depth)
            self.vec2neck = VectorEncoder(widths, Hidden("leakyrelu", config.dropout), bounded=True)
        else:
            bound = [nn.Tanh()] if config.bounded else []
            self.vec2neck = nn.Sequential(nn.Linear(inputs, config.latent), *bound)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_embeddings(x)
        if self.compression == "token":
            x = torch.cat([self.comp_token.expand(len(x), 1, -1).to(x.dtype), x], 1)
        x = x + self.position_embeddings.weight
        for layer in self.layers:
            x = layer(x)
        if self.compression == "token":
            return self.vec2neck(x[:, 0])
        return self.vec2neck(x.mean(1) if self.compression == "average" else x.flatten(1))


class TokenDecoder(nn.Module):
    def __init__(self, config: HyperRepresentationConfig):
        super().__init__()
        self.tokens = config.num_tokens
        self.position_embeddings = nn.Embedding(self.tokens, config.width)
        outputs = config.width * (1 if config.decompression == "repeat" else self.tokens)
        if config.bottleneck_depth:
            widths = linear_widths(outputs, config.latent, config.bottleneck_depth)[::-1]
            self.nec2vec = VectorDecoder(widths, Hidden("leakyrelu", config.dropout))
        else:
            self.nec2vec = nn.Linear(config.latent, outputs)
        self.decoder_bias = nn.Parameter(torch.randn(config.latent) / 1000) if config.decoder_bias else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.token_debeddings = make_debedder(config)

    def forward(self, z: Tensor) -> Tensor:
        z = z if self.decoder_bias is None else z + self.decoder_bias
        y = self.nec2vec(z).unflatten(1, (-1, self.position_embeddings.embedding_dim))  # [B, N or 1, D]
        y = y + self.position_embeddings.weight
        for layer in self.layers:
            y = layer(y)
        return self.token_debeddings(y)


def make_embedder(config: HyperRepresentationConfig) -> nn.Module:
    if config.encoding == "weight":
        return WeightEmbedder(config.width)
    if config.embedder == "attn":
        inner = config.embedder_width, config.embedder_heads, config.dropout
        return AttentionEmbedder(config.layers, config.width, *inner)
    return NeuronEmbedder(config.layers, config.width, config.encoding == "neuron_in_out")


def make_debedder(config: HyperRepresentationConfig) -> nn.Module:
    if config.encoding == "weight":
        return WeightDebedder(config.width)
    outgoing, depth = config.encoding == "neuron_in_out", config.debedder_depth
    return NeuronDebedder(config.layers, config.width, config.size, outgoing, depth, config.dropout)


class ProjectionHead(nn.Module):
    """Maps codes to what is contrasted: hidden layers with ReLU, and a batch norm at the end."""

    def __init__(self, config: HyperRepresentationConfig):
        super().__init__()
        widths = [config.latent, *[config.head_width] * config.head_depth]
        self.layers = nn.ModuleList()
        for inputs, outputs in pairwise(widths):
            self.layers.append(nn.Linear(inputs, outputs))
            self.layers.extend([nn.BatchNorm1d(outputs)] if config.head_norm else [])
            self.layers.append(nn.ReLU())
        self.layers.extend([nn.Linear(widths[-1], config.projection), nn.BatchNorm1d(config.projection)])
        for module in self.layers:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.constant_(module.bias, 0.01)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z)
        return z


class HyperRepresentation(nn.Module):
    """An autoencoder of networks: flat vectors to one code each, and back.

    Weights may be put on one scale before and after: ``encode`` sees ``(flat - shift) / scale``, and ``decode`` undoes
    it. Both are buffers, 0 and 1 unless a trainer sets them.

    Example:
        >>> layers = (Rows(0, 12, 4, 3), Rows(16, 24, 2, 4))  # a perceptron of 3, 4 and 2 units
        >>> model = HyperRepresentation(HyperRepresentationConfig(size=26, layers=layers, latent=5))
        >>> z, prediction, projection = model(torch.randn(7, 26))
        >>> z.shape, prediction.shape, projection.shape
        (torch.Size([7, 5]), torch.Size([7, 26]), torch.Size([7, 20]))
    """

    def __init__(self, config: HyperRepresentationConfig):
        super().__init__()
        self.config = config
        if config.encoding == "vector":
            widths = [config.size, *config.hidden, config.latent]
            hidden = Hidden(config.activation, config.dropout, config.layer_norm)
            residual = config.residual_blocks, config.residual_depth
            self.encoder = VectorEncoder(widths, hidden, config.bounded, *residual)
            self.decoder = VectorDecoder(widths[::-1], hidden, *residual)
        else:
            self.encoder, self.decoder = TokenEncoder(config), TokenDecoder(config)
        self.projection_head = ProjectionHead(config) if config.head_depth else None
        self.register_buffer("shift", torch.zeros(config.size))
        self.register_buffer("scale", torch.ones(config.size))

    def encode(self, flat: Tensor) -> Tensor:
        """Codes ``[B, E]`` of networks ``[B, P]``."""
        return self.encoder((flat - self.shift) / self.scale)

    def decode(self, z: Tensor) -> Tensor:
        """Networks ``[B, P]`` of codes ``[B, E]``."""
        return self.decoder(z) * self.scale + self.shift

    def forward(self, flat: Tensor, noise: Tensor | None = None, views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[B, E]``, reconstructions ``[B, P]`` and projections of networks ``[B, P]``.

        Args:
            flat: Networks, ``[B, P]``.
            noise: Added to the code before it is decoded, ``[B, E]``, in units of the standard deviation that each
                entry of the code has over the batch.
            views: Equal parts of the batch, one behind the other, of which each has its own batch norm in the
                projection, as in the published code.
        """
        z = self.encode(flat)
        seen = z if noise is None else z + noise * z.detach().std(0, correction=0)
        projection = z
        if self.projection_head is not None:
            projection = torch.cat([self.projection_head(part) for part in z.chunk(views)])
        return z, self.decode(seen), projection

    @classmethod
    def from_published(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """A model with the sizes of a published configuration and the weights of its state dict.

        Args:
            config: What the published code calls ``config``: keys such as ``model::latent_dim``, with the table
                ``model::index_dict`` of the layers' offsets, which is taken as it is, also where it is wrong.
            state: The state dict of the autoencoder, with or without ``projection_head.`` names. The head of a file
                that has none is drawn at random.

        Raises:
            ValueError: If the state does not fit the configuration.
        """
        model = cls(HyperRepresentationConfig(**published_fields(config, state)))
        state = {rename(name): value for name, value in state.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith(("projection_head.", "shift", "scale"))]
        if missing or unexpected:
            what = f"without {missing[:3]}" if missing else f"with {unexpected[:3]}"
            raise ValueError(f"HyperRepresentation: state must fit the configuration, got one {what}")
        return model.eval()
