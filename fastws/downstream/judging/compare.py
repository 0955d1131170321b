"""``fastws zoo compare``: sampled networks beside the zoo that they were made from, and beside cheap baselines."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from fastws import pages
from fastws.devices import find_device
from fastws.downstream.evaluate import activations_of, job_of
from fastws.downstream.judging import page as compare_page
from fastws.downstream.judging import trained
from fastws.downstream.judging.baselines import Set, baselines
from fastws.downstream.judging.compute import cost_of
from fastws.downstream.judging.judged import ENSEMBLE, Judged, Known, Replicates, behave, ensemble_gain, judge
from fastws.downstream.judging.memorisation import SCREENED, Judge
from fastws.downstream.judging.statistics import tabulate
from fastws.downstream.judging.verdict import Evidence, evidence, verdict
from fastws.downstream.populations import Measured, measure
from fastws.downstream.representation import load
from fastws.downstream.sampling.anchors import BY, Anchors, Choice, choose_anchors
from fastws.files.atomic import write_file, write_json, write_tensors
from fastws.files.json import read as read_json
from fastws.files.safetensors import open_tensors
from fastws.matching.match import match
from fastws.runs.begun import former_names
from fastws.zoo.align import aligned_rows
from fastws.zoo.format.rows import last_rows, rows_of_epochs
from fastws.zoo.format.zoo import ODD, Zoo
from fastws.zoo.making.make import Job
from fastws.zoo.making.recipes import Part

SMALLEST = 10  # held-out networks
PLAIN = ("noise", "average", "PCA + Gaussian", "PCA + flow")  # groups of baselines, of which the nearest are screened


@former_names(zoo="train", report="out")
@dataclass(frozen=True, kw_only=True)
class Config:
    """Says whether sampled networks are new, and whether they are better than cheap baselines that are as new.

    fastws zoo compare zoos/kde30 zoos/pca64 --train zoos/mnist --out runs/compare.html
    fastws zoo compare --reports runs/compare-0 runs/compare-1 runs/compare-2 --out runs/compare

    Give samples and the zoo they were made from, or reports of several zoos, whose verdicts are then joined, or with
    --continued zoos of networks whose training went on, whose accuracies are compared epoch by epoch.
    """

    samples: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # folders of sampled networks
    out: str  # folder for report.html and results.json; or the page itself, which ends with .html
    train: str | None = None  # folder of the zoo that the samples were made from, aligned
    continued: tuple[str, ...] = ()  # zoos of networks that were trained on; others are tested against the first
    reports: tuple[str, ...] = ()  # what zoo compare wrote of samples of the same names from other zoos

    epochs: tuple[int, int] | None = None  # first and last epoch of the training states; by default all
    best: float = 1.0  # share of the training networks that are anchors, and whose accuracy held-out networks must have
    model: str | None = None  # checkpoint of train ae or train sane: reconstructed anchors are then a set as well
    baselines: bool = True  # measures noise, averages and Gaussians of principal components as well
    flow: bool = False  # also a flow in the space of principal components, of a minute for each number of components
    count: int = 200  # networks of each baseline, and held-out networks at most; samples are all looked at
    images: int = 2000  # test images, at most, that predictions are compared on
    seed: int = 0  # of the random numbers of the baselines
    json: bool = False  # print the results as JSON
    device: str | None = None  # cpu, cuda, cuda:1; by default cuda where there is one

    def __post_init__(self):
        if not (self.samples or self.reports or self.continued):
            raise ValueError(
                "zoo compare: samples must name at least one folder, got none; or give --reports or --continued"
            )
        names = [Path(path).name for path in self.samples]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"zoo compare: samples must be folders of different names, got {twice[0]!r} more than once"
            )
        if (self.train is None) != (not self.samples):
            got = f"--train {self.train} and {len(self.samples)} samples"
            raise ValueError(f"zoo compare: train must be given with samples, and samples with train, got {got}")
        if self.reports and (self.samples or len(self.reports) < 2):
            got = f"{len(self.reports)} reports and {len(self.samples)} samples"
            raise ValueError(f"zoo compare: reports must be two or more, and without samples, got {got}")
        for name in ("count", "images"):
            if getattr(self, name) < 2:
                raise ValueError(f"zoo compare: {name} must be at least 2, got {getattr(self, name)}")
        if not 0 < self.best <= 1:
            raise ValueError(f"zoo compare: best must be in (0, 1], got {self.best}")


def run(config: Config) -> None:
    pages.require_matplotlib("zoo compare")
    results = compare(config)
    if config.json:
        print(json.dumps(results, indent=2))
        return
    for sentence in results["verdicts"].values():
        print(sentence)
    for line in compare_page.lines_of(results["populations"]):
        print(line)
    print(f"report: {written(config.out).page}")


def compare(config: Config) -> dict:
    """Judges samples and baselines; writes a page, its numbers, and what its verdicts rest on.

    Raises:
        FileNotFoundError: If a zoo or report is missing, or a zoo has no alignment.
        ValueError: If samples are of another architecture or activation, or there are too few held-out networks.
    """
    results = {"zoo": config.train, "verdicts": {}, "populations": [], "costs": {}, "sets": []}
    tensors: dict[str, Tensor] = {}
    if config.samples:
        results |= judge_samples(config, tensors)
    if config.reports:
        results["reports"] = list(config.reports)
        results["verdicts"] = join_reports(config.reports)
    if config.continued:
        found = trained.read(config.continued)
        results["populations"] += trained.tables(found)
        results["costs"] |= {path: cost_of(Zoo.open(path)) for path in config.continued}
        results["accuracy"] = {
            name: {str(epoch): values.tolist() for epoch, values in one.items()} for name, one in found.items()
        }
    results = plain(results)
    files = written(config.out)
    files.page.parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        write_tensors(files.replicates, tensors)
    write_json(files.results, results)
    title = Path(config.train).name if config.train else "several populations"
    write_file(files.page, pages.document(f"samples of {title}", compare_page.body(results)).encode())
    return results


class Written(NamedTuple):
    """The files of a report."""

    page: Path
    results: Path
    replicates: Path


def written(out: str) -> Written:
    """Those in a folder, or a page and what lies beside it."""
    path = Path(out)
    if path.suffix == ".html":
        return Written(path, path.with_suffix(".json"), path.with_suffix(".safetensors"))
    return Written(path / "report.html", path / "results.json", path / "replicates.safetensors")


def plain(results: object) -> object:
    """Results without what JSON does not have: numbers that are not finite become None, tuples lists."""
    if isinstance(results, dict):
        return {name: plain(value) for name, value in results.items()}
    if isinstance(results, list | tuple):
        return [plain(value) for value in results]
    if isinstance(results, float | numpy.floating):
        return float(results) if numpy.isfinite(results) else None
    return results


# --- samples of one zoo


class Scene(NamedTuple):
    """What sets are judged in."""

    zoo: Zoo
    job: Job
    activation: str
    device: torch.device
    judged_by: Judge
    part: Part  # images that predictions are compared on
    known: Known
    gain: float  # of ten held-out networks as an ensemble

    def measure(self, flat: Tensor) -> Measured:
        return measure_on(flat, self.job, self.activation, self.part, self.device)

    def judge(self, one: Set) -> tuple[Judged, Replicates, Measured]:
        novelty = self.judged_by.novelty(one.flat, SCREENED if one.group in PLAIN else None)
        found = self.measure(one.flat)
        gain = ensemble_gain(self.measure(one.flat[:ENSEMBLE]), self.known.y)
        told = judge(self.judged_by, self.known, one.name, one.group, one.flat, novelty, found, gain, self.gain)
        return *told, found


def judge_samples(config: Config, tensors: dict[str, Tensor]) -> dict:
    """Judges all sets; adds what verdicts rest on to ``tensors``, ``name/field`` ``[1 + RESAMPLES]`` each."""
    zoo = Zoo.open(config.train)
    samples = [Zoo.open(path) for path in config.samples]
    for one in samples:
        zoo.layout.require_same(one.layout, f"zoo compare: samples {one.path}")
    anchors = choose_anchors(Choice(epochs=config.epochs, best=config.best, aligned=True), zoo)
    for one in samples:
        require_activation(one, zoo, anchors.activation)
    scene, rows = set_scene(config, zoo, anchors)
    judged, replicates, accuracies = [], {}, {}
    for one in tqdm(list(sets_of(config, scene, samples, anchors, rows)), desc="compare", unit=" sets"):
        told, numbers, found = scene.judge(one)
        judged.append(told)
        replicates[one.name] = one, numbers
        if one.group not in PLAIN:
            accuracies[one.name] = found.accuracy.numpy()
    noise = [numbers for one, numbers in replicates.values() if one.group == "noise"]
    gaussian: dict[int, dict[float, Replicates]] = {}
    for one, numbers in replicates.values():
        if one.group == "PCA + Gaussian":
            gaussian.setdefault(one.components, {})[one.temperature] = numbers
    verdicts, rivals = {}, {}
    for name in (one.path.name for one in samples):
        rests_on, rivals[name] = evidence(replicates[name][1], noise, gaussian)
        verdicts[name] = verdict(name, [rests_on], rivals[name])
        tensors |= {f"{name}/{field}": torch.from_numpy(value.copy()) for field, value in rests_on._asdict().items()}
    judged_by = scene.judged_by
    return {
        "training states": len(judged_by.training),
        "held-out networks": len(judged_by.held_out),
        "activation": anchors.activation,
        "flipped groups": [name for name, flip in zip(zoo.symmetry.names, flips_of(zoo, anchors), strict=True) if flip],
        "held-out distance": judged_by.unit,
        "recall": judged_by.recall(),
        "sets": [one._asdict() for one in judged],
        "verdicts": verdicts,
        "rivals": rivals,
        "populations": [{"epoch": 0, "rows": tabulate(accuracies)}],
        "costs": {one.path.name: cost_of(one) for one in samples},
    }


def require_activation(one: Zoo, zoo: Zoo, activation: str | None) -> None:
    if "activation" in one.properties.column_names:
        others = set(one.properties["activation"].to_pylist()) - {activation}
        if others:
            what = f"activation {activation}, the commonest of {zoo.path}, got {', '.join(map(str, others))}"
            raise ValueError(f"zoo compare: samples {one.path} must have {what}")


def flips_of(zoo: Zoo, anchors: Anchors) -> tuple[bool, ...]:
    return tuple(flip and anchors.activation in ODD for flip in zoo.symmetry.flips)


def set_scene(config: Config, zoo: Zoo, anchors: Anchors) -> tuple[Scene, Tensor]:
    """What sets are judged in, and the rows of the training states: all that the samples were learned from."""
    device = find_device(config.device)
    job = job_of(zoo, limit=None, device=str(device.type))
    rows = states_of(zoo, "train", anchors.activation)
    rows = rows_of_epochs(zoo, rows, config.epochs, "zoo compare")
    held_out = states_of(zoo, "test", anchors.activation, last=True)
    if len(held_out) < SMALLEST:  # models are not trained on those of val, of which only a flow asks when to stop
        held_out = torch.cat([held_out, states_of(zoo, "val", anchors.activation, last=True)])
    by = next((name for name in BY if name in zoo.properties.column_names), None)
    if config.best < 1 and by is not None:  # as accurate as the anchors have to be
        values = torch.from_numpy(zoo.numbers(by))
        held_out = held_out[values[held_out] >= values[anchors.rows].min()]
    held_out = held_out[: config.count]
    if len(held_out) < SMALLEST:
        what = f"{SMALLEST} networks of activation {anchors.activation} in its test and val splits, got {len(held_out)}"
        raise ValueError(f"zoo compare: zoo must have at least {what}; take a larger zoo")
    training, others = aligned_rows(zoo, rows).float(), aligned_rows(zoo, held_out).float()
    judged_by = Judge(training, others, zoo.symmetry, zoo.layout, flips_of(zoo, anchors))
    x, y = job.data.test
    spaced = torch.linspace(0, len(y) - 1, min(len(y), config.images)).long()
    part = Part(x[spaced.to(x.device)], y[spaced.to(y.device)])
    activation = anchors.activation or activations_of(zoo, job.plan)[0]
    predictions = measure_on(training, job, activation, part, device).predictions
    found = measure_on(others, job, activation, part, device)
    known = Known(part.y.cpu(), predictions, found, None)
    known = known._replace(behaviour=behave(known, found, judged_by.nearest(others)[1]))
    gain = ensemble_gain(measure_on(others[:ENSEMBLE], job, activation, part, device), known.y)
    return Scene(zoo, job, activation, device, judged_by, part, known, gain), rows


def measure_on(flat: Tensor, job: Job, activation: str, part: Part, device: torch.device) -> Measured:
    return measure(flat.to(device), job.plan, [activation] * len(flat), part, progress=False)


def sets_of(config: Config, scene: Scene, samples: list[Zoo], anchors: Anchors, rows: Tensor) -> Iterator[Set]:
    """All networks that are judged: held-out ones, untrained ones, reconstructed anchors, samples and baselines."""
    zoo, judged_by = scene.zoo, scene.judged_by

    def aligned(flat: Tensor) -> Tensor:
        found = match(flat, judged_by.mean, zoo.symmetry, zoo.layout, flips=anchors.activation in ODD)
        return zoo.symmetry.permute(flat, found, zoo.layout)

    yield Set("held-out networks", "held-out", judged_by.held_out)
    untrained = states_of(zoo, "train", anchors.activation, untrained=True)[: config.count]
    if len(untrained) > 1:
        yield Set("untrained networks", "untrained networks", aligned(zoo.rows(untrained).float()))
    if config.model is not None:
        representation = load(config.model, scene.device).suit(zoo, "zoo compare")
        some = anchors.rows[: config.count]
        flat = (aligned_rows(zoo, some) if representation.aligned else zoo.rows(some)).float().to(scene.device)
        made = representation.decode(representation.encode(flat), like=flat).cpu()
        yield Set("reconstructed anchors", "reconstructed anchors", aligned(made))
    for one in samples:
        yield Set(one.path.name, one.path.name, aligned(one.rows(torch.arange(len(one))).float()))
    if config.baselines:
        last = set(last_rows(zoo).values())
        ends = anchors.rows[[row in last for row in anchors.rows.tolist()]]
        picked = aligned_rows(zoo, ends if len(ends) else anchors.rows).float()
        validation = states_of(zoo, "val", anchors.activation, last=True)
        stopping = aligned_rows(zoo, validation).float() if len(validation) else judged_by.training[:0]
        options = {"count": config.count, "flow": config.flow, "seed": config.seed}
        yield from baselines(judged_by.training, picked, stopping, zoo.layout, **options)


def states_of(zoo: Zoo, split: str, activation: str | None, last: bool = False, untrained: bool = False) -> Tensor:
    """Rows of a split, of one activation: all states after training has begun, each network's last, or untrained."""
    rows = zoo.split(split)
    kept = set(last_rows(zoo).values()) if last else None
    column = zoo.properties["activation"].to_pylist() if activation is not None else None
    epochs = zoo.numbers("epoch") if "epoch" in zoo.properties.column_names else None
    if epochs is None and untrained:
        return rows[:0]
    chosen = [
        row
        for row in rows.tolist()
        if (kept is None or row in kept)
        and (column is None or column[row] == activation)
        and (epochs is None or (epochs[row] == 0 if untrained else epochs[row] > 0))
    ]
    return torch.tensor(chosen, dtype=torch.int64)


# --- samples of several zoos


def join_reports(reports: tuple[str, ...]) -> dict[str, str]:
    """Verdicts on the sets that every report judged, from all zoos together.

    Raises:
        FileNotFoundError: If a report is missing.
        ValueError: If no set is in all of them, or two are of the same zoo.
    """
    found, zoos = [], []
    for files in map(written, reports):
        for path in (files.results, files.replicates):
            if not path.is_file():
                raise FileNotFoundError(
                    f"zoo compare: reports must be what zoo compare wrote of samples, got no {path}"
                )
        zoos.append(str(read_json(files.results).get("zoo")))
        with open_tensors(files.replicates) as file:
            found.append({name: file.get_tensor(name).numpy() for name in file.keys()})  # noqa: SIM118
    if len(set(zoos)) < len(zoos):
        raise ValueError(f"zoo compare: reports must be of different zoos, got {', '.join(zoos)}")
    fields = Evidence._fields
    names = [name for name in dict.fromkeys(key.rpartition("/")[0] for key in found[0])]
    shared = [name for name in names if all(f"{name}/{field}" in one for field in fields for one in found)]
    if not shared:
        raise ValueError(f"zoo compare: reports must have sets of the same name, got {', '.join(names)} and others")
    return {name: verdict(name, [Evidence(*(one[f"{name}/{x}"] for x in fields)) for one in found]) for name in shared}
