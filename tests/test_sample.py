"""Samplers, the command that writes what they draw as a zoo, and the accuracy of such zoos."""

from functools import partial

import numpy
import pytest
import torch

import fastws
from fastws.downstream import evaluate, optional, populations
from fastws.downstream.representation import load
from fastws.downstream.sampling import flow, generators, sample
from fastws.train.ae import train as ae
from fastws.train.sane import train as sane
from fastws.zoo import Zoo, make
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.alignment import ALIGNMENT
from fastws.zoo.making.make import Config as MakeConfig

pytestmark = pytest.mark.usefixtures("in_one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("zoo"))
    torch.set_num_threads(1)
    make(
        MakeConfig(
            out=path,
            networks=14,
            epochs=2,
            limit=200,
            validation=50,
            activations=("tanh", "relu"),
            optimizers=("adam",),
            lrs=(0.01,),
            threads=1,
        )  # fmt: skip
    )
    return Zoo.open(path)


@pytest.fixture(scope="module")
def models(zoo, tmp_path_factory):
    """Checkpoints of both trainers, which hardly learned anything."""
    out = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    ae.train(ae.Config(zoo=str(zoo.path), out=str(out / "ae"), steps=3, batch_size=8, device="cpu"), zoo, CPU)
    options = {"size": "tiny", "steps": 2, "batch_size": 4, "window": 8, "device": "cpu"}
    sane.train(sane.Config(zoo=str(zoo.path), out=str(out / "sane"), **options), zoo, CPU)
    return {name: str(out / name / "checkpoint.pt") for name in ("ae", "sane")}


def config(zoo, out, **options):
    return sample.Config(zoo=str(zoo.path), out=str(out), count=6, device="cpu", **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- samplers


@pytest.mark.parametrize("width", [1, 4, 12])
def test_reference_kde_is_the_released_loop(width):
    """sklearn's KernelDensity, part by part, with the seed that the released code gives it every time."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    anchors = torch.randn(50, 12, dtype=torch.float64)
    parts = []
    for part in anchors.numpy().reshape(50, -1, width).transpose(1, 0, 2):
        density = neighbors.KernelDensity(kernel="gaussian", bandwidth=0.2).fit(part)
        parts.append(density.sample(20, random_state=42))
    expected = numpy.concatenate(parts, 1)
    drawn = generators.kde_reference(anchors, 20, 0.2, width=width)
    numpy.testing.assert_allclose(drawn.points.numpy(), expected, rtol=0, atol=1e-15)
    single = generators.kde_reference(anchors.float(), 20, 0.2, width=width)
    numpy.testing.assert_allclose(single.points.numpy(), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("width", [1, 8, 64])
def test_independent_kde_mixes_anchors(width):
    """Every dimension has the spread of the anchors; parts come from anchors of their own, and each part from one."""
    anchors = torch.randn(300, 64, dtype=torch.float64)
    drawn = generators.kde(anchors, 2000, 0.1, generator(), width=width)
    points = drawn.points
    torch.testing.assert_close(points.std(0), (anchors.var(0) + 0.01).sqrt(), rtol=0.1, atol=0)
    torch.testing.assert_close(points.mean(0), anchors.mean(0), rtol=0, atol=0.15)
    exact = generators.kde(anchors, 100, 0.0, generator(), width=width).points.view(100, -1, width)
    known = anchors.view(300, -1, width)
    matches = (exact[:, None] == known).all(-1)  # [100, 300, parts]
    assert (matches.sum(1) == 1).all()
    chosen = matches.int().argmax(1)
    if width == 64:
        assert torch.equal(chosen, generators.kde(anchors, 100, 0.0, generator(), width=width).anchors)
    else:
        assert drawn.anchors.eq(-1).all() and (chosen[:, 0] == chosen[:, 1]).double().mean() < 0.05
    apart = torch.cdist(anchors, anchors).fill_diagonal_(torch.inf).min(1).values.median()
    novel = torch.cdist(points, anchors).min(1).values.median() / apart
    assert 0.9 < novel < 1.1 if width < 64 else novel < 0.2


def test_prior_knows_nothing_of_anchors():
    points = generators.prior(torch.full((3, 50), 7.0), 400, 10.0, generator()).points
    assert abs(points.mean()) < 0.5 and 9.5 < points.std() < 10.5


def test_averages_and_noise_say_what_they_are_made_of():
    anchors = torch.randn(9, 5)
    points, chosen = generators.average(anchors, 4, 3, generator())
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    torch.testing.assert_close(points, anchors[chosen].mean(1))
    assert torch.allclose(generators.average(anchors, 2, 99, generator()).points, anchors.mean(0))
    scale = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    points, chosen = generators.noisy(anchors, 4000, scale, generator())
    torch.testing.assert_close((points - anchors[chosen[:, 0]]).std(0), scale, rtol=0.05, atol=1e-6)


def test_components_restore_what_they_span():
    points = torch.randn(10, 30, dtype=torch.float64)
    space = generators.Components.of(points, 0)
    assert len(space.scale) == 9
    torch.testing.assert_close(space.restore(space.project(points)), points)
    torch.testing.assert_close(space.project(points).std(0), torch.ones(9, dtype=torch.float64))
    drawn = generators.gaussian(space.leading(4), 5000, 0.5, generator()).points
    z = space.project(drawn)
    torch.testing.assert_close(z[:, :4].std(0), torch.full((4,), 0.5, dtype=torch.float64), rtol=0.05, atol=0)
    assert z[:, 4:].abs().max() < 1e-9


def test_trained_flow_draws_from_the_distribution():
    points = torch.randn(2000, 2) @ torch.tensor([[2.0, 0.5], [0.0, 1.0]]) + 3
    held_out = torch.randn(100, 2) @ torch.tensor([[2.0, 0.5], [0.0, 1.0]]) + 3
    trained = flow.train_flow(generators.Components.of(points, 0), points, held_out, generator(), steps=250)
    drawn = flow.follow(trained._replace(integration_steps=8), 2000, 1.0, generator()).points
    torch.testing.assert_close(drawn.mean(0), points.mean(0), rtol=0, atol=0.25)
    torch.testing.assert_close(drawn.T.cov(), points.T.cov(), rtol=0.25, atol=0.25)


def test_flow_of_a_normal_distribution_is_a_normal_distribution():
    points, held_out = torch.randn(8000, 2), torch.randn(100, 2)
    trained = flow.train_flow(generators.Components.of(points, 0), points, held_out, generator(), steps=250)
    drawn = flow.follow(trained._replace(integration_steps=8), 4000, 1.0, generator()).points
    torch.testing.assert_close(drawn.mean(0), torch.zeros(2), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std(0), torch.ones(2), rtol=0, atol=0.05)


@pytest.mark.parametrize("source", [1.0, 0.01])
def test_flow_of_the_closed_form_ends_on_training_points(source):
    """The minimiser of the loss over few points leads back to them: v(z, t) = (sum_i p_i z_i - z) / (1 - t)."""
    anchors = torch.randn(20, 2, dtype=torch.float64)
    space = generators.Components.of(anchors, 0)
    codes = space.project(anchors)

    class Optimal(torch.nn.Module):
        def forward(self, z, t):
            rest = (1 - t).clamp(min=1e-6)[:, None]
            weight = (-torch.cdist(z, t[:1] * codes).square() / (2 * rest**2 * source**2)).softmax(1)
            return (weight @ codes - z) / rest

    trained = flow.Flow(space, Optimal(), 0, 0, 0.0, source, 400)
    drawn = flow.follow(trained, 50, 1.0, generator()).points
    assert torch.cdist(drawn, anchors).min(1).values.max() < 1e-2
    assert len(torch.cdist(drawn, anchors).argmin(1).unique()) > 5


def test_deepweightflow_is_what_was_released():
    """Its velocity written out, its loss, and 99 steps of integration where 100 are said."""
    velocity, calls = flow.ReleasedVelocity(6, hidden=8).eval(), []
    with torch.no_grad():
        for parameter in velocity.parameters():
            parameter.normal_(std=0.5)
    state, gelu, linear = velocity.state_dict(), torch.nn.functional.gelu, torch.nn.functional.linear

    def plain(x, t):
        layer = lambda name, x: linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
        x = torch.cat([x, layer("time.2", gelu(layer("time.0", t[:, None])))], 1)
        for dense, norm in (("net.0", "net.1"), ("net.4", "net.5"), ("net.8", "net.9")):
            x = layer(dense, x)
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
            x = gelu(x * state[f"{norm}.weight"] + state[f"{norm}.bias"])
        return layer("net.11", x)

    x0, x1, jitter, t = *torch.randn(3, 5, 6), torch.rand(5)
    torch.testing.assert_close(velocity(x0, t), plain(x0, t), rtol=1e-5, atol=1e-6)
    path = (1 - t[:, None]) * x0 + t[:, None] * x1 + jitter
    expected = (plain(path, t) - (x1 - x0)).square().mean()
    torch.testing.assert_close(flow.flow_loss(velocity, x0, x1, t, jitter), expected)
    trained = flow.train_deepweightflow(torch.randn(10, 12), generator(), steps=30)
    assert trained.space.axes.shape == (9, 12) and trained.source == 0.01 and 0 < trained.kept <= 30
    counted = torch.nn.Module()
    counted.forward = lambda z, t: calls.append(t[0].item()) or torch.zeros_like(z)
    flow.follow(trained._replace(velocity=counted), 2, 1.0, generator())
    assert len(calls) == 4 * 99 and max(calls) == pytest.approx(1)


def test_gan_learns_where_points_are():
    points = 5 + 0.5 * torch.randn(500, 3)
    drawn = generators.gan(points, 500, generator(), steps=400).points
    torch.testing.assert_close(drawn.mean(0), points.mean(0), rtol=0, atol=0.3)


# --- samples are zoos


@pytest.mark.parametrize("method", ["direct", "uniform", "prior", "neighbour", "kde", "noise", "average", "pca"])
@pytest.mark.parametrize("model", [None, "ae", "sane"])
def test_every_method_makes_a_zoo(zoo, models, tmp_path, method, model):
    made = sample.sample(config(zoo, tmp_path / "a", method=method, model=models.get(model), epochs=(1, 2)))
    assert len(made) == 6 and made.layout == zoo.layout and made.dropped == 0
    assert set(made.properties["method"].to_pylist()) == {method}
    assert len(set(made.properties["activation"].to_pylist())) == 1
    again = sample.sample(config(zoo, tmp_path / "b", method=method, model=models.get(model), epochs=(1, 2)))
    assert torch.equal(made.weights, again.weights)


def test_direct_samples_are_anchors_and_their_reconstructions(zoo, models, tmp_path):
    plain = sample.sample(config(zoo, tmp_path / "plain", method="direct"))
    activation = plain.properties["activation"][0].as_py()
    states = zoo.properties.select(["epoch", "activation"]).to_pylist()
    last = {"epoch": 2, "activation": activation}
    kept = [row for row in zoo.split("train").tolist() if states[row] == last]
    expected = zoo.rows([kept[n % len(kept)] for n in range(6)])
    assert torch.equal(plain.weights, expected)
    for name in ("ae", "sane"):
        made = sample.sample(config(zoo, tmp_path / name, method="direct", model=models[name]))
        representation = load(models[name])
        torch.testing.assert_close(made.weights, representation.decode(representation.encode(expected)))


def test_best_anchors_are_chosen_on_validation_images(zoo, tmp_path):
    options = {"method": "direct", "activation": "tanh", "best": 0.4, "epochs": (1, 2)}
    made = sample.sample(config(zoo, tmp_path / "best", **options))
    states = zoo.properties.to_pylist()
    known = {f"{state['model']}@{state['epoch']}": state["val_accuracy"] for state in states}
    chosen = [known[name] for name in made.properties["anchors"].to_pylist()]
    train = [states[row] for row in zoo.split("train").tolist()]
    candidates = [state["val_accuracy"] for state in train if state["activation"] == "tanh" and state["epoch"] > 0]
    assert min(chosen) >= numpy.quantile(candidates, 0.6) - 1e-6
    assert "best 40% by val_accuracy (which overstates theirs by about " in made.provenance["sampled"]["from"]


def test_what_cannot_be_sampled_is_said_before_anything_is_written(zoo, models, tmp_path):
    def refused(message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            sample.sample(config(zoo, tmp_path / "out", **{"method": "kde"} | options))
        assert not (tmp_path / "out").exists()

    refused("train split with activation gelu, got none", activation="gelu")
    refused("train split of epochs 7 to 9, got none", epochs=(7, 9))
    refused("by must be a property of .* to take the best by", best=0.5, by="nothing")
    refused(
        "model must be a checkpoint of fastws train ae or train sane, got no file", FileNotFoundError, model="none.pt"
    )
    refused("run fastws zoo align", FileNotFoundError, aligned=True)
    with pytest.raises(ValueError, match=r"best must be in \(0, 1\], got 0"):
        config(zoo, tmp_path / "out", method="kde", best=0)
    made = sample.sample(config(zoo, tmp_path / "once", method="average"))
    with pytest.raises(ValueError, match="out must be a new folder"):
        sample.sample(config(zoo, made.path, method="average"))
    refused("density must be dimension or joint where networks have no codes of tokens", density="token")
    refused("density must be dimension or joint", density="token", model=models["ae"])
    refused("condition must be left out for .*, whose networks have no batch norm", condition=20)
    with pytest.raises(ValueError, match="candidates must be at least 6, the count, got 5"):
        config(zoo, tmp_path / "out", method="kde", candidates=5)
    with pytest.raises(ValueError, match="rounds must be 1 without candidates and for methods direct, uniform, prior"):
        config(zoo, tmp_path / "out", method="prior", candidates=8, rounds=2)
    junk = tmp_path / "junk.pt"
    torch.save({"extra": {"layers": [], "hidden": 3}, "model": {}}, junk)
    refused("got .*junk.pt: the checkpoint of another program", model=str(junk))
    torch.save({"extra": {"hyper_representation": 3, "layout": 3}}, junk)
    refused("model must be a checkpoint of fastws train ae or train sane, got .*junk.pt", model=str(junk))


def test_halo_is_what_a_sane_sees_beside(zoo, models, tmp_path):
    refused = partial(config, zoo, tmp_path / "made", method="direct")
    with pytest.raises(ValueError, match="representation: halo must be left out for an autoencoder of whole networks"):
        sample.sample(refused(model=models["ae"], halo=1))
    with pytest.raises(ValueError, match="sample: halo must be left out without a model, got 1"):
        refused(halo=1)
    with pytest.raises(ValueError, match=r"halo must be in \[0, .*\] for a window of .* tokens, got 99"):
        sample.sample(refused(model=models["sane"], halo=99))
    assert not (tmp_path / "made").exists()
    made = [
        sample.sample(config(zoo, tmp_path / f"made-{n}", method="direct", model=models["sane"], halo=n))
        for n in (0, 1)
    ]
    assert not torch.equal(made[0].weights, made[1].weights)


def test_neighbours_by_umap(monkeypatch):
    """Points between anchors of two clusters, in whose coordinates they are drawn; or a sentence."""
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="sample: umap-learn must be installed for manifold umap, got none; pip"):
        generators.neighbour(torch.randn(40, 6), 5, generator(), "umap")
    monkeypatch.undo()
    pytest.importorskip("umap")
    anchors = torch.randn(40, 6) + 20 * (torch.arange(40) % 2)[:, None]
    points = generators.neighbour(anchors, 50, generator(), "umap").points
    assert points.shape == (50, 6) and points.isfinite().all() and points.dtype == anchors.dtype
    assert points.min() > anchors.min() - 10 and points.max() < anchors.max() + 10


# --- candidates


@pytest.mark.parametrize("mode", ["independent", "reference"])
@pytest.mark.parametrize("density", ["dimension", "token", "joint"])
def test_densities_of_tokens(zoo, models, tmp_path, mode, density):
    options = {"method": "kde", "model": models["sane"], "mode": mode, "density": density}
    made = sample.sample(config(zoo, tmp_path / "made", **options))
    assert len(made) == 6 and made.provenance["sampled"]["bandwidth"] == generators.TOKEN_BANDWIDTH
    known = [bool(name) for name in made.properties["anchors"].to_pylist()]
    assert all(known) == (mode == "reference" or density == "joint") and any(known) == all(known)
    representation = load(models["sane"])
    anchors = sample.choose_anchors(sample.Choice(), zoo)
    codes = representation.encode(anchors.read(zoo, anchors.rows))
    width = {"dimension": 1, "token": codes.shape[2], "joint": codes.shape[1] * codes.shape[2]}[density]
    draw = generators.kde_reference if mode == "reference" else generators.kde
    cloud = codes.flatten(1)
    options = (0.2,) if mode == "reference" else (0.2 * cloud.std(0, correction=0), generator())
    drawn = draw(cloud, 6, *options, width=width)
    torch.testing.assert_close(made.weights, representation.decode(drawn.points.view(6, *codes.shape[1:])))


def test_the_best_candidates_are_kept(zoo, tmp_path):
    options = {"method": "noise", "noise": 0.5, "aligned": False}
    whole = sample.sample(
        sample.Config(zoo=str(zoo.path), out=str(tmp_path / "all"), count=20, device="cpu", **options)
    )
    best = sample.sample(config(zoo, tmp_path / "best", candidates=20, **options))
    evaluate.evaluate(evaluate.Config(zoo=str(whole.path), device="cpu"))
    accuracy = numpy.sort(Zoo.open(whole.path).numbers("val_accuracy"))[::-1]
    numpy.testing.assert_allclose(best.numbers("candidate_val_accuracy"), accuracy[:6], atol=1e-6)
    assert all(any(torch.equal(row, other) for other in whole.weights) for row in best.weights)
    trained = sample.sample(config(zoo, tmp_path / "train", candidates=20, judged_on="train", **options))
    assert "candidate_train_accuracy" in trained.properties.column_names


def test_rounds_draw_from_what_was_kept(zoo, tmp_path):
    options = {"method": "kde", "density": "joint", "bandwidth": 0.1, "candidates": 12, "aligned": False}
    one = sample.sample(config(zoo, tmp_path / "one", **options))
    three = sample.sample(config(zoo, tmp_path / "three", rounds=3, **options))
    names = {name for name in one.properties["anchors"].to_pylist()}
    assert {name for name in three.properties["anchors"].to_pylist()} <= names  # names of networks, not of samples
    accuracy = three.numbers("candidate_val_accuracy")
    assert (numpy.diff(accuracy) <= 0).all() and accuracy.mean() >= one.numbers("candidate_val_accuracy").mean() - 0.1


def test_the_released_bootstrap_does_not_select_in_its_last_round(zoo, tmp_path):
    """It returns the first samples of the last round, whatever their accuracy."""
    options = {"method": "kde", "density": "joint", "mode": "reference", "bandwidth": 0.1, "aligned": False}
    made = sample.sample(config(zoo, tmp_path / "made", candidates=12, rounds=2, **options))
    first = sample.sample(config(zoo, tmp_path / "first", candidates=12, **options))
    expected = generators.kde_reference(first.weights, 12, 0.1, width=zoo.layout.num_weights).points[:6]
    torch.testing.assert_close(made.weights, expected)


# --- evaluation


def test_evaluation_is_that_of_each_network_alone(zoo, tmp_path):
    made = sample.sample(config(zoo, tmp_path, method="noise", noise=0.3))
    done, columns, ensemble = evaluate.evaluate(evaluate.Config(zoo=str(made.path), device="cpu"))
    job = evaluate.job_of(made, device="cpu")
    x, y = job.data.test
    logits = []
    for row in range(len(made)):
        network = job.plan.build(made.properties["activation"][row].as_py())
        network.load_state_dict(made.checkpoint(row))
        with torch.no_grad():
            logits.append(network.eval()(x))
    logits = torch.stack(logits)
    accuracy = (logits.argmax(2) == y).double().mean(1)
    assert done.numbers("test_accuracy") == pytest.approx(accuracy.numpy(), abs=1e-6)
    assert columns["test_loss"] == pytest.approx(
        [torch.nn.functional.cross_entropy(one, y).item() for one in logits], rel=1e-5
    )
    assert ensemble["test_accuracy"] == pytest.approx((logits.mean(0).argmax(1) == y).double().mean().item(), abs=1e-6)
    found = populations.measure(made.weights, job.plan, ["tanh"] * 6, job.data.test, progress=False)
    with torch.no_grad():
        one_by_one = torch.cat([populations.logits_of(row[None], job.plan, ["tanh"], None)(x) for row in made.weights])
    assert torch.equal(found.predictions.long(), one_by_one.argmax(2))


def test_evaluating_twice_replaces_columns(zoo, tmp_path):
    made = sample.sample(config(zoo, tmp_path, method="average"))
    evaluate.evaluate(evaluate.Config(zoo=str(made.path), device="cpu"))
    first = Zoo.open(made.path)
    evaluate.evaluate(evaluate.Config(zoo=str(made.path), device="cpu", limit=40))
    second = Zoo.open(made.path)
    assert first.properties.column_names == second.properties.column_names
    assert torch.equal(first.weights, second.weights)


def test_zoos_of_other_origin_cannot_be_evaluated(zoo, tmp_path):
    layout = fastws.Layout.from_checkpoint({"fc.weight": torch.zeros(2, 3)})
    with fastws.zoo.ZooWriter(tmp_path / "bare", layout) as writer:
        writer.append(torch.zeros(2, 6), {"model": ["a", "b"]})
    with pytest.raises(ValueError, match="provenance must be that of fastws zoo make"):
        evaluate.evaluate(evaluate.Config(zoo=str(tmp_path / "bare"), device="cpu"))
    made = sample.sample(config(zoo, tmp_path / "made", method="average"))
    with pytest.raises(FileNotFoundError, match="data must be 'digits', 'digits28', or a folder with"):
        evaluate.evaluate(evaluate.Config(zoo=str(made.path), data=str(tmp_path / "nothing"), device="cpu"))


def test_models_of_aligned_networks_sample_from_aligned_anchors(zoo, tmp_path):
    align(AlignConfig(zoo=str(zoo.path)))
    try:
        trained = ae.Config(
            zoo=str(zoo.path), out=str(tmp_path / "ae"), steps=1, batch_size=8, aligned=True, device="cpu"
        )
        ae.train(trained, zoo, CPU)
        model = str(tmp_path / "ae/checkpoint.pt")
        made = sample.sample(config(zoo, tmp_path / "made", method="direct", model=model))
        assert made.provenance["sampled"]["aligned"]
        plain = sample.sample(config(zoo, tmp_path / "weights", method="direct"))
        unaligned = sample.sample(config(zoo, tmp_path / "as-they-are", method="direct", aligned=False))
        assert plain.provenance["sampled"]["aligned"] and not torch.equal(plain.weights, unaligned.weights)
        torch.testing.assert_close(plain.weights.norm(dim=1), unaligned.weights.norm(dim=1))
    finally:
        (zoo.path / ALIGNMENT).unlink()
