"""How G small CNNs at once run forward and backward in plain PyTorch, by the rows of their table.

Activations of G networks are ``[G, channels, height, width, B]`` with the batch last: every copy of a convolution or a
pooling moves runs of B numbers, a flatten is a view, and all arithmetic is a batched matrix product over the networks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu

from fastws.small_cnn.table import ACTIVATION, ACTIVATIONS, CONVOLUTION, POOLING, Row

SQRT_HALF, INVERSE_SQRT_TAU = 0.5**0.5, 0.3989422804014327

# What a row leaves behind for the way back: the gradient of its output -> that of its input.
Back = Callable[[Tensor], Tensor]


def forward(
    weights: Tensor, x: Tensor, rows: Sequence[Row], activation: Tensor, masks: dict[int, Tensor], grad: Tensor
) -> tuple[Tensor, list[Back]]:
    """Runs G networks.

    Args:
        weights: ``[G, P]``.
        x: Images ``[G, C, H, W, B]``, or ``[1, C, H, W, B]`` if all networks see the same.
        rows: Those of the table.
        activation: Code of each network's activation, ``[G]``.
        masks: Factors ``[G, units, B]`` of dropout layers by their ``first_unit``; layers without one let all through.
        grad: Where the gradient of the weights goes, ``[G, P]``.

    Returns:
        Logits ``[G, num_classes, B]``, and the functions to call from last to first with the gradient of the logits.
    """
    backs = []
    for row in rows:
        x = x.reshape(len(x), *row.in_shape, x.shape[-1])
        if row.kind == CONVOLUTION:
            x, back = convolve(weights, x, row, grad, last=not backs)
        elif row.kind == POOLING:
            x, back = pool(x, row.kernel_height, row.kernel_width)
        elif row.kind == ACTIVATION:
            x, back = activate(x.expand(len(weights), *x.shape[1:]), activation)
        elif row.first_unit in masks:
            mask = masks[row.first_unit].view(len(weights), *x.shape[1:])
            x, back = x * mask, partial(scale, mask)
        else:
            continue
        backs.append(back)
    return x.flatten(1, 3), backs


def convolve(weights: Tensor, x: Tensor, row: Row, grad_weights: Tensor, last: bool) -> tuple[Tensor, Back]:
    """The gradient of ``x`` is left out where it would be the last on the way back."""
    size = torch.Size(row.weight_shape).numel()
    span = slice(row.weight_offset, row.weight_offset + size)
    bias_span = slice(row.bias_offset, row.bias_offset + row.out_channels) if row.bias_offset >= 0 else None
    weight = weights[:, span].view(len(weights), row.out_channels, -1)  # [G, O, K]
    patches = unfold(x, row)  # [G or 1, K, N]
    if len(x) < len(weights):  # one tall product instead of G that each read x again
        y = (weight.reshape(-1, weight.shape[2]) @ patches[0]).view(*weight.shape[:2], -1)
    else:
        y = torch.bmm(weight, patches)
    if bias_span:
        y = y + weights[:, bias_span, None]

    def back(grad: Tensor) -> Tensor:
        grad = grad.reshape(y.shape)
        grad_weights[:, span] = (grad @ patches.transpose(1, 2)).flatten(1)
        if bias_span:
            grad_weights[:, bias_span] = grad.sum(2)
        return grad if last else fold(weight.transpose(1, 2) @ grad, row, x.shape[-1])

    return y.view(len(y), *row.out_shape, x.shape[-1]), back


def scale(mask: Tensor, grad: Tensor) -> Tensor:
    return mask * grad.view(mask.shape)


def unfold(x: Tensor, row: Row) -> Tensor:
    """``[G, C, H, W, B]`` -> ``[G, C * kh * kw, out_h * out_w * B]``: what each output of a convolution sees."""
    windows = x.unfold(2, row.kernel_height, row.stride_height).unfold(3, row.kernel_width, row.stride_width)
    windows = windows.permute(0, 1, 5, 6, 2, 3, 4)  # from [G, C, oh, ow, B, kh, kw]
    return windows.reshape(len(x), -1, windows[0, 0, 0, 0].numel())


def fold(grad: Tensor, row: Row, batch: int) -> Tensor:
    """The adjoint of ``unfold``."""
    _, out_h, out_w = row.out_shape
    grad = grad.view(len(grad), row.in_channels, row.kernel_height, row.kernel_width, out_h, out_w, batch)
    if grad.shape[2:6] == (1, 1, row.in_height, row.in_width):
        return grad[:, :, 0, 0]
    grad_x = grad.new_zeros(len(grad), *row.in_shape, batch)
    for i in range(row.kernel_height):
        for j in range(row.kernel_width):
            grad_x[:, :, i :: row.stride_height, j :: row.stride_width][:, :, :out_h, :out_w] += grad[:, :, i, j]
    return grad_x


def pool(x: Tensor, height: int, width: int) -> tuple[Tensor, Back]:
    """Maxima of blocks; the first of equals gets the gradient. Rows and columns that fill no block are left out."""
    out_h, out_w = x.shape[2] // height, x.shape[3] // width

    def parts(x: Tensor) -> list[Tensor]:
        places = [(i, j) for i in range(height) for j in range(width)]
        return [x[:, :, i::height, j::width][:, :, :out_h, :out_w] for i, j in places]

    largest, *others = parts(x)
    winner = torch.zeros_like(largest, dtype=torch.uint8)
    for number, part in enumerate(others, 1):
        winner = torch.where(part > largest, number, winner)
        largest = torch.maximum(largest, part)

    def back(grad: Tensor) -> Tensor:
        grad, grad_x = grad.view(largest.shape), grad.new_zeros(x.shape)
        for number, part in enumerate(parts(grad_x)):
            part.copy_(torch.where(winner == number, grad, 0))
        return grad_x

    return largest, back


def activate(x: Tensor, activation: Tensor) -> tuple[Tensor, Back]:
    """Each network's own activation."""
    y, slope = torch.empty_like(x), torch.empty_like(x)
    for code in activation.unique().tolist():
        of_code = activation == code
        y[of_code], slope[of_code] = activation_and_slope(x[of_code], code)
    return y, lambda grad: grad.view(x.shape) * slope


def activation_and_slope(x: Tensor, code: int) -> tuple[Tensor, Tensor]:
    match list(ACTIVATIONS)[code]:
        case "tanh":
            y = x.tanh()
            return y, 1 - y * y
        case "relu":
            return x.relu(), (x > 0).to(x.dtype)
        case "sigmoid":
            y = x.sigmoid()
            return y, y * (1 - y)
        case "gelu":
            share = 0.5 * (1 + torch.erf(x * SQRT_HALF))
            return gelu(x), share + x * INVERSE_SQRT_TAU * torch.exp(-0.5 * x * x)
