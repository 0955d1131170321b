"""Verdicts on sampled networks: the rules in their order, and intervals of samples, baselines and zoos together."""

import json
import re

import numpy
import pytest
import torch

from fastws.downstream.judging import compare as compare_zoos
from fastws.downstream.judging.judged import Replicates
from fastws.downstream.judging.statistics import RESAMPLES, around
from fastws.downstream.judging.verdict import Evidence, evidence, over_curves, over_noise, verdict
from fastws.files.atomic import write_tensors


def of(accuracy, novelty, spread=1.0, apart=1.0, width=0.002, seed=0):
    """Statistics of a set, resampled with a standard deviation of ``width``."""
    random = numpy.random.default_rng([seed, int(1e6 * accuracy), int(1e6 * novelty)])

    def resampled(value):
        return numpy.concatenate([[value], value + width * random.normal(size=RESAMPLES)])

    return Replicates(*map(resampled, (accuracy, accuracy, accuracy, novelty, spread, apart)))


NOISE = [of(accuracy, novelty) for accuracy, novelty in ((0.95, 0.1), (0.9, 0.6), (0.7, 1.2))]
GAUSSIAN = {
    16: {0.5: of(0.95, 0.5, spread=0.2), 1.0: of(0.85, 0.9, spread=0.4)},
    64: {0.5: of(0.93, 0.7, spread=0.4), 1.0: of(0.8, 1.1, spread=0.7)},
}


@pytest.mark.parametrize(
    "judged, expected",
    [
        (of(0.96, 0.2), "a copies its training networks: its novelty is 0.20"),
        (of(0.96, 0.9, apart=0.1), "a makes one network"),
        (of(0.75, 0.9), "a is no better than noise at equal novelty: -5.0 .* points better"),
        (of(0.95, 1.15), "a: no baseline at its novelty"),
        (of(0.95, 0.9, spread=0.8), "a: no baseline at its novelty"),
        (of(0.833, 1.0, spread=0.6), r"a is no better than PCA 64 \+ Gaussian, T = 0.8[78]"),
        (
            of(0.9, 1.0, spread=0.6),
            r"a is better than PCA 64 .* by 6.[78] .* points at novelty 1.00 and spread 0.60, in",
        ),
    ],
)
def test_rules_in_their_order(judged, expected):
    rests_on, rival = evidence(judged, NOISE, GAUSSIAN)
    sentence = verdict("a", [rests_on], rival)
    assert re.match(expected, sentence), sentence


def test_intervals_are_of_samples_and_baselines_together():
    """Three curves of points with the same spread: the difference varies by both, chosen anew each time."""
    judged = of(0.9, 0.8, width=0.01, seed=1)
    curve = {64: {1.0: of(0.8, 0.9, width=0.02), 1.2: of(0.79, 1.0, width=0.02)}}
    value, low, high = around(over_curves(judged._replace(spread=judged.spread - 0.5), curve)[0])
    assert value == pytest.approx(0.1)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.01**2 + 0.02**2) ** 0.5, rel=0.1)
    value, low, high = around(over_noise(judged, [of(0.95, 0.1, width=0.02), of(0.7, 1.2, width=0.02)]))
    assert value == pytest.approx(0.9 - (0.95 - 0.25 * 0.7 / 1.1)) and low < value < high


def test_the_best_of_many_equal_baselines_is_told_by_its_other_half():
    """Chosen by luck of one half: by that half the difference would be negative."""
    random = numpy.random.default_rng(0)
    curves = {}
    for components in range(40):
        one = of(0.8, 1.0, width=0.0, seed=components)
        luck = random.normal(size=2) * 0.02
        curves[components] = {1.0: one._replace(choosing=one.choosing + luck[0], scoring=one.scoring + luck[1])}
    value, name = over_curves(of(0.8, 1.0, width=0.0), curves)
    chosen = int(name.split()[1]) if name.split()[1] != "all" else 0
    assert curves[chosen][1.0].choosing[0] == max(curve[1.0].choosing[0] for curve in curves.values()) > 0.83
    assert abs(value[0]) < 0.06 and value[0] == pytest.approx(0.8 - curves[chosen][1.0].scoring[0])


def test_gaussian_of_components_is_no_better_than_itself():
    for seed in range(5):
        judged = of(0.85, 0.9, spread=0.55, width=0.01, seed=seed)
        curve = {
            64: {
                0.7: of(0.9, 0.8, 0.4, width=0.01),
                1.0: of(0.85, 0.9, 0.55, width=0.01),
                1.2: of(0.8, 1.0, 0.65, width=0.01),
            }
        }
        rests_on, rival = evidence(judged, [], curve)
        assert "no better than PCA 64" in verdict("a", [rests_on], rival)


def zoo_of(gain, seed=0):
    numbers = of(0.9, 1.0, seed=seed)
    return Evidence(
        numbers.accuracy, numbers.novelty, numbers.spread, numbers.apart, *2 * [numbers.accuracy - 0.9 + gain]
    )


def test_three_zoos_of_one_sign_make_a_claim():
    gains = (0.02, 0.03, 0.025)
    joined = verdict("a", [zoo_of(gain, seed) for seed, gain in enumerate(gains)])
    assert re.match("a is better than PCA . Gaussian by 2.5 .* in all of 3 zoos", joined)
    assert "in these 2 zoos; three seeds of one sign prove it" in verdict("a", [zoo_of(0.02), zoo_of(0.03)])
    assert "no better" in verdict("a", [zoo_of(0.1), zoo_of(-0.02), zoo_of(0.01)])  # seeds vary more than networks
    mixed = [zoo_of(-0.0005), *(zoo_of(0.1, seed) for seed in range(9))]
    assert re.search("is better than .* in 9 of 10 zoos only", verdict("a", mixed))


def report(path, zoo, gain, name="kde"):
    path.mkdir()
    (path / "results.json").write_text(json.dumps({"zoo": zoo}))
    numbers = {f"{name}/{field}": torch.from_numpy(x.copy()) for field, x in zoo_of(gain)._asdict().items()}
    write_tensors(path / "replicates.safetensors", numbers)
    return str(path)


def test_reports_of_several_zoos_are_joined(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [report(tmp_path / f"r{n}", f"zoo-{n}", 0.02 + n / 100) for n in range(3)]
    results = compare_zoos.compare(compare_zoos.Config(reports=tuple(paths), out=str(tmp_path / "out")))
    assert "by 3.0 " in results["verdicts"]["kde"] and "in all of 3 zoos" in (tmp_path / "out/report.html").read_text()
    same = report(tmp_path / "same", "zoo-0", 0.02)
    with pytest.raises(ValueError, match="reports must be of different zoos"):
        compare_zoos.compare(compare_zoos.Config(reports=(paths[0], same), out=str(tmp_path / "no")))
    other = report(tmp_path / "other", "zoo-9", 0.02, "gan")
    with pytest.raises(ValueError, match="reports must have sets of the same name"):
        compare_zoos.compare(compare_zoos.Config(reports=(paths[0], other), out=str(tmp_path / "no")))
    with pytest.raises(FileNotFoundError, match="reports must be what zoo compare wrote"):
        compare_zoos.compare(compare_zoos.Config(reports=(paths[0], str(tmp_path)), out=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()
    with pytest.raises(ValueError, match="reports must be two or more"):
        compare_zoos.Config(reports=(paths[0],), out="x")


def test_a_report_is_a_folder_or_a_page():
    assert [path.name for path in compare_zoos.written("runs/a")] == [
        "report.html",
        "results.json",
        "replicates.safetensors",
    ]
    assert [path.name for path in compare_zoos.written("runs/a.html")] == ["a.html", "a.json", "a.safetensors"]
    same = compare_zoos.Config(samples=("a",), zoo="zoos/b", report="r.html")
    assert (same.train, same.out) == ("zoos/b", "r.html")
