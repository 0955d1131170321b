"""No step of a trainer waits for the device: on a GPU by torch's own word, elsewhere on a device that cannot be asked.

What is away computes on the CPU (tests/away.py), so that of the kernels of GPUs only the launchers are looked at.
"""

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from away import AWAY, NoWaiting, away
from small_zoo import make_small_zoo
from test_nern_train import CONFIG as NERN
from test_nern_train import make_images, make_teacher
from test_train_ae import CONFIG as AE
from test_train_sane import CONFIG as SANE

from fastws import _native
from fastws.nern.convolutions import chosen_kernels
from fastws.nn import hyper_representation
from fastws.nn.sane import SANE as Model
from fastws.testing import devices
from fastws.train import loop
from fastws.train.ae import train as ae
from fastws.train.ae.plateau import Plateau
from fastws.train.nern import train as nern
from fastws.train.sane import train as sane

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CUDA = [device for device in devices() if device == "cuda"]
Move = Callable[[object], object]
# operators without a kernel for GPUs whose reference does not wait; NeRN's layers are at most 192 wide by default
REFERENCES = {"coordinate_mlp_backward"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_small_zoo(tmp_path_factory.mktemp("zoo"))


# --- trainers: from a zoo or a network to what makes one step of training, without the log


def sane_steps(changes: dict, zoo, move: Move) -> Callable[[int], None]:
    config = replace(SANE, clip=1.0, **changes)
    source = sane.make_source(config, zoo, CPU)
    model = move(Model(sane.model_config(config, source)))
    source = source._replace(population=source.population.move(move))
    optimizer = loop.adamw(model, config)

    def step(number: int) -> None:
        loop.set_one_cycle(optimizer, config, number)
        metrics = sane.losses(config, model, sane.draw(config, source, "train", number))
        loop.differentiate(metrics["loss"], model, optimizer, config.clip)
        optimizer.step()

    return step


def ae_steps(changes: dict, zoo, move: Move) -> Callable[[int], None]:
    config = replace(AE, **changes)
    source = ae.make_source(config, zoo, CPU)
    objective = ae.Objective(config, source)
    model = hyper_representation.HyperRepresentation(ae.model_config(config, source))
    objective.scale(model)
    model = move(model)
    moved = source._replace(**{name: move(getattr(source, name)) for name in ("weights", "table", "sigma")})
    for name in ("offsets", "sigma", "around"):
        setattr(objective, name, move(getattr(objective, name)))
    objective.source, optimizer, plateau = moved, ae.make_optimizer(model, config), Plateau(10**6, CPU)
    plateau.carried["loss_sum"] = move(plateau.carried["loss_sum"])

    def step(number: int) -> None:
        plateau.set_rates(optimizer, config, number)
        metrics = objective.losses(model, objective.draw(number))
        plateau.see(metrics["loss"])
        loop.differentiate(metrics["loss"], model, optimizer, config.clip)
        optimizer.step()

    return step


def nern_steps(changes: dict, zoo, move: Move) -> Callable[[int], None]:
    config = replace(NERN, out=str(zoo.path.parent / "nern"), clip_each=1.0, clip_value=0.1, **changes)
    teacher, images = make_teacher(), None if config.data_free else make_images()
    job = nern.make_job(config, teacher, images, CPU)
    model = move(nern.make_model(config, job, teacher))
    device = next(model.parameters()).device
    job.kernels.device = device
    stored = replace(job.stored, rows=move(job.stored.rows))
    moved = {name: move(getattr(job, name)) for name in ("teacher", "factors", "originals")}
    job, watch = job._replace(stored=stored, **moved), nern.Watch(config, device)
    optimizer = nern.make_optimizer(config.optimizer, model.parameters(), lr=config.lr)

    def step(number: int) -> None:
        nern.set_rate(optimizer, config, number)
        metrics = nern.compute_losses(config, job, model, nern.draw(config, job, number, device))
        loop.differentiate(metrics["loss"], model, optimizer, config.clip)
        nern.clip_each(list(model.parameters()), config.clip_each, config.clip_value)
        if config.data_free:
            loop.step_unless(watch.skips(metrics, model=model), optimizer, model)
        else:
            optimizer.step()

    return step


TRAINERS = {
    "sane": partial(sane_steps, {}),
    "sane-published": partial(sane_steps, {"permute": "none", "shared_window": True, "erase": 0.1, "target": "clean"}),
    "sane-both": partial(sane_steps, {"permute": "both", "normalize": "batch"}),
    "ae": partial(ae_steps, {}),
    "ae-vector": partial(ae_steps, {"encoding": "vector", "hidden": (20,), "erase": 0.1, "contrast": "positive"}),
    "ae-penalties": partial(ae_steps, {"code_variance": 0.1, "code_norm": 0.1, "error_clip": 1.0, "optimizer": "sgd"}),
    "nern": partial(nern_steps, {}),
    "nern-turns": partial(nern_steps, {"batching": "random_batch_without_replacement", "encoding": "ffn"}),
    "nern-layers": partial(nern_steps, {"batching": "random_layer", "optimizer": "adadelta", "maps": "clean"}),
    "nern-all": partial(nern_steps, {"batching": "all", "features": "batch", "reconstruction": "mse"}),
    "nern-data-free": partial(nern_steps, {"data_free": True, "images": None}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_no_step_waits_for_the_device(name, zoo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # there may be none
    with NoWaiting() as mode:
        step = TRAINERS[name](zoo, away)
        for number in range(3):
            step(number)
    on_gpu = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} | set(_native.TRITON)
    assert mode.served and mode.served <= on_gpu | REFERENCES


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("name", TRAINERS)
def test_no_step_waits_by_the_word_of_torch(name, device, zoo):
    step = TRAINERS[name](zoo, partial(move_to, torch.device(device)))
    step(0)  # kernels are loaded and compiled, and constants copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def move_to(device: torch.device, x):
    if isinstance(x, dict):
        return {name: move_to(device, value) for name, value in x.items()}
    return [move_to(device, value) for value in x] if isinstance(x, list) else x.to(device)


def test_steps_that_wait_are_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with NoWaiting():
        x, numbers = away(torch.arange(4.0)), torch.arange(4)
        for wait in [
            lambda: x.sum().item(),
            lambda: x.tolist(),
            lambda: float(x[0]),
            lambda: bool(x.isnan().any()),
            lambda: x.cpu(),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x.unique(),
            lambda: x[numbers],
            lambda: numbers.to(AWAY),
            lambda: numbers.to(AWAY, non_blocking=True),
            lambda: torch.tensor([1.0], device=AWAY),
            lambda: x.new_tensor([1.0]),
            lambda: x + torch.ones(4),
        ]:
            with pytest.raises(AssertionError, match="waits for the device|must have all its tensors on one device"):
                wait()
        y = numbers.pin_memory().to(AWAY, non_blocking=True) + x * torch.tensor(2.0)
    assert y.inner.tolist() == [0, 3, 6, 9]


def test_kernels_of_a_gpu_are_not_asked_which_kernels_were_chosen():
    assert chosen_kernels([], away(torch.arange(3))) == {}


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "kernels").glob("[!_]*.py")))
def test_launchers_do_not_wait(file):
    banned = {"item", "tolist", "cpu", "nonzero", "unique", "tensor", "as_tensor", "synchronize", "masked_select"}
    for node in ast.walk(ast.parse((ROOT / "kernels" / file).read_text())):
        name = getattr(getattr(node, "func", None), "attr", None)
        assert not (isinstance(node, ast.Call) and name in banned), f"{file}:{node.lineno} waits by {name}"
