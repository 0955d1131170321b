"""Barriers between pairs of networks that were trained independently: as they are, and after every alignment.

python experiments/barriers.py --network mlp --data mnist --out runs/barriers-mlp                        # or --smoke
python experiments/barriers.py --network vit --data mnist --continuous --out runs/barriers-vit

Pairs are disjoint: networks differ in their first weights and in the order of the images. Intervals are those of
Student's t over pairs. The MLP has three hidden layers; the ViT, before its norms, 3 layers of 4 heads on patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import torch
import tyro
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm

from fastws.compare.aligning import Aligner, Matching, require_function
from fastws.compare.evaluating import Data, Examples, load_examples
from fastws.compare.lines import Mixer, barrier_of, line, statistics_of
from fastws.compare.modules import Network
from fastws.files.atomic import write_json, write_tensors
from fastws.files.checkpoints import load_checkpoint
from fastws.runs.begun import begin
from fastws.runs.stages import stage
from fastws.terminal import one_sentence


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains pairs of networks, or goes on with them, and prints the barriers between them."""

    out: str  # folder for networks and results
    network: Literal["mlp", "vit"] = "mlp"
    data: str = "digits"  # folder of images, or digits
    width: int = 64  # of hidden layers
    pairs: int = 5
    epochs: int = 5
    batch_size: int = 64
    lr: float = 1e-3
    points: int = 11  # networks on each line
    statistics: int = 5000  # training images for activations and repaired moments
    continuous: bool = False  # aligns at the whole group too
    smoke: bool = False  # a few networks on few images, to see that everything works; its numbers mean nothing


class Block(nn.Module):
    """One layer of a transformer, norms first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer with learned positions; the mean over patches is classified."""

    def __init__(self, shape: tuple[int, int, int], width: int, num_classes: int):
        super().__init__()
        size = shape[1] // 4
        self.embed = nn.Conv2d(shape[0], width, size, size)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def make(config: Config, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    if config.network == "vit":
        return ViT(shape, config.width, num_classes)
    widths, layers = [int(numpy.prod(shape)), *[config.width] * 3], [nn.Flatten()]
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(config.width, num_classes))


def train(config: Config, examples: Examples, make_one: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module, (x, y) = make_one(), examples.train
    steps = config.epochs * (len(x) // config.batch_size)
    optimizer = torch.optim.AdamW(module.parameters(), config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, max(2, steps))
    order = torch.cat([torch.randperm(len(x)) for _ in range(config.epochs + 1)])
    for step in tqdm(range(steps), desc=f"network {seed}", unit=" steps"):
        rows = order[step * config.batch_size : (step + 1) * config.batch_size]
        optimizer.zero_grad()
        cross_entropy(module(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def run(config: Config) -> None:
    folder = Path(config.out)
    begin("barriers", folder, config)
    limit = 200 if config.smoke else None
    examples = load_examples("barriers", Data(data="digits" if config.smoke else config.data, limit=limit))
    shape, num_classes = tuple(examples.train.x.shape[1:]), int(examples.train.y.max()) + 1

    def make_one() -> nn.Module:
        return make(config, shape, num_classes)

    network = Network(make_one().eval().requires_grad_(False), examples.test.x[:2], config.network)
    for seed in range(2 * config.pairs):
        path = folder / f"network-{seed}.safetensors"
        if not path.exists():
            write_tensors(path, train(config, examples, make_one, seed).state_dict())
    found = []
    for pair in range(config.pairs):
        states = [load_checkpoint(folder / f"network-{2 * pair + k}.safetensors") for k in range(2)]
        found.append(stage(folder, f"pair-{pair}", lambda states=states: measure(config, network, states, examples)))
    results = {"config": {"network": config.network, "width": config.width, "data": Path(config.data).name}}
    results |= {"pairs": config.pairs, "points": config.points, "images": len(examples.test.x)}
    results |= {"ends": summary([one["result"]["ends"] for one in found]), "barriers": {}}
    for name in found[0]["result"]["barriers"]:
        rows = [one["result"]["barriers"][name] for one in found]
        results["barriers"][name] = {key: summary([row[key] for row in rows]) for key in rows[0]}
    write_json(folder / "results.json", results)
    print_table(results)


def measure(config: Config, network: Network, states: list[dict[str, Tensor]], examples: Examples) -> dict:
    """The barriers of one pair by alignment and treatment of statistics, on test images."""
    x = examples.calibrating(config.statistics).x
    ways = {"permuted by weights": Matching(), "permuted by activations": Matching(by="activations")}
    ways |= {"whole group": Matching(continuous=True)} if config.continuous else {}
    seconds = {"as they are": states[1]}
    for name, how in ways.items():
        moved = Aligner(network, how, x).pair(*states)
        require_function(f"barriers: {name}", network, states[1], moved)
        seconds[name] = moved.state
    barriers, ends = {}, []
    for name, state in seconds.items():
        mixer = Mixer(network, [states[0], state], x)
        for statistics in statistics_of(network, x):
            title = f"{name}, {statistics}"
            scores = line(mixer, config.points, statistics, examples.test, precision="fp32", name=title)
            barriers[title] = barrier_of(scores)._asdict()
            ends.append((scores[0].loss + scores[-1].loss) / 2)
    return {"barriers": barriers, "ends": ends[0]}


def summary(values: list[float]) -> dict[str, float]:
    """Mean and half the width of the 95 % interval over pairs; of one pair there is none."""
    count = len(values)
    half = float(student.ppf(0.975, count - 1) * numpy.std(values, ddof=1) / count**0.5) if count > 1 else None
    return {"mean": float(numpy.mean(values)), "half": half}


def print_table(results: dict) -> None:
    print(f"{results['pairs']} pairs of {results['config']['network']}, loss of the ends {said(results['ends'])}")
    print(f"{'':36}{'loss barrier':>20}{'accuracy barrier':>20}")
    for name, one in results["barriers"].items():
        print(f"{name:36}{said(one['loss']):>20}{said(one['accuracy']):>20}")


def said(value: dict[str, float]) -> str:
    return f"{value['mean']:.4f}" + ("" if value["half"] is None else f" ± {value['half']:.4f}")


if __name__ == "__main__":
    with one_sentence("barriers"):
        run(tyro.cli(Config))
