import json
from importlib import import_module

import numpy
import pytest
import torch
from damages import damaged
from safetensors.torch import save_file
from scipy.stats import kendalltau
from small_zoo import make_small_zoo

import fastws
from fastws.downstream import encoder as encoders
from fastws.downstream import predict
from fastws.downstream.probes import extract, intervals, ridge
from fastws.downstream.probes import features as probe_features
from fastws.downstream.probes import targets as targets_module
from fastws.files.lock import one_writer
from fastws.nn.sane import SANE, SANEConfig

embed = import_module("fastws.downstream.embed")  # the package has a function of that name
CPU = torch.device("cpu")
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make_small_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def encoder(zoo):
    torch.manual_seed(0)
    layout = zoo.layout.with_tokens(5)
    positions = tuple(int(count) + 1 for count in layout.positions.amax(0))
    sizes = {"window": 8, "width": 16, "heads": 2, "depth": 1, "latent": 6}
    model = SANE(SANEConfig(token_size=5, max_positions=positions, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # attention that matters
    layers = len(layout.table)
    return encoders.Encoder(model, layout, torch.rand(layers) + 0.5, torch.randn(layers))


# --- probes


def regress(features, target, penalty, published):
    """An independent statement: normal equations with a column of ones, by numpy; only as published it is penalised."""
    x, y = {}, {}
    for split in SPLITS:
        known = ~numpy.isnan(target[split])
        x[split] = numpy.concatenate([features[split], numpy.ones((len(features[split]), 1))], 1)[known]
        y[split] = target[split][known]
    penalised = numpy.ones(x["train"].shape[1])
    penalised[-1] = published
    matrix = x["train"].T @ x["train"] + penalty * numpy.diag(penalised)
    weights = numpy.linalg.solve(matrix, x["train"].T @ y["train"])
    predicted = {split: x[split] @ weights for split in SPLITS}
    score = {split: 1 - ((predicted[split] - y[split]) ** 2).mean() / y[split].var() for split in SPLITS}
    return score, kendalltau(y["test"], predicted["test"]).statistic


def make_problem(width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(width)
    counts = dict(zip(SPLITS, (40, 25, 30), strict=True))
    features = {split: torch.randn(n, width, generator=generator, dtype=dtype) + 2 for split, n in counts.items()}
    mixing = torch.randn(width, 3, generator=generator, dtype=dtype) / width**0.5
    targets = {}
    for split, x in features.items():
        noise = torch.randn(len(x), 3, generator=generator, dtype=dtype)
        targets[split] = x @ mixing + noise * torch.tensor([0.1, 1.0, 5.0], dtype=dtype)
    targets["train"][3, 1] = targets["test"][7, 1] = torch.nan
    return features, targets


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("width", [5, 39, 100])  # fewer, as many, more features than networks, with the ones
def test_probes_are_those_of_numpy(width, published):
    features, targets = make_problem(width)
    for number, probe in enumerate(ridge.fit_probes(features, targets, standardize=False, published=published)):
        plain = {split: x.numpy() for split, x in features.items()}
        target = {split: y[:, number].numpy() for split, y in targets.items()}
        runs = {penalty: regress(plain, target, penalty, published) for penalty in ridge.PENALTIES}
        penalty = max(ridge.PENALTIES, key=lambda penalty: runs[penalty][0]["val"])
        score, tau = runs[penalty]
        assert probe.penalty == penalty and probe.standardized is False
        assert probe.train_r2 == pytest.approx(score["train"], rel=0, abs=1e-8)
        assert probe.val_r2 == pytest.approx(score["val"], rel=0, abs=1e-8)
        assert probe.test_r2 == pytest.approx(score["test"], rel=0, abs=1e-8)
        assert probe.test_tau == pytest.approx(tau, abs=1e-12)


@pytest.mark.parametrize("width", [5, 100])
def test_intercept_is_not_penalised(width):
    """No penalty keeps predictions from the mean: that of the training split is reached, however far it is from 0."""
    features, targets = make_problem(width)
    far = {split: y + 1e3 for split, y in targets.items()}
    for ours, theirs in zip(ridge.fit_probes(features, targets), ridge.fit_probes(features, far), strict=True):
        assert ours.scores() == pytest.approx(theirs.scores(), rel=1e-6)
        assert ours.train_r2 > -1e-9  # the mean alone has 0
    moved = ridge.fit_probes(features, far, published=True)[2]
    assert moved.scores() != pytest.approx(ridge.fit_probes(features, targets, published=True)[2].scores(), rel=1e-3)


def test_scaling_is_chosen_on_the_validation_split():
    features, targets = make_problem(30)
    units = {split: x * torch.logspace(-4, 4, 30) for split, x in features.items()}
    tried = [ridge.fit_probes(units, targets, standardize=way) for way in (False, True)]
    for chosen, *ways in zip(ridge.fit_probes(units, targets), *tried, strict=True):
        best = max(ways, key=lambda probe: probe.val_r2)
        assert chosen.scores() == best.scores()
    assert any(probe.standardized for probe in ridge.fit_probes(units, targets))
    known = {split: y[~y.isnan().any(1)] for split, y in targets.items()}
    rows = {split: x[~targets[split].isnan().any(1)] for split, x in units.items()}
    alone = ridge.fit_probes(rows | {"val": rows["val"][:0]}, known | {"val": known["val"][:0]})
    assert all(probe.train_r2 > 0.9 for probe in alone[:1])  # without validation rows the training split chooses


def test_probe_finds_what_is_there():
    features, targets = make_problem(5)
    clear, _, hidden = probes = ridge.fit_probes(features, targets)
    for probe, y in zip(probes, targets["test"].T, strict=True):  # the predictions are those that were scored
        y = y[~y.isnan()]
        error = (probe.test_prediction - y).square().mean() / y.var(correction=0)
        assert 1 - error.item() == pytest.approx(probe.test_r2)
    assert clear.test_r2 > 0.9 and clear.test_tau > 0.7 and hidden.test_r2 < 0.5


def test_standardised_probes_ignore_units():
    features, targets = make_problem(5)
    other = {split: x * torch.tensor([1e-6, 1, 1e4, 3, 1e2]) - 7 for split, x in features.items()}
    ours, theirs = (ridge.fit_probes(x, targets, standardize=True) for x in (features, other))
    for a, b in zip(ours, theirs, strict=True):
        assert a.scores() == pytest.approx(b.scores(), rel=1e-6)
    unscaled = ridge.fit_probes(other, targets, standardize=False)
    assert unscaled[0].scores() != pytest.approx(theirs[0].scores(), rel=1e-6)


def test_constant_targets_have_no_score():
    features, targets = make_problem(5)
    targets = {split: torch.ones_like(y) for split, y in targets.items()}
    probe = ridge.fit_probes(features, targets)[0]
    assert numpy.isnan([probe.train_r2, probe.val_r2, probe.test_r2, probe.test_tau]).all()


def test_interval_is_that_of_resampled_networks():
    random = numpy.random.default_rng(0)
    models = [f"m{number % 12}" for number in range(60)]
    target = torch.from_numpy(random.normal(size=60))
    prediction = target + 0.4 * torch.from_numpy(random.normal(size=60))
    low, high = intervals.r2_interval(prediction, target, models, seed=3)
    scores = []
    for _ in range(1500):
        drawn = random.integers(12, size=12)
        rows = torch.tensor([row for m in drawn for row in range(60) if models[row] == f"m{m}"])
        y = target[rows]
        scores.append(float(1 - (y - prediction[rows]).square().mean() / y.var(correction=0)))
    assert [low, high] == pytest.approx(numpy.quantile(scores, [0.025, 0.975]).tolist(), abs=0.03)
    assert intervals.r2_interval(target, target, models, 0) == pytest.approx([1, 1])
    assert intervals.r2_interval(target, torch.ones(60), models, 0) is None


# --- features


def make_features(config, zoo):
    return {name: features(zoo) for name, features in extract.make_extractors(config, zoo).items()}


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_are_those_of_numpy(zoo, padded):
    layout = zoo.layout.with_tokens(5)
    tokens = layout.tokenize(zoo.weights.double()).values
    features = []
    for layer in range(len(layout.table)):
        here = layout.positions[:, 1] == layer
        mask = torch.ones_like(layout.mask) if padded else layout.mask
        entries = tokens[:, here][:, mask[here]].numpy()
        quantiles = numpy.percentile(entries, [1, 25, 50, 75, 99], axis=1)
        features += [entries.mean(1), entries.var(1), *quantiles]
    actual = probe_features.layer_statistics(zoo.weights, layout, padded=padded)
    assert actual.shape == (len(zoo), 7 * len(layout.table))
    torch.testing.assert_close(actual, torch.from_numpy(numpy.stack(features, 1)), rtol=1e-10, atol=1e-12)


def test_statistics_of_weights_and_biases_apart_are_those_of_each_tensor(zoo):
    actual = probe_features.layer_statistics(zoo.weights, zoo.layout, apart=True)
    weights = zoo.layout.unflatten(zoo.weights[0])
    expected = [fastws.layer_statistics(x.reshape(1, -1), torch.tensor([[0, x.numel()]])) for x in weights.values()]
    torch.testing.assert_close(actual[0], torch.cat(expected).flatten(), rtol=1e-10, atol=1e-12)


# --- embeddings


@pytest.mark.parametrize("window, halo", [(8, 0), (8, 2), (8, 3), (9, 4), (1, 0)])
def test_chunks_cover_every_sequence(window, halo):
    for num_tokens in range(1, 60):
        starts, width, place = encoders.chunk(num_tokens, window, halo)
        assert width == min(window, num_tokens) and starts.min() >= 0 and starts.max() + width <= num_tokens
        seen = (starts[:, None] + torch.arange(width)).flatten()[place]
        assert torch.equal(seen, torch.arange(num_tokens))
        inside = place % width  # tokens before, and width - 1 - inside behind
        assert (torch.minimum(inside, width - 1 - inside) >= torch.minimum(
            torch.full_like(seen, halo), torch.minimum(seen, num_tokens - 1 - seen))).all()  # fmt: skip


def test_published_chunks():
    """Content of 128 tokens with 64 on both sides; the first begins, the last ends with the sequence."""
    starts, _, place = encoders.chunk(128 * 3 + 72, 256, 64)
    assert starts.tolist() == [0, 64, 192, 200] and place[[0, 127, 128, 383, 384]].tolist() == [0, 127, 320, 703, 952]


@pytest.mark.parametrize("halo", [None, 0, 3])
def test_encode_is_the_model_on_every_chunk(zoo, encoder, halo):
    weights, layout = zoo.weights[:3], encoder.layout
    z = encoders.encode(encoder, weights, halo=halo, batch_size=2)
    values = layout.tokenize(weights).values
    layer = layout.positions[:, 1].long()
    values = (values * encoder.scale[layer, None] + encoder.shift[layer, None]) * layout.mask
    count = layout.num_tokens
    content = count if halo is None else 8 - 2 * halo
    expected = []
    for first in range(0, count, content):
        begin = 0 if halo is None else min(max(first - halo, 0), count - 8)
        window = slice(begin, count if halo is None else begin + 8)
        part = encoder.model.encode(values[:, window], layout.positions[window])
        expected.append(part[:, first - begin : min(first + content, count) - begin])
    torch.testing.assert_close(z, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


def test_embedding_is_the_mean_of_tokens(zoo, encoder):
    embeddings = embed.embed(encoder, zoo, halo=2, batch_size=7)
    expected = encoders.encode(encoder, zoo.weights, halo=2).mean(1)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)
    one_pass = embed.embed(encoder, zoo, halo=None)
    assert embeddings.std(0).min() > 1e-3 and (embeddings - one_pass).abs().max() > 1e-3


def test_embedding_of_layers_is_the_mean_of_each(zoo, encoder):
    z = encoders.encode(encoder, zoo.rows(range(5)), halo=None)
    layer = encoder.layout.positions[:, 1]
    expected = torch.cat([z[:, layer == number].mean(1) for number in range(len(encoder.layout.table))], 1)
    torch.testing.assert_close(embed.embed(encoder, zoo, halo=None, pool="layers")[:5], expected)


def test_distances_by_hand():
    features = torch.tensor([[0.0, 0], [3, 4], [0, 1]])  # 5, 1 and sqrt(18) apart
    moved = torch.tensor([[0.0, 0], [0, 2], [3, 4], [3, 4], [0, 1], [0, 1]])  # one copy moves, by 2
    found = embed.compare_distances(features, moved)
    others = (5 + 1 + 18**0.5) / 3
    assert found["permuted"] == pytest.approx(2 / 6) and found["other"] == pytest.approx(others)
    assert found["ratio"] == pytest.approx(2 / 6 / others)
    assert found["nearer"] == pytest.approx(11 / 12) and found["nearer_than_nearest"] == pytest.approx(5 / 6)


def test_embeddings_survive_a_file(tmp_path, encoder):
    embeddings = torch.randn(7, 6)
    embed.save_embeddings(tmp_path / "new" / "e.safetensors", embeddings, encoder.layout)
    assert torch.equal(embed.load_embeddings(tmp_path / "new" / "e.safetensors", 7, encoder.layout), embeddings)


# --- the commands


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, encoder):
    """What a run of the trainer leaves."""
    std = 1 / encoder.scale
    sizes = vars(encoder.model.config)
    extra = {"sane": sizes, "layout": encoder.layout.to_dict(), "mean": -encoder.shift * std, "std": std}
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    torch.save({"model": encoder.model.state_dict(), "extra": extra}, path)
    return path


def test_encoder_is_loaded(checkpoint, encoder, zoo):
    loaded = encoders.load_encoder(checkpoint)
    ours, expected = (encoders.encode(e, zoo.weights[:2], halo=2) for e in (loaded, encoder))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_commands(checkpoint, zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed.Zoo, "open", lambda path: zoo)
    out = tmp_path / "embeddings.safetensors"
    embed.run(embed.Config(model=str(checkpoint), zoo="small", out=str(out), device="cpu"))
    predict.run(predict.Config(zoo="small", out=str(tmp_path), embeddings=str(out)))
    predict.run(
        predict.Config(
            zoo="small", out=str(tmp_path / "b"), model=str(checkpoint), device="cpu", features=("statistics",)
        )
    )
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    again = json.loads((tmp_path / "b/results.json").read_text())
    for name, value in results["results"][0].items():
        other = again["results"][0][name]
        assert value == (other if isinstance(value, str) else pytest.approx(other))
    assert {row["features"] for row in results["results"]} == {"embedding", "statistics", "weights"}
    scores = {(row["features"], row["target"]): row["test_r2"] for row in results["results"]}
    assert f"protocol: {predict.PROTOCOL}" in printed and results["protocol"] == predict.PROTOCOL
    assert scores["statistics", "test_accuracy"] > 0.9 and scores["statistics", "generalisation_gap"] is None
    assert f"{scores['statistics', 'test_accuracy']:.4f}" in printed and f"results: {tmp_path}/results.json" in printed


def test_targets_that_are_not_finite_are_left_out_and_counted(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict.Zoo, "open", lambda path: zoo)
    train, accuracy = zoo.split("train"), targets_module.read_target(zoo, "test_accuracy")
    spoilt = accuracy.clone()
    spoilt[train[0]], spoilt[train[1]], spoilt[zoo.split("test")[0]] = torch.inf, -torch.inf, torch.nan
    known, scores = spoilt.isfinite(), []
    for target in (spoilt, accuracy.where(known, torch.nan)):
        monkeypatch.setattr(targets_module, "read_target", lambda zoo, name, target=target: target)
        predict.run(
            predict.Config(zoo="small", out=str(tmp_path), targets=("test_accuracy",), features=("statistics",))
        )
        assert "note: test_accuracy is missing or infinite in 3 states, which are left out" in capsys.readouterr().out
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["left_out"] == {"test_accuracy": 3}
        scores.append(results["results"])
    assert scores[0] == scores[1] and scores[0][0]["test_r2"] > 0.9


def test_embeddings_have_one_writer(checkpoint, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(embed.Zoo, "open", lambda path: zoo)
    out = tmp_path / "new/embeddings.safetensors"
    config = embed.Config(model=str(checkpoint), zoo="small", out=str(out), device="cpu")
    with one_writer(out), pytest.raises(BlockingIOError, match="one process at a time may write it"):
        embed.run(config)
    assert not out.parent.exists()
    embed.run(config)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_published_protocol(checkpoint, encoder, zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict.Zoo, "open", lambda path: zoo)
    config = predict.Config(zoo="small", out=str(tmp_path), model=str(checkpoint), device="cpu", published=True)
    predict.run(config)
    assert f"protocol: {predict.PUBLISHED}\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["protocol"] == predict.PUBLISHED and not any(row["standardized"] for row in results["results"])
    features = make_features(config, zoo)
    longest = zoo.layout.with_tokens(None)
    tokens = longest.tokenize(zoo.weights.double()).values
    entries = tokens[:, longest.positions[:, 1] == 0].flatten(1)  # with their padding
    torch.testing.assert_close(features["statistics"][:, 0], entries.mean(1))
    torch.testing.assert_close(features["embedding"], encoders.encode(encoder, zoo.weights, halo=None).mean(1))
    by_split = {split: features["statistics"][zoo.split(split)] for split in SPLITS}
    targets = {split: targets_module.read_target(zoo, "test_accuracy")[zoo.split(split)][:, None] for split in SPLITS}
    (probe,) = ridge.fit_probes(by_split, targets, published=True)
    (row,) = [row for row in results["results"] if (row["features"], row["target"]) == ("statistics", "test_accuracy")]
    assert row["test_r2"] == pytest.approx(probe.test_r2)


# --- bad input


@pytest.mark.parametrize("halo", [-1, 4])
def test_halo_must_leave_room(encoder, zoo, halo):
    with pytest.raises(ValueError, match=rf"embed: halo must be in \[0, 3\] for a window of 8 tokens, got {halo}"):
        embed.embed(encoder, zoo, halo=halo)


def test_model_must_be_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="embed: model must be the checkpoint.pt of fastws train sane, got no"):
        encoders.load_encoder(tmp_path / "none.pt")
    torch.save({"extra": {}, "padding": torch.zeros(20_000)}, tmp_path / "other.pt")
    for size in (100, 4300, 60_000):
        (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:size])
        with pytest.raises(ValueError, match="embed: model must be the checkpoint.pt of fastws train sane, got"):
            encoders.load_encoder(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="embed: model must be the checkpoint.pt of fastws train sane"):
        encoders.load_encoder(tmp_path / "other.pt")


def test_checkpoints_from_strangers_are_refused_or_harmless(checkpoint, zoo, tmp_path):
    whole, refused = torch.load(checkpoint, weights_only=True), 0
    plain = {"sane": whole["extra"]["sane"], "layout": json.loads(json.dumps(whole["extra"]["layout"]))}
    statistics = {"mean": whole["extra"]["mean"], "std": whole["extra"]["std"]}
    strange = [whole["extra"] | broken for _, _, broken in damaged(plain)]
    strange += [whole["extra"] | {name: x} for name in statistics for x in (torch.zeros(3), -torch.ones(6), None)]
    for extra in strange:
        torch.save(whole | {"extra": extra}, tmp_path / "strange.pt")
        try:
            embed.embed(encoders.load_encoder(tmp_path / "strange.pt"), zoo, halo=None)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 300


def test_targets_must_be_properties(zoo):
    with pytest.raises(ValueError, match=r"predict: targets must be properties of the zoo \(model, epoch,.*got 'size'"):
        targets_module.read_target(zoo, "size")
    with pytest.raises(ValueError, match="property 'model' must be a number, got string"):
        targets_module.read_target(zoo, "model")


def test_embeddings_must_fit_the_zoo(zoo, tmp_path):
    save_file({"embeddings": torch.zeros(3, 2)}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"must hold embeddings \[4, E\], one per row of the zoo, got \[3, 2\]"):
        embed.load_embeddings(tmp_path / "e.safetensors", 4, zoo.layout)


def test_embeddings_must_be_of_the_architecture_and_finite(zoo, tmp_path):
    path, other = tmp_path / "e.safetensors", fastws.Layout.from_checkpoint(torch.nn.Linear(2, 2))
    embed.save_embeddings(path, torch.zeros(4, 2), other)
    with pytest.raises(ValueError, match=f"of the architecture .* of the zoo, got those of {other.fingerprint}"):
        embed.load_embeddings(path, 4, zoo.layout)
    embed.save_embeddings(path, torch.tensor([[0.0], [torch.nan]]), zoo.layout)
    with pytest.raises(ValueError, match="must hold finite embeddings, got others first in row 1"):
        embed.load_embeddings(path, 2, zoo.layout)


def test_embeddings_must_be_a_file_of_tensors(zoo, tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty must be a file that fastws embed wrote, got"):
        embed.load_embeddings(tmp_path / "empty", 4, zoo.layout)


def test_configs_are_checked():
    with pytest.raises(ValueError, match="embed: batch_size must be at least 1, got 0"):
        embed.Config(model="", zoo="", out="", batch_size=0)
    with pytest.raises(ValueError, match="predict: targets must name at least one property, got none"):
        predict.Config(zoo="", out="", targets=())
    with pytest.raises(ValueError, match="predict: padded must be left out where biases are apart, got both"):
        predict.Config(zoo="", out="", padded=8, apart=True)
    with pytest.raises(ValueError, match="predict: published must be given without apart and standardize, got both"):
        predict.Config(zoo="", out="", published=True, standardize=True)


def test_features_must_be_asked_for(zoo):
    with pytest.raises(ValueError, match="predict: features must be asked for, got none"):
        make_features(predict.Config(zoo="small", out="", features=()), zoo)
