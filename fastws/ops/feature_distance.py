"""Feature distance: how far apart normalised feature maps of two networks are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastws import _native

EPSILON = 1e-3


def feature_distance(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """Squared distances of feature maps, each image normalised to length one, the mean over images.

    ``loss = sum_m weights[m] * sum_b |a / (|a| + 1e-3) - t / (|t| + 1e-3)|**2 / B`` for ``a = student_maps[m][b]`` and
    ``t = teacher_maps[m][b]``: the feature loss of NeRN (arXiv 2212.13554, where it is called attention loss), in the
    form of its published code. Each map is read once for the loss and once for the gradient, whatever its memory
    format, and half precision is added up in float32 or better. Differentiable once, in maps of either side; the
    gradient of a map of zeros is finite. The error is a few times 1e-15 times the ratio of the lengths of a and t.

    Args:
        student_maps: One or more maps, ``[B, ...]``, floating point, of the same B.
        teacher_maps: Maps of the same shapes, dtypes and devices.
        weights: How often each map counts, by default once. In the published code sums of residual blocks overwrite
            the maps before them and count twice.

    Returns:
        The loss, ``[]``, float32, or float64 for maps of float64.

    Raises:
        ValueError: If numbers of maps, a shape, dtype or device do not fit.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[-6.0, -8.0]])
        >>> fastws.feature_distance([student], [teacher])
        tensor(3.9988)
    """
    weights = [1.0] * len(student_maps) if weights is None else weights
    if not len(student_maps) == len(teacher_maps) == len(weights) or len(weights) == 0:
        got = f"{len(student_maps)}, {len(teacher_maps)} and {len(weights)}"
        raise ValueError(f"feature_distance: maps and weights must be as many, at least 1, got {got}")
    batch = student_maps[0].shape[:1]
    distances = []
    for m, (student, teacher, weight) in enumerate(zip(student_maps, teacher_maps, weights, strict=True)):
        if student.dim() < 2 or student.shape[:1] != batch or batch[0] == 0 or not student.is_floating_point():
            must = f"[B, ...] floating point with B = {batch[0] if batch else 'images'} >= 1"
            got = f"{list(student.shape)} {student.dtype}"
            raise ValueError(f"feature_distance: student map {m} must be {must}, got {got}")
        if (teacher.shape, teacher.dtype, teacher.device) != (student.shape, student.dtype, student.device):
            must = f"{list(student.shape)} {student.dtype} on {student.device}"
            got = f"{list(teacher.shape)} {teacher.dtype} on {teacher.device}"
            raise ValueError(f"feature_distance: teacher map {m} must be {must}, got {got}")
        rows = image_rows(student, teacher)
        distances.append(torch.ops.fastws.feature_distance(*rows, weight / batch[0])[0])
    return torch.stack(distances).sum()


def image_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps as ``[B, K]``, in the order in which the student lies in memory, where that needs no copy."""
    if student.dim() == 4 and student.is_contiguous(memory_format=torch.channels_last):
        return student.permute(0, 2, 3, 1).flatten(1), teacher.permute(0, 2, 3, 1).flatten(1)
    return student.flatten(1), teacher.flatten(1)


def feature_distance_reference(student: Tensor, teacher: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The weighted sum of distances of ``[B, K]``, and ``sum(a * a), sum(t * t), sum((a - t)**2)``, ``[B, 3]``."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    a, t = student.to(dtype), teacher.to(dtype)
    sums = torch.stack([a.square().sum(1), t.square().sum(1), (a - t).square().sum(1)], 1)
    lengths = sums[:, :2].sqrt()[..., None]
    distances = (a / (lengths[:, 0] + EPSILON) - t / (lengths[:, 1] + EPSILON)).square()
    return weight * distances.sum(), sums.double()


def feature_distance_backward_reference(
    grad: Tensor, student: Tensor, teacher: Tensor, sums: Tensor, weight: float
) -> Tensor:
    """``2 * weight * grad * scale_a * (a * (scale_a - u.a * scale_a / |a|) - t * scale_t)`` for the difference u."""
    of_student, of_teacher = gradient_scales(grad, sums, weight)
    dtype = torch.promote_types(student.dtype, torch.float32)
    gradient = student.to(dtype) * of_student.to(dtype)[:, None] - teacher.to(dtype) * of_teacher.to(dtype)[:, None]
    return gradient.to(student.dtype)


def gradient_scales(grad: Tensor, sums: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The gradient is the first times the student minus the second times the teacher; ``[B]``, float64."""
    squares_a, squares_t, apart = sums.unbind(1)
    length_a, length_t = squares_a.sqrt(), squares_t.sqrt()
    scale_a, scale_t = 1 / (length_a + EPSILON), 1 / (length_t + EPSILON)
    product = (squares_a + squares_t - apart) / 2
    along = torch.where(length_a > 0, (scale_a * squares_a - scale_t * product) / length_a, 0)
    outer = 2 * weight * grad.double() * scale_a
    return outer * scale_a * (1 - along), outer * scale_t


torch.library.define(
    "fastws::feature_distance", "(Tensor student, Tensor teacher, float weight) -> (Tensor distance, Tensor sums)"
)
torch.library.define(
    "fastws::feature_distance_backward",
    "(Tensor grad, Tensor student, Tensor teacher, Tensor sums, float weight) -> Tensor",
)
torch.library.register_kernel("fastws::feature_distance", "default", feature_distance_reference)
torch.library.register_kernel("fastws::feature_distance_backward", "default", feature_distance_backward_reference)


@torch.library.register_fake("fastws::feature_distance")
def feature_distance_fake(student, teacher, weight):
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty((), dtype=dtype), student.new_empty(len(student), 3, dtype=torch.float64)


@torch.library.register_fake("fastws::feature_distance_backward")
def feature_distance_backward_fake(grad, student, teacher, sums, weight):
    return student.new_empty(student.shape)


def feature_distance_setup_context(ctx, inputs, output):
    student, teacher, ctx.weight = inputs
    _, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(student, teacher, sums)


def feature_distance_backward(ctx, grad_distance, grad_sums):
    student, teacher, sums = ctx.saved_tensors
    grad_student = grad_teacher = None
    if ctx.needs_input_grad[0]:
        grad_student = torch.ops.fastws.feature_distance_backward(grad_distance, student, teacher, sums, ctx.weight)
    if ctx.needs_input_grad[1]:  # the distance is the same seen from the other side
        swapped = sums[:, [1, 0, 2]]
        grad_teacher = torch.ops.fastws.feature_distance_backward(grad_distance, teacher, student, swapped, ctx.weight)
    return grad_student, grad_teacher, None


def feature_distance_double_backward(ctx, grad):
    raise NotImplementedError("feature_distance: differentiable once")


torch.library.register_autograd(
    "fastws::feature_distance", feature_distance_backward, setup_context=feature_distance_setup_context
)
torch.library.register_autograd("fastws::feature_distance_backward", feature_distance_double_backward)
_native.register_triton("feature_distance", file="feature_distance")
_native.register_triton("feature_distance_backward", file="feature_distance")
