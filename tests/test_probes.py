"""Intervals, classifiers, trees and transforms of features; tests/test_predict.py has ridge regression and commands."""

import json
from types import SimpleNamespace as Namespace

import numpy
import pyarrow
import pytest
import torch
from scipy.stats import kendalltau
from small_zoo import make_small_zoo

import fastws
from fastws.downstream import optional, predict
from fastws.downstream.probes import (
    extract,
    intervals,
    published,
    ridge,
    scores,
    softmax,
    spectra,
    transforms,
    trees,
)
from fastws.downstream.probes import targets as targets_module
from fastws.downstream.probes.features import layer_statistics
from fastws.zoo.making.grids import PRESETS

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


def test_interval_of_a_mean_covers_it(monkeypatch):
    """500 sets of 40 networks of 5 states that are alike: 95 % intervals hold the truth about as often."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    covered = 0
    for seed in range(500):
        _, target, models = clustered(seed, networks=40)
        low, high = intervals.mean_interval(target, models, seed)
        covered += low <= 0 <= high
    assert 0.92 <= covered / 500 <= 0.97


# --- classifiers


def clouds(seed, width=6, counts=(43, 20, 31), classes=(3, 4)):
    """Features around a centre for each class of the first target; the second says between which planes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes[0], width, generator=generator)
    features, codes = {}, {}
    for split, n in zip(("train", "val", "test"), counts, strict=True):  # planes through the quartiles of the first
        own = torch.randint(classes[0], (n,), generator=generator)
        features[split] = centres[own] + torch.randn(n, width, generator=generator)
        planes = features["train"][:, 0].quantile(torch.tensor([0.25, 0.5, 0.75]))
        codes[split] = torch.stack([own, (features[split][:, :1] > planes).sum(1)], 1)
    return features, codes, classes


def published_classifier(features, codes, count):
    """The published recipe, one target at a time, by modules of torch and its global random numbers."""
    torch.manual_seed(42)
    layer = torch.nn.Linear(features["train"].shape[1], count)
    torch.nn.init.kaiming_normal_(layer.weight)
    torch.nn.init.constant_(layer.bias, 0.01)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4, weight_decay=1e-6)
    for epoch in range(1, 51):
        for chosen in torch.randperm(len(codes["train"])).split(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(features["train"][chosen]), codes["train"][chosen]).backward()
            optimizer.step()
        if epoch % 10 == 0:
            torch.randperm(len(codes["test"]))
    return layer


def test_published_classifiers_are_those_trained_one_by_one(capsys):
    features, codes, classes = clouds(0)
    codes["train"][5, 1] = -1
    fits = softmax.classify(features, codes, classes, published=True)
    for target, (fit, count) in enumerate(zip(fits, classes, strict=True)):
        known = codes["train"][:, target] >= 0
        one = {"train": codes["train"][known, target], "test": codes["test"][:, target]}
        layer = published_classifier(features | {"train": features["train"][known]}, one, count)
        assert torch.equal(fit.test_prediction, layer(features["test"]).argmax(1))
        assert torch.equal(fit.predict(features["val"]), layer(features["val"]).argmax(1))
        right = (layer(features["train"][known]).argmax(1) == one["train"]).double().mean()
        assert fit.train_accuracy == pytest.approx(right.item())
        here = known.nonzero().flatten()[None]
        weights, bias = softmax.train_published(features["train"], here, one["train"][None], [count], 31)
        torch.testing.assert_close(weights[0].T, layer.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(bias[0], layer.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [6, 60])  # fewer and more features than networks
def test_softmax_regression_is_that_of_scikit_learn(width):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, codes, classes = clouds(1, width)
    codes["train"][7, 0] = codes["test"][0, 0] = -1
    fits = softmax.classify(features, codes, classes)
    mean, std = features["train"].mean(0), features["train"].std(0, correction=0)
    scaled = {split: ((x - mean) / std).double().numpy() for split, x in features.items()}
    for target, fit in enumerate(fits):
        known = {split: codes[split][:, target].numpy() >= 0 for split in codes}
        x = {split: scaled[split][known[split]] for split in codes}
        y = {split: codes[split][known[split], target].numpy() for split in codes}
        losses = {}
        for penalty in softmax.PENALTIES:
            model = linear_model.LogisticRegression(C=1 / penalty, max_iter=10_000, tol=1e-10).fit(
                x["train"], y["train"]
            )
            chances = model.predict_proba(x["val"])
            losses[penalty] = -numpy.log(chances[numpy.arange(len(chances)), y["val"]]).mean(), model
        best = min(losses, key=lambda penalty: losses[penalty][0])
        assert fit.penalty == best
        assert (fit.test_prediction.numpy() == losses[best][1].predict(x["test"])).all()
        assert fit.test_accuracy == pytest.approx((fit.test_prediction.numpy() == y["test"]).mean())
        assert torch.equal(fit.predict(features["test"])[torch.from_numpy(known["test"])], fit.test_prediction)


# --- trees


def test_trees_are_stopped_by_the_validation_split():
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    features, targets = {}, {}
    for split, n in zip(("train", "val", "test"), (400, 100, 100), strict=True):
        features[split] = torch.randn(n, 4, generator=generator)
        step = (features[split][:, 0] > 0) ^ (features[split][:, 1] > 0)  # no line tells these apart
        targets[split] = torch.stack([step.double(), torch.randn(n, generator=generator).double()], 1)
    targets["test"][3, 0] = torch.nan
    step, noise = trees.fit_trees(features, targets)
    assert step.test_r2 > 0.7 and noise.test_r2 < 0.1 and len(step.test_prediction) == 99
    known = targets["test"][:, 0].isfinite()
    assert torch.equal(step.predict(features["test"][known]), step.test_prediction)
    assert step.scores()["penalty"] is None and ridge.fit_probes(features, targets)[0].test_r2 < 0.2
    codes = {split: values[:, :1].nan_to_num(-1).long() for split, values in targets.items()}
    (classes,) = trees.classify_trees(features, codes, [2])
    assert classes.test_accuracy > 0.9 and len(classes.test_prediction) == 99
    nobody = {split: values[: 0 if split == "val" else None] for split, values in targets.items()}
    assert trees.fit_trees(features | {"val": features["val"][:0]}, nobody)[0].test_r2 > 0.7


# --- transforms


def test_polar_has_radius_and_angles():
    polar = transforms.polar(torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]], dtype=torch.float64))
    right = numpy.pi / 2
    expected = [[5, numpy.arccos(0.6), numpy.arccos(0.8)], [2, right, numpy.pi], [0, right, right]]
    torch.testing.assert_close(polar, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kernel", transforms.KERNELS)
def test_fewer_kernel_components_are_the_first_of_more(kernel):
    decomposition = pytest.importorskip("sklearn.decomposition")
    train, other = torch.randn(300, 6), torch.randn(9, 6)
    found = transforms.kernel_pca(train, kernel, 5)(other)[:, :3]
    alone = decomposition.KernelPCA(3, kernel=kernel, eigen_solver="dense").fit(train.double().numpy())
    torch.testing.assert_close(found.abs(), torch.from_numpy(alone.transform(other.double().numpy())).abs())


def test_libraries_that_are_missing_are_one_sentence(monkeypatch):
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"umap-learn must be installed for umap, got none; pip install '.*\[umap]'"):
        transforms.umap(torch.randn(9, 3), 2)
    with pytest.raises(ValueError, match="predict: scikit-learn must be installed for kpca, got none"):
        transforms.kernel_pca(torch.randn(9, 3), "rbf", 2)


# --- spectra


def plain_power_law(values):
    """The statement of powerlaw: for each x_min the likeliest exponent, and of these the one that fits best."""
    values, found = numpy.sort(values), []
    for begin in range(len(values) - 1):
        tail = values[begin:]
        alpha = 1 + len(tail) / numpy.log(tail / tail[0]).sum()
        fitted = 1 - (tail / tail[0]) ** (1 - alpha)
        found.append((numpy.abs(fitted - numpy.arange(len(tail)) / len(tail)).max(), alpha))
    return min(found)[1]


def test_spectra_are_those_of_numpy():
    nn = torch.nn
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 20), nn.Linear(20, 1))
    layout = fastws.Layout.from_checkpoint(module)
    flat = torch.randn(4, layout.num_weights)
    actual = spectra.layer_spectra(flat, layout)
    assert actual.shape == (4, 12)  # the last layer has one row, and no spectrum
    for row, state in zip(actual, map(layout.unflatten, flat), strict=True):
        expected = []
        for name in ("0.weight", "2.weight"):
            values = numpy.linalg.svd(state[name].flatten(1).double().numpy(), compute_uv=False) ** 2
            alpha, norm, largest = plain_power_law(values), values.sum(), values.max()
            expected += [numpy.log10(norm), alpha, alpha * numpy.log10(largest), numpy.log10((values**alpha).sum())]
            expected += [numpy.log10(largest), norm / largest]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_power_law_finds_the_exponent_that_was_drawn():
    draws = (1 - torch.rand(3, 600, dtype=torch.float64)) ** (-1 / 1.5)  # alpha = 2.5
    assert (spectra.power_law(draws.sort(descending=True).values) - 2.5).abs().max() < 0.4


def test_leading_singular_values_by_random_projection_are_near():
    left, right = (torch.linalg.qr(torch.randn(2, size, 30, dtype=torch.float64)).Q for size in (80, 60))
    matrices = left * 0.7 ** torch.arange(30) @ right.mT
    found = spectra.singular_values(matrices, 8)
    torch.testing.assert_close(found, torch.linalg.svdvals(matrices)[:, :8], rtol=1e-6, atol=0)


def test_layers_of_zeros_and_of_dead_units_have_finite_spectra():
    layout = fastws.Layout.from_checkpoint(torch.nn.Linear(9, 7))
    flat = torch.randn(3, layout.num_weights)
    flat[0] = 0
    flat[1, 9:18] = 0  # a dead unit
    found = spectra.layer_spectra(flat, layout)
    assert found.isfinite().all()
    alive = flat[1, :63].view(7, 9)[[0, 2, 3, 4, 5, 6]].double().numpy()
    expected = plain_power_law(numpy.linalg.svd(alive, compute_uv=False) ** 2)
    assert found[1, 1].item() == pytest.approx(expected)


# --- the command


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    """Two zoos whose networks have a name, too: their size; and of one network it is missing."""
    found = []
    for name in ("a", "b"):
        zoo = make_small_zoo(tmp_path_factory.mktemp(name))
        accuracy = enumerate(zoo.numbers("test_accuracy"))
        sizes = [None if row < 2 else "large" if x > 0.7 else "small" for row, x in accuracy]
        zoo.__dict__["properties"] = zoo.properties.append_column("size", pyarrow.array(sizes))
        found.append(zoo)
    return {str(zoo.path): zoo for zoo in found}


def run_predict(zoos, tmp_path, monkeypatch, **options):
    monkeypatch.setattr(predict.Zoo, "open", lambda path: zoos[str(path)])
    first, second = zoos
    options = {"targets": ("test_accuracy", "size"), "ood": (second,)} | options
    predict.run(predict.Config(zoo=first, out=str(tmp_path), **options))
    return json.loads((tmp_path / "results.json").read_text())


def test_names_and_other_zoos_are_in_the_table(zoos, tmp_path, monkeypatch, capsys):
    results = run_predict(zoos, tmp_path, monkeypatch, features=("statistics",), beside="sane-mnist")
    number, moved, name, moved_name = results["results"]
    _, second = zoos
    assert number["zoo"] is None and moved["zoo"] == second and number["published"] == 0.987
    # the other zoo is made of the same networks: so scores are the same
    assert moved["test_r2"] == pytest.approx(number["test_r2"])
    assert moved["r2_interval"] == pytest.approx(number["r2_interval"])
    assert number["test_r2"] > 0.9 and number["r2_interval"][0] < number["test_r2"] < number["r2_interval"][1]
    assert number["tau_interval"][0] < number["test_tau"] < number["tau_interval"][1] and number["at_chance"] == 0
    assert name["test_accuracy"] == moved_name["test_accuracy"] > 0.8 > name["most_frequent"]
    assert results["left_out"] == {"test_accuracy": 0, "size": 2}
    printed = capsys.readouterr().out
    assert "published scores: sane-mnist, arXiv 2406.09997, table 1" in printed and f"on {second}" in printed
    assert "note: size is missing or infinite in 2 states" in printed


def test_published_probes_of_other_zoos_have_the_smallest_penalty(zoos, tmp_path, monkeypatch):
    results = run_predict(zoos, tmp_path, monkeypatch, features=("statistics",), published=True)["results"]
    zoo, other = zoos.values()
    places = {"train": zoo, "val": zoo, "test": other}
    features = {
        split: layer_statistics(one.rows(one.split(split)), one.layout.with_tokens(None), padded=True)
        for split, one in places.items()
    }
    accuracy = {split: torch.from_numpy(zoo.numbers("test_accuracy"))[zoo.split(split)][:, None] for split in features}
    (fitted,) = ridge.fit_probes(features, accuracy, published=True, penalties=(1e-5,))
    assert results[1]["penalty"] == 1e-5 and results[1]["test_r2"] == pytest.approx(fitted.test_r2)


def test_every_set_of_features_and_every_probe_runs(zoos, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(transforms, "COMPONENTS", (5, 3))
    kinds = ("statistics", "weights", "chunk", "spectra", "kpca")
    results = run_predict(zoos, tmp_path, monkeypatch, features=kinds, probe=("linear", "trees"), chunk=20)["results"]
    found = {line["features"] for line in results}
    components = {f"kpca {kernel} {count}" for kernel in transforms.KERNELS for count in (5, 3)}
    assert found == set(kinds) - {"kpca"} | components
    assert len(results) == len(found) * 2 * 4
    assert all(line["test_r2"] is not None for line in results if "test_r2" in line)
    polar = run_predict(zoos, tmp_path, monkeypatch, features=("weights",), transform="polar")["results"]
    assert {line["features"] for line in polar} == {"weights polar"}


def test_kernels_that_are_not_positive_are_left_out(zoos, capsys):
    pytest.importorskip("sklearn")
    zoo = next(iter(zoos.values()))
    found = extract.make_extractors(predict.Config(zoo="", out="", features=("kpca",)), zoo)
    assert "kpca rbf 50" in found and "kpca sigmoid 50" not in found
    assert "note: kpca sigmoid is left out: There are significant negative eigenvalues" in capsys.readouterr().out


def test_networks_at_chance_are_counted_and_left_out_of_tau():
    target = torch.tensor([0.1, 0.105, 0.5, 0.6, 0.7, 0.8], dtype=torch.float64)
    prediction = torch.tensor([0.9, 0.8, 0.5, 0.6, 0.7, 0.8], dtype=torch.float64)
    found = scores.score_numbers(prediction, target, list("abcdef"), chance=0.1)
    assert found["at_chance"] == pytest.approx(2 / 6) and found["tau_without"] == 1 and found["test_tau"] < 0.5


def test_chunk_is_a_slice_of_the_weights(zoos, tmp_path):
    zoo = next(iter(zoos.values()))
    config = predict.Config(zoo="", out="", features=("chunk",), chunk=7, chunk_start=3)
    (chunk,) = (make(zoo) for make in extract.make_extractors(config, zoo).values())
    assert torch.equal(chunk, zoo.rows(range(len(zoo)))[:, 3:10])
    with pytest.raises(ValueError, match=r"predict: chunk_start must be in \[0, \d+] of \d+ weights, got 1000"):
        extract.make_extractors(predict.Config(zoo="", out="", features=("chunk",), chunk_start=1000), zoo)


def test_what_does_not_go_together_is_refused(zoos):
    with pytest.raises(ValueError, match="predict: ood must be given with model instead of embeddings"):
        predict.Config(zoo="", out="", ood=("b",), embeddings="e.safetensors")
    with pytest.raises(ValueError, match="predict: probe must name at least one, got none"):
        predict.Config(zoo="", out="", probe=())
    with pytest.raises(ValueError, match="predict: chunk and leading must be at least 1, got 0 and None"):
        predict.Config(zoo="", out="", chunk=0)
    zoo = next(iter(zoos.values()))
    with pytest.raises(ValueError, match="property 'model' must be a number or a name to be predicted, got string"):
        targets_module.read_targets(zoo, ("model",))


def test_published_scores_are_those_of_the_zoo():
    recipe = json.loads(json.dumps(PRESETS["svhn-s-seed"])) | {"preset": "svhn-s-seed", "networks": 50}
    made = Namespace(provenance={"config": recipe})
    assert published.find_published(made, None).score("embedding", "test_accuracy") == 0.991
    decayed = Namespace(provenance={"config": recipe | {"weight_decays": [0.01]}})
    assert published.find_published(decayed, None) is None  # another recipe than the published one
    assert published.find_published(Namespace(provenance={}), None) is None
    found = published.find_published(made, "unterthiner-cifar10")
    assert found.score("weights", "optimizer") == pytest.approx(0.74) and found.score("spectra", "optimizer") is None
