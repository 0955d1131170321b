"""The augmentation of ImageNet runs: operations against their definitions, and how often and how strongly they come."""

from collections import Counter

import numpy
import pytest
import torch
from PIL import Image

from fastws.nern import augment
from fastws.nern.augment import FILL, OPERATIONS, mix, randaugment

NAMES = ("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast")
NAMES += ("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y")
M = 0.7  # magnitude


def pixels(size=(20, 10)) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)


def apply(name, array, m=M) -> numpy.ndarray:
    return numpy.asarray(OPERATIONS[NAMES.index(name)](Image.fromarray(array), m)).astype(int)


def test_there_are_fifteen_operations():
    assert len(OPERATIONS) == len(NAMES) == 15


@pytest.mark.parametrize("m", [M, -M])
def test_operations_on_values(m):
    x = pixels()
    wide = x.astype(int)
    numpy.testing.assert_array_equal(apply("invert", x, m), 255 - wide)
    numpy.testing.assert_array_equal(apply("posterize", x, m), wide // 64 * 64)  # 4 - 2 bits
    numpy.testing.assert_array_equal(apply("solarize", x, m), numpy.where(wide < 256 - 179, wide, 255 - wide))
    numpy.testing.assert_array_equal(apply("solarize_add", x, m), numpy.where(wide < 128, wide + 77, wide))
    numpy.testing.assert_allclose(apply("brightness", x, m), (wide * (1 + 0.9 * m)).clip(0, 255), atol=1)
    grey = wide @ (0.299, 0.587, 0.114)
    numpy.testing.assert_allclose(
        apply("color", x, m), (grey[..., None] + (1 + 0.9 * m) * (wide - grey[..., None])).clip(0, 255), atol=3
    )
    mean = grey.mean()
    numpy.testing.assert_allclose(apply("contrast", x, m), (mean + (1 + 0.9 * m) * (wide - mean)).clip(0, 255), atol=2)


def test_operations_on_histograms():
    x = pixels((100, 40)) // 2 + 30  # 30 ... 157
    for name in ("autocontrast", "equalize"):
        found = apply(name, x)
        assert found.min() < 3 and found.max() > 252
        for channel in range(3):  # a growing function of the values
            order = numpy.argsort(x[..., channel], axis=None, kind="stable")
            assert (numpy.diff(found[..., channel].flat[order]) >= 0).all()


def test_sharpness_acts_on_edges():
    x = numpy.full((9, 9, 3), 100, dtype=numpy.uint8)
    x[4, 4] = 150
    sharper, softer = apply("sharpness", x, M)[4, 4, 0], apply("sharpness", x, -M)[4, 4, 0]
    assert softer < 150 < sharper and (apply("sharpness", x, M)[0] == 100).all()


def test_operations_on_places():
    x = pixels((100, 40))
    moved = apply("translate_x", x, 0.2)  # 9 pixels
    numpy.testing.assert_allclose(moved[:, :91], x[:, 9:].astype(int), atol=1)
    assert (moved[:, 91:] == FILL).all()
    moved = apply("translate_y", x, -0.5)  # 9 pixels
    numpy.testing.assert_allclose(moved[9:], x[:31].astype(int), atol=1)
    assert (moved[:9] == FILL).all()
    ramp = numpy.repeat(numpy.arange(100, dtype=numpy.uint8)[None, :, None], 40, 0).repeat(3, 2)
    sheared = apply("shear_x", ramp, 1.0)  # row y is moved by 0.3 (y + 1/2)
    numpy.testing.assert_allclose(sheared[10, :80, 0], numpy.arange(80) + 0.3 * 10.5, atol=1)
    ramp = ramp.swapaxes(0, 1).copy()
    numpy.testing.assert_allclose(apply("shear_y", ramp, 1.0)[:80, 10, 0], numpy.arange(80) + 0.3 * 10.5, atol=1)
    dot = numpy.zeros((41, 41, 3), dtype=numpy.uint8)
    dot[20, 39:41] = 255
    rotated = apply("rotate", dot, 1.0)  # by 30 degrees, to the left
    y, x = (rotated[..., 0] * (rotated != FILL).any(-1)).nonzero()[0].mean(), numpy.argmax(rotated[..., 0].max(0))
    assert y < 20 and x < 39


def test_randaugment_draws_evenly(monkeypatch):
    seen = []

    def record(number):
        return lambda image, m: (seen.append((number, m)), image)[1]

    monkeypatch.setattr(augment, "OPERATIONS", tuple(record(number) for number in range(15)))
    draws = torch.rand(6000, augment.DRAWS, generator=torch.Generator().manual_seed(0)).tolist()
    image = Image.new("RGB", (4, 4))
    for one in draws:
        randaugment(image, one)
    counts = Counter(number for number, _ in seen)
    chi_square = sum((counts[number] - len(seen) / 15) ** 2 / (len(seen) / 15) for number in range(15))
    assert abs(len(seen) - 6000) < 220 and chi_square < 36.1  # 99.9 % of 14 degrees of freedom
    magnitudes = numpy.array([m for _, m in seen])
    assert abs((magnitudes > 0).mean() - 0.5) < 0.03
    assert abs(abs(magnitudes).mean() - 0.7) < 0.003 and abs(abs(magnitudes).std() - 0.05) < 0.003


def test_mix_is_mixup_or_cutmix():
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 12, 8)
    shares, areas = [], []
    for seed in range(2000):
        mixed = mix(images, seed)
        torch.testing.assert_close(mixed[0] + mixed[1], torch.ones(3, 12, 8))  # both in the same way
        if set(mixed.unique().tolist()) <= {0.0, 1.0} and mixed[0].unique().numel() > 1:
            rows, columns = mixed[0, 0].amax(1).nonzero(), mixed[0, 0].amax(0).nonzero()
            box = mixed[0, 0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == 1).all() and (mixed[0] == mixed[0, :1]).all()
            areas.append(box.numel() / 96)
        else:
            assert mixed[0].unique().numel() == 1
            shares.append(mixed[0, 0, 0, 0].item())
    assert torch.equal(mix(images, 3), mix(images, 3))
    # Beta(0.1, 0.1) has its mass at the ends, and mean 1/2; boxes of side sqrt(u) lose what is outside of the image
    assert abs(numpy.mean(shares) - 0.5) < 0.05 and numpy.mean([0.1 < share < 0.9 for share in shares]) < 0.25
    assert 700 < len(areas) < 1050 and 0.2 < numpy.mean(areas) < 0.5
