"""The one training loop: draw a batch, take a step, log, evaluate, checkpoint, resume.

A run holds no state but the model, the optimizer, the number of steps done and what a trainer asks to be kept: rates
are functions of the step, and batches are drawn from the seed and the step. So a run that was killed continues as if
nothing had happened, bit for bit on a CPU.

Between two lines of the log no step waits for the device, so that it never waits for the host: what a step needs of the
host is on its way before that. Lines of the log, evaluations and checkpoints wait; several processes also where they
agree to stop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fastws.runs import processes, rates
from fastws.runs.begun import plain, require_same
from fastws.runs.log import Log
from fastws.terminal import AGAIN, Stopped
from fastws.train import files, sharding

MAY_CHANGE = (
    "out",
    "log_every",
    "eval_every",
    "save_every",
    "keep_every",
    "compile",
    "device",
    "sample_every",
    "shard",
)  # may change when a run is resumed
Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every trainer is told."""

    out: str  # folder of the run: log.jsonl and checkpoint.pt; an interrupted run in it is resumed

    steps: int = 10_000  # of training, those before an interruption included
    batch_size: int = 32  # samples per step, over all processes
    lr: float = 1e-4  # peak of the one-cycle schedule
    weight_decay: float = 3e-9  # of matrices and tables; vectors have none
    clip: float | None = None  # largest norm of the gradient
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    compile: bool = False  # pass the model through torch.compile
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one
    seed: int = 0  # seed of everything random

    log_every: int = 10  # steps between lines of log.jsonl
    eval_every: int = 500  # steps between evaluations
    save_every: int = 500  # steps between checkpoints
    keep_every: int | None = None  # steps between checkpoints that are kept, as checkpoint-<step>.pt

    def __post_init__(self):
        for name in ("steps", "batch_size", "lr", "log_every", "eval_every", "save_every", "keep_every"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"train: {name} must be positive, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"train: clip must be positive, or None for no clipping, got {self.clip}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"train: seed must be in [0, 2**63), got {self.seed}")


@files.claims_folder
def train(
    config: Config,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Metrics],
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    extra: dict[str, Any] | None = None,
    carried: dict[str, Tensor] | None = None,
    set_rates: Callable[[torch.optim.Optimizer, Config, int], None] | None = None,
    evaluate_now: Callable[[int, Metrics], bool] | None = None,
    skip: Callable[[Metrics], Tensor] | None = None,
    look: tuple[int, Callable[[nn.Module], Metrics]] | None = None,
) -> dict[str, float]:
    """Trains ``model`` in place and returns its last metrics.

    Args:
        config: Steps, rates, precision, and where to write.
        model: On the device of this process; see ``processes.join``.
        optimizer: Of the parameters of ``model``, from ``adamw``.
        batch: Draws the share of this process in the batch of a step, from the seed and the step alone.
        loss: Computes scalars, ``"loss"`` among them, from the model and a batch.
        evaluate: Computes scalars from the model in evaluation mode.
        extra: Tensors and plain containers that are saved with the model, for those who use it. A run is resumed
            only if they are what they were.
        carried: Tensors that callbacks change as steps go by; they are saved, and come back when a run is resumed.
        set_rates: Sets the rates of a step in the optimizer; ``set_one_cycle`` by default.
        evaluate_now: Whether to evaluate after a step, from the number of steps done and its metrics, beside those
            that ``eval_every`` asks for; the same in all processes.
        skip: Whether a step is to change nothing and not to be logged, from its metrics, once its gradients are
            there: bool ``[]`` on the device, the same in all processes.
        look: Steps between calls of a function of the model, in evaluation mode and without its wrapper; the scalars
            that it gives are logged as those of samples, also after the last step.

    Raises:
        Stopped: If SIGINT or SIGTERM asked to stop; the run can be resumed.
        ValueError: If ``out`` holds a run with another config or other data, or a damaged checkpoint.
        OSError: If ``out`` cannot be written, another process trains into it, or the disk is full.
        FloatingPointError: If the loss is not finite, or weights to be evaluated or saved are not.
    """
    folder, device = Path(config.out), next(model.parameters()).device
    carried, set_rates = carried or {}, set_rates or set_one_cycle
    done = restore(folder, config, extra or {}, model, optimizer, carried)
    processes.require_equal("step to resume from", done, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))
    if config.compile:
        model.compile()  # in place: the names in checkpoints stay as they are
    alone = processes.world() == 1 or sharding.is_sharded(model)
    parallel = model if alone else DistributedDataParallel(model)
    with processes.stop_requests() as stop, Recorder(folder, config, done, device) as recorder:
        drawn = batch(done) if done < config.steps else None
        while done < config.steps:
            set_rates(optimizer, config, done)
            with autocast:
                metrics = loss(parallel, drawn)
            metrics |= differentiate(metrics["loss"], model, optimizer, config.clip)
            skipped = None if skip is None else skip(metrics)
            if skipped is None:
                optimizer.step()
            else:
                step_unless(skipped, optimizer, model)
            done += 1
            last = done == config.steps
            stopping = processes.agree_to_stop(stop.is_set(), done, device)
            keeping = config.keep_every is not None and done % config.keep_every == 0
            saving = last or stopping or keeping or done % config.save_every == 0
            recorder.step(done)
            # drawn ahead, while the device is busy with the step: what follows may wait for it
            drawn = None if last or stopping else batch(done)
            if (saving or done % config.log_every == 0) and not (skipped is not None and skipped):
                recorder.write("train", metrics)
            wanted = evaluate_now is not None and evaluate_now(done, metrics)
            evaluating = evaluate and (last or wanted or done % config.eval_every == 0)
            looking = look is not None and (last or done % look[0] == 0)
            if saving or evaluating or looking:
                require_finite(model, done)
            if evaluating:
                parallel.eval()
                with torch.no_grad(), autocast:
                    recorder.write("val", evaluate(parallel))
                parallel.train()
            if looking:
                model.eval()
                with torch.no_grad(), autocast:
                    recorder.write("sample", look[1](model))
                model.train()
            if saving:
                state = {"config": plain(config), "step": done, "extra": extra or {}, "carried": carried}
                state |= sharding.whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                if processes.rank() == 0:
                    files.save(folder / "checkpoint.pt", state)
                    if keeping:
                        files.keep(folder / "checkpoint.pt", done)
                del state
            if stopping and not last:
                raise Stopped(f"stopped after step {done} of {config.steps}; {AGAIN}", stop.number)
    return recorder.latest


def differentiate(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> Metrics:
    optimizer.zero_grad()  # not the model: one that is split holds other tensors between its passes
    loss.backward()
    if clip is None:
        return {}
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    return {"gradient_norm": norm.full_tensor() if sharding.is_part(norm) else norm}


@torch.no_grad()
def step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Takes a step that changes nothing where ``skipped``, bool ``[]``, without asking the device whether it is.

    Optimizers that count their steps on the host count this one all the same.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    for parameter in parameters:  # nothing that is not finite may reach the optimizer
        parameter.grad = torch.where(skipped, 0, parameter.grad)
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    changed = [x for x in (*parameters, *moments) if x.device == skipped.device]
    before = [x.clone() for x in changed]
    optimizer.step()
    for x, old in zip(changed, before, strict=True):
        x.copy_(torch.where(skipped, old, x))


def require_finite(model: nn.Module, done: int) -> None:
    """Raises FloatingPointError for weights that a gradient spoilt although the loss was finite."""
    weights = dict(model.named_parameters())
    parts = [weight.to_local() if sharding.is_part(weight) else weight for weight in weights.values()]
    broken = processes.total(torch.stack([~part.isfinite().all() for part in parts]).float()).tolist()
    for name, count in zip(weights, broken, strict=True):
        if count:
            got = f"NaN or infinity in {name} after step {done}"
            raise FloatingPointError(f"train: weights must be finite, got {got}; lower lr or set clip")


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW, without weight decay of biases and norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_one_cycle(optimizer: torch.optim.Optimizer, config: Config, step: int) -> None:
    """Sets the learning rate and beta1 of a step; see ``rates.one_cycle``."""
    rate, momentum = rates.one_cycle(config.lr, step, config.steps)
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = rate, (momentum, group["betas"][1])


def uses_bf16(config: Config, device: torch.device) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def restore(
    folder: Path,
    config: Config,
    extra: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    carried: dict[str, Tensor],
) -> int:
    """Loads the checkpoint of a run, if there is one; returns the number of steps done."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = files.load(path)
    # "memory" is what checkpoints of version 0.1 call what is carried
    state = state | {"carried": state.get("carried", state.get("memory"))} if isinstance(state, dict) else {}
    if not {"config", "step", "extra", "model", "optimizer"} <= set(state) or not isinstance(state["carried"], dict):
        raise ValueError(f"train: {path} must be the checkpoint of a run, got another file; give another --out")
    require_same("train", folder, config, state["config"], MAY_CHANGE)
    for name, value in extra.items():
        if name in state["extra"] and not same(value, state["extra"][name]):
            raise ValueError(f"train: {name} must be what it was to resume {folder}, got another; give another --out")
    sharding.load(model, optimizer, state)
    for name in carried.keys() & state["carried"].keys():
        carried[name].copy_(state["carried"][name])
    return state["step"]


def same(value: Any, before: Any) -> bool:
    """Whether they are equal; floating tensors up to rounding, which another number of threads changes.

    What a dictionary did not hold before is newer than the run, as in configurations.
    """
    if isinstance(value, dict) and isinstance(before, dict):
        return before.keys() <= value.keys() and all(same(value[name], before[name]) for name in before)
    if isinstance(value, list) and isinstance(before, list):
        return len(value) == len(before) and all(map(same, value, before))
    if not isinstance(value, Tensor):
        return not isinstance(before, Tensor) and value == before
    alike = isinstance(before, Tensor) and value.shape == before.shape and value.dtype == before.dtype
    return alike and torch.allclose(value, before)


class Recorder:
    """The log and the progress bar of a run; both are kept by the first process alone."""

    def __init__(self, folder: Path, config: Config, done: int, device: torch.device):
        first = processes.rank() == 0
        header = {"config": plain(config)} | files.describe(device) | {"processes": processes.world()}
        self.log = Log(folder, header, done) if first else None
        self.bar = tqdm(total=config.steps, initial=done, unit="step", disable=not first)
        self.latest: dict[str, float] = {}
        self.done, self.begin, self.start = done, done, perf_counter()

    def step(self, done: int) -> None:
        self.done = done
        self.bar.update()

    def write(self, split: str, metrics: Metrics) -> None:
        """Averages metrics over all processes and writes them down; the only place that waits for the device."""
        values = {f"{split}/{name}": value for name, value in processes.average(metrics).items()}
        loss = values.get(f"{split}/loss", 0.0)
        if not isfinite(loss):
            raise FloatingPointError(
                f"train: loss must be finite, got {loss} in step {self.done}; lower lr or set clip"
            )
        self.latest |= values
        if self.log:
            rate = (self.done - self.begin) / (perf_counter() - self.start)
            self.log.write({"step": self.done, "steps_per_second": rate} | values)
            self.bar.set_postfix(loss=f"{self.latest.get('train/loss', float('nan')):.4g}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        if self.log:
            self.log.close()
