"""Intervals, classifiers, trees and transforms of features; tests/test_predict.py has ridge regression and commands."""

import numpy
import pytest
import torch
from scipy.stats import kendalltau

from fastws.downstream.probes import intervals

# --- intervals


def clustered(seed, networks=12, states=5):
    """Rows of networks whose states are alike: predictions, targets and the network of each row."""
    random = numpy.random.default_rng(seed)
    target = numpy.repeat(random.normal(size=networks), states) + 0.1 * random.normal(size=networks * states)
    prediction = target + 0.5 * numpy.repeat(random.normal(size=networks), states)
    return torch.from_numpy(prediction), torch.from_numpy(target), numpy.arange(networks).repeat(states).tolist()


def test_interval_of_tau_is_that_of_resampled_networks(monkeypatch):
    prediction, target, models = clustered(0)
    target = target.round(decimals=1)  # with ties
    shuffled = torch.randperm(60)
    monkeypatch.setattr(intervals, "ROWS_AT_ONCE", 7)
    low, high = intervals.tau_interval(prediction[shuffled], target[shuffled], [models[i] for i in shuffled], seed=3)
    random, scores = numpy.random.default_rng(3), []
    for counts in random.multinomial(12, numpy.full(12, 1 / 12), intervals.RESAMPLES):
        rows = numpy.repeat(numpy.arange(60), numpy.repeat(counts, 5))
        scores.append(kendalltau(target[rows].numpy(), prediction[rows].numpy()).statistic)
    assert [low, high] == pytest.approx(numpy.quantile(scores, [0.025, 0.975]).tolist(), abs=1e-12)
    assert intervals.tau_interval(prediction, torch.ones(60, dtype=torch.float64), models) is None
    assert intervals.tau_interval(prediction[:0], target[:0], []) is None


def test_interval_of_a_mean_covers_it():
    """500 sets of 40 networks of 5 states that are alike: 95 % intervals hold the truth about as often."""
    covered = 0
    for seed in range(500):
        _, target, models = clustered(seed, networks=40)
        low, high = intervals.mean_interval(target, models, seed)
        covered += low <= 0 <= high
    assert 0.92 <= covered / 500 <= 0.97
