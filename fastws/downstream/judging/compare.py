"""``fastws zoo compare``: sampled networks beside the zoo that they were made from, and beside cheap baselines."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from fastws import pages
from fastws.downstream.judging import page as compare_page
from fastws.downstream.judging import trained
from fastws.downstream.judging.compute import cost_of
from fastws.downstream.judging.config import Config
from fastws.downstream.judging.judged import Replicates
from fastws.downstream.judging.scene import PLAIN, flips_of, require_activation, set_scene, sets_of
from fastws.downstream.judging.statistics import tabulate
from fastws.downstream.judging.verdict import Evidence, evidence, verdict
from fastws.downstream.sampling.anchors import Choice, choose_anchors
from fastws.files.atomic import write_file, write_json, write_tensors
from fastws.files.json import read as read_json
from fastws.files.safetensors import open_tensors
from fastws.zoo.format.zoo import Zoo


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
