"""A Gaussian of networks that learns to work."""

from dataclasses import replace

import pytest
import torch
from small_zoo import make_small_zoo
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fastws.downstream.sampling.behaviour import IMAGES, classification, teach
from fastws.downstream.sampling.generators import Components
from fastws.downstream.sampling.sample import Config, sample
from fastws.layout.layout import Layout
from fastws.zoo.making.make import Config as MakeConfig
from fastws.zoo.making.make import make, prepare


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return make(
        MakeConfig(
            out=str(tmp_path_factory.mktemp("behaviour") / "zoo"),
            networks=30,
            epochs=3,
            activations=("tanh",),
            inits=("xavier_uniform",),
            optimizers=("momentum",),
            lrs=(0.1,),
            limit=500,
        )
    )


def test_gradient_is_that_of_the_cross_entropy(zoo):
    config = MakeConfig(out=str(zoo.path), networks=1, limit=IMAGES)
    job = prepare(replace(config, activations=("tanh",)))
    part = job.data.train
    flat = zoo.rows(torch.arange(3, 7)).float()
    losses, slopes = classification(job.plan, part, "tanh", generator(1))(flat)
    rows = torch.randint(len(part.y), (4, 1, IMAGES), generator=generator(1))[:, 0]
    network, layout = job.plan.build("tanh"), Layout.from_checkpoint(job.plan.build("tanh"))

    def loss(row, x, y):
        return cross_entropy(functional_call(network, layout.unflatten(row), (x,)), y)

    expected = torch.stack([loss(row, part.x[chosen], part.y[chosen]) for row, chosen in zip(flat, rows, strict=True)])
    torch.testing.assert_close(losses.float(), expected.detach(), rtol=1e-5, atol=1e-6)
    expected = vmap(grad(loss))(flat, part.x[rows], part.y[rows])
    torch.testing.assert_close(slopes, expected, rtol=1e-3, atol=1e-6)


def test_mean_and_directions_follow_the_loss_and_keep_the_spread():
    points = torch.randn(50, 6, generator=generator())
    before, target = Components.of(points, 3), torch.full((6,), 0.4)

    def gradient(samples):
        return (samples - target).square().sum(1), 2 * (samples - target)

    after = teach(before, gradient, 300, generator(1))
    spreads = [(space.scale[:, None] * space.axes).norm(dim=0) for space in (before, after)]
    torch.testing.assert_close(*spreads)
    distances = [(space.mean - target).norm() for space in (before, after)]
    assert distances[1] < 0.5 * distances[0]
    untouched = teach(before, gradient, 0, generator(1))
    torch.testing.assert_close(untouched.restore(torch.eye(3)), before.restore(torch.eye(3)))


def test_samples_work_better_and_are_as_far_apart(zoo, tmp_path):
    options = {"zoo": str(zoo.path), "method": "pca", "components": 8, "count": 60, "aligned": False}
    plain = sample(Config(out=str(tmp_path / "plain"), **options))
    taught = sample(Config(out=str(tmp_path / "taught"), behaviour=40, **options))
    assert taught.provenance["sampled"]["behaviour"] == 40
    job = prepare(MakeConfig(out=str(tmp_path / "x"), networks=1, limit=500, activations=("tanh",)))
    losses = [
        classification(job.plan, job.data.test, "tanh", generator())(one.rows(torch.arange(60)).float())[0].mean()
        for one in (plain, taught)
    ]
    assert losses[1] < 0.9 * losses[0]
    spread = [one.rows(torch.arange(60)).float().std(0).mean().item() for one in (plain, taught)]
    assert spread[1] == pytest.approx(spread[0], rel=0.15)


def test_bad_options_get_one_sentence(zoo, tmp_path):
    for options in ({"method": "kde"}, {"method": "pca", "model": "a.pt"}):
        with pytest.raises(ValueError, match="behaviour must be left out but for method pca without a model"):
            Config(zoo=str(zoo.path), out=str(tmp_path / "new"), behaviour=3, **options)
    with pytest.raises(ValueError, match="behaviour must be a number from 0 on, got -1"):
        Config(zoo=str(zoo.path), out=str(tmp_path / "new"), method="pca", behaviour=-1)
    make_small_zoo(tmp_path / "small")
    with pytest.raises(ValueError, match="provenance must be that of fastws zoo make"):
        sample(Config(zoo=str(tmp_path / "small"), out=str(tmp_path / "new"), method="pca", behaviour=3))
    assert not (tmp_path / "new").exists()
