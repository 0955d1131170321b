"""What linear probes read off the weights of a zoo: accuracy, epoch, generalisation gap and hyperparameters.

python experiments/zoo_probes.py --zoo zoos/mnist-s-seed --out zoos/mnist-s-seed-probes      # or --smoke

The benchmark of the model zoo data set (arXiv 2209.14764): W, all weights, against s(W), mean, variance and five
quantiles of the weights and of the biases of each layer. Numbers are predicted by ridge regression with the penalty
that does best on the validation split; names by the same regression to one column per name, of which the largest wins,
where the published protocol trains a linear classifier. Splits are those of the zoo, by network.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
import tyro
from torch import Tensor

import fastws
from fastws.downstream.probes.intervals import r2_interval
from fastws.downstream.probes.ridge import fit_probes
from fastws.files.atomic import write_json
from fastws.terminal import one_sentence
from fastws.zoo import Zoo
from fastws.zoo.alignment import ALIGNMENT, aligned_rows
from fastws.zoo.making.make import Config as ZooConfig
from fastws.zoo.making.make import make
from fastws.zoo.survey.diversity import tensor_offsets

SPLITS = ("train", "val", "test")
MEASURES = ("test_accuracy", "epoch", "generalisation_gap")
RECIPE = ("activation", "dropout", "init", "optimizer", "lr", "weight_decay")
SEED = 0  # of the intervals


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints how well properties of networks that the probes have not seen are predicted."""

    zoo: str = ""  # folder; may be left out with smoke
    out: str = "runs/zoo_probes"  # folder for results.json
    epochs: tuple[int, ...] = (1, 3, 5, 10, 15, 20, 25)  # whose states are probed; none: all
    smoke: bool = False  # on a tiny zoo of digits made for it; its numbers mean nothing

    def __post_init__(self):
        if not self.zoo and not self.smoke:
            raise ValueError("zoo_probes: zoo must be a folder, got none; or give --smoke")


def run(config: Config) -> None:
    path = Path(config.zoo or Path(config.out, "zoo"))
    zoo = make(ZooConfig(out=str(path), networks=24, epochs=3, limit=300)) if config.smoke else Zoo.open(path)
    rows = probed_rows(config, zoo)
    models = zoo.properties["model"].cast("string").take(rows["test"].numpy()).to_pylist()
    numbers, names = find_targets(zoo, torch.cat(list(rows.values())))
    results = []
    print(f"{'features':<10} {'target':<20} {'train':>8} {'val':>8} {'test':>8}  score, [2.5 %, 97.5 %] over networks")
    for kind, features in make_features(zoo, rows).items():
        for line in probe_numbers(features, numbers, rows, models) + probe_names(features, names, rows):
            results.append({"features": kind} | line)
            print_line(results[-1])
    sizes = {split: len(found) for split, found in rows.items()}
    content = {"config": asdict(config), "fastws": fastws.__version__, "rows": sizes, "results": results}
    path = Path(config.out, "results.json")
    write_json(path, content)
    print(f"results: {path}")


def probed_rows(config: Config, zoo: Zoo) -> dict[str, Tensor]:
    epochs = zoo.numbers("epoch")
    wanted = torch.from_numpy(numpy.isin(epochs, config.epochs) if config.epochs else numpy.full(len(zoo), True))
    rows = {split: zoo.split(split) for split in SPLITS}
    rows = {split: found[wanted[found]] for split, found in rows.items()}
    empty = [split for split, found in rows.items() if len(found) == 0]
    if empty:
        raise ValueError(f"zoo_probes: epochs must be some of the zoo's, got no state of {empty[0]} at {config.epochs}")
    return rows


def find_targets(zoo: Zoo, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, numpy.ndarray]]:
    """Properties that differ between the states: numbers, float64 ``[M]``, and names."""
    numbers, names = {}, {}
    for name in (*MEASURES, *RECIPE):
        if name not in zoo.properties.column_names:
            continue
        column = zoo.properties[name].to_numpy()
        if len(numpy.unique(column[rows.numpy()])) < 2:
            continue
        if numpy.issubdtype(column.dtype, numpy.number):
            numbers[name] = torch.from_numpy(column.astype(numpy.float64))
        else:
            names[name] = column.astype(str)
    return numbers, names


def make_features(zoo: Zoo, rows: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Feature sets: name: split: ``[n, d]``."""
    weights = {split: zoo.rows(found) for split, found in rows.items()}
    offsets = tensor_offsets(zoo.layout)
    statistics = {split: fastws.layer_statistics(found, offsets).flatten(1) for split, found in weights.items()}
    features = {"s(W)": statistics, "W": weights}
    if (zoo.path / ALIGNMENT).is_file():
        features["W aligned"] = {split: aligned_rows(zoo, found) for split, found in rows.items()}
    return features


def probe_numbers(
    features: dict[str, Tensor], targets: dict[str, Tensor], rows: dict[str, Tensor], models: list[str]
) -> list[dict]:
    wanted = {split: torch.stack([values[found] for values in targets.values()], 1) for split, found in rows.items()}
    lines = []
    for number, (name, probe) in enumerate(zip(targets, fit_probes(features, wanted, published=True), strict=True)):
        target = wanted["test"][:, number]
        known = ~target.isnan()
        of_known = [model for model, here in zip(models, known.tolist(), strict=True) if here]
        interval = r2_interval(probe.test_prediction, target[known], of_known, SEED)
        scores = probe.scores()
        found = {split: scores[f"{split}_r2"] for split in SPLITS}
        rest = {"interval": interval, "tau": scores["test_tau"], "penalty": scores["penalty"]}
        lines.append({"target": name, "score": "R2"} | found | rest)
    return lines


def probe_names(features: dict[str, Tensor], targets: dict[str, numpy.ndarray], rows: dict[str, Tensor]) -> list[dict]:
    """Accuracy on the test split, beside that of the most frequent name of the training split."""
    lines = []
    for name, values in targets.items():
        split = {part: values[found.numpy()] for part, found in rows.items()}
        classes, counts = numpy.unique(split["train"], return_counts=True)
        columns = {part: torch.from_numpy((found[:, None] == classes).astype(float)) for part, found in split.items()}
        scores = torch.stack([probe.test_prediction for probe in fit_probes(features, columns, published=True)], 1)
        right = (classes[scores.argmax(1).numpy()] == split["test"]).mean()
        frequent = (split["test"] == classes[counts.argmax()]).mean()
        lines.append({"target": name, "score": "accuracy", "test": float(right), "most frequent": float(frequent)})
    return lines


def print_line(line: dict) -> None:
    cells = " ".join(f"{'-' if line.get(split) is None else format(line[split], '.4f'):>8}" for split in SPLITS)
    rest = f"accuracy, most frequent name {line['most frequent']:.4f}" if line["score"] == "accuracy" else "R2"
    if line.get("interval"):
        rest += f", [{line['interval'][0]:.3f}, {line['interval'][1]:.3f}]"
    print(f"{line['features']:<10} {line['target']:<20} {cells}  {rest}", flush=True)


if __name__ == "__main__":
    with one_sentence("zoo_probes"):
        run(tyro.cli(Config))
