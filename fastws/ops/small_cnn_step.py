"""Small CNN step: G small networks of one architecture, each with a recipe of its own, trained side by side."""

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from fastws.philox import check_stream, philox_reference
from fastws.small_cnn import ACTIVATIONS, DROPOUT, Row, check_layers, forward, rows_of

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")  # in the order of their codes
MOMENTUM, BETA1, BETA2, EPSILON = 0.9, 0.9, 0.999, 1e-8
CHUNK = 2**21  # activations of one layer that evaluation computes at once


def small_cnn_step(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    images: Tensor,
    labels: Tensor,
    batches: Tensor,
    layers: Tensor,
    *,
    activation: Tensor,
    dropout: Tensor,
    optimizer: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    seed: Tensor,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Makes S optimisation steps of G small networks, each on its own minibatches and with its own hyperparameters.

    Step s of network g minimises the mean cross-entropy of ``images[batches[g, s]]`` by a formula of ``torch.optim``:
    SGD, SGD with momentum 0.9, Adam or AdamW (betas 0.9 and 0.999, eps 1e-8). Unit u of sample b is dropped where
    ``philox(seed[g], step + s)[b * U + u] < dropout[g] * 2**32``; u counts the units of all dropout layers, U in total,
    and what is kept is divided by ``1 - dropout[g]``. So what a network becomes depends neither on its neighbours nor
    on how its steps are cut into calls. Not differentiable. Source: model zoos, arXiv 2209.14764.

    Args:
        weights: ``[G, P]``, float32 or float64, in the order of ``network.parameters()``.
        first: First moments of the optimizers, like ``weights``; zeros at the start. SGD leaves them as they are.
        second: Second moments, like ``weights``; zeros at the start. Only Adam and AdamW change them.
        images: ``[n, C, H, W]``, of the dtype of ``weights``.
        labels: Classes, ``[n]``, int64.
        batches: Images that each network sees in each step, ``[G, S, B]``, int32 or int64.
        layers: ``fastws.layer_table(network, (C, H, W))``, ``[L, 12]``, int64.
        activation: 0 tanh, 1 relu, 2 sigmoid, 3 exact gelu: ``[G]``, int32.
        dropout: Probability in ``[0, 1)`` at each dropout layer, ``[G]``, float64.
        optimizer: 0 SGD, 1 SGD with momentum, 2 Adam, 3 AdamW: ``[G]``, int32.
        lr: Learning rates, ``[G]``, float64.
        weight_decay: As the optimizer understands it, ``[G]``, float64.
        seed: Names each network's stream of random numbers, from 0: ``[G]``, int64.
        step: Updates made before this call.

    Returns:
        Tensors: weights, first and second after the S steps, ``[G, P]``; the mean cross-entropy of each minibatch
        before its update, ``[G, S]``; and how many of it were classified rightly, ``[G, S]``, int64.

    Raises:
        ValueError: If an argument does not fit. Values are checked on the CPU only.

    Example:
        >>> layers = fastws.layer_table(torch.nn.Linear(1, 2), (1,))
        >>> weights, images = torch.zeros(1, 4), torch.tensor([[[[-1.0]]], [[[1.0]]]])
        >>> zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        >>> sgd = {"activation": zero.int(), "dropout": zero, "optimizer": zero.int(), "lr": one, "weight_decay": zero}
        >>> state = fastws.small_cnn_step(weights, weights, weights, images, torch.tensor([0, 1]),
        ...                               torch.tensor([[[0, 1]]]), layers, **sgd, seed=zero.long())
        >>> state[0], state[3], state[4]
        (tensor([[-0.5000,  0.5000,  0.0000,  0.0000]]), tensor([[0.6931]]), tensor([[1]]))
    """
    op, device, double = "small_cnn_step", weights.device, torch.float64
    check_networks(op, weights, images, layers, activation)
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
    state, data, recipe = (weights, first, second), (images, labels, batches), (optimizer, lr, weight_decay, seed)
    return torch.ops.fastws.small_cnn_step(*state, *data, layers, activation, dropout, *recipe, step)


def small_cnn_logits(weights: Tensor, images: Tensor, layers: Tensor, activation: Tensor) -> Tensor:
    """Computes the logits of G small networks on the same images, without dropout. Not differentiable.

    Args:
        weights: ``[G, P]``, float32 or float64, in the order of ``network.parameters()``.
        images: ``[n, C, H, W]``, of the dtype of ``weights``.
        layers: ``fastws.layer_table(network, (C, H, W))``, ``[L, 12]``, int64.
        activation: 0 tanh, 1 relu, 2 sigmoid, 3 exact gelu: ``[G]``, int32.

    Returns:
        Logits ``[G, n, num_classes]``.

    Raises:
        ValueError: If an argument does not fit. Values are checked on the CPU only.

    Example:
        >>> layers = fastws.layer_table(torch.nn.Linear(1, 2), (1,))
        >>> weights = torch.tensor([[2.0, 3.0, 0.0, 1.0]])
        >>> fastws.small_cnn_logits(weights, torch.ones(1, 1, 1, 1), layers, torch.zeros(1, dtype=torch.int32))
        tensor([[[2., 4.]]])
    """
    check_networks("small_cnn_logits", weights, images, layers, activation)
    return torch.ops.fastws.small_cnn_logits(weights, images, layers, activation)


def check_networks(op: str, weights: Tensor, images: Tensor, layers: Tensor, activation: Tensor) -> None:
    if weights.dim() != 2 or weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: weights must be [G, P] float32 or float64, got {list(weights.shape)} {weights.dtype}")
    if images.dim() != 4 or images.dtype != weights.dtype or images.device != weights.device:
        got = f"{list(images.shape)} {images.dtype} on {images.device}"
        raise ValueError(f"{op}: images must be [n, C, H, W] {weights.dtype} on {weights.device}, got {got}")
    check_layers(op, layers, images, weights.shape[1])
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


def small_cnn_step_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, first, second = weights.clone(), first.clone(), second.clone()
    rows, recipe = rows_of(layers), (optimizer, lr, weight_decay)
    losses = weights.new_empty(batches.shape[:2])
    correct = labels.new_empty(batches.shape[:2])
    for s, batch in enumerate(batches.long().unbind(1) if len(weights) else ()):  # [G, B]
        masks = dropout_masks(rows, dropout, seed, step + s, batch.shape[1], weights.dtype)
        x = images[batch].permute(0, 2, 3, 4, 1).contiguous()  # [G, C, H, W, B]
        grad = torch.empty_like(weights)
        logits, backs = forward(weights, x, rows, activation, masks, grad)  # [G, num_classes, B]
        target, scores = labels[batch], logits.log_softmax(1)
        losses[:, s] = nll_loss(scores, target, reduction="none").mean(1)
        correct[:, s] = (logits.argmax(1) == target).sum(1)
        grad_x = scores.exp()
        grad_x.scatter_add_(1, target[:, None], torch.full_like(grad_x[:, :1], -1))
        grad_x /= batch.shape[1]
        for back in reversed(backs):
            grad_x = back(grad_x)
        weights, first, second = update(weights, first, second, grad, *recipe, step + s + 1)
    return weights, first, second, losses, correct


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


def small_cnn_logits_reference(weights: Tensor, images: Tensor, layers: Tensor, activation: Tensor) -> Tensor:
    rows, grad = rows_of(layers), torch.empty_like(weights)
    largest = max(torch.Size(row.out_shape).numel() for row in rows)
    logits = weights.new_empty(len(weights), len(images), rows[-1].out_channels)
    together = max(16, CHUNK // (largest * max(len(weights), 1)))
    for begin in range(0, len(images) if len(weights) else 0, together):
        x = images[begin : begin + together].permute(1, 2, 3, 0)[None]
        logits[:, begin : begin + together] = forward(weights, x, rows, activation, {}, grad)[0].transpose(1, 2)
    return logits


torch.library.define(
    "fastws::small_cnn_step",
    "(Tensor weights, Tensor first, Tensor second, Tensor images, Tensor labels, Tensor batches, Tensor layers, "
    "Tensor activation, Tensor dropout, Tensor optimizer, Tensor lr, Tensor weight_decay, Tensor seed, SymInt step) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastws::small_cnn_logits", "(Tensor weights, Tensor images, Tensor layers, Tensor activation) -> Tensor"
)
torch.library.register_kernel("fastws::small_cnn_step", "default", small_cnn_step_reference)
torch.library.register_kernel("fastws::small_cnn_logits", "default", small_cnn_logits_reference)


@torch.library.register_fake("fastws::small_cnn_step")
def small_cnn_step_fake(weights, first, second, images, labels, batches, *rest):
    losses = weights.new_empty(batches.shape[:2])
    state = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weights, first, second))
    return *state, losses, labels.new_empty(batches.shape[:2])


@torch.library.register_fake("fastws::small_cnn_logits")
def small_cnn_logits_fake(weights, images, layers, activation):
    num_classes = torch.library.get_ctx().new_dynamic_size()  # a value of the table
    return weights.new_empty(weights.shape[0], images.shape[0], num_classes)


def small_cnn_step_backward(ctx, *grads):
    raise NotImplementedError("small_cnn_step: not differentiable, it is a whole training step")


def small_cnn_logits_backward(ctx, *grads):
    raise NotImplementedError("small_cnn_logits: not differentiable; use torch.func.functional_call for gradients")


torch.library.register_autograd("fastws::small_cnn_step", small_cnn_step_backward)
torch.library.register_autograd("fastws::small_cnn_logits", small_cnn_logits_backward)
