"""Reading a raw zoo of 51 states per network into a zoo folder, against the published reader's work.

Predicted, per state of 2,464 weights, files in the page cache, one thread: opening and reading 14 kB 25 us, the
directory of the file 30 us, copying and checking 10 us, its line of JSON 20 us, 10 kB written and synced 10 us: 0.1 ms,
of which a third is the system's own time for files. The published reader loads by torch (0.5 ms), copies the checkpoint
six times (0.2 ms each), parses all lines of the network for each of its states (0.5 ms) and concatenates: 2.5 ms. On a
disk that gives 200 MB/s, 51,000 states are 0.7 GB and take 3.5 s, which is then what reading takes.

What came out otherwise: file, directory, copy and JSON cost in processor time what was predicted, but Python's work
around each state and the writer's own look for NaN cost as much again. The published work costs several times as much
as predicted, because ``torch.load`` reads the pickle in Python code. A cold file costs its latency, not its bytes,
which ``copy, cold`` pays too.

Rows: ``kernel`` is ``read_ray``; ``published work`` the published steps, restated; ``published code`` the reader in a
checkout of ModelZoos/ModelZooDataset (``--reference``) with Ray replaced by plain calls; ``copy`` reads the bytes of
all files and writes the matrix, no more. ``cold`` drops the files from the page cache first. The rivals read a share of
the networks; what they return is compared first. ``--full`` reads 1,000 networks.

Run: fastws bench zoo_read [--full] [--reference PATH]
"""

import copy
import importlib
import io
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastws.benchmarks.harness import Options
from fastws.zoo import ReadOptions, Zoo, read_ray, sequence_pairs

SHARE = 20  # networks that the rivals read
STATES, ROUNDS = 51, 3
NOT_FINITE = 1, 7  # network and epoch
LAYERS = [(0, "conv2d"), (3, "conv2d"), (6, "conv2d"), (9, "fc"), (11, "fc")]
PROPERTIES = {"result_keys": ["test_acc", "training_iteration", "ggap"], "config_keys": ["optim::lr", "model::nlin"]}


def make_raw_zoo(root: Path, networks: int) -> None:
    """Networks of the published size with the files of the published generator; its lines hold 40 settings each."""
    modules = (nn.Conv2d(1, 8, 5), nn.Conv2d(8, 6, 5), nn.Conv2d(6, 4, 2), nn.Linear(36, 20), nn.Linear(20, 10))
    shapes = [(f"module_list.{layer}.{name}", p.shape) for (layer, _), module in zip(LAYERS, modules, strict=True)
              for name, p in module.named_parameters()]  # fmt: skip
    config = {"model::nlin": "tanh", "model::dropout": 0.0, "optim::optimizer": "adam", "optim::lr": 3e-4}
    config |= {f"setting::{number}": number / 7 for number in range(36)}
    generator = torch.Generator().manual_seed(0)
    for number in tqdm(range(networks), desc="making"):
        folder = root / f"NN_tune_trainable_97ebe_{number:05}_{number}_seed={number + 1}_2021-07-26_17-33-32"
        folder.mkdir(parents=True)
        with open(folder / "result.json", "w") as file:
            for epoch in range(STATES):
                line = {"train_loss": 1 / (epoch + 1), "train_acc": 0.9, "test_loss": 0.5, "test_acc": epoch / 64}
                line |= {"training_iteration": epoch, "trial_id": "97ebe", "date": "2021-07-26_17-33-32", "pid": number}
                file.write(json.dumps(line | {"time_total_s": 9.5 * epoch, "config": config | {"seed": number}}) + "\n")
        for epoch in range(STATES):
            state = OrderedDict((name, torch.randn(shape, generator=generator)) for name, shape in shapes)
            if (number, epoch) == NOT_FINITE:
                state["module_list.6.bias"][2] = math.nan
            content = io.BytesIO()
            torch.save(state, content)
            (folder / f"checkpoint_{epoch:06}").mkdir()
            (folder / f"checkpoint_{epoch:06}/checkpoints").write_bytes(content.getvalue())


# --- rivals: each returns weights [n, P] and the property "test_acc"


def published_work(folders: list[Path]) -> tuple[Tensor, list[float]]:
    """Per state: load, copy to look for NaN, copy to look for large weights, copy twice to keep, copy both at the end.

    Then the whole result file again for one line, and a concatenation tensor by tensor of one more copy.
    """
    kept = []
    for folder in folders:
        for epoch in range(STATES):
            state = torch.load(folder / f"checkpoint_{epoch:06}/checkpoints", map_location="cpu", weights_only=True)
            if any(tensor.isnan().any() for tensor in copy.deepcopy(state).values()):
                continue
            if any((tensor.abs() > math.inf).any() for tensor in copy.deepcopy(state).values()):
                continue
            kept.append((copy.deepcopy(state), copy.deepcopy(state), folder, epoch))
    inputs, _ = copy.deepcopy([state for state, *_ in kept]), copy.deepcopy([state for _, state, *_ in kept])
    accuracy = []
    for _, _, folder, epoch in kept:
        with open(folder / "result.json") as file:
            accuracy.append([json.loads(line) for line in file][epoch]["test_acc"])
    vectors = []
    for state in inputs:
        vector = torch.Tensor()
        for tensor in copy.deepcopy(state).values():
            vector = torch.cat((vector, tensor.view(-1)))
        vectors.append(vector)
    return torch.stack(vectors), accuracy


def import_published(path: Path):
    """The published class, with plain calls for Ray, and without its progress bar."""

    class Remote:
        def __init__(self, function):
            self.remote = function

    ray = types.ModuleType("ray")
    ray.remote = lambda *args, **_: Remote(args[0]) if args else Remote
    ray.get, ray.init, ray.shutdown = (lambda value: value), (lambda **_: None), (lambda: None)
    bar = types.ModuleType("checkpoints_to_datasets.progress_bar")
    update = types.SimpleNamespace(remote=lambda count: None)
    bar.ProgressBar = lambda total: types.SimpleNamespace(
        actor=types.SimpleNamespace(update=update), print_until_done=lambda: None
    )
    torch._six = types.SimpleNamespace(string_classes=(str,))
    sys.modules |= {"ray": ray, "checkpoints_to_datasets.progress_bar": bar}
    sys.path.insert(0, str(path / "code"))
    return importlib.import_module("checkpoints_to_datasets.dataset_base").ModelDatasetBase


def published_code(dataset_class, root: Path, count: int) -> tuple[Tensor, list[float]]:
    dataset = dataset_class(**published_options(root), max_samples=count, property_keys=copy.deepcopy(PROPERTIES))
    return dataset.__get_weights__(), dataset.properties["test_acc"]


def published_options(root: Path) -> dict:
    epochs = list(range(STATES))
    return {"root": [root], "layer_lst": LAYERS, "epoch_lst": epochs, "ds_split": [1.0, 0.0], "shuffle_path": False}


# --- what all are compared with


def drop_from_cache(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_bytes(root: Path, out: Path) -> None:
    """What no reader can do without: all bytes read, all weights written and synced."""
    out.mkdir()
    with open(out / "weights", "wb") as target:
        for folder in sorted(os.scandir(root), key=lambda entry: entry.name):
            Path(folder.path, "result.json").read_bytes()
            for epoch in range(STATES):
                with open(f"{folder.path}/checkpoint_{epoch:06}/checkpoints", "rb", buffering=0) as file:
                    target.write(file.read()[: 4 * 2464])
        target.flush()
        os.fsync(target.fileno())


def check(zoo: Zoo, rivals: dict, networks: int) -> None:
    assert len(zoo) == networks * STATES - 1
    for name, rival in rivals.items():
        weights, accuracy = rival()
        order = [place for _, place in sorted(zip(published_order(weights, zoo), range(len(weights)), strict=True))]
        assert torch.equal(zoo.rows(range(len(weights))), weights[order]), name
        assert zoo.properties["test_accuracy"].to_pylist()[: len(weights)] == [accuracy[i] for i in order], name


def check_pairs(zoo: Zoo, dataset_class, root: Path) -> None:
    """The published pairs of states that follow each other, in any order of networks."""
    dataset = dataset_class(**published_options(root), task="sequence_prediction")
    sides = [[torch.cat([x.flatten() for x in state.values()]) for state in part] for part in
             (dataset.data_in, dataset.data_out)]  # fmt: skip
    published = {(now.numpy().tobytes(), following.numpy().tobytes()) for now, following in zip(*sides, strict=True)}
    count = SHARE * (STATES - 1) - 2
    now, following = (zoo.rows(rows).numpy() for rows in sequence_pairs(zoo)[:count].T)
    assert {(a.tobytes(), b.tobytes()) for a, b in zip(now, following, strict=True)} == published


def published_order(weights: Tensor, zoo: Zoo) -> list[int]:
    """Rows of the zoo that a rival's rows are: it takes the networks as the file system lists them."""
    places = {row.tobytes(): place for place, row in enumerate(zoo.rows(range(len(weights))).numpy())}
    return [places[row.tobytes()] for row in weights.numpy()]


def measure(function, *args) -> float:
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def rows(options: Options) -> Iterator[dict]:
    networks = 1000 if options.full else 2 if options.small else SHARE if options.quick else 100
    with tempfile.TemporaryDirectory() as temporary:
        times = time_readers(Path(temporary), networks, options)
    kernel = statistics.median(times["kernel"])
    for name, seconds in times.items():
        about = {"op": "zoo read", "implementation": name, "case": f"{networks} x {STATES} states of 2464 weights"}
        second = statistics.median(seconds)
        yield about | {"us": second * 1e6, "times_kernel": second / kernel, "states_per_s": 1 / second}


def time_readers(folder: Path, networks: int, options: Options) -> dict[str, list[float]]:
    """Seconds per state, of several rounds."""
    root, share, out = folder / "raw", folder / "share", folder / "zoo"
    make_raw_zoo(root, networks)
    os.sync()
    folders = sorted(root.iterdir())[:SHARE]
    share.mkdir()
    for path in folders:
        (share / path.name).symlink_to(path)
    reading = ReadOptions(threads=options.threads)
    rivals = {"published work": lambda: published_work(folders)}
    if options.reference:
        dataset_class = import_published(options.reference)
        rivals["published code"] = lambda: published_code(dataset_class, share, SHARE)
    check(read_ray(root, out, options=reading), rivals, networks)
    if options.reference:
        check_pairs(Zoo.open(out), dataset_class, share)
    times = {name: [] for name in ("kernel", "copy", "kernel, cold", "copy, cold", *rivals)}
    for _ in range(ROUNDS):
        for name in times:
            shutil.rmtree(out, ignore_errors=True)
            if name.endswith("cold"):
                drop_from_cache(root)
            if name in rivals:
                times[name].append(measure(rivals[name]) / (len(folders) * STATES))
            elif name.startswith("copy"):
                times[name].append(measure(copy_bytes, root, out) / (networks * STATES))
            else:
                times[name].append(measure(lambda: read_ray(root, out, options=reading)) / (networks * STATES))
    return times
