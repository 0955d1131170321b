"""What moves the predictor: Ranger, and torch's optimizers by name; rates as functions of the step; clipping."""

from collections.abc import Iterable
from math import cos, pi, sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, AdamW, Optimizer

MOMENTUM = 0.9  # of SGD, with Nesterov's step
RECTIFIED = 5  # length of the average from which on RAdam divides by the root of the second moment

Name = Literal["ranger", "adamw", "sgd", "adadelta"]
Schedule = Literal["cosine", "exponential"]


class Ranger(Optimizer):
    """RAdam (arXiv 1908.03265) with Lookahead (1907.08610) and centralised gradients (2004.01461).

    The version of April 2020 that NeRN was published with, step for step: in step t, from 1,

    - ``g <- g - mean(g)`` over all axes but the first, of tensors with more than one;
    - ``v <- beta2 v + (1 - beta2) g**2``, ``m <- beta1 m + (1 - beta1) g``;
    - ``p <- p - lr weight_decay p``, biases included;
    - ``p <- p - lr s m / (sqrt(v) + eps)`` where the average is long enough to be rectified by s, else
      ``p <- p - lr m / (1 - beta1**t)``;
    - every ``lookahead`` steps ``slow <- slow + blend (p - slow)``, from the initial weights, and ``p <- slow``.

    Args:
        parameters: Tensors or groups of them.
        lr: Learning rate.
        betas: Decay of the first and second moments; NeRN's, not Ranger's own.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times the learning rate.
        centralize: Whether gradients are centralised. The published flag ``use_gc`` did nothing: they always were.
        lookahead: Steps between two blends.
        blend: Part of the way from slow to fast weights.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        parameters: Iterable,
        lr: float = 5e-3,
        *,
        betas: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 1e-3,
        centralize: bool = True,
        lookahead: int = 6,
        blend: float = 0.5,
    ):
        ranges = {"lr": lr > 0, "eps": eps > 0, "weight_decay": weight_decay >= 0, "lookahead": lookahead >= 1}
        ranges |= {"betas": all(0 <= beta < 1 for beta in betas), "blend": 0 <= blend <= 1}
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        defaults |= {"centralize": centralize, "lookahead": lookahead, "blend": blend, "step": 0}
        for name, fits in ranges.items():
            if not fits:
                raise ValueError(f"ranger: {name} must be in its range, see the docstring, got {defaults[name]}")
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step; parameters without gradient stay where they are."""
        if closure is not None:
            raise ValueError("ranger: closure must be None, got one; compute the loss before")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self.update(group, parameters)

    def update(self, group: dict, parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        group["step"] += 1
        gradients = [p.grad for p in parameters]
        if group["centralize"]:
            gradients = [g - g.mean(tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g for g in gradients]
        first, second, slow = self.moments(parameters)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        if group["weight_decay"]:
            torch._foreach_add_(parameters, parameters, alpha=-group["weight_decay"] * group["lr"])
        size, rectified = step_size(group["step"], beta1, beta2)
        if rectified:
            roots = torch._foreach_sqrt(second)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(parameters, first, roots, -size * group["lr"])
        else:
            torch._foreach_add_(parameters, first, alpha=-size * group["lr"])
        if group["step"] % group["lookahead"] == 0:
            torch._foreach_add_(slow, torch._foreach_sub(parameters, slow), alpha=group["blend"])
            torch._foreach_copy_(parameters, slow)

    def moments(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"first": torch.zeros_like(p), "second": torch.zeros_like(p), "slow": p.clone()}
        return [[self.state[p][name] for p in parameters] for name in ("first", "second", "slow")]


def step_size(step: int, beta1: float, beta2: float) -> tuple[float, bool]:
    """RAdam's factor of the learning rate in a step, from 1, and whether it is rectified."""
    decay, limit = beta2**step, 2 / (1 - beta2) - 1
    length = limit - 2 * step * decay / (1 - decay)
    if length <= RECTIFIED:
        return 1 / (1 - beta1**step), False
    rectification = (length - 4) / (limit - 4) * (length - 2) / length * limit / (limit - 2)
    return sqrt((1 - decay) * rectification) / (1 - beta1**step), True


def make_optimizer(
    name: Name, parameters: Iterable, *, lr: float, weight_decay: float = 1e-3, centralize: bool = True
) -> Optimizer:
    """An optimizer by name, with the published settings.

    Args:
        name: "ranger", "adamw", "sgd" (momentum 0.9, Nesterov) or "adadelta".
        parameters: Tensors or groups of them.
        lr: Learning rate.
        weight_decay: Of all parameters.
        centralize: Of Ranger: whether gradients are centralised.

    Raises:
        ValueError: If there is no such optimizer, or a number is out of range.
    """
    match name:
        case "ranger":
            return Ranger(parameters, lr, weight_decay=weight_decay, centralize=centralize)
        case "adamw":
            return AdamW(parameters, lr, betas=(0.5, 0.999), weight_decay=weight_decay, fused=True)
        case "sgd":
            return SGD(parameters, lr, momentum=MOMENTUM, weight_decay=weight_decay, nesterov=True)
        case "adadelta":
            return Adadelta(parameters, lr, weight_decay=weight_decay)
    raise ValueError(f"optimizer: name must be ranger, adamw, sgd or adadelta, got {name!r}")


def learning_rate(schedule: Schedule, step: int, steps: int, lr: float, min_lr: float) -> float:
    """The rate of a step, from 0: from ``lr`` along half a cosine, or by equal factors, to ``min_lr`` after ``steps``.

    Raises:
        ValueError: If there is no such schedule.
    """
    if schedule == "cosine":
        return min_lr + (lr - min_lr) * (1 + cos(pi * step / steps)) / 2
    if schedule == "exponential":
        return lr * (min_lr / lr) ** (step / steps)
    raise ValueError(f"optimizer: schedule must be cosine or exponential, got {schedule!r}")


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_each(parameters: Iterable[Tensor], norm: float | None = None, value: float | None = None) -> None:
    """Limits the norm of each parameter's gradient by itself, as the published code does, and then its entries."""
    parameters = [p for p in parameters if p.grad is not None]
    if norm is not None:
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_(parameter, norm)
    if value is not None:
        torch.nn.utils.clip_grad_value_(parameters, value)
