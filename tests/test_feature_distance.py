import pytest
import torch

import fastws
from fastws import _native
from fastws.ops.feature_distance import (
    EPSILON,
    feature_distance_backward_reference,
    feature_distance_reference,
)
from fastws.testing import assert_as_accurate, devices, implementations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 2), (3, 7), (2, 515), (35, 3), (1, 20_001)]  # B, K


def example(B, K, dtype=torch.float32, device="cpu", apart=0.5):
    rng = torch.Generator().manual_seed(0)
    teacher, noise = torch.randn(2, B, 2 * K, generator=rng)[..., ::2]  # not contiguous
    return (teacher + apart * noise).to(device, dtype), teacher.to(device, dtype)


def published(student_maps, teacher_maps):
    """Every map divided by its length and a thousandth, image by image; the squares of differences, over the images."""

    def normalised(x):
        return x / (x.reshape(len(x), -1).norm(dim=1).view(-1, *[1] * (x.dim() - 1)) + 1e-3)

    return sum(
        ((normalised(t) - normalised(s)) ** 2).sum() for s, t in zip(student_maps, teacher_maps, strict=True)
    ) / len(student_maps[0])


@pytest.mark.parametrize("name, function, device", implementations("feature_distance"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_feature_distance_is_the_reference(name, function, device, dtype, shape):
    args = *example(*shape, dtype, device), 0.3
    for output, actual in enumerate(function(*args)):
        assert_as_accurate(actual, lambda *x, output=output: feature_distance_reference(*x)[output], *args)


@pytest.mark.parametrize("name, function, device", implementations("feature_distance_backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_feature_distance_backward_is_the_reference(name, function, device, dtype, shape):
    student, teacher = example(*shape, dtype, device)
    sums = feature_distance_reference(student.double(), teacher.double(), 1.0)[1]
    grad = torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32), device=device)
    args = grad, student, teacher, sums, 0.3
    assert_as_accurate(function(*args), feature_distance_backward_reference, *args)


@pytest.mark.parametrize("name, function, device", implementations("feature_distance"))
def test_feature_distance_by_hand(name, function, device):
    student = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=device)
    teacher = torch.tensor([[0.0, 2.0], [0.0, 1.0]], device=device)
    distance, sums = function(student, teacher, 0.5)
    assert sums.tolist() == [[25, 4, 13], [0, 1, 1]]
    a, t = 1 / (5 + EPSILON), 1 / (2 + EPSILON)
    expected = (3 * a) ** 2 + (4 * a - 2 * t) ** 2 + 1 / (1 + EPSILON) ** 2
    assert distance.item() == pytest.approx(0.5 * expected, rel=1e-6)


@pytest.mark.parametrize("name, function, device", implementations("feature_distance"))
def test_feature_distance_of_nearly_equal_maps_keeps_its_digits(name, function, device):
    student, teacher = example(4, 5000, device=device, apart=1e-4)
    exact = feature_distance_reference(student.double(), teacher.double(), 1.0)[0]
    assert exact < 1e-7 and function(student, teacher, 1.0)[0].item() == pytest.approx(exact.item(), rel=1e-4)
    assert function(student, student, 1.0)[0] == 0


@pytest.mark.parametrize("name, function, device", implementations("feature_distance_backward"))
def test_feature_distance_of_a_map_of_zeros_has_a_gradient(name, function, device):
    student, teacher = torch.zeros(1, 2, device=device), torch.tensor([[3.0, 4.0]], device=device)
    sums = torch.tensor([[0.0, 25.0, 25.0]], dtype=torch.float64, device=device)
    gradient = function(torch.tensor(1.0, device=device), student, teacher, sums, 1.0)
    torch.testing.assert_close(gradient, -2 / EPSILON * teacher / (5 + EPSILON))


@pytest.mark.parametrize("device", devices())
def test_feature_distance_is_the_published_loss(device):
    rng = torch.Generator().manual_seed(1)
    shapes = [(4, 6, 5, 5), (4, 8, 3, 3), (4, 10)]
    students = [torch.randn(s, generator=rng).to(device).requires_grad_() for s in shapes]
    teachers = [torch.randn(s, generator=rng).to(device).requires_grad_() for s in shapes]
    # the second map counts twice, as the one that it overwrites
    expected = published([*students, students[1]], [*teachers, teachers[1]])
    actual = fastws.feature_distance(students, teachers, weights=[1, 2, 1])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(loss, [*students, *teachers]) for loss in (actual, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("formats", [(True, True), (True, False), (False, True)])
def test_feature_distance_takes_any_memory_format(formats):
    def laid_out(x, last):
        return x.contiguous(memory_format=torch.channels_last) if last else x

    student, teacher = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    losses, grads = [], []
    for student_last, teacher_last in [(False, False), formats]:
        x = laid_out(student, student_last).requires_grad_()
        losses.append(fastws.feature_distance([x], [laid_out(teacher, teacher_last)]))
        grads.append(torch.autograd.grad(losses[-1], x)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
    assert grads[1].is_contiguous(memory_format=torch.channels_last) == formats[0]


@pytest.mark.parametrize("ratio", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("name, function, device", implementations("feature_distance"))
def test_feature_distance_of_maps_of_other_lengths(name, function, device, ratio):
    student, teacher = (x.to(device) for x in example(3, 20_001, torch.float64))
    student = student * ratio
    args = student, teacher, 1 / 3
    exact = published([student], [teacher]).item()
    assert function(*args)[0].item() == pytest.approx(exact, rel=0, abs=5e-15 * ratio)


@pytest.mark.skipif("feature_distance" not in _native.COMPILED["cpu"], reason="PyTorch's own sums depend on threads")
def test_feature_distance_does_not_depend_on_the_threads():
    threads, maps, losses = torch.get_num_threads(), example(64, 5000), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        losses.append(torch.ops.fastws.feature_distance(*maps, 1.0)[0])
    torch.set_num_threads(threads)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("device", devices())
def test_feature_distance_gradients(device):
    maps = [x.clone().requires_grad_() for x in example(2, 5, torch.float64, device)]
    assert torch.autograd.gradcheck(lambda a, t: fastws.feature_distance([a, t], [t, a], [2, 1]), maps)
    (grad,) = torch.autograd.grad(fastws.feature_distance(maps[:1], maps[1:]), maps[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="feature_distance: differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("device", devices())
def test_feature_distance_opcheck(device):
    student, teacher = (x.clone().requires_grad_() for x in example(3, 5, device=device))
    torch.library.opcheck(torch.ops.fastws.feature_distance.default, (student, teacher, 0.3))
    sums = feature_distance_reference(student.detach(), teacher.detach(), 0.3)[1]
    grad = torch.tensor(0.7, device=device)
    args = grad, student.detach(), teacher.detach(), sums, 0.3
    torch.library.opcheck(torch.ops.fastws.feature_distance_backward.default, args)


@pytest.mark.parametrize("device", devices())
def test_feature_distance_compiles(device):
    student, teacher = (x.clone().requires_grad_() for x in example(3, 5, device=device))
    compiled = torch.compile(fastws.feature_distance, fullgraph=True, backend="aot_eager")
    losses = [f([student, teacher], [teacher, student], [2, 1]) for f in (fastws.feature_distance, compiled)]
    assert losses[0] == losses[1]
    assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in losses))


def test_feature_distance_names_the_wrong_argument():
    student, teacher = example(3, 5)
    with pytest.raises(ValueError, match="maps and weights must be as many, at least 1, got 1, 2 and 1"):
        fastws.feature_distance([student], [teacher, teacher])
    with pytest.raises(ValueError, match="maps and weights must be as many, at least 1, got 0, 0 and 0"):
        fastws.feature_distance([], [])
    with pytest.raises(
        ValueError, match=r"student map 1 must be \[B, ...\] floating point with B = 3 >= 1, got \[2, 5\]"
    ):
        fastws.feature_distance([student, student[:2]], [teacher, teacher[:2]])
    with pytest.raises(ValueError, match=r"teacher map 0 must be \[3, 5\] torch.float32 on cpu, got \[3, 5\] torch.fl"):
        fastws.feature_distance([student], [teacher.double()])
