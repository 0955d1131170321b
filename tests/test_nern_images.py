import numpy
import pytest
import torch
from PIL import Image

from fastws.data.images import read
from fastws.nern import images
from fastws.nern.augment import DRAWS
from fastws.nern.images import MEAN, ORDER, STD, decode, flip_and_crop, open_images, uniform_images
from fastws.random.integers import epoch_rows

COUNTS = {"train": 30, "test": 8}


@pytest.fixture
def folder(tmp_path):
    """Images of 12 x 8 pixels whose first pixel is their number, of two classes."""
    random = numpy.random.default_rng(0)
    for part, count in COUNTS.items():
        for number in range(count):
            pixels = random.integers(0, 256, (8, 12, 3), dtype=numpy.uint8)
            pixels[0, 0] = number
            path = tmp_path / part / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path


def statistics(values):
    return torch.tensor(values)[:, None, None]


def pixels_of(batch):
    """Pixels from 0 to 255 of a normalised batch."""
    return (batch * statistics(STD) + statistics(MEAN)) * 255


def test_parts_are_apart_and_normalised(folder):
    found = open_images(folder, validation=2)
    assert {name: len(part.labels) for name, part in found.parts.items()} == {"train": 28, "val": 2, "test": 8}
    assert found.shape == (3, 8, 12) and found.num_classes == 2
    train, val = (found.parts[name].images.flatten(1) for name in ("train", "val"))
    assert not (train[:, None] == val[None]).all(2).any()
    (raw, labels), _ = read(folder, None, None)
    assert sorted(map(tuple, torch.cat([train, val]).tolist())) == sorted(map(tuple, raw.flatten(1).tolist()))
    ((test, test_labels),) = found.batches("test", 100)
    expected = read(folder, None, None)[1]
    torch.testing.assert_close(pixels_of(test), expected[0].float(), rtol=0, atol=1e-3)
    assert torch.equal(test_labels, expected[1])
    assert [len(y) for _, y in found.batches("test", 3)] == [3, 3, 2]


def test_validation_is_at_most_a_tenth(folder):
    assert len(open_images(folder).parts["val"].labels) == 3
    assert "val" not in open_images(folder, validation=0).parts
    limited = open_images(folder, limit=5, validation=3)
    assert {name: len(part.labels) for name, part in limited.parts.items()} == {"train": 5, "val": 3, "test": 5}


def test_flips_and_crops_are_those_of_their_words():
    torch.manual_seed(0)
    x = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    words = torch.randint(0, 2**32, (5, 64))
    found = flip_and_crop(x, words)
    for image, result, (flip, down, right) in zip(x, found, words[:3].T.tolist(), strict=True):
        canvas = torch.zeros(3, 6 + 8, 5 + 8, dtype=torch.uint8)
        canvas[:, 4:-4, 4:-4] = image.flip(2) if flip >= 2**31 else image
        top, left = down * 9 // 2**32, right * 9 // 2**32
        assert torch.equal(result, canvas[:, top : top + 6, left : left + 5])


def test_flips_and_crops_cover_everything():
    x = torch.zeros(4000, 1, 9, 11)
    x[:, 0, 4, 4] = 1  # a dot, one pixel left of the middle
    words = torch.randint(0, 2**32, (5, 4000), generator=torch.Generator().manual_seed(0))
    counts = flip_and_crop(x, words).sum(0)[0]
    assert counts.sum() == 4000 and (counts > 0).all()  # it never leaves, and comes everywhere
    expected = torch.tensor([1.0, 1, 2, 2, 2, 2, 2, 2, 2, 1, 1]) * 4000 / 18  # columns 0 to 8, or 2 to 10 where flipped
    assert ((counts.sum(0) - expected).square() / expected).sum() < 30  # chi-square of 10 degrees of freedom: 0.1 %
    assert ((counts.sum(1) - 4000 / 9).square() / (4000 / 9)).sum() < 26


def test_batches_depend_on_seed_and_step_alone(folder):
    first, second = open_images(folder), open_images(folder)
    assert torch.equal(first.batch(7, 0, 5), second.batch(7, 0, 5))
    assert not torch.equal(first.batch(7, 0, 5), first.batch(7, 0, 6))
    assert not torch.equal(first.batch(7, 0, 5), first.batch(7, 1, 5))


def test_every_epoch_visits_every_image(folder):
    images = open_images(folder, validation=0)
    count = len(images.parts["train"].labels)
    rows = torch.cat([epoch_rows(count, 4, 0, ORDER, step) for step in range(count)])[: 2 * count].view(2, count)
    for step in range(3):
        labels = images.parts["train"].labels[rows[0, 4 * step : 4 * step + 4]]
        assert torch.equal(images.labelled_batch(4, 0, step)[1], labels)
    assert rows.sort(1).values.tolist() == [list(range(count))] * 2 and not torch.equal(*rows)
    assert len(epoch_rows(3, 8, 0, ORDER, 1)) == 8  # more than an epoch


def test_files_are_read_when_wanted(folder):
    found = open_images(folder, size=6, validation=2)
    assert {name: len(part.labels) for name, part in found.parts.items()} == {"train": 28, "val": 2, "test": 8}
    assert found.shape == (3, 6, 6)
    batch = found.batch(5, 0, 3)
    assert batch.shape == (5, 3, 6, 6) and torch.equal(batch, open_images(folder, size=6, validation=2).batch(5, 0, 3))
    ((test, labels),) = found.batches("test", 100)
    part = found.parts["test"]
    with Image.open(part.paths[3]) as image:
        whole = image.resize((6, 6), Image.Resampling.BILINEAR, box=(2.5, 0.5, 9.5, 7.5))
    torch.testing.assert_close(pixels_of(test)[3], torch.tensor(numpy.array(whole)).permute(2, 0, 1).float())
    assert labels.tolist() == [int(path.parent.name == "b") for path in part.paths]


def test_strong_augmentation_changes_training_images_alone(folder):
    plain, strong = (open_images(folder, size=16, augment=augment) for augment in ("crop", "rand"))
    batches = [images.batch(20, 0, 3) for images in (plain, strong, open_images(folder, size=16, augment="rand"))]
    assert torch.equal(batches[1], batches[2]) and not torch.equal(batches[1], strong.batch(20, 0, 4))
    assert (batches[0] - batches[1]).abs().amax((1, 2, 3)).gt(0).sum() > 10
    assert torch.equal(plain.labelled_batch(20, 0, 3)[1], strong.labelled_batch(20, 0, 3)[1])
    ((test, _),), ((same, _),) = (list(images.batches("test", 100)) for images in (plain, strong))
    assert torch.equal(test, same)


def test_largest_words_are_below_one(folder):
    paths = open_images(folder, size=6).parts["test"].paths
    for word in (0, 2**32 - 1):
        words = torch.full((5 + DRAWS, len(paths)), word)
        assert decode(paths, 6, words).shape == (len(paths), 3, 6, 6)


def test_random_parts_are_inside_and_vary():
    words = torch.randint(0, 2**32, (5, 500), generator=torch.Generator().manual_seed(0))
    boxes = [images.random_part(120, 80, draws) for draws in (words * images.UNIT).T.tolist()]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 120 + 1e-9 and 0 <= top < bottom <= 80 + 1e-9
    areas = [(right - left) * (bottom - top) / 9600 for left, top, right, bottom in boxes]
    assert min(areas) < 0.12 and max(areas) > 0.7 and 0.4 < sum(areas) / 500 < 0.6


def test_a_folder_without_training_images_can_be_evaluated(folder):
    (folder / "train").rename(folder / "elsewhere")
    found = open_images(folder, size=6)
    assert list(found.parts) == ["test"] and found.num_classes == 2
    with pytest.raises(ValueError, match="nern images: data must have training images, got none"):
        found.batch(2, 0, 0)


def test_uniform_images():
    x = uniform_images((3, 8, 8), 64, 0, 7)
    assert x.shape == (64, 3, 8, 8) and x.dtype == torch.float32 and x.min() >= -2 and x.max() < 2
    assert abs(x.mean()) < 0.05 and abs(x.var() - 4 / 3) < 0.05
    assert torch.equal(x, uniform_images((3, 8, 8), 64, 0, 7))
    assert not torch.equal(x, uniform_images((3, 8, 8), 64, 0, 8))
    assert not torch.equal(x, uniform_images((3, 8, 8), 64, 1, 7))


def test_bad_images_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="nern images: mean and std must have 3 entries, got 1 and 1"):
        open_images(folder, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="nern images: augment must be 'crop' for images in memory, got 'rand'"):
        open_images(folder, augment="rand")
    with pytest.raises(FileNotFoundError, match="data must have a folder 'test' or 'val' with a folder per class"):
        open_images(tmp_path / "train", size=8)
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png: file must be a readable PNG or JPEG, got"):
        decode([path], 8)
    Image.new("I;16", (8, 8)).save(path)
    with pytest.raises(ValueError, match="broken.png: file must have 8 bits per channel, got mode I;16"):
        decode([path], 8)


def test_damaged_png_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[36] = 0  # the length of its pixels
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png: file must be a readable PNG or JPEG, got"):
        decode([tmp_path / "a.png"], 8)


def test_grey_images_are_normalised_by_the_mean_of_colours():
    images, _ = next(open_images("digits", limit=4).batches("test", 4))
    assert images.shape == (4, 1, 8, 8) and images.min() == pytest.approx(-0.449 / 0.226, abs=1e-3)
    assert images.max() == pytest.approx((1 - 0.449) / 0.226, abs=1e-2)  # white is 16
