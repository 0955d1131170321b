"""Damaged files for every reader, seeded: ``python tests/fuzz.py --mutants 50000`` or ``make fuzz``.

A reader must take a damaged file or refuse it with one sentence: no crash, no hang, no other exception, no memory above
``room(size)`` of the file, and no other numbers where the format has checksums. Linux only: memory is read from /proc.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file
from small_zoo import make_small_zoo
from test_data_formats import write_cifar10, write_cifar100, write_mnist, write_stl10, write_svhn, write_usps
from test_zoo_read import make_dataset, make_state, unterthiner_network, write_pickle, write_trial, write_unterthiner
from torch import nn

from fastws.data.images import load
from fastws.downstream.embed import load_embeddings, save_embeddings
from fastws.files.checkpoints import load_checkpoint, load_plain, open_checkpoint
from fastws.files.limits import room
from fastws.files.safetensors import read_safetensors_header
from fastws.layout.layout import Layout
from fastws.nern.orders import load_orders, network_orders, save_orders
from fastws.runs.log import Log
from fastws.runs.stages import read as read_stage
from fastws.zoo import ReadOptions, read_checkpoints, read_hub, read_pickle, read_ray, read_unterthiner
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import Alignment
from fastws.zoo.format.zoo import Zoo
from fastws.zoo.readers.record import read_report

REFUSALS = (ValueError, OSError, FloatingPointError)
LONGEST = 10  # seconds for one file
VALUES = (
    b"\0",
    b"\x01",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"[" * 200,
)


class Case(NamedTuple):
    """A reader and a sound file."""

    make: Callable[[Path], Path]  # writes files into a folder, and returns the one to damage
    read: Callable[[Path], object]  # what the reader makes of the file: tensors, or anything else
    checked: bool = False  # whether the format has checksums of all that becomes numbers


CASES: dict[str, Case] = {}


def state_file(**options) -> Callable[[Path], Path]:
    def make(folder):
        torch.save(make_state(1), folder / "a.pt", **options)
        return folder / "a.pt"

    return make


def tensors_file(folder):
    save_file(make_state(1), folder / "a.safetensors")
    return folder / "a.safetensors"


def index_file(folder):
    tensors_file(folder)
    index = folder / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(make_state(1), "a.safetensors")}))
    return index


def fresh(path: Path) -> Path:
    """The folder that a zoo is read into."""
    shutil.rmtree(path.parent / "out", ignore_errors=True)
    return path.parent / "out"


def rows(zoo: Zoo) -> object:
    zoo.properties.to_pydict()
    return {"rows": zoo.rows(range(len(zoo)))}


def images(folder: Path) -> object:
    found = load(folder, limit=20)
    return {"x": found.train_x, "y": found.train_y}


def trial(name: str) -> Callable[[Path], Path]:
    def make(folder):
        write_trial(folder / "raw/a", 1, epochs=range(2))
        (folder / "raw/a/params.json").write_text(json.dumps({"lr": 0.1, "model": {"nlin": "tanh"}}))
        return folder / "raw/a" / name

    return make


def hub(name: str) -> Callable[[Path], Path]:
    def make(folder):
        (folder / "hub/a").mkdir(parents=True)
        save_file(make_state(1), folder / "hub/a/model.safetensors")
        (folder / "hub/a/config.json").write_text(json.dumps({"size": 3, "deep": {"name": "x"}}))
        return folder / "hub/a" / name

    return make


def dataset(legacy: bool) -> Callable[[Path], Path]:
    def make(folder):
        write_pickle(folder / "data.pt", {"trainset": make_dataset([1, 2])}, legacy)
        return folder / "data.pt"

    return make


def population(name: str) -> Callable[[Path], Path]:
    def make(folder):
        write_unterthiner(folder / "raw", [unterthiner_network()] * 2)
        return folder / "raw" / name

    return make


def read_population(path: Path) -> object:
    return rows(read_unterthiner(path.parent, fresh(path.parent)))


def zoo(pattern: str) -> Callable[[Path], Path]:
    def make(folder):
        made = make_small_zoo(folder / "zoo", widths=(3, 4, 2))
        if "alignment" in pattern:
            align(AlignConfig(zoo=str(made.path)))
        return next((folder / "zoo").glob(pattern))

    return make


def read_zoo(path: Path) -> object:
    return rows(Zoo.open(path.parent))


def report(folder):
    (folder / "files").mkdir()
    torch.save(make_state(1), folder / "files/a.pt")
    read_checkpoints(folder / "files", folder / "zoo")
    return folder / "zoo/read.json"


def images_of(write: Callable, pattern: str, **options) -> Callable[[Path], Path]:
    def make(folder):
        write(folder / "images", **options)
        return next(path for path in sorted((folder / "images").rglob(pattern)) if path.is_file())

    return make


def read_images(path: Path) -> object:
    return images(next(parent for parent in path.parents if parent.name == "images"))


def encoded(kind: str) -> bytes:
    pixels = numpy.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def classes(kind: str) -> Callable[[Path], Path]:
    def make(folder):
        for part in ("train", "test"):
            for name in "ab":
                (folder / "images" / part / name).mkdir(parents=True)
                (folder / "images" / part / name / f"0.{kind}").write_bytes(encoded(kind))
        return folder / "images/train/a" / f"0.{kind}"

    return make


def parquet_images(folder):
    (folder / "images").mkdir()
    for part in ("train", "test"):
        table = pyarrow.table({"image": [{"bytes": encoded("png")}] * 4, "label": [0, 1, 2, 0]})
        pyarrow.parquet.write_table(table, folder / f"images/{part}-0.parquet")
    return folder / "images/train-0.parquet"


def dump(folder):
    sets = {f"{name}set": torch.utils.data.TensorDataset(torch.rand(4, 1, 4, 4), torch.arange(4)) for name in PARTS}
    torch.save(sets, folder / "dataset.pt")
    return folder / "dataset.pt"


PARTS = ("train", "test")
KERNELS = [torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))]


def orders(name: str) -> Callable[[Path], Path]:
    def make(folder):
        save_orders(folder / "orders", network_orders(KERNELS, "crossfilter"), KERNELS, "crossfilter")
        return folder / "orders" / name

    return make


def text_file(name: str, content: object) -> Callable[[Path], Path]:
    def make(folder):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return folder / name

    return make


LAYOUT = Layout.from_checkpoint(make_state(1))
STRICT = ReadOptions(on_bad="raise")  # or a damaged state is left out, with its name, and rows are fewer
LOG = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(5))


def embeddings(folder):
    save_embeddings(folder / "e.safetensors", torch.randn(4, 3), LAYOUT)
    return folder / "e.safetensors"


def run_checkpoint(folder):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"config": {"lr": 0.1}, "step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def several_networks(folder):
    quantised = {
        "w": torch.quantize_per_tensor(torch.ones(4, 5), 0.1, 0, torch.qint8),
        "_extra_state": (1, torch.ones(2)),
    }
    state = {"epoch": 3, "module.model": make_state(1) | quantised, "ema": {"state_dict": make_state(2)}}
    torch.save(state, folder / "several.pt")
    return folder / "several.pt"


CASES |= {
    "torch file": Case(state_file(), load_checkpoint, True),
    "torch file, legacy": Case(state_file(_use_new_zipfile_serialization=False), load_checkpoint),
    "torch file, layout": Case(state_file(), lambda path: Layout.from_checkpoint(path).describe()),
    "torch file, states": Case(state_file(), lambda path: rows(read_checkpoints(path, fresh(path), like=LAYOUT)), True),
    "several networks": Case(several_networks, lambda path: open_checkpoint(path).tensors, True),
    "checkpoint of a run": Case(run_checkpoint, load_plain, True),
    "safetensors": Case(tensors_file, load_checkpoint),
    "safetensors header": Case(tensors_file, read_safetensors_header),
    "safetensors, states": Case(tensors_file, lambda path: rows(read_checkpoints(path, fresh(path), like=LAYOUT))),
    "index": Case(index_file, load_checkpoint),
    "pickled data set": Case(dataset(False), lambda path: rows(read_pickle(path, fresh(path), options=STRICT)), True),
    "pickled data set, legacy": Case(dataset(True), lambda path: rows(read_pickle(path, fresh(path)))),
    "ray results": Case(trial("result.json"), lambda path: rows(read_ray(path.parents[1], fresh(path.parents[1])))),
    "ray params": Case(trial("params.json"), lambda path: rows(read_ray(path.parents[1], fresh(path.parents[1])))),
    "hub config": Case(hub("config.json"), lambda path: rows(read_hub(path.parents[1], fresh(path.parents[1])))),
    "hub weights": Case(hub("model.safetensors"), lambda path: rows(read_hub(path.parents[1], fresh(path.parents[1])))),
    "weights.npy": Case(population("weights.npy"), read_population),
    "metrics.csv": Case(population("metrics.csv"), read_population),
    "zoo.json": Case(zoo("zoo.json"), read_zoo),
    "models.parquet": Case(zoo("models*.parquet"), read_zoo),
    "weights of a zoo": Case(zoo("weights*"), read_zoo),
    "alignment": Case(zoo("alignment*"), lambda path: Alignment.open(Zoo.open(path.parent)).permutations),
    "read.json": Case(report, lambda path: str(read_report(path.parent))),
    "layout": Case(text_file("layout.json", LAYOUT.to_dict()), lambda path: Layout.load(path).describe()),
    "stage": Case(text_file("s.json", {"result": {"a": 1}, "attempts": 1}), lambda path: read_stage(path, "result")),
    "log.jsonl": Case(text_file("log.jsonl", LOG), lambda path: Log(path.parent, {}, 3).close()),
    "embeddings": Case(embeddings, lambda path: load_embeddings(path, 4, LAYOUT)),
    "orders": Case(orders("orders.json"), lambda path: load_orders(path.parent, KERNELS, "crossfilter")),
    "order of a layer": Case(orders("layer_0.pt"), lambda path: load_orders(path.parent, KERNELS, "crossfilter"), True),
    "IDX": Case(images_of(write_mnist, "train-images*"), read_images),
    "IDX labels": Case(images_of(write_mnist, "train-labels*"), read_images),
    "IDX, gzip": Case(images_of(write_mnist, "train-images*", packed=True), read_images, True),
    "CIFAR-10": Case(images_of(write_cifar10, "data_batch_2"), read_images),
    "CIFAR-100": Case(images_of(write_cifar100, "train"), read_images),
    "SVHN": Case(images_of(write_svhn, "train*"), read_images),
    "STL-10": Case(images_of(write_stl10, "train_y*"), read_images),
    "USPS": Case(images_of(write_usps, "usps.bz2"), read_images, True),
    "PNG": Case(classes("png"), read_images),
    "JPEG": Case(classes("jpeg"), read_images),
    "parquet of images": Case(parquet_images, read_images),
    "dataset.pt": Case(dump, lambda path: load(path).train_x, True),
}


def damage(content: bytes, chance: random.Random) -> bytes:
    """A copy with a few bytes changed, put in, cut out or moved."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        # headers are where most is decided
        place = chance.randrange(min(len(changed), chance.choice((64, 1024, 1 << 30))) + 1)
        end = min(len(changed), place + chance.choice((1, 2, 4, 8, 64)))
        kind = chance.randrange(7)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            value = chance.choice(VALUES)
            changed[place : place + len(value)] = value
        elif kind == 2:
            changed[place:place] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4, 32))))
        elif kind == 3:
            del changed[place:end]
        elif kind == 4:
            del changed[place:]
        elif kind == 5:
            changed[place:place] = changed[place:end] * chance.choice((1, 3, 100))
        else:
            digits = [at for at in range(place, min(len(changed), place + 200)) if 48 <= changed[at] <= 57]
            for at in digits[:1]:
                changed[at : at + 1] = chance.choice((b"-1", b"99999999999999999999", b"1e400", b"null", b'"x"', b"{}"))
    return bytes(changed)


def digest(value: object) -> str:
    """Equal for equal numbers."""
    if isinstance(value, torch.Tensor):
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return hashlib.sha256(f"{list(value.shape)} {value.dtype}".encode() + content).hexdigest()
    if isinstance(value, dict):
        return str(sorted((str(key), digest(entry)) for key, entry in value.items()))
    return str([digest(entry) for entry in value]) if isinstance(value, list | tuple) else str(value)


def memory(name: str) -> int:
    """Bytes: VmRSS, those in use, or VmHWM, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def try_one(case: Case, path: Path, content: bytes, sound: bytes, expected: str) -> str:
    """What is wrong with what a reader does; "" if nothing is."""
    path.write_bytes(content)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    try:
        found = digest(case.read(path))
    except REFUSALS as error:
        found = expected
        if "\n" in str(error).strip():
            return f"two sentences: {str(error)[:200]!r}"
    except Exception as error:  # noqa: BLE001  whatever it is, it is what is looked for
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    if (more := memory("VmHWM") - before) > room(len(content)):
        return f"{more >> 20} MB of memory for {len(content)} bytes"
    return "other numbers" if case.checked and found != expected else ""


def work(name: str, folder: Path, numbers: range, seed: int, said: int) -> None:
    """Tries mutants in a process of its own, and says before each which one it is, and after it what is wrong."""
    case = CASES[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    path = case.make(folder)
    sound = path.read_bytes()
    expected = digest(case.read(path))
    for number in numbers:
        os.write(said, f"{number}\n".encode())
        content = damage(sound, random.Random(f"{seed} {name} {number}"))
        signal.alarm(LONGEST)
        if wrong := try_one(case, path, content, sound, expected):
            os.write(said, f"!{number} {wrong}\n".replace("\n", " ").strip().encode() + b"\n")
        signal.alarm(0)
        path.write_bytes(sound)


def fuzz(name: str, count: int, seed: int, folder: Path) -> list[str]:
    """What is wrong with a reader, a line each."""
    wrong, first = [], 0
    while first < count:
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                work(name, folder, range(first, count), seed, writer)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        last = None
        with open(reader) as lines:
            for line in lines:
                if line.startswith("!"):
                    wrong.append(f"{name}: {line[1:].strip()}")
                else:
                    last = int(line)
        _, status = os.waitpid(process, 0)
        if status == 0:
            return wrong
        if last is None:
            return [*wrong, f"{name}: the sound file is not read, status {status}"]
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        wrong.append(f"{name}: {last} ended the process by {how}")  # signal 14: it took too long
        first = last + 1
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=50_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("readers", nargs="*", help="by default all: " + ", ".join(CASES))
    options = parser.parse_args()
    names = options.readers or list(CASES)
    wrong, begun = [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = fuzz(name, -(-options.mutants // len(names)), options.seed, Path(folder, "files"))
            print(f"{time.time() - begun:6.0f} s  {name}: {len(found)} wrong", *found[:20], sep="\n    ", flush=True)
            wrong += found
    if wrong:
        sys.exit(f"{len(wrong)} mutants were neither read nor refused in one sentence")


if __name__ == "__main__":
    main()
