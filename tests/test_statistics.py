"""Statistics of populations against plain statements and scipy."""

import numpy
import pytest
import scipy.stats
import torch

from fastws.downstream.judging import statistics
from fastws.downstream.judging.statistics import draw_counts, weighted_mean, weighted_median


def random(seed=0):
    return numpy.random.default_rng(seed)


def test_spreads_of_resampled_populations_lie_around_that_of_the_population():
    flat = torch.from_numpy(random().normal(size=(20, 400)))
    value, low, high = statistics.around(statistics.mean_std(flat, draw_counts(20, random())))
    assert value == pytest.approx(flat.std(0).mean().item(), rel=1e-5) and low < value < high


@pytest.mark.parametrize("size", [1, 2, 7, 10])
def test_resampled_populations_are_what_drawing_again_gives(size):
    values, counts = random(1).normal(size=size), draw_counts(size, random())
    assert counts.shape == (statistics.RESAMPLES + 1, size) and (counts.sum(1) == size).all() and (counts[0] == 1).all()
    flat = torch.from_numpy(random(2).normal(size=(size, 5)))
    means, medians, spreads = (
        weighted_mean(values, counts), weighted_median(values, counts), statistics.mean_std(flat, counts)
    )  # fmt: skip
    pairs = numpy.triu_indices(size, 1)
    for row in range(0, 60, 7):
        drawn = numpy.repeat(numpy.arange(size), counts[row])
        assert means[row] == pytest.approx(values[drawn].mean())
        assert medians[row] == pytest.approx(numpy.median(values[drawn]))
        variance = flat[drawn].var(0, correction=0) * size**2 / max(size**2 - (counts[row] ** 2).sum(), 1)
        assert spreads[row] == pytest.approx(variance.sqrt().mean().item(), abs=1e-5)
        expected = [(drawn == i).sum() * (drawn == j).sum() for i, j in zip(*pairs, strict=True)]
        assert statistics.pair_counts(counts[row : row + 1])[0].tolist() == expected


def test_intervals_of_networks_with_several_states_cover_the_truth():
    """On 500 synthetic sets of 60 networks with five states that are nearly alike; states as networks would not."""
    covered, too_narrow = 0, 0
    for seed in range(500):
        numbers = random(seed)
        values = (numbers.normal(size=(60, 1)) + 0.2 * numbers.normal(size=(60, 5))).ravel()
        clusters = numpy.repeat(numpy.arange(60), 5)
        covered += covers(statistics.cluster_interval(values, clusters, numbers))
        too_narrow += covers(statistics.cluster_interval(values, numpy.arange(300), numbers)) if seed < 100 else 0
    assert 0.93 <= covered / 500 <= 0.97
    assert too_narrow / 100 < 0.75


def covers(interval):
    return interval[1] <= 0 <= interval[2]


def test_seeds_are_drawn_before_networks():
    """Seeds that differ by far more than their networks: the interval is that of so few seeds."""
    replicates = [10 * seed + random(seed).normal(size=statistics.RESAMPLES + 1) * 0.01 for seed in range(3)]
    value, low, high = statistics.around(statistics.over_seeds(replicates, random()))
    assert value == pytest.approx(10, abs=0.05) and low == pytest.approx(0, abs=1) and high == pytest.approx(20, abs=1)


@pytest.mark.parametrize("best, accuracy, images, std", [(0.3, 0.955, 287, 0.008), (0.2, 0.83, 1000, 0.02)])
def test_optimism_of_choosing_by_the_score_that_is_told(best, accuracy, images, std):
    numbers, gaps = random(3), []
    for _ in range(300):
        true = accuracy + std * numbers.normal(size=200)
        seen = true + (accuracy * (1 - accuracy) / images) ** 0.5 * numbers.normal(size=200)
        kept = seen >= numpy.quantile(seen, 1 - best)
        gaps.append((seen[kept] - true[kept]).mean())
    expected = statistics.selection_optimism(best, accuracy, images, std)
    assert expected == pytest.approx(numpy.mean(gaps), rel=0.2)
    if best == 0.3:
        assert expected == pytest.approx(0.012, abs=0.0005)


def test_difference_of_two_populations():
    a, b = random(4).normal(0.6, 0.1, size=23), random(5).normal(0.5, 0.2, size=31)
    found = statistics.compare(a, b)
    variances = a.var(ddof=1) / 23, b.var(ddof=1) / 31
    assert found.mean[0] == pytest.approx(a.mean() - b.mean())
    assert found.welch_t == pytest.approx(found.mean[0] / sum(variances) ** 0.5)
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 22 + variances[1] ** 2 / 30)
    assert found.welch_p == pytest.approx(2 * scipy.stats.t.sf(abs(found.welch_t), freedom))
    assert found.mann_whitney_u == sum((x > y) + (x == y) / 2 for x in a for y in b)
    differences = sorted(x - y for x in a for y in b)
    assert found.shift[0] == pytest.approx(differences[356])
    # the interval holds exactly the shifts that the test does not reject, up to its approximation by a normal law
    for edge in found.shift[1:]:
        rejected = scipy.stats.mannwhitneyu(a - edge, b, method="asymptotic", use_continuity=False)
        assert rejected.pvalue == pytest.approx(0.05, abs=0.005)
    assert statistics.compare(a[:1], b) is None
    assert statistics.compare(numpy.ones(3), numpy.zeros(4)) is None


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1, 1]) and statistics.holm([]) == []


def test_summary():
    values = random(6).normal(size=50)
    found = statistics.summarise(values, random())
    assert (found.count, found.std) == (50, pytest.approx(values.std(ddof=1)))
    assert found.mean[0] == pytest.approx(values.mean()) and found.median[0] == pytest.approx(numpy.median(values))
    error = values.std() / 50**0.5
    assert found.mean[2] - found.mean[1] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.quantiles == pytest.approx(numpy.quantile(values, [0.05, 0.25, 0.75, 0.95]).tolist())
    assert statistics.summarise(values[:1], random()).std == 0
