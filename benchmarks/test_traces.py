"""What on_gpu.sh runs beside benchmarks, as far as a machine without a GPU can."""

import json

import pytest

from fastws.benchmarks import replays, trace_sane


def test_a_step_of_sane_is_traced(tmp_path, capsys):
    trace_sane.main(str(tmp_path), size="tiny", batch=2, steps=1)
    assert "traceEvents" in json.loads((tmp_path / "sane-trace.json").read_text())
    assert "steps per second without the profiler" in capsys.readouterr().out


def test_replays_are_of_cases_that_there_are(monkeypatch, capsys):
    """With a call in the place of a graph: nothing can be recorded here."""
    if replays.DEVICE == "cpu":
        with pytest.raises(SystemExit, match="replays: torch must see a GPU, got none"):
            replays.main(["nt_xent"])
    monkeypatch.setattr(replays, "DEVICE", "cuda")
    monkeypatch.setattr(replays, "recorded", lambda run, args: run)
    monkeypatch.setattr(replays, "time_all", lambda runs, args, quick: {name: [1.5e-6] for name in runs})
    replays.main(["nt_xent"])
    assert "kernel: 1.5 us a call, 1.5 us a replay" in capsys.readouterr().out

    def refuse(run, args):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replays, "recorded", refuse)
    replays.main(["nt_xent"])
    assert "cannot be recorded: operation not permitted when stream is capturing\n" in capsys.readouterr().out
