"""What launching costs on a GPU: calls of operators beside replays of the same from CUDA graphs.

Run: python -m fastws.benchmarks.replays token_views nt_xent
"""

import statistics
import sys
from collections.abc import Callable, Iterator

import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, time_all
from fastws.benchmarks.run import load

OURS = ("kernel", "triton")  # runs of a case that are recorded


def recorded(run: Callable, args: tuple) -> Callable:
    """A call from a graph; raises RuntimeError for what cannot be recorded, which is what waits for the device."""
    run(*args)  # kernels are loaded before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*args)
    return lambda *args: graph.replay()


def compare(case: Case) -> Iterator[str]:
    args = case.make_args()
    for name in (name for name in OURS if name in case.runs):
        what = f"{case.op}: {case.name}: {name}"
        try:
            runs = {"call": case.runs[name], "replay": recorded(case.runs[name], args)}
        except RuntimeError as error:
            yield f"{what}: cannot be recorded: {str(error).splitlines()[0]}"
            continue
        times = {way: statistics.median(seconds) * 1e6 for way, seconds in time_all(runs, args, quick=True).items()}
        yield f"{what}: {times['call']:.1f} us a call, {times['replay']:.1f} us a replay"


def main(names: list[str]) -> None:
    if DEVICE != "cuda":
        sys.exit("replays: torch must see a GPU, got none; graphs are recorded there only")
    for name in names:
        for case in load(name).cases(Options(quick=True, compile=False)):
            for line in compare(case):
                print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
