"""The augmentation of NeRN's ImageNet runs: RandAugment of each image, then mixup or cutmix of a batch.

RandAugment (arXiv 1909.13719): two operations, drawn with replacement; each spares half of the images. Magnitudes are
normal, 7 of 10 with deviation 0.5; all operations become stronger with them.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

DRAWS = 8  # numbers in [0, 1) that an image needs
MAGNITUDE = NormalDist(0.7, 0.05)
FILL = (124, 116, 104)  # what comes into view: the mean of ImageNet
MIXUP, CUTMIX = 0.1, 1.0  # parameters of the Beta distributions (arXiv 1710.09412, 1905.04899)

Operation = Callable[[Image.Image, float], Image.Image]  # magnitude in [-1, 1]; its sign is that of the direction


def solarize_add(image: Image.Image, m: float) -> Image.Image:
    added = int(110 * abs(m))
    return image.point([value + added if value < 128 else value for value in range(256)] * 3)


def enhance(kind: type) -> Operation:
    return lambda image, m: kind(image).enhance(1 + 0.9 * m)


def affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=FILL)


OPERATIONS: tuple[Operation, ...] = (
    lambda image, m: ImageOps.autocontrast(image),
    lambda image, m: ImageOps.equalize(image),
    lambda image, m: ImageOps.invert(image),
    lambda image, m: image.rotate(30 * m, Image.Resampling.BILINEAR, fillcolor=FILL),
    lambda image, m: ImageOps.posterize(image, 4 - int(4 * abs(m))),
    lambda image, m: ImageOps.solarize(image, 256 - int(256 * abs(m))),
    solarize_add,
    enhance(ImageEnhance.Color),
    enhance(ImageEnhance.Contrast),
    enhance(ImageEnhance.Brightness),
    enhance(ImageEnhance.Sharpness),
    lambda image, m: affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    lambda image, m: affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    lambda image, m: affine(image, 1, 0, 0.45 * m * image.width, 0, 1, 0),
    lambda image, m: affine(image, 1, 0, 0, 0, 1, 0.45 * m * image.height),
)


def randaugment(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """Applies up to two operations to an RGB image; ``draws`` are ``DRAWS`` uniform numbers in [0, 1)."""
    for which, spared, magnitude, sign in (draws[:4], draws[4:]):
        if spared < 0.5:
            continue
        m = min(max(MAGNITUDE.inv_cdf(max(magnitude, 1e-9)), 0.0), 1.0)
        image = OPERATIONS[int(which * len(OPERATIONS))](image, m if sign < 0.5 else -m)
    return image


def mix(images: Tensor, seed: int) -> Tensor:
    """Each image of a batch ``[B, C, H, W]`` mixed with that in the mirrored place, all in the same way.

    By mixup, weighted means, or with the same probability by cutmix, a rectangle of the other image.
    """
    generator = numpy.random.default_rng(seed)
    if generator.random() < 0.5:
        share = generator.beta(MIXUP, MIXUP)
        return share * images + (1 - share) * images.flip(0)
    side = generator.beta(CUTMIX, CUTMIX) ** 0.5  # of the rectangle, relative to the image
    sizes = images.shape[2:]
    centers, halves = generator.integers(sizes).tolist(), [round(side * size / 2) for size in sizes]
    rows, columns = (slice(max(c - half, 0), c + half) for c, half in zip(centers, halves, strict=True))
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    return mixed
