"""Boosted trees from features to each target, a non-linear reference, by scikit-learn."""

from collections.abc import Callable, Sequence
from math import nan

import numpy
import torch
from scipy.stats import kendalltau
from torch import Tensor

from fastws.downstream import optional
from fastws.downstream.probes.ridge import Probe, Splits, r_squared
from fastws.downstream.probes.softmax import UNKNOWN, Classified

MOST_TREES = 1000  # where the validation split says when to stop
TREES = 100  # without validation rows
SEED = 0
SPLITS = ("train", "val", "test")


def fit_trees(features: Splits, targets: Splits) -> list[Probe]:
    """Histogram gradient boosting; the number of trees is what the validation split likes best.

    Args:
        features: ``train``, ``val`` and ``test``: ``[n, d]``.
        targets: Likewise ``[n, K]``. Networks whose target is not finite are left out.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    probes = []
    for target in range(targets["train"].shape[1]):
        values = {split: targets[split][:, target].double() for split in SPLITS}
        known = {split: y.isfinite() for split, y in values.items()}
        x = {split: features[split][known[split]] for split in SPLITS}
        y = {split: values[split][known[split]] for split in SPLITS}
        predict = boosted("HistGradientBoostingRegressor", x, y)
        predicted = {split: predict(part) for split, part in x.items()}
        scores = [float(r_squared(predicted[split][:, None], y[split][:, None])) for split in SPLITS]
        tau = float(kendalltau(y["test"].numpy(), predicted["test"].numpy()).statistic)
        probes.append(Probe(nan, False, *scores, tau, predicted["test"], predict))
    return probes


def classify_trees(features: Splits, codes: Splits, classes: Sequence[int]) -> list[Classified]:
    """The same for categorical targets: ``codes`` ``[n, K]``, -1 where the value is missing."""
    results = []
    for target in range(len(classes)):
        known = {split: codes[split][:, target] != UNKNOWN for split in SPLITS}
        x = {split: features[split][known[split]] for split in SPLITS}
        y = {split: codes[split][known[split], target] for split in SPLITS}
        predict = boosted("HistGradientBoostingClassifier", x, y)
        predicted = {split: predict(part) for split, part in x.items()}
        scores = [(predicted[split] == y[split]).double().mean().item() for split in SPLITS]
        results.append(Classified(nan, *scores, predicted["test"], predict))
    return results


def boosted(name: str, features: Splits, targets: Splits) -> Callable[[Tensor], Tensor]:
    """What predicts by an estimator of scikit-learn that was fitted to the training split."""
    make = getattr(optional.load("sklearn.ensemble", "scikit-learn", "eval", "trees"), name)
    x, y = ({split: part.numpy() for split, part in parts.items()} for parts in (features, targets))
    # classes that no training network has cannot be learned, and the early stop would refuse them
    usable = numpy.isin(y["val"], y["train"]) if name.endswith("Classifier") else numpy.ones(len(y["val"]), bool)
    if usable.any():
        estimator = make(max_iter=MOST_TREES, early_stopping=True, random_state=SEED)
        estimator.fit(x["train"], y["train"], X_val=x["val"][usable], y_val=y["val"][usable])
    else:
        estimator = make(max_iter=TREES, early_stopping=False, random_state=SEED).fit(x["train"], y["train"])

    def predict(features: Tensor) -> Tensor:
        return torch.from_numpy(estimator.predict(features.numpy())) if len(features) else torch.zeros(0)

    return predict
