"""What operators that train small CNNs share: checks of arguments, dropout masks, the loss, and the optimizers."""

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from fastws.random.philox import check_stream, philox_reference
from fastws.small_cnn.table import ACTIVATIONS, DROPOUT, Row, check_layers

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")  # in the order of their codes
MOMENTUM, BETA1, BETA2, EPSILON = 0.9, 0.9, 0.999, 1e-8


def check_step(
    op: str,
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    images: Tensor,
    labels: Tensor,
    batches: Tensor,
    layers: Tensor,
    activation: Tensor,
    dropout: Tensor,
    optimizer: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    seed: Tensor,
    step: int,
    axes: int = 2,
) -> None:
    """Checks the arguments of a training step, whose ``weights`` have so many axes; values on the CPU only."""
    device, double = weights.device, torch.float64
    check_networks(op, weights, images, layers, activation, axes)
    check_stream(op, 0, step)
    count, num_images = len(weights), len(images)
    if batches.dim() != 3 or len(batches) != count or batches.shape[2] < 1:
        raise ValueError(f"{op}: batches must be [{count}, S, B], B at least 1, got {list(batches.shape)}")
    if batches.dtype not in (torch.int32, torch.int64) or batches.device != device:
        raise ValueError(f"{op}: batches must be int32 or int64 on {device}, got {batches.dtype} on {batches.device}")
    expected = [(name, x, weights.shape, weights.dtype) for name, x in [("first", first), ("second", second)]]
    expected += [("labels", labels, (num_images,), torch.int64), ("optimizer", optimizer, (count,), torch.int32)]
    expected += [("dropout", dropout, (count,), double), ("lr", lr, (count,), double)]
    expected += [("weight_decay", weight_decay, (count,), double), ("seed", seed, (count,), torch.int64)]
    for name, x, shape, dtype in expected:
        check_tensor(op, name, x, shape, dtype, device)
    if not torch.compiler.is_compiling() and device.type == "cpu":
        check_range(op, "batches", batches, 0, num_images)
        check_range(op, "labels", labels, 0, int(layers[-1, Row._fields.index("out_channels")]))
        check_range(op, "optimizer", optimizer, 0, len(OPTIMIZERS))
        check_range(op, "dropout", dropout, 0, 1)
        check_range(op, "seed", seed, 0, 2**63)


def check_networks(op: str, weights: Tensor, images: Tensor, layers: Tensor, activation: Tensor, axes: int = 2) -> None:
    if weights.dim() != axes or weights.dtype not in (torch.float32, torch.float64):
        expected = {2: "[G, P]", 3: "[G, 2, P]"}[axes] + " float32 or float64"
        raise ValueError(f"{op}: weights must be {expected}, got {list(weights.shape)} {weights.dtype}")
    if images.dim() != 4 or images.dtype != weights.dtype or images.device != weights.device:
        got = f"{list(images.shape)} {images.dtype} on {images.device}"
        raise ValueError(f"{op}: images must be [n, C, H, W] {weights.dtype} on {weights.device}, got {got}")
    check_layers(op, layers, images, weights.shape[-1])
    check_tensor(op, "activation", activation, weights.shape[:1], torch.int32, weights.device)
    if not torch.compiler.is_compiling() and weights.device.type == "cpu":
        check_range(op, "activation", activation, 0, len(ACTIVATIONS))


def check_tensor(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype or x.device != device:
        got = f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else x
        raise ValueError(f"{op}: {name} must be {list(shape)} {dtype} on {device}, got {got}")


def check_range(op: str, name: str, x: Tensor, low: int, high: int) -> None:
    if x.numel() > 0 and not (low <= x.min().item() and x.max().item() < high):
        raise ValueError(f"{op}: {name} must be in [{low}, {high}), got {x.min().item()}..{x.max().item()}")


def dropout_masks(
    rows: list[Row], dropout: Tensor, seed: Tensor, offset: int, batch_size: int, dtype: torch.dtype
) -> dict[int, Tensor]:
    """Factors ``[G, units, B]`` of each dropout layer; none if no network drops anything."""
    sizes = {row.first_unit: torch.Size(row.out_shape).numel() for row in rows if row.kind == DROPOUT}
    if not sizes or not (dropout > 0).any():
        return {}
    numel = batch_size * sum(sizes.values())
    words = torch.stack([philox_reference(key, offset, numel, seed.device) for key in seed.tolist()])
    kept = words >= (dropout[:, None] * 2**32).round()
    factors = (kept / (1 - dropout[:, None])).to(dtype).view(len(seed), batch_size, -1).transpose(1, 2)
    return dict(zip(sizes, factors.split(list(sizes.values()), 1), strict=True))


def classify(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits ``[G, num_classes, B]`` and classes ``[G, B]``: mean cross-entropy, right ones, and its gradient."""
    scores = logits.log_softmax(1)
    losses = nll_loss(scores, target, reduction="none").mean(1)
    grad = scores.exp()
    grad.scatter_add_(1, target[:, None], torch.full_like(grad[:, :1], -1))
    return losses, (logits.argmax(1) == target).sum(1), grad / target.shape[1]


def update(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    grad: Tensor,
    optimizer: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of torch.optim; ``step`` counts from 1."""
    lr, weight_decay = lr[:, None].to(weights.dtype), weight_decay[:, None].to(weights.dtype)
    sgd, momentum, _, adamw = (optimizer[:, None] == code for code in range(4))
    adaptive = optimizer[:, None] >= 2
    weights = torch.where(adamw, weights * (1 - lr * weight_decay), weights)
    grad = torch.where(adamw, grad, grad + weight_decay * weights)
    moved = torch.where(momentum, MOMENTUM * first + grad, first + (1 - BETA1) * (grad - first))
    first = torch.where(sgd, first, moved)
    second = torch.where(adaptive, BETA2 * second + (1 - BETA2) * grad * grad, second)
    denominator = second.sqrt() / (1 - BETA2**step) ** 0.5 + EPSILON
    direction = torch.where(adaptive, first / denominator / (1 - BETA1**step), torch.where(sgd, grad, first))
    return weights - lr * direction, first, second
