"""Files from strangers: whatever a JSON file of a zoo says, it is refused in one sentence or does no harm."""

import json
import shutil

import numpy
import pytest
import torch
from damages import damaged
from safetensors import safe_open
from safetensors.torch import save_file
from small_zoo import make_small_zoo

from fastws.zoo.align import Config, align
from fastws.zoo.alignment import ALIGNMENT, aligned_rows
from fastws.zoo.format.manifest import MANIFEST
from fastws.zoo.format.writer import ZooWriter
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import make
from fastws.zoo.making.resume import RESUME
from fastws.zoo.making.training import Wave

REFUSALS = (ValueError, FileNotFoundError)


def use(zoo: Zoo) -> None:
    """All that reads or moves weights by what a zoo says of itself."""
    flat = zoo.rows(range(len(zoo)))
    tokens = zoo.layout.tokenize(flat).values if zoo.layout.token_size < 2**20 else None
    if tokens is not None:
        assert torch.equal(zoo.layout.detokenize(tokens, like=flat), flat)
    if zoo.symmetry:
        permuted = zoo.symmetry.permute(flat, zoo.symmetry.random(len(flat)), zoo.layout)
        assert torch.equal(permuted.sort(1).values, flat.sort(1).values)
        repr(zoo.symmetry), zoo.symmetry.describe()
    zoo.checkpoint(0), zoo.layout.describe(), zoo.properties
    for name in zoo.splits:
        zoo.split(name)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    zoo = make_small_zoo(tmp_path_factory.mktemp("strangers") / "zoo", widths=(3, 4, 2))
    align(Config(zoo=str(zoo.path)))
    return zoo


def test_manifest_is_refused_or_harmless(small, tmp_path):
    folder = shutil.copytree(small.path, tmp_path / "zoo")
    whole, refused = json.loads((folder / MANIFEST).read_text()), 0
    for path, value, manifest in damaged(whole | {"splits": {"train": ["m0", "m1"], "test": ["m2"]}}):
        (folder / MANIFEST).write_text(json.dumps(manifest))
        for attempt in (lambda: use(Zoo.open(folder)), lambda: ZooWriter(folder, small.layout).close()):
            try:
                attempt()
            except REFUSALS as error:
                assert "\n" not in str(error), (path, value)
                refused += 1
            except Exception as error:
                raise AssertionError(f"{path} = {value!r}: {error!r}") from error
        assert {file.name for file in folder.iterdir()} >= {file.name for file in small.path.iterdir()}, (path, value)
    assert refused > 2000


def test_alignment_is_refused_or_harmless(small, tmp_path):
    path, refused = tmp_path / ALIGNMENT, 0
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("permutations", "before", "after")}
        fields = json.loads(file.metadata()["alignment"])
    zoo = Zoo.open(tmp_path)
    expected = aligned_rows(zoo, range(len(zoo)))

    def attempt(tensors, fields):
        save_file(tensors, path, {"alignment": json.dumps(fields)})
        try:
            rows = aligned_rows(zoo, range(len(zoo)))
        except REFUSALS as error:
            assert "\n" not in str(error)
            return 1
        assert torch.equal(rows.sort(1).values, expected.sort(1).values)
        return 0

    for _, _, broken in damaged(fields):
        refused += attempt(tensors, broken)
    assert refused > 100
    generator = numpy.random.default_rng(0)
    for _ in range(50):
        wrong = tensors["permutations"].clone()
        wrong[tuple(generator.integers(wrong.shape))] = int(generator.integers(-(2**31), 2**31))
        assert attempt(tensors | {"permutations": wrong}, fields)
    for name, tensor in tensors.items():
        for other in (tensor[1:], tensor[..., None], tensor.double() if name == "permutations" else tensor.float()):
            assert attempt(tensors | {name: other.contiguous()}, fields)


DAMAGES = {
    "state of another shape": (lambda x: x | {"state": x["state"][:, :, 1:].contiguous()}, {}, "state must be"),
    "state of another dtype": (lambda x: x | {"state": x["state"].double()}, {}, "state must be"),
    "orders of another shape": (lambda x: x | {"orders": x["orders"][1:]}, {}, "orders must be"),
    "orders of no generator": (lambda x: x | {"orders": torch.full_like(x["orders"], 255)}, {}, "orders must be"),
    "no orders": (lambda x: {"state": x["state"]}, {}, "file must be readable"),
    "another wave": (dict, {"first": "1"}, "first must be a multiple of 2 below 4, got 1"),
    "a wave behind the last": (dict, {"first": "4"}, "first must be"),
    "another epoch": (dict, {"epoch": "9"}, r"epoch must be in \[0, 1\], got 9"),
    "no number": (dict, {"epoch": "x"}, "file must be readable"),
}


@pytest.mark.parametrize("damage, told, sentence", DAMAGES.values(), ids=DAMAGES)
def test_resume_file_is_refused(tmp_path, monkeypatch, damage, told, sentence):
    options = {"networks": 4, "epochs": 1, "limit": 96, "wave": 2, "threads": 1, "order": "published"}
    config, advance = MakeConfig(out=str(tmp_path), sampling="grid", **options), Wave.advance
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            Wave, "advance", lambda wave, *x, **options: advance(wave, *x, **options) if wave.epoch < 0 else 1 / 0
        )
        make(config)
    path = tmp_path / RESUME
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("state", "orders")}
    save_file(damage(tensors), path, metadata | told)
    with pytest.raises(ValueError, match=f"{path}: {sentence}"):
        make(config)
    save_file(tensors, path, metadata)
    assert len(make(config)) == 8
