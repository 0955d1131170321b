import doctest
import io
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from fastws.data import digits as digits_file
from fastws.data import images
from fastws.data.images import Transform, load

SHARED = Path(__file__).parents[2] / "shared/data"


def encode(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def write_folder(folder, train, test, column="image"):
    folder.mkdir()
    for part, pictures in (("train", train), ("test", test)):
        table = {column: [encode(picture) for picture in pictures], "label": list(range(len(pictures)))}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{part}.parquet")
    return folder


def pictures(count, *shape):
    return numpy.random.default_rng(0).integers(0, 256, (count, *shape), dtype=numpy.uint8)


def test_docstring_examples_run():
    result = doctest.testmod(images)
    assert result.attempted > 0 and result.failed == 0


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = load("digits")
    expected = torch.from_numpy(datasets.load_digits().images).float().flatten(1)
    mean, std = digits.train_x.mean(), digits.train_x.std(correction=0)
    torch.testing.assert_close(mean, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.tensor(1.0), atol=1e-5, rtol=0)
    every = torch.cat([digits.train_x, digits.test_x]).flatten(1)
    every = (every - every.min()) / (every.max() - every.min()) * 16  # pixels are whole numbers up to 16
    assert sorted(every.round().int().tolist()) == sorted(expected.int().tolist())


def test_large_digits_are_the_same_images():
    small, large = load("digits"), load("digits28", transform=Transform(mean=(0.0,), std=(1.0,)))
    assert large.train_x.shape == (len(small.train_x), 1, 28, 28) and large.num_classes == 10
    assert torch.equal(small.train_y, large.train_y) and torch.equal(small.test_y, large.test_y)
    assert large.train_x.min() == 0 and 0.9 < large.train_x.max() <= 1
    # the mean of what lies where a pixel was is near it
    again = torch.nn.functional.interpolate(large.test_x, (8, 8), mode="area")
    plain = load("digits", transform=Transform(mean=(0.0,), std=(1.0,))).test_x
    assert torch.corrcoef(torch.stack([again.flatten(), plain.flatten()]))[0, 1] > 0.95  # blurred by the interpolation


def test_digits_are_split_by_class_and_always_alike():
    digits = load("digits")
    share = digits.test_y.bincount() / (digits.test_y.bincount() + digits.train_y.bincount())
    assert digits.num_classes == 10 and (share - 0.2).abs().max() < 0.005
    assert all(torch.equal(a, b) for a, b in zip(digits[:4], load("digits")[:4], strict=True))


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setattr(digits_file, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install scikit-learn"):
        load("digits")


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["grey", "colour"])
def test_parquet_holds_the_pixels(tmp_path, column, shape):
    train, test = pictures(6, *shape), pictures(3, *shape)
    loaded = load(write_folder(tmp_path / "set", train, test, column))
    expected = torch.from_numpy(train).view(6, 5, 7, -1).permute(0, 3, 1, 2).double()
    std, mean = torch.std_mean(expected, (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(loaded.train_x.double(), (expected - mean) / std, atol=1e-5, rtol=1e-5)
    expected = torch.from_numpy(test).view(3, 5, 7, -1).permute(0, 3, 1, 2).double()
    torch.testing.assert_close(loaded.test_x.double(), (expected - mean) / std, atol=1e-5, rtol=1e-5)
    assert loaded.train_y.tolist() == [0, 1, 2, 3, 4, 5] and loaded.num_classes == 6


def test_limit_takes_evenly_spaced_rows_over_all_files(tmp_path):
    folder = tmp_path / "set"
    write_folder(folder, pictures(600, 4, 4), pictures(2, 4, 4))
    (folder / "train.parquet").rename(folder / "train-00000-of-00002.parquet")
    table = {"image": [encode(picture) for picture in pictures(3, 4, 4)], "label": [700, 701, 702]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "train-00001-of-00002.parquet")
    assert load(folder).train_y.tolist() == [*range(600), 700, 701, 702]
    labels = load(folder, limit=201).train_y.tolist()
    assert labels == [*range(0, 600, 3), 700]


def test_errors_name_the_file_and_what_it_lacks(tmp_path):
    what = r"'digits', 'digits28', or a folder with .* train\*.parquet.*, got no such folder"
    with pytest.raises(FileNotFoundError, match=what):
        load(tmp_path / "nothing")
    folder = write_folder(tmp_path / "set", pictures(3, 4, 4), pictures(2, 4, 4), column="picture")
    with pytest.raises(ValueError, match="train.parquet: columns must include 'image' or 'img', got picture, label"):
        load(folder)
    with pytest.raises(ValueError, match="must have one shape"):
        load(write_folder(tmp_path / "sizes", pictures(3, 4, 4), pictures(2, 5, 4)))
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load("digits", limit=0)
    broken = tmp_path / "broken"
    write_folder(broken, pictures(3, 4, 4), pictures(2, 4, 4))
    table = pyarrow.table({"image": [{"bytes": b"\x89PNG nonsense", "path": None}], "label": [0]})
    pyarrow.parquet.write_table(table, broken / "test.parquet")
    with pytest.raises(ValueError, match="test.parquet: image in row 0 must be a readable PNG or JPEG"):
        load(broken)
    (broken / "train.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match="train.parquet: file must be parquet"):
        load(broken)


@pytest.mark.parametrize("name, shape", [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_published_data_sets_load(name, shape):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    loaded = load(SHARED / name, limit=200)
    assert loaded.train_x.shape == (200, *shape) and loaded.num_classes == 10
