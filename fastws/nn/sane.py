"""SANE, the sequential autoencoder of network weights (Schürholt, Mahoney and Borth, ICML 2024, arXiv 2406.09997).

Names of submodules are those of the published model, so that its checkpoints load.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastws.files.checkpoints import load_plain
from fastws.ops.attention import attention

WRAPPERS = re.compile(r"^((_orig_mod|module|model)\.)+")  # what compile, DDP and a trainer put before a name
Positions = Literal["learned", "sinusoidal", "summed"]  # summed: sines of all axes in the same entries, as published


@dataclass(frozen=True, kw_only=True)
class SANEConfig:
    """The size of a SANE."""

    token_size: int  # entries per token
    window: int  # tokens per training window; the projection head is made for it
    max_positions: tuple[int, int, int] = (1, 1, 1)  # tokens, layers and output units in tables; 1 without tables
    positions: Positions = "learned"  # tables of them, or sines, which know no largest network
    relative: bool = False  # positions are parts of the network, of 1024, whatever its size
    layer_types: int = 0  # kinds of layers that have an embedding; 0: positions do not say the kind
    dropout: float = 0.0  # probability of dropping what enters a transformer or leaves a branch
    width: int = 1024  # of the transformers; a multiple of heads, even
    heads: int = 8  # of the attention
    depth: int = 8  # blocks, in the encoder and again in the decoder
    latent: int = 128  # entries per token embedding
    projection: int = 30  # outputs of the projection head

    def __post_init__(self):
        for name in ("token_size", "window", "width", "heads", "depth", "latent", "projection", "max_positions"):
            value = getattr(self, name)
            if min(value if name == "max_positions" else [value]) < 1:
                raise ValueError(f"SANE: {name} must be positive, got {value}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"SANE: positions must be one of {get_args(Positions)}, got {self.positions!r}")
        if not 0 <= self.dropout < 1 or self.layer_types < 0:
            got = f"{self.dropout} and {self.layer_types}"
            raise ValueError(f"SANE: dropout must be in [0, 1) and layer_types from 0, got {got}")
        if self.positions != "learned" and self.width < 6:
            raise ValueError(f"SANE: width must be at least 6 for sines of three axes, got {self.width}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"SANE: width must be even and a multiple of heads={self.heads}, got {self.width}")

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], heads: int) -> Self:
        """Reads the sizes from the state dict of a published model; the number of heads is not in it."""
        latent, width = state["encoder_comp.weight"].shape
        projection, head_inputs = state["projection_head.head.0.weight"].shape
        return cls(
            token_size=state["tokenizer.weight"].shape[1],
            window=head_inputs // latent,
            max_positions=tuple(state[f"pe.pe{axis}.weight"].shape[0] for axis in (1, 2, 3)),
            width=width,
            heads=heads,
            depth=sum(name.startswith("transformer_encoder.") and name.endswith("ln_1.weight") for name in state),
            latent=latent,
            projection=projection,
        )


SINES = {"positions": "sinusoidal"}
PRESETS = {  # name: what of SANEConfig the architecture of a zoo does not decide
    "tiny": {"width": 64, "heads": 4, "depth": 2, "latent": 16, "window": 16},  # seconds on a CPU: tests, first steps
    "small": {"width": 256, "heads": 8, "depth": 4, "latent": 64, "window": 32},  # minutes to hours on a CPU
    "cnn": {"width": 1024, "heads": 8, "depth": 8, "latent": 128, "window": 64},  # published, CNN zoos
    "resnet18": {"width": 2048, "heads": 16, "depth": 8, "latent": 128, "window": 256},  # published, ResNet-18 zoos
    # of the follow-ups: zoos of several architectures (arXiv 2504.10141), and WeightCLIP, whose sines we keep apart
    "multizoo": {"width": 2048, "heads": 16, "depth": 8, "latent": 128, "window": 256},
    "weightclip": {"width": 1600, "heads": 20, "depth": 12, "latent": 192, "window": 512, "dropout": 0.05} | SINES,
    "weightclip-cnn": {"width": 1024, "heads": 16, "depth": 16, "latent": 128, "window": 118, "dropout": 0.1} | SINES,
}
PUBLISHED = {  # the two complete published configurations
    "cnn": SANEConfig(token_size=289, max_positions=(100, 10, 40), **PRESETS["cnn"]),
    "resnet18": SANEConfig(token_size=288, max_positions=(55_000, 100, 550), **PRESETS["resnet18"]),
}


class SelfAttention(nn.Module):
    """Attention of all tokens of a window to all, padding included; one matrix for query, key and value."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attention(self.c_attn(x), self.heads))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm transformer block as in GPT-2, without biases."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of blocks; no norm at its end."""

    def __init__(self, width: int, heads: int, depth: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.transformer = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = self.dropout(x.reshape(-1, *shape[-2:]))  # the fast attention kernels know one batch axis
        for block in self.transformer:
            x = block(x)
        return x.view(shape)


class PositionEmbedding(nn.Module):
    """``concat(token[n] + layer[l], unit[c])``, three learned tables of half the width."""

    def __init__(self, max_positions: tuple[int, int, int], width: int):
        super().__init__()
        self.pe1, self.pe2, self.pe3 = (nn.Embedding(count, width // 2) for count in max_positions)

    def forward(self, positions: Tensor) -> Tensor:
        token, layer, unit = positions.unbind(-1)
        return torch.cat([self.pe1(token) + self.pe2(layer), self.pe3(unit)], -1)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of token, layer and unit: entries of their own for each, or of all three in the same."""

    def __init__(self, width: int, summed: bool):
        super().__init__()
        self.width, self.summed = width, summed
        # where axes shared their entries, positions that differ by an exchange of axes would be the same
        parts = [width // 6] * 2 if not summed else []
        self.pairs = [width // 2 - sum(parts), *parts] if not summed else [width // 2] * 3

    def forward(self, positions: Tensor) -> Tensor:
        waves = []
        for axis, pairs in zip(positions.unbind(-1), self.pairs, strict=True):
            rate = 10_000 ** (-torch.arange(pairs, device=axis.device, dtype=torch.float32) / pairs)
            angle = axis[..., None] * rate
            waves.append(torch.stack([angle.sin(), angle.cos()], -1).flatten(-2))
        return sum(waves) if self.summed else torch.cat(waves, -1)


class ProjectionHead(nn.Module):
    """Maps the embeddings of a whole window to one vector, for the contrastive loss."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(inputs, outputs, bias=False),
            nn.LayerNorm(outputs),
            nn.ReLU(),
            nn.Linear(outputs, outputs, bias=False),
            nn.LayerNorm(outputs),
            nn.ReLU(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.head(z.flatten(-2))


class SANE(nn.Module):
    """An autoencoder of windows of tokens: token values and positions to one embedding per token, and back.

    Encoder: linear, plus position, transformer, linear. Decoder: the same with its own weights, plus the same
    position. There is no attention mask. Values may have any leading axes; positions have those axes or only the last
    of them, down to ``[W, 3]``, and are then shared: views of one window pass their positions once. With
    ``layer_types`` positions have a fourth number, the kind of layer.

    Example:
        >>> config = SANEConfig(token_size=9, max_positions=(48, 3, 16), **PRESETS["tiny"])
        >>> values, positions = torch.randn(2, 5, 16, 9), torch.zeros(5, 16, 3, dtype=torch.int32)
        >>> z, prediction, projection = SANE(config)(values, positions)
        >>> z.shape, prediction.shape, projection.shape
        (torch.Size([2, 5, 16, 16]), torch.Size([2, 5, 16, 9]), torch.Size([2, 5, 30]))
    """

    def __init__(self, config: SANEConfig):
        super().__init__()
        self.config = config
        width, latent = config.width, config.latent
        self.tokenizer = nn.Linear(config.token_size, width)
        self.transformer_encoder = Transformer(width, config.heads, config.depth, config.dropout)
        self.encoder_comp = nn.Linear(width, latent)
        self.decoder_comp = nn.Linear(latent, width)
        self.transformer_decoder = Transformer(width, config.heads, config.depth, config.dropout)
        self.detokenizer = nn.Linear(width, config.token_size)
        if config.positions == "learned":
            self.pe = PositionEmbedding(config.max_positions, width)
        else:
            self.pe = SinusoidalPositions(width, config.positions == "summed")
        self.layer_type = nn.Embedding(config.layer_types, width) if config.layer_types else None
        self.projection_head = ProjectionHead(config.window * latent, config.projection)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws matrices and tables from N(0, 0.02**2), the output matrices of residual branches smaller by depth."""
        residual_std = 0.02 / sqrt(2 * self.config.depth)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, residual_std if name.endswith("c_proj.weight") else 0.02)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)

    def encode(self, values: Tensor, positions: Tensor) -> Tensor:
        """Embeds tokens: values ``[.., W, T]`` and positions ``[.., W, 3]`` integer to ``[.., W, E]``, any W."""
        return self._encode(values, self._embed(positions))

    def decode(self, z: Tensor, positions: Tensor) -> Tensor:
        """Predicts tokens: embeddings ``[.., W, E]`` and positions ``[.., W, 3]`` to values ``[.., W, T]``."""
        return self._decode(z, self._embed(positions))

    def forward(self, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns embeddings ``[.., W, E]``, predictions ``[.., W, T]`` and projections ``[.., 30]`` of windows."""
        position = self._embed(positions)
        z = self._encode(values, position)
        return z, self._decode(z, position), self.projection_head(z)

    def _embed(self, positions: Tensor) -> Tensor:
        position = self.pe(positions[..., :3])
        return position if self.layer_type is None else position + self.layer_type(positions[..., 3])

    def _encode(self, values: Tensor, position: Tensor) -> Tensor:
        return self.encoder_comp(self.transformer_encoder(self.tokenizer(values) + position))

    def _decode(self, z: Tensor, position: Tensor) -> Tensor:
        return self.detokenizer(self.transformer_decoder(self.decoder_comp(z) + position))

    @classmethod
    def from_published(cls, path: str | Path, heads: int) -> Self:
        """Loads a checkpoint of the published trainer, compiled or not.

        Args:
            path: The ``state.pt`` of a run, or a file with the model's state dict alone.
            heads: Attention heads, the only size that cannot be read from the file.
        """
        content = load_plain(path)
        state = content.get("model", content) if isinstance(content, dict) else {}
        return cls.from_state(state, heads)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], heads: int) -> Self:
        """A model with the sizes and the weights of a state dict, with or without the prefixes of wrappers."""
        state = {WRAPPERS.sub("", name): value for name, value in state.items()}
        if "encoder_comp.weight" not in state:
            raise ValueError(f"SANE: state must have the names of a SANE, got {list(state)[:3]}")
        with torch.device("meta"):
            model = cls(SANEConfig.of_state(state, heads))
        model.to_empty(device="cpu").load_state_dict(state)
        return model
