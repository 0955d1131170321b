"""The training loop on a small regression, which is also a program: ``python tests/test_loop.py OUT`` trains it."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import finish, one_thread, run_script, run_two_processes, start
from torch import nn

from fastws.nern.optimizer import make_optimizer
from fastws.random.philox import philox_reference
from fastws.runs import log, processes, rates
from fastws.terminal import Stopped
from fastws.train import files, loop

CONFIG = loop.Config(
    out="unset", steps=40, batch_size=8, lr=1e-2, clip=1.0, device="cpu", log_every=1, eval_every=10, save_every=3
)


def draw(config, step, split=slice(None)):
    words = philox_reference(config.seed, step, config.batch_size * 5, torch.device("cpu"))
    return (words.view(config.batch_size, 5) * 2.0**-32)[split].float()


def losses(model, x):
    y = model(x)
    whole = processes.gather(y)
    spread = (whole - whole.mean(0)).square().mean()  # like contrast, a loss of the whole batch
    return {"loss": (y - x.prod(-1, keepdim=True).sin()).square().mean() + (spread - 0.1).square(), "spread": spread}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.LayerNorm(16, bias=False), nn.Linear(16, 1))


def train(config, at_step=lambda step: None):
    with processes.join(config.device):
        model = build()

        def batch(step):
            at_step(step)
            return draw(config, step, processes.share(config.batch_size))

        def evaluate(model):
            return losses(model, draw(config, 10**6, processes.share(config.batch_size)))

        arguments = {"batch": batch, "loss": losses, "evaluate": evaluate, "extra": {"sizes": (5, 16, 1)}}
        loop.train(config, model=model, optimizer=loop.adamw(model, config), **arguments)
    return model


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def curve(out):
    return [(record["step"], record["train/loss"]) for record in read_log(out)[1:] if "train/loss" in record]


def assert_same_run(out, other):
    ours, theirs = (files.load(Path(folder) / "checkpoint.pt") for folder in (out, other))
    for key in ("step", "model", "optimizer", "extra"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert curve(out) == curve(other)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing interrupted."""
    out = str(tmp_path_factory.mktemp("reference"))
    with one_thread():
        train(replace(CONFIG, out=out))
    return out


def test_loop_trains_and_logs(reference):
    header, *records = read_log(reference)
    assert header["config"]["steps"] == 40 and header["torch"] == torch.__version__ and header["processes"] == 1
    assert {"fastws", "commit", "device", "python"} < header.keys()
    losses_by_step = dict(curve(reference))
    assert list(losses_by_step) == list(range(1, 41)) and losses_by_step[40] < losses_by_step[1] / 2
    validation = [record for record in records if "val/loss" in record]
    assert [record["step"] for record in validation] == [10, 20, 30, 40]
    assert all(record["steps_per_second"] > 0 for record in records) and "train/gradient_norm" in records[0]


def test_batches_are_drawn_ahead_of_what_waits(tmp_path, monkeypatch):
    events, write = [], loop.Recorder.write

    def watched(recorder, split, metrics):
        events.append((split, recorder.done))
        write(recorder, split, metrics)

    monkeypatch.setattr(loop.Recorder, "write", watched)
    train(replace(CONFIG, out=str(tmp_path), steps=3, eval_every=2), lambda step: events.append(("batch", step)))
    expected = [("batch", 0), ("batch", 1), ("train", 1), ("batch", 2), ("train", 2), ("val", 2)]
    assert events == [*expected, ("train", 3), ("val", 3)]


@pytest.mark.parametrize("name", ["adamw", "sgd", "ranger"])
def test_steps_that_are_skipped_change_nothing(name):
    models = [build(), build()]
    optimizers = [make_optimizer(name, model.parameters(), lr=0.1) for model in models]

    def step(number, skipped=None):
        for model, optimizer in zip(models, optimizers, strict=True):
            loop.differentiate(losses(model, draw(CONFIG, number))["loss"], model, optimizer, None)
            if model is models[0]:
                optimizer.step()
            elif skipped is not None:
                model[0].weight.grad[0, 0] = torch.nan if skipped else model[0].weight.grad[0, 0]
                loop.step_unless(torch.tensor(skipped), optimizer, model)

    step(0, False)
    step(1, False)
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))
    before = [x.clone() for x in models[1].parameters()]
    moments = [x.clone() for state in optimizers[1].state.values() for x in state.values() if x is not None]
    step(2, True)
    after = [x for state in optimizers[1].state.values() for x in state.values() if x is not None]
    assert all(torch.equal(*pair) for pair in zip(before, models[1].parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(moments, after, strict=True))
    assert not torch.equal(before[0], models[0][0].weight)


def test_checkpoint_is_plain(reference):
    state = torch.load(Path(reference) / "checkpoint.pt", weights_only=True)
    assert state["step"] == 40 and state["config"]["lr"] == 1e-2 and state["extra"] == {"sizes": (5, 16, 1)}
    assert [path.name for path in Path(reference).glob("*.tmp")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loop_stops_when_asked_and_resumes(reference, tmp_path, number, capsys):
    config = replace(CONFIG, out=str(tmp_path))
    before = signal.getsignal(number)
    with one_thread():
        with pytest.raises(Stopped, match="stopped after step 18 of 40; run the same command again to resume") as stop:
            train(config, lambda step: step == 17 and os.kill(os.getpid(), number))
        assert stop.value.code == 128 + number
        assert signal.getsignal(number) == before
        assert files.load(tmp_path / "checkpoint.pt")["step"] == 18
        train(replace(config, log_every=1, save_every=7, compile=False))
    assert_same_run(tmp_path, reference)


def test_loop_resumes_after_sigkill(reference, tmp_path):
    when = int.from_bytes(os.urandom(1)) % 30 + 2  # any step; that it does not matter which is the point
    process = start(run_script, __file__, tmp_path)
    while not (tmp_path / "log.jsonl").exists() or len(read_whole_lines(tmp_path)) <= when:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    assert finish(process) == [-signal.SIGKILL]
    with one_thread():
        train(replace(CONFIG, out=str(tmp_path)))
    assert_same_run(tmp_path, reference)


def read_whole_lines(out):
    return (out / "log.jsonl").read_text().split("\n")[:-1]


def test_two_processes_equal_one(reference, tmp_path):
    run_two_processes(__file__, tmp_path)
    assert read_log(tmp_path)[0]["processes"] == 2
    ours, theirs = (files.load(Path(out) / "checkpoint.pt")["model"] for out in (tmp_path, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(curve(tmp_path)), torch.tensor(curve(reference)), rtol=1e-5, atol=1e-5)
    untrained = build().state_dict()
    assert max((ours[name] - untrained[name]).abs().max() for name in ours) > 0.01


def test_one_cycle_sets_rate_and_beta1():
    config = replace(CONFIG, steps=101, lr=3e-4)
    optimizer = loop.adamw(build(), config)
    loop.set_one_cycle(optimizer, config, 7)
    rate, momentum = rates.one_cycle(3e-4, 7, 101)
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(rate, (momentum, 0.999))] * 2


def test_adamw_spares_vectors():
    matrices, vectors = loop.adamw(build(), replace(CONFIG, weight_decay=0.5)).param_groups
    assert [p.dim() for p in matrices["params"]] == [2, 2] and matrices["weight_decay"] == 0.5
    assert [p.dim() for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0


def test_bf16_keeps_weights_in_fp32(tmp_path):
    seen = []
    model = build()
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    config = replace(CONFIG, out=str(tmp_path), steps=2, precision="bf16")
    arguments = {"batch": partial(draw, config), "loss": losses}
    loop.train(config, model=model, optimizer=loop.adamw(model, config), **arguments)
    assert seen == [torch.bfloat16] * 2 and {p.dtype for p in model.parameters()} == {torch.float32}


def test_compiled_run_has_the_same_names(tmp_path, monkeypatch, reference):
    compiled = []

    def compile(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")  # needs no compiler

    monkeypatch.setattr(nn.Module, "compile", compile)
    with one_thread():
        train(replace(CONFIG, out=str(tmp_path), compile=True))
    ours, theirs = (files.load(Path(out) / "checkpoint.pt")["model"] for out in (tmp_path, reference))
    assert len(compiled) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_scalars_go_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    class Writer:
        written = []

        def __init__(self, folder, purge_step):
            self.written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            self.written.append((name, value, step))

        def close(self):
            self.written.append("closed")

    monkeypatch.setattr(log, "SummaryWriter", Writer)
    train(replace(CONFIG, out=str(tmp_path), steps=2))
    losses_written = [(step, value) for name, value, step in Writer.written[1:-1] if name == "train/loss"]
    assert Writer.written[0] == (str(tmp_path), 1) and Writer.written[-1] == "closed"
    assert losses_written == curve(tmp_path)


# --- bad input


def test_wrong_config_is_refused(reference):
    config = replace(CONFIG, out=reference, lr=2e-2)
    with pytest.raises(ValueError, match=r"train: lr must be 0.01, with which .* was begun, got 0.02; give another"):
        train(config)


def test_other_data_is_refused(reference):
    model = build()
    arguments = {"batch": partial(draw, CONFIG), "loss": losses, "extra": {"sizes": (5, 16, 2)}}
    config = replace(CONFIG, out=reference)
    with pytest.raises(
        ValueError, match="train: sizes must be what it was to resume .*, got another; give another --out"
    ):
        loop.train(config, model=model, optimizer=loop.adamw(model, config), **arguments)


def test_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint.pt must be a checkpoint, got .*; remove it to start anew"):
        train(replace(CONFIG, out=str(tmp_path)))


def test_pickles_are_refused(tmp_path):
    torch.save({"step": torch.nn.Linear(1, 1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt must be a checkpoint"):
        train(replace(CONFIG, out=str(tmp_path)))
    torch.save({"state_dict": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt must be the checkpoint of a run, got another file"):
        train(replace(CONFIG, out=str(tmp_path)))


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="train: out must be a folder that can be written, got .*Not a directory"):
        train(replace(CONFIG, out=str(tmp_path / "file" / "run")))


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_disk(step):
        if step == 5:
            monkeypatch.setattr(os, "fsync", refuse)

    message = r"train: disk must have room for 1 MiB at .*No space left.*; free it, then run the same command"
    with pytest.raises(OSError, match=message):
        train(replace(CONFIG, out=str(tmp_path)), fill_disk)
    assert files.load(tmp_path / "checkpoint.pt")["step"] == 3 and not list(tmp_path.glob("*.tmp"))


def test_one_run_at_a_time_trains_into_a_folder(tmp_path):
    def disturb(step):
        if step == 3:
            with pytest.raises(BlockingIOError, match=f"checkpoint.pt: one process at a time .* process {os.getpid()}"):
                train(replace(CONFIG, out=str(tmp_path)))

    train(replace(CONFIG, out=str(tmp_path)), disturb)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_half_a_file_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / "checkpoint.pt.1.tmp").write_text("half")
    (tmp_path / "mine.tmp").write_text("not of a run")
    train(replace(CONFIG, out=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["checkpoint.pt", "log.jsonl", "mine.tmp"]


def test_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "checkpoint.pt")

    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        files.load(tmp_path / "checkpoint.pt")


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="train: disk must have room for 1 MiB"):
        train(replace(CONFIG, out=str(tmp_path)))


def test_loss_must_be_finite(tmp_path):
    model = build()
    config = replace(CONFIG, out=str(tmp_path), save_every=1)
    arguments = {"batch": lambda step: draw(config, step) / (step < 4), "loss": losses}
    with pytest.raises(FloatingPointError, match="loss must be finite, got (nan|inf) in step 5; lower lr or set clip"):
        loop.train(config, model=model, optimizer=loop.adamw(model, config), **arguments)
    state = files.load(tmp_path / "checkpoint.pt")
    assert state["step"] == 4 and all(weight.isfinite().all() for weight in state["model"].values())


def test_weights_must_be_finite_to_be_saved(tmp_path):
    model = build()
    config = replace(CONFIG, out=str(tmp_path), save_every=5)

    def spoilt(model, batch):
        metrics = losses(model, batch)
        metrics["loss"].register_hook(lambda gradient: gradient * torch.nan if model.calls == 10 else gradient)
        model.calls += 1
        return metrics

    model.calls = 0
    arguments = {"batch": lambda step: draw(config, step), "loss": spoilt, "evaluate": lambda model: {}}
    with pytest.raises(FloatingPointError, match="weights must be finite, got NaN or infinity in .* after step 10"):
        loop.train(config, model=model, optimizer=loop.adamw(model, config), **arguments)
    assert files.load(tmp_path / "checkpoint.pt")["step"] == 5


@pytest.mark.parametrize("field, value", [("steps", 0), ("lr", -1.0), ("clip", 0.0), ("seed", -1), ("log_every", 0)])
def test_config_is_checked(field, value):
    with pytest.raises(ValueError, match=f"train: {field} must be"):
        replace(CONFIG, **{field: value})


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(replace(CONFIG, out=sys.argv[1]), lambda step: time.sleep(0.02))  # leaves time to be killed
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in names), names  # at whose end a process may abort
