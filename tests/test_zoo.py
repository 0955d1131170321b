import errno
import json
import os
import signal
import time
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import finish, keep_moments, start

from fastws.files import atomic, parquet
from fastws.layout.layout import Layout
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo import Zoo, ZooWriter
from fastws.zoo.format import parts, writer
from fastws.zoo.format import zoo as format
from fastws.zoo.making.architectures import build
from fastws.zoo.making.make import Config, draw_recipes
from fastws.zoo.making.training import Recipe

NETWORK = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
LAYOUT = Layout.from_checkpoint(NETWORK)  # 14 weights
P = LAYOUT.num_weights


def numbered(first, count):
    """Rows that know their place."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None] + torch.arange(P) / 16


def describe(first, count):
    return {"model": [f"net {i // 3}" for i in range(first, first + count)], "place": list(range(first, first + count))}


def write(path, count, **options):
    with ZooWriter(path, LAYOUT, **options) as zoo:
        for first in range(0, count, 5):
            zoo.append(numbered(first, min(5, count - first)), describe(first, min(5, count - first)))
    return Zoo.open(path)


def assert_holds(zoo, count):
    assert len(zoo) == count == len(zoo.properties)
    assert torch.equal(zoo.rows(range(count)), numbered(0, count))
    if count:
        assert zoo.properties["place"].to_pylist() == list(range(count))
    models = sorted(model for members in zoo.splits.values() for model in members)
    assert models == sorted(set(zoo.properties["model"].to_pylist()))


# --- what is written is what is read


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.lists(st.integers(0, 4), max_size=5),
    st.sampled_from([1, 500, 2**30]),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_write_is_identity(tmp_path_factory, dtype, counts, shard_bytes, seed):
    path = tmp_path_factory.mktemp("zoo")
    rows = torch.randn(sum(counts), P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if len(rows):
        rows[0, :3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 2])
    accuracy = torch.arange(len(rows)) / 7
    with ZooWriter(path, LAYOUT, dtype=dtype, shard_bytes=shard_bytes) as zoo:
        for count, part in zip(counts, rows.split(counts), strict=True):
            columns = {"model": range(count), "accuracy": accuracy[:count], "name": ["a ü"] * count}
            assert zoo.append(part, columns) == count
    read = Zoo.open(path)
    again = read.rows(range(len(rows)))
    assert again.dtype == dtype and torch.equal(again.view(torch.uint8), rows.view(torch.uint8))
    assert all(len(shard) * P * dtype.itemsize <= max(shard_bytes, 4 * P * dtype.itemsize) for shard in read.shards)
    if len(rows):
        assert read.properties["name"].to_pylist() == ["a ü"] * len(rows)
        expected = [value for count in counts for value in accuracy[:count].tolist()]
        assert read.properties["accuracy"].to_pylist() == expected


def test_zoo_tells_layout_symmetry_provenance_and_checkpoints(tmp_path):
    symmetry = Symmetry.trace(NETWORK, torch.zeros(1, 3))
    with ZooWriter(tmp_path, LAYOUT, symmetry, {"data": "none"}) as zoo:
        zoo.append(LAYOUT.flatten(NETWORK)[None], {"model": ["a"]})
    read = Zoo.open(tmp_path)
    assert read.layout == LAYOUT and read.symmetry == symmetry and read.provenance == {"data": "none"}
    for name, tensor in NETWORK.state_dict().items():
        assert torch.equal(read.checkpoint(0)[name], tensor)
    assert write(tmp_path / "other", 1).symmetry is None


def test_finished_zoo_is_one_file_and_can_be_added_to(tmp_path):
    assert_holds(write(tmp_path, 12), 12)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) == 1 and (tmp_path / "models.parquet").exists()
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        assert len(zoo) == 12
        zoo.append(numbered(12, 4), describe(12, 4))
        assert_holds(Zoo.open(tmp_path), 16)
    zoo = Zoo.open(tmp_path)
    assert_holds(zoo, 16)
    assert torch.equal(zoo.weights, numbered(0, 16))
    assert {path.name[:6] for path in tmp_path.iterdir()} == {"zoo.js", "models", "weight"} and len(zoo.shards) == 1


def test_zoo_of_many_files(tmp_path):
    zoo = write(tmp_path, 23, shard_bytes=7 * P * 4)
    assert [len(shard) for shard in zoo.shards] == [5, 5, 5, 5, 3]
    order = torch.randperm(23)
    assert torch.equal(zoo.rows(order), numbered(0, 23)[order])
    with pytest.raises(ValueError, match=r"zoo must have one file of weights to be one tensor, got 5; take zoo.rows"):
        zoo.weights  # noqa: B018
    with pytest.raises(IndexError, match=r"indices must be in \[0, 23\)"):
        zoo.rows([0, 23])


def test_writing_into_mapped_weights_stays_private(tmp_path):
    zoo = write(tmp_path, 3)
    zoo.weights.zero_()
    assert_holds(Zoo.open(tmp_path), 3)


def test_states_take_two_percent_more_than_their_weights(tmp_path):
    count, layout = 2000, Layout.from_checkpoint(build("cnn-s", (1, 28, 28)))
    recipes = draw_recipes(Config(zoo="", networks=count // 40, dropouts=(0.0, 0.5)))
    with ZooWriter(tmp_path, layout, dtype=torch.bfloat16) as zoo:
        for epoch in range(40):
            columns = {name: [getattr(recipe, name) for recipe in recipes] for name in Recipe._fields}
            measured = {name: torch.rand(len(recipes)) for name in ("train_loss", "train_accuracy", "test_accuracy")}
            columns |= {"epoch": [epoch] * len(recipes)} | measured
            zoo.append(torch.randn(len(recipes), layout.num_weights), columns)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 1.02 * count * layout.num_weights * 2


def test_zoo_of_a_million_states_opens_at_once(tmp_path):
    states, layout = 10**6, Layout.from_checkpoint(torch.nn.Sequential(torch.nn.Linear(16, 5), torch.nn.Linear(5, 2)))
    with ZooWriter(tmp_path, layout) as zoo:
        zoo.append(torch.zeros(1, layout.num_weights), {"model": ["0"]})
    manifest = json.loads((tmp_path / "zoo.json").read_text())
    manifest["weights"][0]["rows"] = manifest["models"][0]["rows"] = states
    manifest["splits"]["train"] = [str(model) for model in range(states // 50)]
    atomic.write_json(tmp_path / "zoo.json", manifest)
    weights = tmp_path / manifest["weights"][0]["file"]
    size = 4 * states * layout.num_weights
    header = {"dtype": "F32", "shape": [states, layout.num_weights], "data_offsets": [0, size]}
    text = json.dumps({"weights": header}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + size)  # a sparse file: 388 MB of zeros that take no room
    models = pyarrow.array(numpy.arange(states) // 50).cast("string")
    parts.write_models(tmp_path / "models.parquet", pyarrow.table({"model": models}))
    resident, begin = resident_bytes(), time.perf_counter()
    zoo = Zoo.open(tmp_path)
    assert len(zoo) == states and zoo.rows([states - 1]).sum() == 0
    assert time.perf_counter() - begin < 1
    assert resident_bytes() - resident < 20e6  # of names of models, none of states
    assert len(zoo.split("train")) == states


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- splits


def test_splits_are_by_model_and_stay(tmp_path):
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        zoo.append(numbered(0, 120), describe(0, 120))  # 40 models
    before = Zoo.open(tmp_path)
    assert {name: len(members) for name, members in before.splits.items()} == {"train": 28, "val": 6, "test": 6}
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        zoo.append(numbered(120, 60), describe(120, 60))
    after = Zoo.open(tmp_path)
    assert {name: len(members) for name, members in after.splits.items()} == {"train": 42, "val": 9, "test": 9}
    rows = {name: after.split(name) for name in after.splits}
    assert torch.equal(torch.cat(list(rows.values())).sort().values, torch.arange(180))
    models = after.properties["model"].to_pylist()
    for name, members in before.splits.items():
        assert set(members) <= set(after.splits[name])
        assert {models[row] for row in rows[name]} == set(after.splits[name])
    assert before.splits["val"] != [f"net {i}" for i in range(28, 34)], "models must be shuffled"
    with pytest.raises(ValueError, match="name must be one of train, val, test, got 'dev'"):
        after.split("dev")


def test_given_splits_are_kept(tmp_path):
    splits = {"train": ["net 0"], "ood": ["net 1"]}
    assert write(tmp_path, 6, splits=splits).split("ood").tolist() == [3, 4, 5]
    with ZooWriter(tmp_path, LAYOUT) as zoo, pytest.raises(ValueError, match="splits that were given, got 'net 2'"):
        zoo.append(numbered(6, 1), describe(6, 1))
    with pytest.raises(ValueError, match="ZooWriter: models must be none where splits are given, got 1"):
        ZooWriter(tmp_path / "other", LAYOUT, splits=splits, models=["net 2"])


def test_known_models_are_in_the_same_splits_however_they_come(tmp_path):
    models = [f"net {number}" for number in range(40)]
    with ZooWriter(tmp_path / "whole", LAYOUT) as zoo:
        zoo.append(numbered(0, 120), describe(0, 120))
    with ZooWriter(tmp_path / "parts", LAYOUT, models=models) as zoo:
        for begin in range(117, -1, -3):
            zoo.append(numbered(begin, 3), describe(begin, 3))
        zoo.append(numbered(120, 3), describe(120, 3) | {"model": ["new"] * 3})  # one that was not known
    splits = [Zoo.open(tmp_path / name).splits for name in ("whole", "parts")]
    assert splits[0] != write(tmp_path / "unknown", 120).splits
    assert {name: [m for m in members if m != "new"] for name, members in splits[1].items()} == splits[0]
    assert sum(splits[1].values(), []).count("new") == 1


# --- writers die, readers come at any time


def test_every_moment_of_writing_is_a_valid_zoo(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MERGE", 3)
    with keep_moments(tmp_path / "zoo", tmp_path) as moments:
        write(tmp_path / "zoo", 23)
    monkeypatch.undo()
    counts = []
    for moment in moments:
        zoo = Zoo.open(moment)
        assert_holds(zoo, len(zoo))
        counts.append(len(zoo))
        with ZooWriter(moment, LAYOUT) as again:
            again.append(numbered(len(zoo), 2), describe(len(zoo), 2))
        assert_holds(Zoo.open(moment), len(zoo) + 2)
        assert not list(moment.glob("*.tmp"))
    assert counts == sorted(counts) and set(counts) == {0, 5, 10, 15, 20, 23} and len(counts) > 20


def test_reader_keeps_what_it_opened(tmp_path):
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        zoo.append(numbered(0, 5), describe(0, 5))
        zoo.append(numbered(5, 5), describe(5, 5))
        early = Zoo.open(tmp_path)
        zoo.append(numbered(10, 5), describe(10, 5))
    assert len(list(tmp_path.glob("weights-*"))) == 1
    assert_holds(early, 10)  # its files are gone; the properties are read from the merged one
    assert_holds(Zoo.open(tmp_path), 15)


def test_reader_follows_files_that_were_merged_while_it_opened(tmp_path, monkeypatch):
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        zoo.append(numbered(0, 5), describe(0, 5))
        zoo.append(numbered(5, 5), describe(5, 5))
        stale, read = format.read_manifest(tmp_path), format.read_manifest
    answers = [stale]
    monkeypatch.setattr(format, "read_manifest", lambda path: answers.pop() if answers else read(path))
    assert_holds(Zoo.open(tmp_path), 10)


def write_without_end(path):
    with ZooWriter(path, LAYOUT) as zoo:
        for first in range(len(zoo), 10**6, 7):
            zoo.append(numbered(first, 7), describe(first, 7))
            print(first, flush=True)


def test_killed_writer_leaves_a_zoo_and_no_lock(tmp_path):
    said, tmp_path = tmp_path / "said", tmp_path / "zoo"
    process = start(write_without_end, tmp_path, said=said)
    while not said.exists() or said.read_text().count("\n") < 10:
        assert finish(process, timeout=0.001) == [None]
    while_written = Zoo.open(tmp_path)
    assert_holds(while_written, len(while_written))
    with pytest.raises(BlockingIOError, match=f"one process at a time may write it, process {process.pid} does"):
        ZooWriter(tmp_path, LAYOUT)
    process.kill()
    assert finish(process) == [-signal.SIGKILL]
    zoo = Zoo.open(tmp_path)
    assert_holds(zoo, len(zoo))
    last = int(said.read_text().rpartition("\n")[0].split()[-1])
    assert len(zoo) in (last + 7, last + 14)  # all that append has confirmed
    with ZooWriter(tmp_path, LAYOUT) as again:
        again.append(numbered(len(zoo), 1), describe(len(zoo), 1))
    assert_holds(Zoo.open(tmp_path), len(zoo) + 1)


def test_a_model_in_two_splits_is_refused(tmp_path):
    splits = {"train": ["a", "b"], "test": ["b"]}
    with pytest.raises(ValueError, match="a model must be in one split, got 'b' in train and test"):
        ZooWriter(tmp_path / "new", LAYOUT, splits=splits)
    assert not (tmp_path / "new").exists()
    ZooWriter(tmp_path, LAYOUT).close()
    manifest = json.loads((tmp_path / "zoo.json").read_text())
    (tmp_path / "zoo.json").write_text(json.dumps(manifest | {"splits": splits}))
    with pytest.raises(ValueError, match="zoo.json: a model must be in one split, got 'b' in train and test"):
        Zoo.open(tmp_path)


@pytest.mark.parametrize("moment", ["is_file", "read_safetensors_header", "from_file", "open_regular", "ParquetFile"])
def test_a_reader_beside_a_merging_writer_never_fails(tmp_path, monkeypatch, moment):
    """The writer merges its files just before the reader takes its next step into one of them."""
    writer = ZooWriter(tmp_path, LAYOUT)
    rows = torch.randn(4, LAYOUT.num_weights)
    for row in rows.split(1):
        writer.append(row, {"model": ["a"]})
    owner = {
        "is_file": Path,
        "read_safetensors_header": parts,
        "from_file": torch.UntypedStorage,
        "open_regular": parquet,
        "ParquetFile": pyarrow.parquet,
    }[moment]
    step = getattr(owner, moment)

    def merge_first(path, *args, **options):
        monkeypatch.undo()
        writer.close()
        return step(path, *args, **options)

    monkeypatch.setattr(owner, moment, merge_first)
    zoo = Zoo.open(tmp_path)
    assert zoo.rows(range(4)).equal(rows) and zoo.properties["model"].to_pylist() == ["a"] * 4
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "models.parquet"  # it did merge


def test_second_writer_is_refused_until_the_first_closes(tmp_path):
    with ZooWriter(tmp_path, LAYOUT), pytest.raises(BlockingIOError, match=f"process {os.getpid()} does"):
        ZooWriter(tmp_path, LAYOUT)
    with pytest.raises(KeyError), ZooWriter(tmp_path, LAYOUT):
        raise KeyError
    assert not (tmp_path / "writer.lock").exists()
    write(tmp_path, 1)


# --- bad weights


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path):
    rows = numbered(0, 6)
    rows[1, 3], rows[4, 0] = float("nan"), -float("inf")
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        assert zoo.append(rows, describe(0, 6)) == 4
        assert zoo.append(rows[4:5], {"model": ["never"], "place": [9]}) == 0
        assert (len(zoo), zoo.submitted, zoo.dropped) == (4, 7, 3)
    zoo = Zoo.open(tmp_path, on_bad="raise")
    assert zoo.dropped == 3 and zoo.properties["place"].to_pylist() == [0, 2, 3, 5]
    assert torch.equal(zoo.weights, rows[[0, 2, 3, 5]])
    assert "never" not in [model for members in zoo.splits.values() for model in members]


def test_overflow_in_the_stored_dtype_counts_as_not_finite(tmp_path):
    with ZooWriter(tmp_path, LAYOUT, dtype=torch.float16, on_bad="raise") as zoo:
        with pytest.raises(ValueError, match="rows must be finite in torch.float16, got NaN or infinity in 1 of 2"):
            zoo.append(numbered(0, 2) * torch.tensor([[1], [1e6]]), describe(0, 2))
        assert len(zoo) == 0


def test_reader_finds_rows_that_are_not_finite(tmp_path):
    zoo = write(tmp_path, 12)
    rows = numbered(0, 12)
    rows[7, 2] = float("nan")
    (file,) = tmp_path.glob("weights-*")
    parts.write_weights(file, [rows], (12, P), torch.float32)
    assert Zoo.open(tmp_path).bad_rows.tolist() == []
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 12 rows, first in row 7; open it with on_bad"):
        Zoo.open(tmp_path, on_bad="raise")
    checked = Zoo.open(tmp_path, on_bad="drop")
    assert checked.bad_rows.tolist() == [7] and len(checked) == 12
    kept = torch.cat([checked.split(name) for name in zoo.splits]).sort().values
    assert kept.tolist() == [*range(7), *range(8, 12)]


# --- errors


def test_append_refuses_what_does_not_fit(tmp_path):
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        zoo.append(numbered(0, 2), describe(0, 2))
        for rows in (numbered(0, 2)[:, 1:], numbered(0, 2).int(), numbered(0, 2)[0]):
            with pytest.raises(ValueError, match=r"append: rows must be \[k, 14\] floating point, got"):
                zoo.append(rows, describe(0, 2))
        with pytest.raises(ValueError, match="properties must have a column 'model', got place"):
            zoo.append(numbered(0, 2), {"place": [0, 1]})
        with pytest.raises(ValueError, match="column 'place' must have 2 entries like rows, got 3"):
            zoo.append(numbered(0, 2), describe(0, 2) | {"place": [0, 1, 2]})
        with pytest.raises(ValueError, match=r"columns must be those of the zoo, .* differ in \['lr', 'place'\]"):
            zoo.append(numbered(0, 2), {"model": ["a", "b"], "lr": [0, 0]})
        with pytest.raises(ValueError, match="columns must have the types of the zoo"):
            zoo.append(numbered(0, 2), {"model": ["a", "b"], "place": ["here", "there"]})
    assert_holds(Zoo.open(tmp_path), 2)


def test_writer_refuses_another_architecture_or_dtype(tmp_path):
    write(tmp_path, 2)
    other = Layout.from_checkpoint(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3)))
    with pytest.raises(ValueError, match=r"architecture must be the same, but '2.weight' \[2, 2\] .* meets"):
        ZooWriter(tmp_path, other)
    with pytest.raises(ValueError, match="dtype must be that of the zoo, F32, got torch.bfloat16"):
        ZooWriter(tmp_path, LAYOUT, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must be float16, bfloat16, float32 or float64, got torch.int32"):
        ZooWriter(tmp_path, LAYOUT, dtype=torch.int32)
    assert_holds(write(tmp_path / "next", 1), 1)


def test_full_disk_leaves_the_zoo_as_it_was(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with ZooWriter(tmp_path, LAYOUT) as zoo:
        zoo.append(numbered(0, 2), describe(0, 2))
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="weights-00001.safetensors: writing it needs 5,728 bytes of") as error:
            zoo.append(numbered(2, 100), describe(2, 100))
        assert error.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        zoo.append(numbered(2, 3), describe(2, 3))
    assert_holds(Zoo.open(tmp_path), 5)


def test_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path.name}: name must be that of a file, got a folder"):
        atomic.write_file(tmp_path, b"x")
    assert not list(tmp_path.parent.glob("*.tmp"))


def test_path_must_be_in_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    for use in (Zoo.open, lambda path: ZooWriter(path, LAYOUT)):
        with pytest.raises(ValueError, match=r"zoo: path must be in UTF-8, got b'.*\\xff'; take another folder"):
            use(path)
    assert not path.exists()


def test_half_files_of_other_commands_stay(tmp_path):
    (tmp_path / "alignment.safetensors.1.tmp").write_text("half")
    (tmp_path / "weights-00007.safetensors.1.tmp").write_text("half")
    write(tmp_path, 5)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["alignment.safetensors.1.tmp"]


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/zoo: folder must be writable, got Not a directory"):
        ZooWriter(tmp_path / "file" / "zoo", LAYOUT)


def rewrite_header(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


DAMAGES = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "file must have .* bytes, got"),
    "cut in the header": (lambda path: os.truncate(path, 20), "header must fit into the file"),
    "empty": (lambda path: os.truncate(path, 0), "file must be a safetensors file, got nothing"),
    "offsets out of range": (
        lambda path: rewrite_header(path, lambda h: h["weights"].update(data_offsets=[64, 64 + 3 * P * 4])),
        "leaves a gap after the header",
    ),
    "overlap": (
        lambda path: rewrite_header(path, lambda h: h.update(b=h["weights"])),
        "'b' overlaps|'weights' overlaps",
    ),
    "wrong shape": (
        lambda path: rewrite_header(path, lambda h: h["weights"].update(shape=[P, 3])),
        r"'weights' must be torch.float32 \[3, 14\], as zoo.json says, got torch.float32 \[14, 3\]",
    ),
    "integers": (
        lambda path: rewrite_header(path, lambda h: h["weights"].update(dtype="I32")),
        r"'weights' must be torch.float32 \[3, 14\], as zoo.json says, got torch.int32",
    ),
    "another name": (
        lambda path: rewrite_header(path, lambda h: h.update(w=h.pop("weights"))),
        "must hold a tensor 'weights', got none",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused(tmp_path, damage):
    write(tmp_path, 3)
    (file,) = tmp_path.glob("weights-*")
    do, sentence = DAMAGES[damage]
    do(file)
    with pytest.raises(ValueError, match=sentence) as error:
        Zoo.open(tmp_path)
    assert file.name in str(error.value)


def test_missing_files_are_named(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="zoo must be a folder with a zoo.json, got no such folder"):
        Zoo.open(tmp_path / "nothing")
    for pattern in ("models.parquet", "weights-*"):
        (file,) = tmp_path.glob(pattern)
        file.rename(tmp_path / "aside")
        with pytest.raises(FileNotFoundError, match=f"{file.name}: file must be there, zoo.json lists it"):
            Zoo.open(tmp_path)
        (tmp_path / "aside").rename(file)
    (tmp_path / "models.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="models.parquet: file must be parquet"):
        Zoo.open(tmp_path).properties  # noqa: B018


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_broken_manifest_is_refused(tmp_path, text):
    write(tmp_path, 3)
    (tmp_path / "zoo.json").write_text(text)
    with pytest.raises(ValueError, match="zoo.json: "):
        Zoo.open(tmp_path)


def test_arrays_of_numpy_are_columns(tmp_path):
    with ZooWriter(tmp_path, LAYOUT) as zoo:
        zoo.append(numbered(0, 2), {"model": numpy.array([7, 8]), "lr": numpy.array([0.1, 0.2], numpy.float32)})
    assert Zoo.open(tmp_path).properties["model"].to_pylist() == ["7", "8"]
