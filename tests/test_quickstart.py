import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from fastws import pages
from fastws.quickstart import new_networks
from fastws.quickstart import run as quickstart
from fastws.zoo.format.zoo import Zoo

SMOKE = quickstart.Config(smoke=True, threads=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(SMOKE, out=str(tmp_path_factory.mktemp("finished")))
    quickstart.run(config)
    return config


def read(config):
    return json.loads((Path(config.out) / "results.json").read_text())


def findings(results):
    return {name: found for name, found in results.items() if name not in ("stages", "config", "command", "machine")}


def test_results_are_complete(finished):
    results = read(finished)
    assert results["zoo"]["networks"] == {"train": 17, "val": 4, "test": 3} and results["zoo"]["states"] == 24 * 5
    assert results["probe"]["rows"] == {"train": 17 * 4, "val": 4 * 4, "test": 3 * 4}
    scored = {(score["features"], score["target"]) for score in results["probe"]["r2"]}
    kinds = ("SANE", "s(W)", "W", "W aligned")
    assert scored == {(kind, target) for kind in kinds for target in quickstart.TARGETS}
    assert set(results["stages"]) == set(quickstart.STAGES)
    assert all(stage["attempts"] == 1 and stage["seconds"] > 0 for stage in results["stages"].values())
    assert results["nern"]["stored_weights"] == 8 * 16 + 96 * 4 and numpy.shape(results["nern"]["kernels"]) == (
        2,
        8,
        4,
        4,
    )
    assert results["nern"]["accuracy"][0] == pytest.approx(results["nern"]["test_accuracy"])
    assert {"fastws", "torch", "python", "commit", "processor", "cores"} <= set(results["machine"])


def test_new_networks_are_judged(finished):
    found = read(finished)["new"]
    assert found["networks"] == 56 and found["training_states"] == 56 * 4 and found["weights"] == 1486
    assert list(found["sets"]) == [words for words, _ in new_networks.SETS.values()] + ["held-out networks"]
    sampled = Zoo.open(Path(finished.out) / "new/kde")
    assert len(sampled) == found["count"] == 12
    mean = sampled.numbers("test_accuracy").mean()
    first, *_, held_out = found["sets"].values()
    assert first["accuracy"][0] == pytest.approx(mean, abs=1e-6) and held_out["novelty"][0] == pytest.approx(1, abs=0.2)
    page = html.unescape((Path(finished.out) / "report.html").read_text())
    for row in quickstart.report.new_rows(found):
        assert all(f"<td>{cell}</td>" in page for cell in row)


def test_report_stands_alone(finished):
    page = (Path(finished.out) / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == page.count("<img") == 6
    assert not re.search(r"<script|<link|https?:", page)


def test_report_holds_the_numbers_of_the_results(finished):
    results = read(finished)
    page = html.unescape((Path(finished.out) / "report.html").read_text())
    cells = re.findall(r"<td>([^<]*)</td>", page)
    for score in results["probe"]["r2"]:
        assert any(cell.split(" [")[0] == f"{score['test_r2']:.3f}" for cell in cells), score
    for kind in ("SANE", "W"):
        assert f"{results['permutations'][kind]['ratio']:.3f}" in cells
    for stage in results["stages"].values():
        assert f"{stage['seconds']:.1f}" in cells
    assert all(f"{accuracy:.3f}" in page for accuracy in results["nern"]["accuracy"])
    assert json.dumps(results["config"], indent=1) in page


def test_summary_is_printed(finished, capsys):
    quickstart.run(finished)  # everything is done: reads it
    out = capsys.readouterr().out
    assert out.count("done before") == len(quickstart.STAGES)
    for score in read(finished)["probe"]["r2"]:
        assert f"{score['test_r2']:.3f}" in out
    assert f"{finished.out}/report.html" in out and f"{finished.out}/results.json" in out


def test_killed_run_is_resumed_to_the_same_results(finished, tmp_path, monkeypatch):
    config = replace(finished, out=str(tmp_path))

    def die(config, folder):
        """dies"""
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(quickstart.STAGES, "embed", die)
        with pytest.raises(KeyboardInterrupt):
            quickstart.run(config)
    assert not (tmp_path / "results.json").exists()
    quickstart.run(config)
    assert findings(read(config)) == findings(read(finished))
    attempts = {name: stage["attempts"] for name, stage in read(config)["stages"].items()}
    assert attempts == {name: 1 + (name == "embed") for name in quickstart.STAGES}


def test_test_networks_are_unseen(finished):
    folder = Path(finished.out)
    zoo = Zoo.open(folder / "zoo")
    assert not (folder / "aligned").exists()  # networks are aligned as they are read
    assert read(finished)["align"]["reference"] in zoo.splits["train"]
    state = torch.load(folder / "sane/checkpoint.pt", weights_only=True)
    assert state["extra"]["aligned"] is True
    assert state["extra"]["networks"] == {"train": 17 * 5, "val": 4 * 5}
    rows = quickstart.probed_rows(replace(finished, **quickstart.SMOKE), zoo)
    models = {split: {zoo.properties["model"][row].as_py() for row in r.tolist()} for split, r in rows.items()}
    assert models == {split: set(members) for split, members in zoo.splits.items()}


@pytest.mark.parametrize(
    "changed, message",
    [({"seed": 1}, "seed must be 0, with which .* was begun, got 1; give another --out")],
)
def test_run_is_resumed_only_as_it_was_begun(finished, changed, message):
    with pytest.raises(ValueError, match=message):
        quickstart.run(replace(finished, **changed))


@pytest.mark.parametrize("name, text", [("config.json", "{"), ("stages/probe.json", "[]"), ("stages/probe.json", "{}")])
def test_damaged_file_is_named(finished, name, text):
    path = Path(finished.out) / name
    whole = path.read_text()
    path.write_text(text)
    try:
        with pytest.raises(ValueError, match=f"{path}: file must .*; remove it, and its stage is done again"):
            quickstart.run(finished)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"networks": 19}, "networks must be at least 20"),
        ({"permutations": 0}, "permutations must be at least 1, got 0"),
        ({"epochs": 5}, r"probe_epochs must be in \[0, 5\]"),
        ({"probe_epochs": ()}, "probe_epochs must be"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, for contrast, got 1"),
        ({"gamma": 2.0}, r"gamma must be in \[0, 1\], got 2.0"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        quickstart.Config(**fields)


def test_missing_matplotlib_is_named_first(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="matplotlib must be installed for the report, got none; pip install"):
        quickstart.run(replace(SMOKE, out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_command_repeats_the_run(finished):
    words = read(finished)["command"].split()
    assert words == ["fastws", "quickstart", "--out", finished.out, "--smoke", "--threads", "1"]
    config = replace(finished, smoke=False, align=False, probe_epochs=(1, 2))
    assert quickstart.command_of(config).endswith("--probe-epochs 1 2 --no-align --threads 1")
