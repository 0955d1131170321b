"""Files that were made to harm: memory and time are bounded by their size, and nothing outside them is touched."""

import gzip
import io
import os
import pickle
import pickletools
import signal
import struct
import time
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from running import finish, run_command, start
from small_zoo import make_small_zoo
from torch import nn

from fastws.data import images
from fastws.files import json
from fastws.files.atomic import open_to_append, write_file
from fastws.files.checkpoints import load_checkpoint, load_plain
from fastws.files.limits import open_regular, unpack
from fastws.files.torch_file import TorchFile
from fastws.files.unpickle import Unpickler
from fastws.terminal import escape

PROTOCOL = b"\x80\x02"


def laughs(depth: int) -> bytes:
    """A tuple of a tuple twice, of a tuple twice, ..."""
    code = b"(K\x01K\x01tq\x01"
    for number in range(1, depth):
        code += b"0(" + 2 * (b"h" + bytes([number])) + b"tq" + bytes([number + 1])
    return code


BOMBS = {
    "a memo of gigabytes": b"Nr" + struct.pack("<I", 150_000_000) + b"0]",
    "a tuple of tuples as a key": b"}" + laughs(40) + b"Ns",
    "a deep tuple as a key": b"})" + b"\x85" * 100_000 + b"Ns",
    "a set of tuples": b"\x8f(" + laughs(40) + b"\x90",
    "bytes that are not there": b"\x96" + struct.pack("<Q", 2**33) + b"abc",
    "a number of a gigabyte": b"\x8b" + struct.pack("<i", 2**30) + b"\1",
    "text of digits": b"I" + b"9" * 100_000 + b"\n",
    "a path of tuples": b"cpathlib\nPosixPath\n(" + laughs(40) + b"tR",
    "copies of a list": b"](" + b"N" * 20_000 + b"eq\x00](" + b"ctorch\nSize\nh\x00\x85R" * 20_000 + b"e",
    "objects without end": b"(" + b"]" * 3_000_000,
}


@pytest.mark.parametrize("codes", BOMBS.values(), ids=BOMBS)
def test_pickles_are_small_or_refused(codes):
    begun = time.perf_counter()
    try:
        found = Unpickler(PROTOCOL + codes + b".").load()
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert found == []
    assert time.perf_counter() - begun < 30


def test_unpickler_reads_what_python_writes():
    values = [None, True, -1, 2**70, 0.5, "ä", b"\xff", (1, (2, 3), ()), {"a": {1: [2]}, (1, "b"): 3}, {1, 2}, 1 + 2j]
    values += [frozenset({1}), [[]] * 3, numpy.float64(0.5), "x" * 300, bytes(300), -(2**40)]
    for protocol in range(2, 6):
        assert Unpickler(pickle.dumps(values, protocol)).load() == values
    array = numpy.arange(6, dtype=numpy.int16).reshape(2, 3)
    for protocol in (2, 3, 4):
        assert numpy.array_equal(Unpickler(pickle.dumps(array, protocol)).load().value, array)


def write_zip(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/data/0", bytes(64))
    return path


def test_tensors_that_claim_any_shape_are_refused(tmp_path):
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    for shape, stride in ((10**13, 0), (17, 1), (2**62, 2**62)):
        numbers = [pickle.dumps((number, 1), 2)[2:-1] for number in (shape, stride)]
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + numbers[0] + numbers[1] + b"\x89NtR"
        path = write_zip(tmp_path / "a.pt", PROTOCOL + b"}X\x01\x00\x00\x00w" + tensor + b"s.")
        with pytest.raises(ValueError, match="a.pt: tensors? must"):
            load_checkpoint(path)
        file = TorchFile(path)
        with pytest.raises(ValueError, match="a.pt: tensor must"):
            file.tensor(file.content["w"])


def test_shared_and_deep_containers(tmp_path):
    shared = b"}q\x00" + b"".join(
        b"0}(X\x01\x00\x00\x00ah" + bytes([n]) + b"X\x01\x00\x00\x00bh" + bytes([n]) + b"uq" + bytes([n + 1])
        for n in range(40)
    )
    loaded = load_plain(write_zip(tmp_path / "a.pt", PROTOCOL + shared + b"."))
    assert loaded["a"] is loaded["b"]
    deep = b"]" * 1000 + b"a" * 999
    with pytest.raises(ValueError, match="a.pt: containers must be nested at most"):
        load_plain(write_zip(tmp_path / "a.pt", PROTOCOL + deep + b"."))


def test_checksums_of_torch_files_are_compared(tmp_path):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.find(torch.arange(100.0).numpy().tobytes()) + 40] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="storage '0' must have the checksum that the file says"):
        load_checkpoint(tmp_path / "a.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(100.0)}, tmp_path / "b.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(tmp_path / "b.pt")["a"], torch.arange(100.0))


def test_legacy_file_without_a_storage_is_refused_and_gradients_are_read(tmp_path):
    network = nn.Linear(20, 20)
    for tensors in (network.state_dict(), dict(network.named_parameters()), network.state_dict(keep_vars=True)):
        torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        loaded = load_checkpoint(tmp_path / "a.pt")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    content = (tmp_path / "a.pt").read_bytes()
    file, cuts = io.BytesIO(content), [0]
    for _ in range(5):
        list(pickletools.genops(file))
        cuts.append(file.tell())
    keys = pickle.loads(content[cuts[4] : cuts[5]])
    (tmp_path / "b.pt").write_bytes(content[: cuts[4]] + pickle.dumps(keys[:1], 2) + content[cuts[5] :])
    with pytest.raises(ValueError, match="b.pt: .*tensors without their storages"):
        load_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 101 + "1" + "}" * 101, '"\\ud800"', b'"\xe9"', "[1"])
def test_json_that_is_deep_or_none(text):
    with pytest.raises(ValueError, match="x must be"):
        json.parse(text, "x")
    assert json.parse('\ufeff{"a": ["[[", "\\ud83d\\ude00"]}'.encode(), "x") == {"a": ["[[", "\U0001f600"]}


def test_packed_files_are_bounded():
    with pytest.raises(ValueError, match="x: file must unpack to 1,000 bytes at most"):
        unpack(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(bytes(2000)))), 1000, "x")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        for read in (open_regular, TorchFile, json.read):
            with pytest.raises(OSError, match="file must be a regular one, got a pipe or a device"):
                read(path)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        open_to_append(tmp_path / "link")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "link").read_text() == "new"


def write_batches(folder: Path, labels: list[int]) -> Path:
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {b"data": numpy.zeros((len(labels), 3072), numpy.uint8), b"labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    return folder


@pytest.mark.parametrize("label", [-1, 2**16, 2**40])
def test_labels_out_of_range_are_refused(tmp_path, label):
    assert len(images.load(write_batches(tmp_path, [0, 1])).train_y) == 10
    with pytest.raises(ValueError, match="whole numbers from 0 below 65,536"):
        images.load(write_batches(tmp_path, [0, label]))


def test_text_is_escaped():
    assert escape("ä\x1b[31m\n\ud800") == "ä\\x1b[31m\\n\\ud800"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_command_says_how_to_resume(tmp_path, number):
    make_small_zoo(tmp_path / "zoo", widths=(3, 4, 2))
    words = ["train", "sane", "--zoo", tmp_path / "zoo", "--out", tmp_path / "run", "--size", "tiny"]
    words += ["--steps", "1000000", "--device", "cpu", "--batch-size", "2", "--window", "4"]
    process = start(run_command, *words, said=tmp_path / "said")
    while not (tmp_path / "run/log.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, number)
    codes, said = finish(process), (tmp_path / "said").read_text()
    assert codes == [128 + number] and "run the same command again to resume" in said.strip().splitlines()[-1], said
    assert "Traceback" not in said
