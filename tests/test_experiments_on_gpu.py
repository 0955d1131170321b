"""Rehearses the long runs of a machine with a GPU: a stub stands for Python, and what it was given is checked here."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from running import finish, run_code, start

ROOT = Path(__file__).parents[1]
# it keeps what it was asked, takes its time, and leaves a log as a run would; code 143 when it is asked to stop
STUB = """#!/bin/bash
trap 'exit 143' TERM
n=$(ls "{calls}" | wc -l)
printf '%s\\0' "$@" > "{calls}/$n"
for out; do :; done
mkdir -p "$out" && echo '{{}}' > "$out/log.jsonl"
sleep {seconds} & wait
exit {status}
"""
NAMES = ["nern-resnet20-160", "nern-resnet20-180", "nern-resnet20-200"]
NAMES += ["mnist-s-seed", "hyperrep-mnist-seed", "hyperrep-generative"]


def rehearse(folder, *parts, budget=600, seconds=0, status=0):
    """The exit status, what is printed, and the arguments of each call of the stub so far."""
    stub, calls = folder / "python", folder / "calls"
    calls.mkdir(exist_ok=True)
    stub.write_text(STUB.format(calls=calls, seconds=seconds, status=status))
    stub.chmod(0o755)
    variables = {"PYTHON": str(stub), "RUNS": str(folder / "runs"), "DATA": "data", "OUT": str(folder / "out")}
    done = subprocess.run(
        ["bash", "experiments/on_gpu.sh", *parts],
        cwd=ROOT,
        env=os.environ | variables | {"BUDGET": str(budget)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    given = [path.read_text().split("\0")[:-1] for path in sorted(calls.iterdir(), key=lambda path: int(path.name))]
    return done.returncode, done.stdout, given


def test_every_run_is_reached_and_none_twice(tmp_path):
    status, _, calls = rehearse(tmp_path)
    assert status == 0 and [Path(call[-1]).name for call in calls] == NAMES
    assert sorted(path.parent.name for path in (tmp_path / "out").rglob("log.jsonl")) == sorted(NAMES)
    status, said, calls = rehearse(tmp_path)
    assert status == 0 and len(calls) == len(NAMES) and said.count("was done before") == len(NAMES)


def test_runs_are_what_the_package_understands(tmp_path, monkeypatch):
    """The code that is given to Python, with what runs taken out: configurations are made, and say what was asked."""
    configs, calls = [], rehearse(tmp_path)[2]
    for module in ("fastws.train.nern.train", "fastws.zoo.making.make", "fastws.train.ae.train"):
        monkeypatch.setattr(import_module(module), "run", configs.append)
    for _, code, *arguments in calls:
        monkeypatch.setattr(sys, "argv", ["-c", *arguments])
        exec(code, {})
    nern, zoo, hyperreps = configs[:3], configs[3], configs[4:]
    assert [(config.hidden, config.steps, config.precision) for config in nern] == [
        (width, 68_600, "bf16") for width in (160, 180, 200)
    ]
    assert (zoo.networks, zoo.epochs, zoo.data) == (1000, 50, "data/mnist")
    assert [config.passes for config in hyperreps] == [500, 500] and all(c.zoo == zoo.out for c in hyperreps)
    assert {config.device for config in configs} == {"cuda"}
    assert [config.out for config in configs] == [str(tmp_path / "runs" / name) for name in NAMES]


def test_budget_is_kept_and_the_next_call_goes_on(tmp_path):
    status, said, calls = rehearse(tmp_path, "nern", budget=36, seconds=20)
    assert status == 3 and len(calls) == 1
    assert "nern-resnet20-160: goes on when the same command is given again" in said
    assert said.count("no time left") == 2
    status, said, calls = rehearse(tmp_path, "nern")
    assert status == 0 and [Path(call[-1]).name for call in calls] == [NAMES[0], *NAMES[:3]]


def test_failures_do_not_end_the_others(tmp_path):
    status, said, calls = rehearse(tmp_path, status=1)
    assert status == 1 and len(calls) == len(NAMES) and said.count("exit status 1") == len(NAMES)


def test_other_runs_are_refused(tmp_path):
    status, said, calls = rehearse(tmp_path, "everything")
    assert status == 2 and "must be nern, zoo or hyperreps, got everything" in said and calls == []


def test_no_library_of_the_command_line_is_needed(tmp_path):
    code = re.findall(r"from (fastws[\w.]*) import", (ROOT / "experiments/on_gpu.sh").read_text())
    banned = "; ".join(
        f"sys.modules[{name!r}] = None" for name in ("tyro", "docstring_parser", "typeguard", "matplotlib")
    )
    command = f"import sys; {banned}; import {', '.join(code)}"
    assert finish(start(run_code, command, said=tmp_path / "said")) == [0], (tmp_path / "said").read_text()
