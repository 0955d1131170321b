"""Windows of files of a hub, against ``pread`` of the same bytes; and opening the folder.

Predicted, one thread, 64 windows of 256 tokens of 288 weights, 18.9 MB in 64 stretches of 295 kB. Warm: ``pread``
copies from the page cache into fresh memory, 4 to 6 ms. Windows are copied and standardised from mapped pages, of which
the system maps 16 at each of 300 faults: 5 to 7 ms, and 1 to 2 ms of Python: 1.3 times as long. Where layers are new, 4
pages of each are read more, half a per cent of the bytes, and 64 layers are measured in 30 us each: 2 ms. Cold:
``pread`` waits for one stretch after the other, windows ask for all at once: half to all of its time, whatever the
disk. A file is opened in 1 ms for its header of some 40 tensors, and in a tenth of it more for mapping.

Rows: ``fastws`` knows the scales of layers, as always but once in a run; ``with new layers`` measures them first;
``pread`` reads into fresh memory, ``pread, kept memory`` into the same memory each time. Cold: files are unmapped and
dropped from the page cache first; that is time on the clock, warm that of the processor.

What came out otherwise: copying from the page cache takes 1.3 ms, a quarter of what was predicted, because memory that
is freed is used again; windows take what was predicted, so three times as long, not 1.3 times.

Run: fastws bench hub [--quick]
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from fastws.benchmarks.harness import Options, spread
from fastws.files.arena import C
from fastws.windows.hub import Hub, open_hub
from fastws.windows.population import cut

LAYER = (256, 256, 3, 3)  # 2.4 MB
ASKED = {"1,000 of 10 MB": (1000, 4), "100 of 100 MB": (100, 42)}  # files, and layers of each
QUICK = {"200 of 10 MB": (200, 4), "20 of 100 MB": (20, 42)}
SMALL = {"2 of 2 MB": (2, 1)}
WINDOWS, WINDOW, ROUNDS = 64, 256, 7
DROP = 4  # MADV_DONTNEED


def make_files(folder: Path, count: int, layers: int) -> None:
    numbers = torch.randn(layers, *LAYER, generator=torch.Generator().manual_seed(0))
    for file in tqdm(range(count), desc="making", leave=False):
        numbers = numbers.roll(1009, -3).add_(1e-3)
        state = {f"layer{layer:02}.weight": numbers[layer] for layer in range(layers)}
        path = folder / f"{file:04}.safetensors"
        save_file(state | {"head.bias": torch.tensor([float(file)])}, path)
        with open(path, "rb") as written:
            os.fsync(written.fileno())  # what is not on disk is not dropped from memory


def draw(hub: Hub, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(number)
    model = torch.randint(len(hub.models), (WINDOWS,), generator=random)
    start = (torch.rand(WINDOWS, generator=random) * (hub.population.num_tokens[model] - WINDOW)).long()
    return model, start


def stretches(hub: Hub, model: torch.Tensor, start: torch.Tensor) -> list[tuple[int, int, int]]:
    """File, first byte and bytes of each stretch that windows are in, as the population asks for them."""
    asked, arena = [], hub.population.arena

    class Asked:
        bytes = arena.bytes

        @staticmethod
        def prefetch(begins, sizes):
            asked.extend(zip(begins, sizes, strict=True))

    hub.population.measured.known.fill_(True)
    cut(hub.population._replace(arena=Asked), model, start, WINDOW)
    files = torch.searchsorted(arena.begins, torch.tensor([begin for begin, _ in asked]), right=True) - 1
    begins = arena.begins[files].tolist()
    return [(file, at - begin, size) for file, begin, (at, size) in zip(files.tolist(), begins, asked, strict=True)]


def drop(hub: Hub, files: list[int]) -> None:
    """Unmaps all pages, which are not dropped otherwise, and drops the files from the page cache."""
    content = hub.population.arena.bytes
    C.madvise(content.data_ptr(), len(content), DROP)
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def check(hub: Hub, files: list[int]) -> None:
    """Windows are the bytes that ``pread`` reads, standardised."""
    plain = hub.population._replace(measured=open_hub(hub.path, standardize=False).population.measured)
    model, start = draw(hub, 0)
    read = b"".join(os.pread(files[file], size, begin) for file, begin, size in stretches(hub, model, start))
    found, lengths, _ = cut(plain, model, start, WINDOW)
    numbers = found[torch.arange(found.shape[2]) < lengths[..., None]]
    if not torch.equal(numbers.sort().values, torch.frombuffer(bytearray(read), dtype=torch.float32).sort().values):
        raise ValueError("hub: windows must be the numbers of the files, got others")


def measure(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    begin = clock()
    run()
    return clock() - begin


def runs_of(hub: Hub, files: list[int], number: int) -> dict[str, Callable[[], object]]:
    model, start = draw(hub, number)
    places = stretches(hub, model, start)
    kept = memoryview(bytearray(sum(size for _, _, size in places)))

    def windows() -> None:
        hub.population.measured.known.fill_(True)
        cut(hub.population, model, start, WINDOW)

    def new_layers() -> None:
        hub.population.measured.known.fill_(False)
        cut(hub.population, model, start, WINDOW)

    def fresh() -> list[bytes]:
        return [os.pread(files[file], size, begin) for file, begin, size in places]

    def into_kept() -> None:
        end = 0
        for file, begin, size in places:
            os.preadv(files[file], [kept[end : end + size]], begin)
            end += size

    return {"fastws": windows, "with new layers": new_layers, "pread": fresh, "pread, kept memory": into_kept}


def race(hub: Hub, files: list[int], rounds: int) -> Iterator[tuple[str, bool, list[float]]]:
    """Each round has other windows, which were all read before or are dropped from memory."""
    draws = [runs_of(hub, files, number) for number in range(rounds)]
    for run in draws:
        run["fastws"]()
    for name in draws[0]:
        yield name, False, [measure(runs[name], time.process_time) for runs in draws]
    for name in draws[0]:
        seconds = []
        for runs in draws:
            drop(hub, files)
            seconds.append(measure(runs[name]))
        yield name, True, seconds


def rows(options: Options) -> Iterator[dict]:
    cases = SMALL if options.small else QUICK if options.quick else ASKED
    for case, (count, layers) in cases.items():
        with tempfile.TemporaryDirectory() as root:
            make_files(Path(root), count, layers)
            hub = open_hub(root)
            files = [os.open(Path(root, model), os.O_RDONLY) for model in hub.models]
            try:
                check(hub, files)
                found = list(race(hub, files, 1 if options.small else ROUNDS))
                opened = []
                for cold in (False, True):
                    if cold:
                        drop(hub, files)
                    opened.append(measure(lambda root=root: open_hub(root)))
            finally:
                for file in files:
                    os.close(file)
        medians = {(name, cold): statistics.median(seconds) * 1e6 for name, cold, seconds in found}
        spreads = {(name, cold): spread(seconds) * 1e6 for name, cold, seconds in found}
        for name in dict.fromkeys(name for name, _, _ in found):
            row = {"op": "hub", "implementation": name, "case": case, "us": medians[name, False]}
            row |= {"iqr": spreads[name, False], "cold_us": medians[name, True], "cold_iqr": spreads[name, True]}
            yield row | {f"of pread{', cold' * cold}": medians["pread", cold] / medians[name, cold] for cold in (0, 1)}
        warm, cold = (seconds * 1e6 for seconds in opened)
        yield {"op": "hub", "implementation": "fastws", "case": f"opening {case}", "us": warm, "cold_us": cold}
