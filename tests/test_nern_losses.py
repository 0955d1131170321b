import math

import pytest
import torch
from torch import nn

from fastws.nern import losses
from fastws.nern.teachers import FeatureTaps
from fastws.nn import CIFARResNet, ResNet

SHAPES = [(4, 3, 3, 3), (5, 4, 3, 3), (5, 5, 1, 1)]


def layers(seed, shapes=SHAPES, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def logits(seed, scale=3.0):
    return scale * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(seed, requires_grad=True):
    return layers(seed, [(3, 2, 4, 4), (3, 5, 2, 2)], requires_grad)


def entries(tensors):
    return [number for tensor in tensors for number in tensor.flatten().tolist()]


# --- weights


def test_rmse_is_over_all_weights():
    predicted, original = layers(0), layers(1, requires_grad=False)
    differences = [x - y for x, y in zip(entries(predicted), entries(original), strict=True)]
    expected = math.sqrt(sum(d * d for d in differences) / len(differences))
    loss = losses.rmse(predicted, original)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    gradients = torch.autograd.grad(loss, predicted)
    for number, difference in zip(entries(gradients), differences, strict=True):
        assert number == pytest.approx(difference / (len(differences) * expected), rel=1e-9)
    assert torch.autograd.gradcheck(lambda *x: losses.rmse(x, original), predicted)


def test_rmse_of_equal_weights_has_gradient_zero():
    original = layers(0)
    gradients = torch.autograd.grad(losses.rmse(original, [x.detach() for x in original]), original)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_rows_of_the_gradient_are_those_of_the_published_step():
    """Kernels without gradient, in the loss of all, leave the others the gradient that they have with all trained."""
    predicted, original = layers(0), layers(1, requires_grad=False)
    everything = torch.autograd.grad(losses.rmse(predicted, original), predicted)
    mixed = [torch.cat([x[:1], x[1:].detach()]) for x in predicted]
    some = torch.autograd.grad(losses.rmse(mixed, original), predicted)
    for whole, part in zip(everything, some, strict=True):
        torch.testing.assert_close(part[:1], whole[:1], rtol=1e-12, atol=0)
        assert not part[1:].any()


def test_layer_mse_is_a_mean_of_means():
    predicted, original = layers(0), layers(1, requires_grad=False)
    means = []
    for x, y in zip(predicted, original, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(entries([x]), entries([y]), strict=True)]
        means.append(sum(squares) / len(squares))
    assert losses.layer_mse(predicted, original).item() == pytest.approx(sum(means) / len(means), rel=1e-12)
    assert torch.autograd.gradcheck(lambda *x: losses.layer_mse(x, original), predicted)


# --- logits


def probabilities(row, temperature=1.0):
    exponentials = [math.exp(x / temperature) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def published(student, teacher, *, under_log=0.0, of_teacher=0.0, temperature=1.0):
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = probabilities(ours, temperature), [x + of_teacher for x in probabilities(theirs, temperature)]
        total += sum(b * (math.log(b) - math.log(a + under_log)) for a, b in zip(q, p, strict=True))
    return temperature**2 * total / len(student)


DISTILLATION = {
    "kl": {},
    "stable_kl": {"under_log": 1e-4},
    "both_stable_kl": {"under_log": 1e-4, "of_teacher": 1e-4},
    "temperature_kl": {"under_log": 1e-4, "temperature": 2.0},
}


@pytest.mark.parametrize("name", losses.DISTILLATION)
def test_distillation_losses_are_their_formulas(name):
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = losses.DISTILLATION[name](student, teacher)
    assert loss.item() == pytest.approx(published(student, teacher, **DISTILLATION[name]), rel=1e-12)
    single = losses.DISTILLATION[name](student.float(), teacher.float())
    assert single.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: losses.DISTILLATION[name](x, teacher), student)


def test_stable_kl_is_negative_where_both_agree_and_bounded():
    same = logits(0)
    assert -1e-3 < losses.stable_kl(same, same) < 0
    apart = torch.tensor([[200.0, 0.0], [200.0, 0.0]])
    assert losses.stable_kl(apart, apart.flip(1)).item() == pytest.approx(-math.log(1e-4), rel=1e-6)


# --- feature maps


def norm(numbers):
    return math.sqrt(sum(x * x for x in numbers))


def published_image(student, teacher):
    total = 0.0
    for f, g in zip(student, teacher, strict=True):
        a, b = entries([f]), entries([g])
        total += sum((x / (norm(a) + 1e-3) - y / (norm(b) + 1e-3)) ** 2 for x, y in zip(a, b, strict=True))
    return total / len(student)


def published_batch(student, teacher):
    a, b = entries([student]), entries([teacher])
    return sum((x / (norm(a) + 1e-3) - y / norm(b)) ** 2 for x, y in zip(a, b, strict=True))


def published_similarity(student, teacher):
    tables = []
    for images in (student, teacher):
        rows = [entries([image]) for image in images]
        products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
        tables.append([[x / (norm(row) + 1e-3) for x in row] for row in products])
    squares = [(x - y) ** 2 for a, b in zip(*tables, strict=True) for x, y in zip(a, b, strict=True)]
    return sum(squares) / len(student) ** 2


FEATURES = {"image": published_image, "batch": published_batch, "similarity": published_similarity}


@pytest.mark.parametrize("name", losses.FEATURES)
def test_feature_losses_are_their_formulas(name):
    student, teacher, weights = maps(0), maps(1, requires_grad=False), [1, 2]
    expected = sum(w * FEATURES[name](x, y) for w, x, y in zip(weights, student, teacher, strict=True))
    loss = losses.FEATURES[name](student, teacher, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    single = losses.FEATURES[name]([x.float() for x in student], [x.float() for x in teacher], weights)
    assert single.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda *x: losses.FEATURES[name](x, teacher, weights), student)


@pytest.mark.parametrize("name", losses.FEATURES)
def test_feature_losses_of_maps_without_signal_are_finite(name):
    student, teacher = [torch.zeros(2, 3, 2, 2, requires_grad=True)], [torch.ones(2, 3, 2, 2)]
    loss = losses.FEATURES[name](student, teacher, [1])
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


# --- smoothness


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def pairs_of_neighbours(weight):
    filters, channels = weight.shape[:2]
    pairs = [((f, c), (f, c + 1)) for f in range(filters) for c in range(channels - 1)]
    return pairs + [((f, c), (f + 1, c)) for f in range(filters - 1) for c in range(channels)]


def published_distance(weight):
    kernels = weight / (
        weight.norm() if weight.shape[2:].numel() == 1 else weight.flatten(2).norm(dim=2)[..., None, None]
    )
    return -sum((kernels[a] - kernels[b]).norm().item() for a, b in pairs_of_neighbours(weight))


def test_smoothness_is_its_formula():
    weights = layers(0, requires_grad=False)
    cosines = sum(
        cosine(entries([w[a]]), entries([w[b]])) for w in weights if w.shape[2] > 1 for a, b in pairs_of_neighbours(w)
    )
    found = losses.cosine_smoothness(weights).item()
    assert found == pytest.approx(cosines + published_distance(weights[2]), rel=1e-9)
    expected = sum(published_distance(weight) for weight in weights)
    assert losses.distance_smoothness(weights).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", losses.SMOOTHNESS)
def test_smoothness_has_gradients(name):
    assert torch.autograd.gradcheck(lambda *x: losses.SMOOTHNESS[name](x), layers(0))
    weight = torch.ones(3, 3, 3, 3, requires_grad=True)  # as smooth as can be
    smooth = losses.SMOOTHNESS[name]([weight])
    assert smooth.item() == pytest.approx({"cosine": 12, "distance": 0}[name])
    assert torch.autograd.grad(smooth, weight)[0].isfinite().all()


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rmse: both lists must .* got \[4, 3, 3, 3\] instead of \[5, 3, 3, 3\]"):
        losses.rmse([torch.zeros(4, 3, 3, 3)], [torch.zeros(5, 3, 3, 3)])
    with pytest.raises(ValueError, match=r"layer_mse: .* got 2 and 1 tensors"):
        losses.layer_mse([torch.zeros(1)] * 2, [torch.zeros(1)])
    with pytest.raises(ValueError, match=r"similarity_distance: .* got 0 and 0 tensors"):
        losses.similarity_distance([], [], [])


# --- the maps that are compared


def published_maps(network, x):
    """As the published code lists them: block sums are added in place, so the maps before them are the sums."""
    relu = torch.relu
    x = network.bn1(network.conv1(x))
    found, x = [x], relu(x)
    for layer in (network.layer1, network.layer2, network.layer3):
        for block in layer:
            y = block.bn1(block.conv1(x))
            found.append(y)
            y = block.bn2(block.conv2(relu(y)))
            if block.padding:
                side = torch.cat([torch.zeros_like(x), x], 1)[:, :, ::2, ::2].roll(-block.padding, 1)
            else:
                side = block.shortcut(x)
            y = y + side
            found += [y, y]
            x = relu(y)
    return found


def expand(taps):
    return [x for x, weight in zip(taps.maps, taps.weights, strict=True) for _ in range(weight)]


@pytest.mark.parametrize("depth, option, count", [(20, "a", 28), (20, "b", 28), (56, "a", 82)])
def test_doubled_taps_are_the_published_maps(depth, option, count):
    torch.manual_seed(0)
    network, x = CIFARResNet(depth, option).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with FeatureTaps(doubled=True) as taps:
            network(x)
        expected = published_maps(network, x)
        found = expand(taps)
        assert len(found) == len(expected) == count
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        with FeatureTaps() as clean:
            network(x)
    assert clean.weights == [1] * len(taps.maps) == [1] * (1 + (depth - 2))


def test_taps_after_activations_are_those_of_resnet18():
    torch.manual_seed(0)
    network = ResNet(18, 10, stem="imagenet").eval()
    with torch.no_grad(), FeatureTaps(after=True, doubled=True) as taps:
        network(torch.randn(1, 3, 32, 32))
    assert len(expand(taps)) == 25 and taps.weights.count(2) == 8
    assert all(x.min() == 0 for x in taps.maps)


def test_taps_of_any_module_keep_what_it_computes():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.GELU(), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    plain = network(x)
    with FeatureTaps() as taps:
        tapped = network(x)
    assert torch.equal(plain, tapped) and [list(m.shape) for m in taps.maps] == [[2, 4, 6, 6], [2, 2, 4, 4]]
    torch.testing.assert_close(taps.maps[0], network[0](x))  # before what happens in place
    gradients = torch.autograd.grad(taps.maps[0].sum() + tapped.sum(), network[0].weight)
    assert gradients[0].isfinite().all()
    with FeatureTaps() as taps:
        network(x)
        network(x)
    assert len(taps.maps) == 4
