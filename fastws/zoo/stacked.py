"""Many small networks of one architecture at once: their weights stacked to ``[G, P]``, one operation for all of them.

Activations are ``[G, channels, height, width, B]`` with the batch last. So every copy of a convolution or a pooling
moves runs of B numbers, a flatten is a view, and all arithmetic is a batched matrix product over the G networks. For
small images on a CPU this is several times faster than vmap, which turns a convolution into a grouped one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BUDGET = {"cpu": 2**23, "cuda": 2**30}  # bytes of the largest operand; a processor's cache should hold it
Drop = Callable[[Tensor], Tensor]  # dropout: applied to the activations behind an nn.Dropout


def stacked_forward(network: nn.Module, flat: Tensor, images: Tensor, drop: Drop | None = None) -> Tensor:
    """The logits of G networks.

    Differentiable in ``flat``. Equal to ``network(images)`` with each network's weights, up to rounding.

    Args:
        network: A ``Network`` of ``architectures``: ``module_list`` holds convolutions without padding, max-pooling
            by 2, elementwise activations, dropout, one flatten and dense layers. Its own weights are not used.
        flat: Weights ``[G, P]`` in the order of ``network.parameters()``.
        images: ``[G, C, H, W, B]``, or ``[1, C, H, W, B]`` where all networks see the same images.
        drop: What stands for each dropout layer; none by default, which is evaluation.

    Returns:
        Logits ``[G, num_classes, B]``.

    Raises:
        ValueError: If a layer is of another kind.
    """
    parameters = list(network.parameters())
    pieces = iter(flat.split([parameter.numel() for parameter in parameters], 1))
    x = images
    for layer in layers_of(network):
        if isinstance(layer, nn.Conv2d):
            x = convolve(x, next(pieces).unflatten(1, layer.weight.shape), next(pieces), layer.stride)
        elif isinstance(layer, nn.Linear):
            weight, bias = next(pieces).unflatten(1, layer.weight.shape), next(pieces)
            x = multiply(weight, x, bias)
        elif isinstance(layer, nn.MaxPool2d) and layer.kernel_size == 2:
            x = PairMax.apply(PairMax.apply(x, 3), 2)
        elif isinstance(layer, nn.Flatten):
            x = x.flatten(1, 3)
        elif isinstance(layer, nn.Dropout):
            x = x if drop is None else drop(x)
        elif isinstance(layer, nn.Tanh | nn.ReLU | nn.Sigmoid | nn.GELU):
            x = layer(x)
        else:
            raise ValueError(f"stacked_forward: layer must be one that zoos are made of, got {layer}")
    return x


@torch.no_grad()
def evaluate(network: nn.Module, flat: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and accuracy of G networks, each ``[G]``.

    Args:
        network: As for ``stacked_forward``.
        flat: Weights ``[G, P]``.
        images: ``[C, H, W, n]``, the batch last.
        labels: int64 ``[n]``.
    """
    loss, correct = flat.new_zeros(2, len(flat))
    size = flat.element_size() * len(flat) * largest_operand(network, images.shape[:3])
    together = max(16, BUDGET[flat.device.type] // size)
    for x, y in zip(images.split(together, -1), labels.split(together), strict=True):
        logits = stacked_forward(network, flat, x[None])
        loss += cross_entropy(logits, y.expand(len(flat), -1), reduction="none").sum(1)
        correct += (logits.argmax(1) == y).sum(1)
    return loss / len(labels), correct / len(labels)


@torch.no_grad()
def largest_operand(network: nn.Module, image_shape: Sequence[int]) -> int:
    """Numbers per network and image in the largest operand, which is most often what a convolution sees."""
    x = torch.zeros(1, *image_shape)
    largest = x.numel()
    for layer in layers_of(network):
        x = layer(x)
        patches = layer.weight[0].numel() * x[0, 0].numel() if isinstance(layer, nn.Conv2d) else 0
        largest = max(largest, x.numel(), patches)
    return largest


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers in the order in which they run."""
    return [module for module in network.modules() if not any(module.children())]


def multiply(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """``weight [G, O, K] @ x [G or 1, K, N] + bias [G, O]``."""
    if x.shape[0] == 1 < weight.shape[0]:
        # one tall product instead of G that each read x again
        product = torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), x[0])
        return product.view(*weight.shape[:2], -1)
    return torch.baddbmm(bias[:, :, None], weight, x)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
    """Convolution without padding: x ``[G or 1, C, H, W, B]``, weight ``[G, O, C, kh, kw]``, bias ``[G, O]``."""
    height, width = ((x.shape[2 + i] - weight.shape[3 + i]) // stride[i] + 1 for i in (0, 1))
    patches = Patches.apply(x, tuple(weight.shape[3:]), stride)
    return multiply(weight.flatten(2), patches, bias).unflatten(2, (height, width, x.shape[4]))


class Patches(torch.autograd.Function):
    """``[G, C, H, W, B]`` -> ``[G, C * kh * kw, out_h * out_w * B]``: what each output of a convolution sees."""

    @staticmethod
    def forward(ctx, x, kernel, stride):
        ctx.kernel, ctx.stride, ctx.shape = kernel, stride, x.shape
        windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # [G, C, oh, ow, B, kh, kw]
        patches = windows.permute(0, 1, 5, 6, 2, 3, 4)
        return patches.reshape(x.shape[0], -1, patches[0, 0, 0, 0].numel())

    @staticmethod
    def backward(ctx, grad):
        (kh, kw), (sh, sw) = ctx.kernel, ctx.stride
        groups, channels, height, width, batch = ctx.shape
        out_h, out_w = (height - kh) // sh + 1, (width - kw) // sw + 1
        grad = grad.view(groups, channels, kh, kw, out_h, out_w, batch)
        grad_x = grad.new_zeros(ctx.shape)
        for i in range(kh):
            for j in range(kw):
                grad_x[:, :, i : i + sh * out_h : sh, j : j + sw * out_w : sw] += grad[:, :, i, j]
        return grad_x, None, None


class PairMax(torch.autograd.Function):
    """The larger of each two neighbours along an axis, without an odd last; the first of equals gets the gradient."""

    @staticmethod
    def forward(ctx, x, axis):
        first, second = pairs(x, axis)
        ctx.axis, ctx.shape = axis, x.shape
        ctx.save_for_backward(first >= second)
        return torch.maximum(first, second)

    @staticmethod
    def backward(ctx, grad):
        (first_is_larger,) = ctx.saved_tensors
        grad_x = grad.new_zeros(ctx.shape) if ctx.shape[ctx.axis] % 2 else grad.new_empty(ctx.shape)
        first, second = pairs(grad_x, ctx.axis)
        torch.where(first_is_larger, grad, grad.new_zeros(()), out=first)
        torch.sub(grad, first, out=second)
        return grad_x, None


def pairs(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Every first and every second entry along an axis: views of ``x``."""
    return x.narrow(axis, 0, x.shape[axis] // 2 * 2).unflatten(axis, (-1, 2)).unbind(axis + 1)
