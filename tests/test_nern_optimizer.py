import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from fastws.nern.optimizer import Ranger, clip_each, learning_rate, make_optimizer, set_learning_rate

STEPS = 20
LR, BETAS, EPS, DECAY = 5e-3, (0.5, 0.999), 1e-5, 1e-3


def rate(step):
    return LR * (1 - step / 40)


def published_ranger(parameter, gradients, *, centralize=True, decay=DECAY):
    """Values after each step, one parameter at a time and out of place, from the formulas."""
    beta1, beta2 = BETAS
    value, slow = parameter.clone(), parameter.clone()
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    limit, values = 2 / (1 - beta2) - 1, []
    for t, gradient in enumerate(gradients, start=1):
        lr = rate(t - 1)
        if centralize and gradient.dim() > 1:
            rows = gradient.reshape(len(gradient), -1)
            gradient = (rows - rows.sum(1, keepdim=True) / rows.shape[1]).reshape(gradient.shape)
        second = beta2 * second + (1 - beta2) * gradient**2
        first = beta1 * first + (1 - beta1) * gradient
        value = value - lr * decay * value
        length = limit - 2 * t * beta2**t / (1 - beta2**t)
        correction = 1 - beta1**t
        if length > 5:
            r = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            value = value - lr * math.sqrt((1 - beta2**t) * r) / correction * first / (second.sqrt() + EPS)
        else:
            value = value - lr / correction * first
        if t % 6 == 0:
            slow = slow + 0.5 * (value - slow)
            value = slow.clone()
        values.append(value)
    return values


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (4,), (3, 2, 3, 3), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def gradients(tensors):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in tensors] for _ in range(STEPS)]


@pytest.mark.parametrize("centralize", [True, False])
@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_ranger_takes_the_published_steps(centralize, decay):
    """Both branches of RAdam (the second from step 6) and three blends."""
    tensors = parameters()
    steps = gradients(tensors)
    expected = [
        published_ranger(p.detach(), [step[i] for step in steps], centralize=centralize, decay=decay)
        for i, p in enumerate(tensors)
    ]
    optimizer = Ranger(tensors, LR, weight_decay=decay, centralize=centralize)
    for t, step in enumerate(steps):
        for parameter, gradient in zip(tensors, step, strict=True):
            parameter.grad = gradient.clone()
        set_learning_rate(optimizer, rate(t))
        optimizer.step()
        for parameter, values, gradient in zip(tensors, expected, step, strict=True):
            torch.testing.assert_close(parameter.detach(), values[t], rtol=1e-12, atol=1e-14)
            assert torch.equal(parameter.grad, gradient)


def test_centralising_matters():
    changed = []
    for centralize in (True, False):
        (parameter,) = tensors = [nn.Parameter(torch.zeros(2, 3))]
        parameter.grad = torch.ones(2, 3)  # without its mean nothing
        Ranger(tensors, centralize=centralize).step()
        changed.append(bool(parameter.detach().any()))
    assert changed == [False, True]


def test_ranger_goes_on_where_it_was_saved():
    tensors = parameters()
    steps = gradients(tensors)

    def run(optimizer, targets, steps):
        for step in steps:
            for parameter, gradient in zip(targets, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    first = Ranger(tensors, LR)
    run(first, tensors, steps[:8])
    copies = [nn.Parameter(p.detach().clone()) for p in tensors]
    second = Ranger(copies, LR)
    second.load_state_dict(deepcopy(first.state_dict()))
    run(first, tensors, steps[8:])
    run(second, copies, steps[8:])
    assert all(torch.equal(p, q) for p, q in zip(tensors, copies, strict=True))


def test_ranger_leaves_parameters_without_gradient():
    first, second = tensors = parameters()[:2]
    before, first.grad = second.detach().clone(), torch.ones_like(first)
    Ranger(tensors).step()
    assert torch.equal(second, before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0}, "lr must be in its range, see the docstring, got 0"),
        ({"betas": (0.5, 1.0)}, r"betas must be .* got \(0.5, 1.0\)"),
        ({"lookahead": 0}, "lookahead must be"),
        ({"blend": 1.5}, "blend must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
    ],
)
def test_ranger_refuses(options, message):
    with pytest.raises(ValueError, match=f"ranger: {message}"):
        Ranger(parameters(), **options)


@pytest.mark.parametrize("name", ["ranger", "adamw", "sgd", "adadelta"])
def test_optimizers_minimise(name):
    tensors = [nn.Parameter(torch.full((3, 4), 2.0)), nn.Parameter(torch.full((3,), 2.0))]
    optimizer = make_optimizer(name, tensors, lr=0.05, weight_decay=0.0, centralize=False)
    for _ in range(20):
        optimizer.zero_grad()
        sum(p.square().sum() for p in tensors).backward()
        optimizer.step()
    assert all((p.detach().abs() < 1.999).all() for p in tensors)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer: name must be ranger, adamw, sgd or adadelta, got 'lion'"):
        make_optimizer("lion", parameters(), lr=1.0)
    with pytest.raises(ValueError, match="optimizer: schedule must be cosine or exponential, got 'linear'"):
        learning_rate("linear", 0, 1, 1.0, 0.1)


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
def test_rates_are_those_of_torch(schedule):
    steps, minimum = 10, 1e-6
    optimizer = torch.optim.SGD(parameters(), LR)
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, minimum)
    else:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, (minimum / LR) ** (1 / steps))
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(schedule, step, steps, LR, minimum) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert learning_rate(schedule, steps, steps, LR, minimum) == pytest.approx(minimum)


def test_each_gradient_is_clipped_by_itself():
    tensors = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    tensors[0].grad, tensors[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    clip_each(tensors, norm=1.0)
    torch.testing.assert_close(tensors[0].grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert tensors[1].grad.tolist() == pytest.approx([0.3, 0.4])
    clip_each(tensors, value=0.5)
    assert tensors[0].grad.tolist() == [0.5, 0.5] and tensors[1].grad.tolist() == pytest.approx([0.3, 0.4])
