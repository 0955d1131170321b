"""Variational CNN step: G small networks that lose weights to variational dropout, trained side by side."""

import torch
from torch import Tensor

from fastws.random.philox import normal_reference
from fastws.small_cnn.passes import Back, convolve, forward
from fastws.small_cnn.steps import check_step, classify, dropout_masks, update
from fastws.small_cnn.table import CONVOLUTION, Row, rows_of

INITIAL_LOG_SIGMA = -10.0  # of the variance of every weight, at the start
THRESHOLD = 3.0  # of log alpha, from which a weight is dropped
BOUNDS = {"convolution": 8.0, "dense": 10.0}  # log alpha is clamped to [-bound, bound]
K1, K2, K3 = 0.63576, 1.8732, 1.48695  # of the divergence, arXiv 1701.05369, equation 14
TINY = 1e-15  # keeps logarithms and roots of zero away
ALIGNMENT = 8  # normals of one Philox counter; the first of a layer and a sample begins one


def variational_cnn_step(
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
    kl_weight: float,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Makes S optimisation steps of G small networks whose weights are normal variables, N(theta, alpha theta^2).

    Like ``small_cnn_step``, with two parameters per weight, theta and log sigma^2, and the loss mean cross-entropy +
    ``kl_weight`` * divergence::

        log_alpha = clamp(log_sigma2 - 2 log(|theta| + 1e-15), -bound, bound)     bound: convolutions 8, dense layers 10
        mean      = layer(x; theta, bias)
        variance  = layer(x^2; alpha theta^2, alpha_bias bias^2) + 1e-15          dense layers: no variance of the bias
        output    = mean + sqrt(variance) * normal                                local reparametrisation
        divergence = -sum(k1 sigmoid(k2 + k3 log_alpha) - log(1 + 1 / alpha) / 2 - k1)

    The sum is over all weights and over the biases of convolutions; biases of dense layers have no log sigma^2, and
    what stands in their place stays what it is. Weight decay acts on theta and on log sigma^2. Dropout layers drop as
    in ``small_cnn_step``, by Philox draw ``2 * (step + s)``. Normals are draw ``2 * (step + s) + 1`` of each network's
    seed: output u of sample b takes number ``b * U + u``; u counts the outputs of all convolutions and dense layers,
    those of each rounded up to a multiple of 8, U in total. Not differentiable. Source: Molchanov et al., arXiv
    1701.05369, with the constants of the published sparse zoos, arXiv 2209.14764.

    Args:
        weights: ``[G, 2, P]``, float32 or float64: theta in the order of ``network.parameters()``, and log sigma^2 of
            each, -10 at the start.
        first: First moments of the optimizers, like ``weights``; zeros at the start.
        second: Second moments, like ``weights``; zeros at the start.
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
        kl_weight: Weight of the divergence in the loss, from 0; the published schedule goes from 0 to 0.0096.
        step: Updates made before this call.

    Returns:
        Tensors: weights, first and second after the S steps, ``[G, 2, P]``; of each minibatch before its update the
        mean cross-entropy, how many were classified rightly (int64), and the divergence, ``[G, S]`` each.

    Raises:
        ValueError: If an argument does not fit. Values are checked on the CPU only.

    Example:
        >>> layers = fastws.layer_table(torch.nn.Linear(1, 2, bias=False), (1,))
        >>> weights, images = torch.tensor([[[1.0, -1.0], [-10.0, -10.0]]]), torch.ones(1, 1, 1, 1)
        >>> zero, batches = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.int64)
        >>> recipe = {"activation": zero.int(), "dropout": zero, "optimizer": zero.int(), "weight_decay": zero}
        >>> state = fastws.variational_cnn_step(weights, weights, weights, images, torch.tensor([0]), batches, layers,
        ...                                     **recipe, lr=zero + 1, seed=zero.long(), kl_weight=0.0)
        >>> state[5]
        tensor([[11.2716]])
    """
    op = "variational_cnn_step"
    if not 0 <= kl_weight < float("inf"):
        raise ValueError(f"{op}: kl_weight must be at least 0 and finite, got {kl_weight}")
    recipe = activation, dropout, optimizer, lr, weight_decay, seed
    check_step(op, weights, first, second, images, labels, batches, layers, *recipe, step, axes=3)
    if weights.shape[1] != 2:
        raise ValueError(f"{op}: weights must be [G, 2, P], theta and log sigma^2, got {list(weights.shape)}")
    return torch.ops.fastws.variational_cnn_step(
        weights, first, second, images, labels, batches, layers, *recipe, kl_weight, step
    )


def sparse_weights(weights: Tensor, layers: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of variational networks: theta without the weights whose log alpha is at least 3.

    Args:
        weights: ``[G, 2, P]``, as ``variational_cnn_step`` returns them.
        layers: ``fastws.layer_table(network, (C, H, W))``.

    Returns:
        Tensors: weights ``[G, P]`` of ordinary networks, zero where something was dropped; and the share of the
        weights that was dropped, ``[G]``. Biases of convolutions are dropped too, but not counted.

    Example:
        >>> layers = fastws.layer_table(torch.nn.Linear(1, 2, bias=False), (1,))
        >>> sparse_weights(torch.tensor([[[0.5, 1e-3], [-10.0, -10.0]]]), layers)
        (tensor([[0.5000, 0.0000]]), tensor([0.5000]))
    """
    rows = rows_of(layers)
    bounds = bounds_of(rows, weights)
    dropped = (log_alpha(weights, bounds)[0] >= THRESHOLD) & (bounds > 0)
    counted = torch.zeros_like(bounds, dtype=torch.bool)
    for row in rows:
        if row.kind == CONVOLUTION:
            counted[row.weight_offset : row.weight_offset + torch.Size(row.weight_shape).numel()] = True
    sparsity = (dropped & counted).sum(1).to(weights.dtype) / counted.sum()
    return torch.where(dropped, 0, weights[:, 0]), sparsity


def kl_divergence(weights: Tensor, layers: Tensor) -> Tensor:
    """The divergence of variational networks ``[G, 2, P]`` from their prior, ``[G]``; see ``variational_cnn_step``."""
    bounds = bounds_of(rows_of(layers), weights)
    return divergence(*log_alpha(weights, bounds), bounds)[0]


def is_dense(row: Row) -> bool:
    return row.in_height == row.in_width == 1


def bounds_of(rows: list[Row], weights: Tensor) -> Tensor:
    """The bound of each weight's log alpha, ``[P]``; 0 for biases of dense layers, which have none."""
    bounds = weights.new_zeros(weights.shape[-1])
    for row in rows:
        if row.kind == CONVOLUTION:
            size = torch.Size(row.weight_shape).numel()
            bounds[row.weight_offset : row.weight_offset + size] = BOUNDS["dense" if is_dense(row) else "convolution"]
            if row.bias_offset >= 0 and not is_dense(row):
                bounds[row.bias_offset : row.bias_offset + row.out_channels] = BOUNDS["convolution"]
    return bounds


def log_alpha(weights: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Log alpha ``[G, P]``, clamped, and where it is not at its bounds: there gradients go through."""
    theta, log_sigma = weights.unbind(1)
    free = log_sigma - 2 * (theta.abs() + TINY).log()
    return free.clamp(-bounds, bounds), (free.abs() <= bounds) & (bounds > 0)


def divergence(alpha: Tensor, inside: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each network ``[G]``, and its slope in log alpha ``[G, P]``; ``alpha`` is log alpha."""
    share = (K2 + K3 * alpha).sigmoid()
    value = K1 - K1 * share + 0.5 * torch.log1p((-alpha).exp())
    slope = -K1 * K3 * share * (1 - share) - 0.5 * (-alpha).sigmoid()
    return torch.where(bounds > 0, value, 0).sum(1), torch.where(inside, slope, 0)


def variational_cnn_step_reference(
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
    kl_weight: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, rates = rows_of(layers), (optimizer, lr, weight_decay)
    bounds = bounds_of(rows, weights)
    # log sigma^2 of a dense layer's bias has no gradient, which is not the same as zero: it does not decay either
    moves = torch.cat([torch.ones_like(bounds), bounds]) > 0
    state = weights.flatten(1), first.flatten(1), second.flatten(1)  # [G, 2 * P]
    losses = weights.new_empty(batches.shape[:2])
    divergences, correct = torch.empty_like(losses), labels.new_empty(batches.shape[:2])
    for s, batch in enumerate(batches.long().unbind(1)):  # [G, B]
        current = state[0].view(weights.shape)
        theta = current[:, 0]
        alpha, inside = log_alpha(current, bounds)
        divergences[:, s], slope = divergence(alpha, inside, bounds)
        variance = torch.where(bounds > 0, alpha.exp() * theta * theta, 0)
        masks = dropout_masks(rows, dropout, seed, 2 * (step + s), batch.shape[1], theta.dtype)
        noise = draw_noise(rows, seed, 2 * (step + s) + 1, batch.shape[1], theta.dtype)
        x = images[batch].permute(0, 2, 3, 4, 1).contiguous()  # [G, C, H, W, B]
        grad_theta, grad_variance = torch.zeros_like(theta), torch.zeros_like(theta)
        logits, backs = noisy_forward(
            theta, variance, x, rows, activation, masks, noise, grad_theta, grad_variance
        )  # [G, num_classes, B]
        losses[:, s], correct[:, s], grad_x = classify(logits, labels[batch])
        for back in reversed(backs):
            grad_x = back(grad_x)
        # inside its bounds, alpha theta^2 is sigma^2 and does not depend on theta
        grad_theta += torch.where(inside, 0, 2 * alpha.exp() * theta * grad_variance)
        grad_theta -= kl_weight * slope * 2 * theta.sign() / (theta.abs() + TINY)
        grad_log_sigma = torch.where(inside, variance * grad_variance, 0) + kl_weight * slope
        moved = update(*state, torch.cat([grad_theta, grad_log_sigma], 1), *rates, step + s + 1)
        state = tuple(torch.where(moves, new, old) for new, old in zip(moved, state, strict=True))
    return *(x.clone().view(weights.shape) for x in state), losses, correct, divergences


def noisy_forward(
    theta: Tensor,
    variance: Tensor,
    x: Tensor,
    rows: list[Row],
    activation: Tensor,
    masks: dict[int, Tensor],
    noise: dict[int, Tensor],
    grad_theta: Tensor,
    grad_variance: Tensor,
) -> tuple[Tensor, list[Back]]:
    """``fastws.small_cnn.forward`` with noise in every convolution and dense layer."""
    backs = []
    for number, row in enumerate(rows):
        if row.kind == CONVOLUTION:
            x = x.reshape(len(x), *row.in_shape, x.shape[-1])
            x, back = convolve_noisily(
                theta, variance, x, row, noise[number], grad_theta, grad_variance, last=not backs
            )
            backs.append(back)
        else:
            x, others = forward(theta, x, [row], activation, masks, grad_theta)
            backs += others
    return x.flatten(1, 3), backs


def convolve_noisily(
    theta: Tensor,
    variance: Tensor,
    x: Tensor,
    row: Row,
    normals: Tensor,
    grad_theta: Tensor,
    grad_variance: Tensor,
    last: bool,
) -> tuple[Tensor, Back]:
    """The gradient of ``x`` is left out where it would be the last on the way back."""
    mean, mean_back = convolve(theta, x, row, grad_theta, last)
    without_bias = row._replace(bias_offset=-1) if is_dense(row) else row
    spread, spread_back = convolve(variance, x * x, without_bias, grad_variance, last)
    deviation = (spread + TINY).sqrt()
    normals = normals.view(mean.shape)

    def back(grad: Tensor) -> Tensor:
        grad = grad.reshape(mean.shape)
        grad_x, grad_square = mean_back(grad), spread_back(grad * normals / (2 * deviation))
        return grad if last else grad_x + 2 * x * grad_square

    return mean + deviation * normals, back


def draw_noise(rows: list[Row], seed: Tensor, offset: int, batch_size: int, dtype: torch.dtype) -> dict[int, Tensor]:
    """Normals ``[G, outputs, B]`` of each convolution and dense layer, by its place in the table."""
    sizes = {n: torch.Size(row.out_shape).numel() for n, row in enumerate(rows) if row.kind == CONVOLUTION}
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()]
    numel = batch_size * sum(padded)
    normals = torch.stack([normal_reference(key, offset, numel, seed.device, dtype) for key in seed.tolist()])
    parts = normals.view(len(seed), batch_size, -1).transpose(1, 2).split(padded, 1)
    return {n: part[:, :size] for (n, size), part in zip(sizes.items(), parts, strict=True)}


torch.library.define(
    "fastws::variational_cnn_step",
    "(Tensor weights, Tensor first, Tensor second, Tensor images, Tensor labels, Tensor batches, Tensor layers, "
    "Tensor activation, Tensor dropout, Tensor optimizer, Tensor lr, Tensor weight_decay, Tensor seed, "
    "float kl_weight, SymInt step) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.register_kernel("fastws::variational_cnn_step", "default", variational_cnn_step_reference)


@torch.library.register_fake("fastws::variational_cnn_step")
def variational_cnn_step_fake(weights, first, second, images, labels, batches, *rest):
    losses = weights.new_empty(batches.shape[:2])
    state = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weights, first, second))
    return *state, losses, labels.new_empty(batches.shape[:2]), torch.empty_like(losses)


def variational_cnn_step_backward(ctx, *grads):
    raise NotImplementedError("variational_cnn_step: not differentiable, it is a whole training step")


torch.library.register_autograd("fastws::variational_cnn_step", variational_cnn_step_backward)
