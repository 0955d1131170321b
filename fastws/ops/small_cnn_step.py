"""Small CNN step: G small networks of one architecture, each with a recipe of its own, trained side by side."""

import torch
from torch import Tensor

from fastws.small_cnn.passes import forward
from fastws.small_cnn.steps import check_networks, check_step, classify, dropout_masks, update
from fastws.small_cnn.table import rows_of

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
    recipe = activation, dropout, optimizer, lr, weight_decay, seed
    check_step("small_cnn_step", weights, first, second, images, labels, batches, layers, *recipe, step)
    state, data = (weights, first, second), (images, labels, batches)
    return torch.ops.fastws.small_cnn_step(*state, *data, layers, *recipe, step)


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
    rows, rates = rows_of(layers), (optimizer, lr, weight_decay)
    losses = weights.new_empty(batches.shape[:2])
    correct = labels.new_empty(batches.shape[:2])
    for s, batch in enumerate(batches.long().unbind(1) if len(weights) else ()):  # [G, B]
        masks = dropout_masks(rows, dropout, seed, step + s, batch.shape[1], weights.dtype)
        x = images[batch].permute(0, 2, 3, 4, 1).contiguous()  # [G, C, H, W, B]
        grad = torch.empty_like(weights)
        logits, backs = forward(weights, x, rows, activation, masks, grad)  # [G, num_classes, B]
        losses[:, s], correct[:, s], grad_x = classify(logits, labels[batch])
        for back in reversed(backs):
            grad_x = back(grad_x)
        weights, first, second = update(weights, first, second, grad, *rates, step + s + 1)
    return weights, first, second, losses, correct


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
