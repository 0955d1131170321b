"""Architectures to trace: each function returns a module and an example input.

Images are small, because groups do not depend on their size.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """act(body(x) + shortcut(x))"""

    def __init__(self, body, shortcut=None, act=None):
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))


def conv_norm(inputs, outputs, kernel=3, stride=1, groups=1, act=True):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if act else []))


# --- the networks of the published zoos


def mlp(widths=(16, 20, 12, 10), bias=True, dropout=0.0, act=nn.Tanh):
    layers = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=bias), act(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2]), torch.randn(2, widths[0])


def zoo_cnn(channels=(1, 8, 6, 4), hidden=20, dropout=0.0):
    a, b, c, d = channels
    drop = [nn.Dropout(dropout)] if dropout else []
    layers = [nn.Conv2d(a, b, 5), nn.MaxPool2d(2), nn.Tanh(), *drop, nn.Conv2d(b, c, 5), nn.MaxPool2d(2), nn.Tanh()]
    layers += [*drop, nn.Conv2d(c, d, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9 * d, hidden), nn.Tanh(), *drop]
    return nn.Sequential(*layers, nn.Linear(hidden, 10)), torch.randn(1, a, 28, 28)


def zoo_cnn_large(dropout=0.5):
    layers = []
    for inputs, outputs in [(3, 16), (16, 32), (32, 15)]:
        layers += [nn.Conv2d(inputs, outputs, 3), nn.MaxPool2d(2), nn.GELU(), nn.Dropout(dropout)]
    head = [nn.Flatten(), nn.Linear(60, 20), nn.GELU(), nn.Dropout(dropout), nn.Linear(20, 10)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 32, 32)


def zoo_res_cnn():
    blocks = []
    for inputs, outputs, kernel in [(1, 8, 5), (8, 6, 5), (6, 4, 2)]:
        body = nn.Sequential(nn.Conv2d(inputs, outputs, kernel), nn.AdaptiveMaxPool2d(4))
        side = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.AdaptiveAvgPool2d(4))
        blocks += [Residual(body, side, nn.Tanh()), nn.Upsample(size=8)]
    head = [nn.Flatten(), nn.Linear(256, 20), nn.Tanh(), nn.Linear(20, 10)]
    return nn.Sequential(*blocks, *head), torch.randn(1, 1, 12, 12)


# --- image classifiers

VGG = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


def vgg(depth=11, width=64):
    layers, inputs = [], 3
    for repeats, factor in zip(VGG[depth], (1, 2, 4, 8, 8), strict=True):
        for _ in range(repeats):
            layers += [*conv_norm(inputs, width * factor)]
            inputs = width * factor
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    hidden = 2 * inputs
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs, hidden), nn.ReLU(), nn.Dropout()]
    head += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 16, 16)


def resnet(blocks=(2, 2, 2, 2), width=64, bottleneck=False, groups=1, excite=False):
    layers, inputs = [conv_norm(3, width)], width
    for stage, repeats in enumerate(blocks):
        inner = width * 2**stage
        outputs = 4 * inner if bottleneck else inner
        for block in range(repeats):
            stride = 2 if stage and not block else 1
            if bottleneck:
                body = [conv_norm(inputs, inner, 1), conv_norm(inner, inner, 3, stride, groups)]
                body.append(conv_norm(inner, outputs, 1, act=False))
            else:
                body = [conv_norm(inputs, inner, 3, stride), conv_norm(inner, outputs, act=False)]
            if excite:
                body.append(Excite(outputs, outputs // 4))
            side = conv_norm(inputs, outputs, 1, stride, act=False) if stride > 1 or inputs != outputs else None
            layers.append(Residual(nn.Sequential(*body), side, nn.ReLU(inplace=True)))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 8, 8)


class Excite(nn.Module):
    """Squeeze and excite: a gate per channel."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class PaddedShortcut(nn.Module):
    """Option A of the ResNet paper: every second pixel, and zeros for the new channels on both sides."""

    def __init__(self, new):
        super().__init__()
        self.side = new // 2

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))


def cifar_resnet(depth=20, option="A", width=16):
    layers, inputs = [conv_norm(3, width)], width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            outputs, stride = width * 2**stage, 2 if stage and not block else 1
            body = nn.Sequential(conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs, act=False))
            side = None
            if stride > 1:
                side = conv_norm(inputs, outputs, 1, 2, act=False)
                side = PaddedShortcut(outputs - inputs) if option == "A" else side
            layers.append(Residual(body, side, nn.ReLU()))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 8, 8)


class Concatenated(nn.Module):
    """cat(x, body(x)): a dense layer; with several bodies, cat of them all."""

    def __init__(self, *bodies):
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x):
        return torch.cat([x, self.bodies[0](x)] if len(self.bodies) == 1 else [body(x) for body in self.bodies], 1)


def densenet(blocks=(2, 3), growth=4, first=8):
    def norm_conv(inputs, outputs, kernel):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv)

    layers, channels = [conv_norm(3, first)], first
    for block, repeats in enumerate(blocks):
        for _ in range(repeats):
            body = nn.Sequential(norm_conv(channels, 4 * growth, 1), norm_conv(4 * growth, growth, 3))
            layers.append(Concatenated(body))
            channels += growth
        if block + 1 < len(blocks):
            layers += [norm_conv(channels, channels // 2, 1), nn.AvgPool2d(2, ceil_mode=True)]
            channels //= 2
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 8, 8)


# expand, channels, repeats
MOBILENET = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]


def mobilenet(divide=4):
    inputs = 32 // divide
    layers = [conv_norm(3, inputs)]
    for expand, channels, repeats in MOBILENET:
        for _ in range(repeats):
            outputs, hidden = channels // divide, inputs * expand
            body = [] if expand == 1 else [conv_norm(inputs, hidden, 1)]
            body += [conv_norm(hidden, hidden, groups=hidden), conv_norm(hidden, outputs, 1, act=False)]
            layers.append(Residual(nn.Sequential(*body)) if inputs == outputs else nn.Sequential(*body))
            inputs = outputs
    last = 1280 // divide
    head = [conv_norm(inputs, last, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(last, 10)]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 8, 8)


def squeezenet(divide=4):
    inputs = 64 // divide
    layers = [nn.Conv2d(3, inputs, 3, padding=1), nn.ReLU()]
    for squeeze, expanded in [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]:
        squeeze, expanded = squeeze // divide, expanded // divide
        layers += [nn.Conv2d(inputs, squeeze, 1), nn.ReLU()]
        sides = nn.Conv2d(squeeze, expanded, 1), nn.Conv2d(squeeze, expanded, 3, padding=1)
        layers += [Concatenated(*sides), nn.ReLU()]
        inputs = 2 * expanded
    head = [nn.Dropout(), nn.Conv2d(inputs, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 8, 8)


class UNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.enter, self.down = self.twice(1, a), self.twice(a, b)
        self.middle = self.twice(b, c)
        self.up, self.up_again = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.merge, self.merge_again = self.twice(2 * b, b), self.twice(2 * a, a)
        self.head = nn.Conv2d(a, 2, 1)

    @staticmethod
    def twice(inputs, outputs):
        return nn.Sequential(conv_norm(inputs, outputs), conv_norm(outputs, outputs))

    def forward(self, x):
        high = self.enter(x)
        low = self.down(F.max_pool2d(high, 2))
        x = self.up(self.middle(F.max_pool2d(low, 2)))
        x = self.merge(torch.cat([low, x], 1))
        return self.head(self.merge_again(torch.cat([high, self.up_again(x)], 1)))


def unet(width=4):
    return UNet(width), torch.randn(1, 1, 8, 8)


def group_norm_cnn(width=8, groups=2):
    layers = [nn.Conv2d(3, width, 3), nn.GroupNorm(groups, width), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 4)), torch.randn(1, 3, 8, 8)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.expand, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.shrink(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)


def convnext(width=8):
    layers = [nn.Conv2d(3, width, 4, 4), ConvNeXtBlock(width), ConvNeXtBlock(width), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, 5)), torch.randn(1, 3, 16, 16)


# --- transformers


class Attention(nn.Module):
    """Self-attention with a fused query-key-value matrix, with separate ones, or with shared key-value heads."""

    def __init__(self, width, heads, fused=True, causal=False, key_heads=None):
        super().__init__()
        self.heads, self.key_heads, self.causal, self.size = heads, key_heads or heads, causal, width // heads
        sizes = [width, self.key_heads * self.size, self.key_heads * self.size]
        self.into = nn.ModuleList([nn.Linear(width, sum(sizes))] if fused else [nn.Linear(width, s) for s in sizes])
        self.out = nn.Linear(width, width)
        self.sizes = sizes

    def forward(self, x):
        parts = self.into[0](x).split(self.sizes, -1) if len(self.into) == 1 else [layer(x) for layer in self.into]
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(self.heads // self.key_heads, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def transformer_block(width, heads, norm=nn.LayerNorm, gated=False, **options):
    hidden = 3 * width
    plain = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    dense = Gated(width, hidden) if gated else plain
    attention = Residual(nn.Sequential(norm(width), Attention(width, heads, **options)))
    return nn.Sequential(attention, Residual(nn.Sequential(norm(width), dense)))


class ViT(nn.Module):
    def __init__(self, width, heads, depth, **options):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(transformer_block(width, heads, **options) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(width=12, heads=3, depth=2, fused=True):
    return ViT(width, heads, depth, fused=fused), torch.randn(2, 3, 8, 8)


class GPT(nn.Module):
    def __init__(self, width, heads, depth, tied=True, norm=nn.LayerNorm, **options):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, width), nn.Embedding(8, width)
        self.blocks = nn.Sequential(
            *(transformer_block(width, heads, norm, causal=True, **options) for _ in range(depth))
        )
        self.norm, self.head = norm(width), nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def gpt(width=12, heads=3, depth=2, **options):
    return GPT(width, heads, depth, **options), torch.randint(0, 11, (1, 6))


class Encoder(nn.Module):
    """Linear layers around the encoder layer of torch."""

    def __init__(self, width, heads, **options):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, width), nn.Linear(width, 2)
        self.layer = nn.TransformerEncoderLayer(width, heads, 16, **options)

    def forward(self, x):
        return self.leave(self.layer(self.enter(x)))


def encoder(width=8, heads=2, **options):
    return Encoder(width, heads, **options), torch.randn(3, 4, 3)


class CrossAttention(nn.Module):
    """The attention of torch between two sequences of different width, with its weights as a second output."""

    def __init__(self):
        super().__init__()
        self.enter, self.other, self.leave = nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x, y):
        y = self.other(y)
        mixed, weights = self.attention(self.enter(x), y, y)
        return self.leave(mixed), weights


def cross_attention():
    return CrossAttention(), (torch.randn(1, 3, 3), torch.randn(1, 5, 4))


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 7), nn.GELU(), nn.Linear(7, tokens))
        self.over_width = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x):
        x = x + self.over_tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_width(self.norms[1](x))


def mixer(width=6):
    layers = [nn.Conv2d(3, width, 4, 4), nn.Flatten(2), Transpose(), MixerBlock(4, width), Mean(), nn.Linear(width, 5)]
    return nn.Sequential(*layers), torch.randn(1, 3, 8, 8)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def unsigned_axes(symmetry, name):
    """The segments of each axis of a tensor: group, count and block."""
    return tuple(part and tuple(segment[:3] for segment in part) for part in symmetry.axes[name])
