"""What every long job shares: the rule by which it begins and resumes, and its rates."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from test_loop import CONFIG, build, train
from test_zoo_make import assert_same, tiny

from fastws.quickstart import run as quickstart
from fastws.runs.begun import begin, default_of, plain, require_same
from fastws.runs.rates import one_cycle
from fastws.train import files, loop
from fastws.zoo.making.make import make


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str
    size: int = 3
    width: int | None = None  # twice the size where it is not given
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.width is None:
            object.__setattr__(self, "width", 2 * self.size)


def test_field_that_is_newer_than_a_run_counts_as_its_default(tmp_path):
    begun = {"out": "a", "size": 3}
    require_same("x", tmp_path, Config(out="b"), begun, {"out"})
    require_same("x", tmp_path, Config(out="a", width=6, sizes=(1, 2)), begun)
    with pytest.raises(ValueError, match=f"x: width must be 6, with which {tmp_path} was begun, got 7; give"):
        require_same("x", tmp_path, Config(out="a", width=7), begun)
    with pytest.raises(ValueError, match=r"x: sizes must be \[1, 2\], with which .* was begun, got \[1\]"):
        require_same("x", tmp_path, Config(out="a", sizes=(1,)), begun)
    with pytest.raises(ValueError, match="x: out must be None, with which .* was begun, got 'a'"):
        require_same("x", tmp_path, Config(out="a"), {"size": 3})


def test_field_that_a_run_was_begun_with_must_be_the_same(tmp_path):
    begun = plain(Config(out="a", size=4))
    require_same("x", tmp_path, Config(out="a", size=4), begun | {"field that is no more": 1})
    with pytest.raises(ValueError, match="x: size must be 4, with which .* was begun, got 3; give another --out"):
        require_same("x", tmp_path, Config(out="a"), begun)


@pytest.mark.parametrize("begun", [None, [1], "text", 3])
def test_what_no_run_wrote_is_refused(tmp_path, begun):
    with pytest.raises(ValueError, match=f"x: {tmp_path} must be a folder that it wrote, got another one; give"):
        require_same("x", tmp_path, Config(out="a"), begun)


def test_default_passes_through_what_fills_it_in():
    assert default_of(Config(out="a", size=5, width=1), "width") == 10
    assert default_of(Config(out="a", sizes=()), "sizes") == [1, 2]


def test_begin_keeps_the_configuration(tmp_path):
    begin("x", tmp_path / "run", Config(out="a"))
    begin("x", tmp_path / "run", Config(out="b"), {"out"})
    assert json.loads((tmp_path / "run/config.json").read_text()) == plain(Config(out="b"))
    with pytest.raises(ValueError, match="x: out must be 'b', with which"):
        begin("x", tmp_path / "run", Config(out="c"))


# --- runs on disk that are older than a field


def test_checkpoint_without_a_field_is_resumed(tmp_path):
    config = replace(CONFIG, out=str(tmp_path / "old"), steps=6)
    train(replace(config, out=str(tmp_path / "whole")))
    train(replace(config, steps=3))
    path = tmp_path / "old/checkpoint.pt"
    state = files.load(path)
    del state["config"]["weight_decay"], state["extra"]["sizes"]
    state["config"]["steps"] = 6
    state["memory"] = state.pop("carried")
    files.save(path, state)
    with pytest.raises(ValueError, match="train: weight_decay must be 3e-09, with which .* was begun, got 0.1"):
        train(replace(config, weight_decay=0.1))
    train(config)
    assert files.load(path)["step"] == 6 and files.load(path)["extra"] == {"sizes": (5, 16, 1)}


@pytest.mark.parametrize("config", [[1], "text"])
def test_checkpoint_of_others_is_refused(tmp_path, config):
    train(replace(CONFIG, out=str(tmp_path), steps=1))
    state = files.load(tmp_path / "checkpoint.pt")
    files.save(tmp_path / "checkpoint.pt", state | {"config": config})
    with pytest.raises(ValueError, match="train: .* must be a folder that it wrote, got another one; give"):
        train(replace(CONFIG, out=str(tmp_path), steps=2))


def test_what_is_carried_comes_back_and_what_is_newer_keeps_its_value(tmp_path):
    model, config = build(), replace(CONFIG, out=str(tmp_path), steps=2)
    count, newer = torch.tensor(0), torch.tensor(7)

    def loss(model, x):
        count.add_(1)
        return {"loss": model(x).square().mean()}

    arguments = {"model": model, "batch": lambda step: torch.ones(2, 5), "loss": loss}
    loop.train(config, optimizer=loop.adamw(model, config), carried={"count": count}, **arguments)
    count.fill_(100)
    state = files.load(tmp_path / "checkpoint.pt")
    files.save(tmp_path / "checkpoint.pt", state | {"config": state["config"] | {"steps": 3}})
    config, carried = replace(config, steps=3), {"count": count, "newer": newer}
    loop.train(config, optimizer=loop.adamw(model, config), carried=carried, **arguments)
    assert count == 3 and newer == 7


@pytest.mark.parametrize(
    "value, before, equal",
    [
        ({"width": 3, "newer": 1}, {"width": 3}, True),
        ({"width": 3}, {"width": 4}, False),
        ({"width": 3}, {"width": 3, "gone": 1}, False),
        ({"width": 3}, 3, False),
        (torch.ones(2), torch.ones(2) + 1e-9, True),
        (torch.ones(2), torch.ones(3), False),
    ],
)
def test_data_of_a_run_is_compared(value, before, equal):
    assert loop.same({"x": value}, {"x": before}) == equal


def test_zoo_without_a_field_is_gone_on_with(tmp_path):
    zoo = make(tiny(tmp_path))
    path = tmp_path / "zoo.json"
    manifest = json.loads(path.read_text())
    del manifest["provenance"]["config"]["train_metrics"], manifest["provenance"]["config"]["gray"]
    path.write_text(json.dumps(manifest))
    assert_same(make(tiny(tmp_path)), zoo)
    with pytest.raises(ValueError, match="zoo make: gray must be .*, with which .* was begun, got True"):
        make(tiny(tmp_path, gray=True))


def test_quickstart_without_a_field_is_gone_on_with(tmp_path):
    config = quickstart.Config(out=str(tmp_path))
    content = plain(config)
    del content["erase"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    begin("quickstart", tmp_path, config, ("out",))
    assert json.loads((tmp_path / "config.json").read_text()) == plain(config)


# --- rates


@pytest.mark.parametrize("steps", [2, 3, 10, 20, 101, 157, 785])
def test_one_cycle_is_the_schedule_of_torch(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    for step in range(steps):
        group = optimizer.param_groups[0]
        assert one_cycle(0.05, step, steps) == pytest.approx((group["lr"], group["momentum"]), rel=1e-9)
        optimizer.step()
        if step + 1 < steps:
            schedule.step()
