"""Every kind of image data set, written as its authors publish it and read back."""

import bz2
import gzip
import os
import pickle

import numpy
import pytest
import scipy.io
import torch
from PIL import Image

from fastws.data.images import Transform, change, load, read
from fastws.zoo.making.make import Config, prepare

LABELS = {"train": numpy.array([3, 0, 2, 1, 9, 5, 5, 0, 1, 2]), "test": numpy.array([0, 9, 4])}
CIFAR10 = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def pixels(part, *shape, seed=0):
    random = numpy.random.default_rng(seed + (part == "test"))
    return random.integers(0, 256, (len(LABELS[part]), *shape), dtype=numpy.uint8)


def write_idx(path, array, packed):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(head + array.tobytes()))
    else:
        path.write_bytes(head + array.tobytes())


def write_mnist(folder, packed=False, below="MNIST/raw"):
    place = folder / below
    place.mkdir(parents=True)
    for part, name in (("train", "train"), ("test", "t10k")):
        write_idx(place / f"{name}-images-idx3-ubyte", pixels(part, 28, 28), packed)
        write_idx(place / f"{name}-labels-idx1-ubyte", LABELS[part].astype(numpy.uint8), packed)
    return {part: pixels(part, 28, 28)[:, None] for part in LABELS}


def write_cifar10(folder):
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for part, names in CIFAR10.items():
        split = zip(names, numpy.array_split(numpy.arange(len(LABELS[part])), len(names)), strict=True)
        for name, rows in split:
            batch = {b"data": pixels(part, 3072)[rows], b"labels": LABELS[part][rows].tolist(), b"batch_label": b"x"}
            (place / name).write_bytes(pickle.dumps(batch, protocol=2))
    return {part: pixels(part, 3072).reshape(-1, 3, 32, 32) for part in LABELS}


def write_cifar100(folder):
    place = folder / "cifar-100-python"
    place.mkdir(parents=True)
    (place / "meta").write_bytes(b"")
    for part in LABELS:
        coarse = {b"coarse_labels": [0] * len(LABELS[part])}
        batch = {b"data": pixels(part, 3072), b"fine_labels": LABELS[part].tolist()} | coarse
        (place / part).write_bytes(pickle.dumps(batch, protocol=2))
    return {part: pixels(part, 3072).reshape(-1, 3, 32, 32) for part in LABELS}


def write_svhn(folder):
    folder.mkdir()
    for part in LABELS:
        labels = numpy.where(LABELS[part] == 0, 10, LABELS[part])[:, None]
        content = {"X": pixels(part, 3, 32, 32).transpose(2, 3, 1, 0), "y": labels}
        scipy.io.savemat(folder / f"{part}_32x32.mat", content)
    return {part: pixels(part, 3, 32, 32) for part in LABELS}


def write_stl10(folder):
    place = folder / "stl10_binary"
    place.mkdir(parents=True)
    for part in LABELS:
        pixels(part, 3, 96, 96).transpose(0, 1, 3, 2).tofile(place / f"{part}_X.bin")
        (LABELS[part] + 1).astype(numpy.uint8).tofile(place / f"{part}_y.bin")
    return {part: pixels(part, 3, 96, 96) for part in LABELS}


def write_usps(folder):
    folder.mkdir()
    for part, name in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        rows = zip(LABELS[part], pixels(part, 256), strict=True)
        lines = [
            f"{label + 1} "
            + " ".join(f"{place}:{2 * (value + 0.5) / 255 - 1:.6f}" for place, value in enumerate(row, 1))
            for label, row in rows
        ]
        (folder / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    return {part: pixels(part, 256).reshape(-1, 1, 16, 16) for part in LABELS}


KINDS = {
    "mnist": write_mnist,
    "mnist-gz": lambda folder: write_mnist(folder, packed=True),
    "fashion-mnist": lambda folder: write_mnist(folder, packed=True, below=""),
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "stl10": write_stl10,
    "usps": write_usps,
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_labels_are_those_of_the_files(tmp_path, kind):
    expected = KINDS[kind](tmp_path / kind)
    for (x, y), part in zip(read(tmp_path / kind, None, None), ("train", "test"), strict=True):
        assert x.dtype == torch.uint8 and numpy.array_equal(x, expected[part])
        assert y.dtype == torch.int64 and numpy.array_equal(y, LABELS[part])
    (x, y), _ = read(tmp_path / kind, 5, None)
    assert numpy.array_equal(x, expected["train"][::2]) and numpy.array_equal(y, LABELS["train"][::2])


def write_classes(folder, test="test"):
    shapes = {part: pixels(part, 6, 5, 3) for part in LABELS}
    for part, place in (("train", "train"), ("test", test)):
        for number, (image, label) in enumerate(zip(shapes[part], LABELS[part], strict=True)):
            inside = folder / place / f"class{label}"
            inside.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(inside / f"{number}.png")
    return shapes


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_classes(tmp_path, test):
    expected = write_classes(tmp_path, test)
    for part, name in (("train", "class4"), ("train", "class6"), ("train", "class7"), ("train", "class8")):
        (tmp_path / part / name).mkdir()  # without images; so all ten classes are there
    for (x, y), part in zip(read(tmp_path, None, None), ("train", "test"), strict=True):
        order = numpy.argsort(LABELS[part], kind="stable")
        assert numpy.array_equal(x, expected[part][order].transpose(0, 3, 1, 2))
        assert numpy.array_equal(y, LABELS[part][order])
    assert load(tmp_path, limit=2).train_x.shape == (2, 3, 6, 5)


def test_annotated_folder_of_tiny_imagenet(tmp_path):
    write_classes(tmp_path, "elsewhere")
    place = tmp_path / "val/images"
    place.mkdir(parents=True)
    for number in range(2):
        Image.fromarray(pixels("test", 6, 5, 3)[number]).save(place / f"val_{number}.png")
    (tmp_path / "val/val_annotations.txt").write_text("val_0.png\tclass3\t0\t0\t1\t1\nval_1.png\tclass0\t0\t0\t1\t1\n")
    images = load(tmp_path)
    classes = sorted(set(LABELS["train"]))
    assert images.test_y.tolist() == [classes.index(3), classes.index(0)]


def test_dump_of_a_published_zoo_stays_as_it_is(tmp_path):
    parts = {
        f"{name}set": torch.utils.data.TensorDataset(torch.randn(count, 1, 4, 4), torch.arange(count))
        for name, count in (("train", 6), ("val", 3), ("test", 2))
    }
    torch.save(parts | {"dataset_seed": 42}, tmp_path / "dataset.pt")
    images = load(tmp_path / "dataset.pt", transform=Transform(mean=(0.5,), std=(0.5,)))
    assert torch.equal(images.train_x, parts["trainset"].tensors[0]) and images.num_classes == 6
    assert torch.equal(images.val_x, parts["valset"].tensors[0]) and torch.equal(images.test_y, torch.arange(2))
    assert load(tmp_path / "dataset.pt", limit=3).train_y.tolist() == [0, 2, 4]
    for labels in (torch.rand(6), torch.arange(6) - 1, torch.arange(6)[:, None]):
        bad = torch.utils.data.TensorDataset(torch.randn(6, 1, 4, 4), labels)
        torch.save(parts | {"trainset": bad}, tmp_path / "bad.pt")
        with pytest.raises(
            ValueError,
            match="bad.pt: .* got labels (that are no integers|must be whole numbers)",
        ):
            load(tmp_path / "bad.pt")
    torch.save(parts | {"trainset": torch.nn.Linear(1, 1)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match="other.pt: file must hold a trainset and a testset of tensors, got .*Linear; it is refused"
    ):
        load(tmp_path / "other.pt")


# --- transforms


def test_transforms_are_those_of_the_imaging_library():
    x = torch.from_numpy(pixels("train", 3, 32, 32))
    changed = change(x, Transform(gray=True, crop=28, resize=20), "")
    for image, result in zip(x, changed, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L").crop((2, 2, 30, 30))
        expected = expected.resize((20, 20), Image.Resampling.BILINEAR)
        assert numpy.array_equal(result[0], numpy.asarray(expected))
    colour = change(x, Transform(resize=28), "")[0]
    expected = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BILINEAR)
    assert numpy.array_equal(colour.permute(1, 2, 0), numpy.asarray(expected))


def test_normalisation_with_given_constants(tmp_path):
    expected = torch.from_numpy(write_mnist(tmp_path)["train"]).float()
    images = load(tmp_path, transform=Transform(mean=(0.1307,), std=(0.3081,)))
    torch.testing.assert_close(images.train_x, (expected / 255 - 0.1307) / 0.3081)
    torch.testing.assert_close(images.black, torch.tensor([-0.1307 / 0.3081]))


def test_validation_is_the_published_split(tmp_path):
    write_mnist(tmp_path)
    generator = torch.Generator().manual_seed(42)
    train, val = torch.utils.data.random_split(range(10), [7, 3], generator=generator)
    images = load(tmp_path, validation=3)
    assert images.train_y.tolist() == LABELS["train"][list(train)].tolist()
    assert images.val_y.tolist() == LABELS["train"][list(val)].tolist()
    whole = load(tmp_path)
    assert whole.val_x is None
    scale = images.train_x.std() / whole.train_x[list(train)].std()  # constants are those of the images trained on
    torch.testing.assert_close(images.train_x.std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(images.val_x.std() / scale, whole.train_x[list(val)].std())


PRESETS = {  # of the published grids: data set, images that its networks see
    "mnist-s-seed": ("mnist", (1, 28, 28)),
    "fmnist-s-hyp-fix": ("fashion-mnist", (1, 28, 28)),
    "svhn-s-hyp-rand": ("svhn", (1, 28, 28)),
    "usps-s-seed": ("usps", (1, 28, 28)),
    "cifar10-s-seed": ("cifar10", (3, 28, 28)),
    "cifar10-l-hyp-fix": ("cifar10", (3, 32, 32)),
    "stl10-s-seed": ("stl10", (3, 28, 28)),
    "stl10-l-hyp-fix": ("stl10", (3, 32, 32)),
    "cifar10-resnet18-seed": ("cifar10", (3, 32, 32)),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_their_data_sets(tmp_path, preset):
    kind, shape = PRESETS[preset]
    KINDS[kind](tmp_path / kind)
    config = Config(zoo="", preset=preset, data=str(tmp_path / kind), validation=3, batch_size=4)
    job = prepare(config)
    assert job.plan.image_shape == shape and job.data.val.x.shape == (3, *shape)
    assert len(job.recipes) == config.networks and ("resnet" in preset) == bool(job.one_by_one)
    white = (1 - torch.tensor(config.mean)) / torch.tensor(config.std)
    black = -torch.tensor(config.mean) / torch.tensor(config.std)
    torch.testing.assert_close(job.data.black, black.expand(shape[0]))
    for x in (job.data.train.x, job.data.val.x, job.data.test.x):
        assert (x.amax((0, 2, 3)) <= white + 1e-5).all() and (x.amin((0, 2, 3)) >= black - 1e-5).all()
        assert x.std() > 0.05 * (white - black).max()  # pixels are uniform random numbers, some of them averaged


# --- errors


class Forbidden:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_batches_that_hold_other_things_than_arrays_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    batch = tmp_path / "cifar-10-batches-py/data_batch_3"
    batch.write_bytes(pickle.dumps({b"data": Forbidden(), b"labels": [1]}, protocol=2))
    with pytest.raises(ValueError, match="training images must be data_batch_1, got .*posix.mkdir; it is refus"):
        load(tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_named(tmp_path, kind):
    folder = tmp_path / kind
    KINDS[kind](folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0)
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="images must .*; download them again"):
            load(folder)
        path.write_bytes(whole)
    load(folder)


def test_errors(tmp_path):
    write_mnist(tmp_path / "two")
    write_mnist(tmp_path / "two", below="FashionMNIST/raw")
    with pytest.raises(ValueError, match="data must be one data set, got .*FashionMNIST/raw, .*MNIST/raw; name one"):
        load(tmp_path / "two")
    one = tmp_path / "two/MNIST"
    with pytest.raises(ValueError, match="validation must be less than 10, the images, got 10"):
        load(one, validation=10)
    with pytest.raises(ValueError, match="crop must be at most 28, got 29"):
        load(one, transform=Transform(crop=29))
    with pytest.raises(ValueError, match="mean must have 0, 1 or 1 entries, got 3"):
        load(one, transform=Transform(mean=(0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="std must be positive"):
        load(one, transform=Transform(std=(0.0,)))
    (one / "raw/t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte.gz: file must be there for the testing"):
        load(one)
    write_classes(tmp_path / "classes")
    with pytest.raises(ValueError, match="image must be in a folder of a class of the training images, got 'class4'"):
        load(tmp_path / "classes")
    Image.fromarray(numpy.full((7, 5), 40_000, numpy.uint16)).save(tmp_path / "classes/train/class0/last.png")
    with pytest.raises(ValueError, match="last.png: file must have 8 bits per channel, got mode I;16; convert it"):
        load(tmp_path / "classes")
    Image.fromarray(pixels("test", 7, 5, 3)[0]).save(tmp_path / "classes/train/class0/last.png")
    with pytest.raises(ValueError, match=r"last.png: image must have the shape of the others, got \[3, 7, 5\] after"):
        load(tmp_path / "classes")
