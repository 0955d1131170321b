"""Small networks, each of which has some lines of the whole group."""

import math

import torch
import torch.nn.functional as F
from torch import nn

TOKENS = (torch.arange(10) * 7 % 20).view(1, -1)


def mlp(activation=nn.ReLU, width=8):
    return nn.Sequential(
        nn.Linear(4, width), activation(), nn.Linear(width, width + 2), activation(), nn.Linear(width + 2, 3)
    )


class Gated(nn.Module):
    """A gated unit; ``clamped`` as in gpt-oss, whose linear branch is clamped and has 1 added."""

    def __init__(self, activation=F.silu, clamped=False, width=6):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(width, 3)
        self.activation, self.clamped = activation, clamped

    def forward(self, x):
        up = self.up(x)
        return self.down(self.activation(self.gate(x)) * (up.clamp(-1, 1) + 1 if self.clamped else up))


def rotate(x, layout):
    """Rotary position codes; pairs (2f, 2f + 1) or (f, f + d / 2)."""
    length, width = x.shape[-2:]
    angles = torch.arange(length)[:, None] * 3.0 * 100.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = angles.cos(), angles.sin()
    if layout == "halves":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Causal attention; queries share keys and values if there are fewer of these."""

    def __init__(self, width=16, heads=4, shared=None, rotary=None, bias=True):
        super().__init__()
        self.heads, self.kept, self.size, self.rotary = heads, shared or heads, width // heads, rotary
        self.q, self.o = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
        self.k, self.v = (nn.Linear(width, self.kept * self.size, bias=bias) for _ in "kv")

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k, v = (f(x).view(batch, length, self.kept, self.size).transpose(1, 2) for f in (self.k, self.v))
        if self.rotary:
            q, k = rotate(q, self.rotary), rotate(k, self.rotary)
        k, v = (y.repeat_interleave(self.heads // self.kept, 1) for y in (k, v))
        later = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        shares = (q @ k.mT / math.sqrt(self.size)).masked_fill(later, -torch.inf).softmax(-1)
        return self.o((shares @ v).transpose(1, 2).reshape(batch, length, -1))


class GPTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Pre-LayerNorm, learned positions."""

    def __init__(self, width=16, heads=4, layers=2, tokens=20, tied=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(10, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class LlamaBlock(nn.Module):
    def __init__(self, width, heads, shared, rotary):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, shared, rotary, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width // 2, bias=False) for _ in "gu")
        self.down = nn.Linear(3 * width // 2, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Pre-RMSNorm, rotary codes, gated units, queries that share keys."""

    def __init__(self, width=16, heads=4, shared=2, layers=1, tokens=20, rotary="halves", tied=False):
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, shared, rotary) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, tokens, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.tokens(tokens))))


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        projected = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(*projected if inputs != outputs else ())

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def resnet8(width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


class ResNeXt(nn.Module):
    """A grouped convolution between two others."""

    def __init__(self, groups=3, inputs=2, outputs=4, activation=F.gelu):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, groups * inputs, 1), nn.Conv2d(groups * outputs, 5, 1)
        self.grouped = nn.Conv2d(groups * inputs, groups * outputs, 3, 1, 1, groups=groups)
        self.activation = activation

    def forward(self, x):
        return self.last(self.activation(self.grouped(self.activation(self.first(x))))).mean((2, 3))


class Experts(nn.Module):
    """A mixture of experts, stacked, gated or else with ReLU."""

    def __init__(self, experts=3, width=4, units=5, gated=True):
        super().__init__()
        self.router, self.head = nn.Linear(width, experts), nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(experts, width, (1 + gated) * units))
        self.down = nn.Parameter(torch.randn(experts, units, width))
        self.gated = gated

    def forward(self, x):
        up = torch.einsum("td,edi->eti", x, self.up)
        if self.gated:
            gate, up = up.chunk(2, -1)
        units = F.silu(gate) * up if self.gated else F.relu(up)
        return self.head((self.router(x).softmax(-1).T[:, :, None] * (units @ self.down)).sum(0))


class Beside(nn.Module):
    """Two heads that read the entries of a convolution's channels beside five others."""

    def __init__(self):
        super().__init__()
        self.first, self.heads = nn.Conv2d(3, 4, 6), nn.ModuleList(nn.Linear(4 * 9 + 5, n) for n in (3, 4))

    def forward(self, x):
        entries = torch.cat([F.gelu(self.first(x)).flatten(1), x[:, 0, 0, :5]], 1)
        return [head(entries) for head in self.heads]


class Latent(nn.Module):
    """Attention whose keys and values come from a normalised latent."""

    def __init__(self, width=8, latent=4, heads=2, size=3):
        super().__init__()
        self.q, self.down = nn.Linear(width, heads * size, bias=False), nn.Linear(width, latent, bias=False)
        self.k, self.v = (nn.Linear(latent, heads * size, bias=False) for _ in "kv")
        self.norm, self.o = nn.RMSNorm(latent, eps=1e-6), nn.Linear(heads * size, width, bias=False)
        self.heads = heads

    def forward(self, x):
        latent = self.norm(self.down(x))
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(latent), self.v(latent))
        )
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class PostNorm(nn.Module):
    """A residual stream that is normalised after each sum, so that a gain stays in it."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(4, width), nn.Linear(width, 12), nn.Linear(12, width)
        self.norm1, self.norm2, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.norm1(self.first(x))
        return self.head(self.norm2(x + self.down(F.gelu(self.up(x)))))


class Recurrent(nn.Module):
    def __init__(self, projected=0):
        super().__init__()
        self.cell = nn.LSTM(3, 5, proj_size=projected, batch_first=True)
        self.head = nn.Linear(projected or 5, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class GroupNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.last(F.gelu(self.norm(self.first(x)))).mean((2, 3))
