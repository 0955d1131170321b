"""One training step of the published hyper-representation of MNIST networks, against the published step restated.

CNN-s (2,464 weights, 48 neurons), transformers of width 800 with 2 blocks, code 700, projection 4 x 400, gamma .1: 44 M
weights. The published step embeds row by row, writes softmax attention out, sees the two views in two passes, contrasts
by all differences of cosines in one tensor [2B, 2B, E] and has Adam update weights tensor by tensor. Weights are
shared, the rate is 0 and nothing is dropped, so that losses and norms of gradients can be compared.

Predicted for one core of 109 GFLOP/s in float32 at batch 32: a network is 4 blocks x 49 tokens x 4.0 M products and 29
M around the code, 64 views 52 G products forward and three times that with gradients: 312 GFLOP, 2.9 s at the peak. All
of it is large products, at which both reach four fifths of the peak: 3.6 s. Adam passes seven times over 176 MB, .15 s;
norms, softmax and rows are a tenth for us and a third for the published step. So 1.2 times as fast, hardly more; batch
500 the same, but that its contrast takes 4 s where ours takes 10 ms. In bf16 with AVX512-BF16 or AMX products take a
half to an eighth.

Predicted for an H200 in bf16, batch 500: 4.9 TFLOP at 40 % of 990 TFLOP/s, 12 ms; the published step is bound by its
launches and copies of row indices, some 2,000 of 5 us and 200 of 20 us: 40 ms in bf16.

Run: fastws bench hyper_representation [--full]
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

import fastws
from fastws.benchmarks.harness import DEVICE, HAS_BF16, Case, Options
from fastws.nn.hyper_representation import HyperRepresentation, HyperRepresentationConfig, rows_of
from fastws.train.ae.presets import PRESETS
from fastws.train.ae.train import contrast
from fastws.zoo.making.architectures import build

GAMMA, TEMPERATURE, RATE, DECAY = 0.1, 0.1, 0.0, 1e-9
BATCH, WHOLE_BATCH, SMALL_BATCH = 32, 500, 16
# of the loss and the norm of its gradient; batch norms of an untrained projection enlarge what bf16 rounds
TOLERANCE = {"": 1e-4, "bf16": 0.15}


def make_model(small: bool) -> HyperRepresentation:
    preset = PRESETS["mnist-seed"]
    names = (
        "latent",
        "width",
        "heads",
        "depth",
        "feed_forward",
        "compression",
        "head_depth",
        "head_width",
        "projection",
    )
    options = {name: preset[name] for name in names} | {"bounded": True, "dropout": 0.0}
    if small:
        options |= {"latent": 8, "width": 16, "feed_forward": 16, "head_width": 8}
    layout = fastws.Layout.from_checkpoint(build("cnn-s", (1, 28, 28)))
    torch.manual_seed(0)
    return HyperRepresentation(HyperRepresentationConfig(size=layout.num_weights, layers=rows_of(layout), **options))


class Step:
    """A step on two views of networks ``[2, B, P]``; gives the loss and the norm of its gradient, ``[2]``."""

    def __init__(self, loss: Callable, model: HyperRepresentation, precision: torch.dtype | None, **adam):
        self.model = deepcopy(model).to(DEVICE)
        self.loss, self.precision = loss, precision
        self.optimizer = torch.optim.Adam(self.model.parameters(), RATE, weight_decay=DECAY, **adam)

    def __call__(self, views: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.precision is not None):
            loss = self.loss(self.model, views)
        loss.backward()
        self.optimizer.step()
        norms = torch._foreach_norm([parameter.grad for parameter in self.model.parameters()])
        return torch.stack([loss.detach().float(), torch.stack(norms).norm()])


def ours(model: HyperRepresentation, views: Tensor) -> Tensor:
    flat = views.flatten(0, 1)
    _, prediction, projection = model(flat, None, 2)
    whole = torch.tensor([[0, flat.shape[1]]], device=DEVICE)
    error, _ = fastws.layerwise_mse(prediction.float(), flat, whole, torch.ones(1, device=DEVICE))
    return GAMMA * contrast(projection.float(), "simclr", TEMPERATURE) + (1 - GAMMA) * error


# --- the published step


def published(model: HyperRepresentation, views: Tensor) -> Tensor:
    layers = model.config.layers
    codes, predictions = [], []
    for view in views:
        z = encode(model.encoder, layers, view)
        codes.append(model.projection_head(z))
        predictions.append(decode(model.decoder, layers, z, view.shape[1]))
    error = nn.functional.mse_loss(torch.cat(predictions), views.flatten(0, 1))
    return GAMMA * nt_xent(*codes) + (1 - GAMMA) * error


def encode(encoder: nn.Module, layers, x: Tensor) -> Tensor:
    tokens = [encoder.comp_token.expand(len(x), 1, -1)[:, 0]]
    for layer, linear in zip(layers, encoder.token_embeddings.layer_lst, strict=True):
        for row in range(layer.rows):
            first = layer.weight_offset + row * layer.row_length
            index = [*range(first, first + layer.row_length), layer.bias_offset + row]
            tokens.append(linear(x[:, index]))
    x = torch.stack(tokens, 1) + encoder.position_embeddings.weight
    for block in encoder.layers:
        x = transform(block, x)
    return encoder.vec2neck(x[:, 0])


def decode(decoder: nn.Module, layers, z: Tensor, size: int) -> Tensor:
    x = decoder.nec2vec(z).view(len(z), decoder.tokens, -1) + decoder.position_embeddings.weight
    for block in decoder.layers:
        x = transform(block, x)
    y, token = torch.zeros(len(z), size, device=z.device), 0
    for layer, linear in zip(layers, decoder.token_debeddings.layer_lst, strict=True):
        for row in range(layer.rows):
            first = layer.weight_offset + row * layer.row_length
            y[:, [*range(first, first + layer.row_length), layer.bias_offset + row]] = linear(x[:, token]).float()
            token += 1
    return y


def transform(block: nn.Module, x: Tensor) -> Tensor:
    x = x + attend(block.attn, norm(block.norm_1, x))
    return x + block.ff.linear_2(torch.relu(block.ff.linear_1(norm(block.norm_2, x))))


def norm(module: nn.Module, x: Tensor) -> Tensor:
    return module.alpha * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + module.bias


def attend(module: nn.Module, x: Tensor) -> Tensor:
    query, key, value = (
        linear(x).view(*x.shape[:2], module.heads, -1).transpose(1, 2)
        for linear in (module.q_linear, module.k_linear, module.v_linear)
    )
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    return module.out((weights @ value).transpose(1, 2).reshape(x.shape))


def nt_xent(first: Tensor, second: Tensor) -> Tensor:
    both = torch.cat([first, second]).float()
    count = len(first)
    similarity = nn.functional.cosine_similarity(both[:, None], both[None], dim=2) / TEMPERATURE
    positive = torch.cat([similarity.diag(count), similarity.diag(-count)])[:, None]
    mask = torch.ones(2 * count, 2 * count, dtype=torch.bool)
    for i in range(count):
        mask[i, i] = mask[count + i, count + i] = mask[i, count + i] = mask[count + i, i] = False
    logits = torch.cat([positive, similarity[mask.to(both.device)].view(2 * count, -1)], 1)
    labels = torch.zeros(2 * count, dtype=torch.int64, device=both.device)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / (2 * count)


def check(actual: Tensor, truth: Callable, views: Tensor, *, name: str = "") -> None:
    # a run in bf16 is as near as bf16 is
    tolerance = TOLERANCE["bf16" if name.endswith("bf16") else ""]
    torch.testing.assert_close(actual, truth(views), rtol=tolerance, atol=1e-4)


def cases(options: Options) -> Iterator[Case]:
    sizes = [SMALL_BATCH] if options.small else [BATCH, WHOLE_BATCH] if options.full or DEVICE == "cuda" else [BATCH]
    model = make_model(options.small)
    for precision in (None, torch.bfloat16) if HAS_BF16 or options.small else (None,):
        suffix = "" if precision is None else ", bf16"
        runs = {
            "fastws": Step(ours, model, precision, fused=True),
            "published": Step(published, model, precision),
            "published compiled": Step(torch.compile(published), model, precision),
        }
        for size in sizes:
            yield Case(
                op="hyper_representation",
                name=f"mnist-seed, batch {size}{suffix}",
                make_args=partial(make_views, size),
                runs=runs,
                truth=runs["published"],
                check=partial(check, name=suffix),
                work=lambda views: 6 * products(model) * 2 * views.shape[1],
                rate="gflop_per_s",
            )


def make_views(size: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, size, 2464, generator=generator).mul_(0.3).to(DEVICE),)


def products(model: HyperRepresentation) -> int:
    """Products of a forward pass of one network, without those of attention."""
    config = model.config
    block = 4 * config.width**2 + 2 * config.width * config.feed_forward
    tokens = config.num_tokens + 1
    rows = sum(layer.rows * (layer.row_length + 1) * config.width for layer in config.layers)
    ends = config.width * config.latent + config.latent * config.width * config.num_tokens
    return config.depth * block * (tokens + config.num_tokens) + 2 * rows + ends
