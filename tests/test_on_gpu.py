"""Rehearses what is run on a machine with a GPU: a stub stands for Python, so that every step is reached here."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = {path.stem for path in (ROOT / "fastws/ops").glob("[a-z]*.py")}
BENCHMARKS = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
# it writes down what it was asked, says the capability of a GPU where it is asked for one, and needs a second for tests
STUB = """#!/bin/sh
echo "$*" >> "{calls}"
case "$*" in *capability*) echo 90;; *pytest*) sleep {seconds};; *ABSENT*) exit {absent};; esac
"""


def rehearse(folder, part, budget=280, seconds=0, absent=0):
    """The exit status, what is printed, and the command lines that the stub was called with."""
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB.format(calls=calls, seconds=seconds, absent=absent))
    stub.chmod(0o755)
    variables = {"PYTHON": str(stub), "OUT": str(folder / "out"), "BUDGET": str(budget), "PATH": "/usr/bin:/bin"}
    command = ["bash", "benchmarks/on_gpu.sh", part]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []


def test_everything_is_tested(tmp_path):
    status, _, calls = rehearse(tmp_path, "works")
    operators, trainers = (call for call in calls if "pytest" in call)
    assert status == 0 and all(f"tests/test_{op}.py" in operators for op in OPS)
    named = "train_sane", "train_ae", "nern_train", "zoo_make", "waiting"
    assert all(f"tests/test_{trainer}.py" in trainers for trainer in named)
    assert all((ROOT / word).exists() for word in f"{operators} {trainers}".split() if word.startswith("tests/"))
    assert not any("pip" in call for call in calls)  # libraries that load are not built again


def test_every_benchmark_runs_once_and_those_that_matter_first(tmp_path):
    status, _, calls = rehearse(tmp_path, "fast")
    names = [call.split()[-1] for call in calls if call.startswith("-c")]
    assert status == 0 and set(names) == BENCHMARKS and len(names) == len(BENCHMARKS)
    assert names[:2] == ["token_views", "small_cnn_step"]
    trace, replays = (call.split()[1:] for call in calls if call.startswith("-m"))
    assert trace == ["fastws.benchmarks.trace_sane", str(tmp_path / "out")]
    assert calls.index(f"-m {' '.join(trace)}") == 4  # behind what matters most
    assert replays[0] == "fastws.benchmarks.replays" and set(replays[1:]) <= BENCHMARKS


def test_budget_is_kept(tmp_path):
    status, _, calls = rehearse(tmp_path, "works", budget=7, seconds=20)
    assert status == 1
    assert sum("pytest" in call for call in calls) == 1
    assert "no time left" in (tmp_path / "out/trainers.log").read_text()


@pytest.mark.parametrize("part", ["all", "slow"])
def test_other_parts_are_refused(tmp_path, part):
    status, said, calls = rehearse(tmp_path, part)
    assert status == 2 and f"must be works or fast, got {part}" in said and calls == []
