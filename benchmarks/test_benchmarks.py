"""Every case of every operator under pytest-benchmark: correctness first, a group for each operator and case.

    pytest benchmarks --benchmark-only -k token_views
    pytest benchmarks --benchmark-disable    once, small and without timing: none may rot

Times are of the threads that torch uses, OMP_NUM_THREADS. Those of ``cold`` calls, groups of their own, are with
nothing in the caches.
"""

from functools import lru_cache

import pytest
import torch

from fastws.benchmarks.harness import DEVICE, Case, Options, make_touch
from fastws.benchmarks.run import NAMES, load, rows

COLD_ROUNDS = 20


def pytest_generate_tests(metafunc):
    once = metafunc.config.getoption("benchmark_disable")
    if "case" in metafunc.fixturenames:
        found = [
            pytest.param(case, run, cold, id=f"{case.op}: {case.name}: {run}" + ", cold" * cold)
            for module in map(load, NAMES)
            for case in getattr(module, "cases", lambda options: ())(Options(small=once))
            for cold in (False, True)
            for run in case.runs
            if not (once and (cold or "compiled" in run))  # cold caches change no result, compilers take minutes
        ]
        metafunc.parametrize("case, run, cold", found)
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [name for name in NAMES if hasattr(load(name), "rows")] if once else [])


@lru_cache(maxsize=1)
def arguments(number: int, make_args) -> tuple:
    """Of the last case, which most likely is that of the next test."""
    return make_args()


def test_case(benchmark, case: Case, run: str, cold: bool):
    args = arguments(id(case), case.make_args)
    case.verify(run, args)
    benchmark.group = f"{case.op}: {case.name}" + ", cold" * cold
    if case.work:
        benchmark.extra_info[case.rate.split("_per")[0]] = case.work(*args) / 1e9

    def call():
        case.runs[run](*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    if cold:
        benchmark.pedantic(call, setup=make_touch(), rounds=COLD_ROUNDS)
    else:
        benchmark(call)


def test_rows(name: str):
    """What does not race operators times itself: here once, in its small size."""
    found = list(rows(load(name), Options(small=True)))
    assert found and all(row["us"] > 0 for row in found)
