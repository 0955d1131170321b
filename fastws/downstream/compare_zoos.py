"""``fastws zoo compare``: sampled networks beside the zoo that they were made from, and beside cheap baselines."""

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastws import pages
from fastws.devices import find_device
from fastws.downstream import generators
from fastws.downstream.evaluate import job_of
from fastws.downstream.memorisation import SCREENED, Judge, Judged, judge, text, verdict
from fastws.downstream.populations import measure
from fastws.downstream.sample import Config as SampleConfig
from fastws.downstream.sample import choose_anchors
from fastws.files.atomic import write_file, write_json
from fastws.layout.spread import layer_offsets, layer_std, per_weight
from fastws.matching.match import match
from fastws.zoo.align import aligned_rows
from fastws.zoo.format.rows import last_rows
from fastws.zoo.format.zoo import ODD, Zoo
from fastws.zoo.making.recipes import Part

NOISE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # in units of each layer's std
COMPONENTS = (16, 32, 64, 96, 128, 192, 256, 0)  # 0: all
TEMPERATURES = (0.5, 0.7, 1.0, 1.2)
TOGETHER = (2, 4, 16)
SMALLEST = 10  # held-out networks
BASELINES = {"noise": pages.GREY, "average": "#009e73", "PCA + Gaussian": pages.BLUE}  # and their colours
COLOURS = (pages.ORANGE, "#cc79a7", "#56b4e9", "#e69f00", "#8c564b", "#7f3fbf")  # of samples


@dataclass(frozen=True, kw_only=True)
class Config:
    """Says whether sampled networks are new, and whether they are better than cheap baselines that are as new.

    fastws zoo compare --zoo zoos/mnist --samples zoos/kde30 zoos/pca64 --out runs/compare
    """

    zoo: str  # folder of the zoo that the samples were made from, aligned
    samples: tuple[str, ...]  # folders of sampled networks
    out: str  # folder for report.html and results.json

    epochs: tuple[int, int] | None = None  # first and last epoch of the training states; by default all
    baselines: bool = True  # measures noise, averages and Gaussians of principal components as well
    count: int = 200  # networks of each set, at most, and of each baseline
    images: int = 2000  # test images, at most, that predictions are compared on
    seed: int = 0  # of the random numbers of the baselines
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if not self.samples:
            raise ValueError("zoo compare: samples must name at least one folder, got none")
        for name in ("count", "images"):
            if getattr(self, name) < 2:
                raise ValueError(f"zoo compare: {name} must be at least 2, got {getattr(self, name)}")


def run(config: Config) -> None:
    pages.require_matplotlib("zoo compare")
    results = compare(config)
    for name, sentence in results["verdicts"].items():
        print(f"{name}: {sentence}")
    print(f"report: {Path(config.out) / 'report.html'}")


def compare(config: Config) -> dict:
    """Judges samples and baselines; writes ``report.html`` and ``results.json``.

    Raises:
        FileNotFoundError: If a zoo is missing, or has no alignment.
        ValueError: If samples are of another architecture or activation, or there are too few held-out networks.
    """
    zoo = Zoo.open(config.zoo)
    samples = [Zoo.open(path) for path in config.samples]
    for one in samples:
        zoo.layout.require_same(one.layout, f"zoo compare: samples {one.path}")
    device = find_device(config.device)
    job = job_of(zoo, limit=None, device=str(device.type))
    picked = SampleConfig(zoo=config.zoo, out=config.out, method="direct", epochs=config.epochs, aligned=True)
    anchors = choose_anchors(picked, zoo, None)
    if config.epochs is None:
        anchors = anchors._replace(rows=states_of(zoo, "train", anchors.activation))
    held_out = states_of(zoo, "test", anchors.activation, last=True)[: config.count]
    if len(held_out) < SMALLEST:
        what = f"{SMALLEST} networks of activation {anchors.activation} in its test split, got {len(held_out)}"
        raise ValueError(f"zoo compare: zoo must have at least {what}; take a larger zoo")
    training = aligned_rows(zoo, anchors.rows).float()
    plan, odd = job.plan, anchors.activation in ODD
    flips = tuple(flip and odd for flip in zoo.symmetry.flips)
    judged_by = Judge(training, aligned_rows(zoo, held_out).float(), zoo.symmetry, zoo.layout, flips)
    x, y = job.data.test
    spaced = torch.linspace(0, len(y) - 1, min(len(y), config.images)).long()
    part = Part(x[spaced.to(x.device)], y[spaced.to(y.device)])
    labels = part.y.cpu()

    def say(name: str, group: str, flat: Tensor) -> Judged:
        novelty = judged_by.novelty(flat, SCREENED if group in BASELINES else None)
        found = measure(flat.to(device), plan, [anchors.activation] * len(flat), part, progress=False)
        theirs, places = novelty.neighbour.unique(return_inverse=True)
        known = measure(training[theirs].to(device), plan, [anchors.activation] * len(theirs), part, progress=False)
        return judge(judged_by, name, group, flat, novelty, found, known.predictions[places], labels)

    sets = [("held-out networks", "held-out", judged_by.held_out)]
    for one in samples:
        flat = one.rows(torch.arange(min(len(one), config.count))).float()
        if "activation" in one.properties.column_names:
            others = set(one.properties["activation"].to_pylist()) - {anchors.activation}
            if others:
                what = (
                    f"activation {anchors.activation}, the commonest of {zoo.path}, got {', '.join(map(str, others))}"
                )
                raise ValueError(f"zoo compare: samples {one.path} must have {what}")
        rows = match(flat, judged_by.mean, zoo.symmetry, zoo.layout, flips=odd)
        sets.append((one.path.name, one.path.name, zoo.symmetry.permute(flat, rows, zoo.layout)))
    last = [n for n, row in enumerate(anchors.rows.tolist()) if row in set(last_rows(zoo).values())]
    sets += list(baselines(config, zoo, training, training[last] if last else training)) if config.baselines else []
    judged = [say(*one) for one in tqdm(sets, desc="compare", unit=" sets")]
    curves = {name: [one for one in judged if one.group == name] for name in ("noise", "PCA + Gaussian")}
    names = [one.path.name for one in samples]
    verdicts = {
        one.name: verdict(one, curves["noise"], curves["PCA + Gaussian"]) for one in judged if one.name in names
    }
    results = {
        "zoo": str(zoo.path),
        "training states": len(training),
        "activation": anchors.activation,
        "flipped groups": [name for name, flip in zip(zoo.symmetry.names, flips, strict=True) if flip],
        "held-out distance": judged_by.unit,
        "recall": judged_by.recall(),
        "sets": [one._asdict() for one in judged],
        "verdicts": verdicts,
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", json.loads(json.dumps(results)))
    write_file(out / "report.html", pages.document(f"samples of {zoo.path.name}", body(results, judged)).encode())
    return results


def states_of(zoo: Zoo, split: str, activation: str | None, last: bool = False) -> Tensor:
    """Rows of a split, of one activation: all states after training has begun, or each network's last."""
    rows = zoo.split(split)
    kept = set(last_rows(zoo).values()) if last else None
    column = zoo.properties["activation"].to_pylist() if activation is not None else None
    epochs = zoo.numbers("epoch") if "epoch" in zoo.properties.column_names else None
    chosen = [
        row
        for row in rows.tolist()
        if (kept is None or row in kept)
        and (column is None or column[row] == activation)
        and (epochs is None or epochs[row] > 0)
    ]
    return torch.tensor(chosen, dtype=torch.int64)


def baselines(config: Config, zoo: Zoo, training: Tensor, last: Tensor) -> Iterable[tuple[str, str, Tensor]]:
    """What needs no learning: noise, averages, and a Gaussian of the weights' principal components."""
    generator = torch.Generator().manual_seed(config.seed)
    offsets = layer_offsets(zoo.layout)
    scale = per_weight(layer_std(training, offsets), offsets, training.shape[1])
    for factor in NOISE:
        yield f"noise of {factor:g} sd", "noise", generators.noisy(last, config.count, factor * scale, generator).points
    for together in TOGETHER:
        yield f"average of {together}", "average", generators.average(last, config.count, together, generator).points
    most = min(len(training) - 1, training.shape[1])
    for components in COMPONENTS:
        if components >= most:
            continue
        for temperature in TEMPERATURES:
            drawn = generators.gaussian(training, config.count, components, temperature, generator)
            yield f"PCA {components or 'all'} + Gaussian, T = {temperature:g}", "PCA + Gaussian", drawn.points


# --- the page

LEGEND = """
Brackets are 95 % intervals over networks. spread: standard deviation of weights over that of training states. apart:
median distance among networks of the set over that among held-out networks. p &le; .05: share of networks nearer to a
training state than 95 % of held-out networks are; 5 % is expected of networks that are like these. agreement and phi:
equal predictions with the nearest training state, and the correlation of errors with its errors. neighbours: how many
training states are nearest to some network, over that of uniform draws. ensemble gain: accuracy of the mean logits of
all networks less their mean accuracy, in points.
"""


def body(results: dict, judged: list[Judged]) -> Iterable[str]:
    yield "<h1>New networks, or old ones?</h1>"
    for sentence in results["verdicts"].values():
        yield f"<p><b>{html.escape(sentence)}</b></p>"
    figure, (axis,) = pages.make_figure(height=5.0)
    colours = {"held-out": "black"} | BASELINES
    for group in dict.fromkeys(one.group for one in judged):
        points = sorted((one for one in judged if one.group == group), key=lambda one: one.novelty[0])
        colour = colours.setdefault(group, COLOURS[(len(colours) - 1 - len(BASELINES)) % len(COLOURS)])
        across, up = [one.novelty[0] for one in points], [one.accuracy[0] for one in points]
        if group != "PCA + Gaussian":  # a grid of components and temperatures is no curve
            axis.plot(across, up, color=colour, linewidth=1, alpha=0.5)
        marker, sizes = "P" if group == "held-out" else "o", [30 + 120 * one.spread[0] for one in points]
        axis.scatter(across, up, s=sizes, color=colour, marker=marker, label=group, alpha=0.85)
    axis.set(
        xlabel="novelty: distance to the nearest training state, of held-out networks 1", ylabel="accuracy, epoch 0"
    )
    axis.legend(fontsize="small")
    yield pages.figure(figure, "Accuracy over novelty; the size of a point is the spread of its networks.")
    states, flipped = results["training states"], ", ".join(results["flipped groups"]) or "none"
    yield f"<p>Distances are to the nearest of {states:,} training states, modulo permutations of all hidden units and "
    yield f"signs of these groups: {html.escape(flipped)}. Activation: {html.escape(str(results['activation']))}. For "
    yield f"baselines the {SCREENED} states nearest as they lie are looked at, among which the nearest of a held-out "
    yield f"network is in {results['recall']:.0%} of the cases.</p>"
    header = ("set", "networks", "accuracy", "novelty", "spread", "apart", "p <= .05", "agreement", "phi")
    header += ("neighbours", "ensemble gain")
    yield pages.table(header, (line(one) for one in judged))
    yield f"<p><small>{LEGEND}</small></p>"


def line(one: Judged) -> list[str]:
    measures = [text(getattr(one, name)) for name in ("novelty", "spread", "apart")]
    accuracy = f"{one.accuracy[0]:.3f} [{one.accuracy[1]:.3f}, {one.accuracy[2]:.3f}]"
    rest = [f"{one.near:.0%}", *(f"{value:.2f}" for value in (one.agreement, one.phi, one.effective_neighbours))]
    return [one.name, str(one.count), accuracy, *measures, *rest, f"{100 * one.ensemble_gain:+.1f}"]
