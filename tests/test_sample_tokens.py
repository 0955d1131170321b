"""Sampling from a SANE: its decoder window by window, norms that have no tokens, and other architectures."""

import pytest
import torch
from small_zoo import make_small_zoo
from torch import nn

import fastws
from fastws.downstream import encoder as encoders
from fastws.downstream import evaluate, populations
from fastws.downstream.embed import Config as Embedding
from fastws.downstream.representation import load
from fastws.downstream.sampling import sample
from fastws.nn.sane import SANE, SANEConfig
from fastws.train.sane import train as sane
from fastws.zoo import Zoo, ZooWriter

pytestmark = pytest.mark.usefixtures("in_one_thread")
CPU = torch.device("cpu")
MODULE = """
from torch import nn

def build():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    return nn.Sequential(*layers)
"""


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    """A zoo of networks with batch norm whose statistics are all different; the path of its module."""
    path = tmp_path_factory.mktemp("normed")
    (path / "sampled_network.py").write_text(MODULE)
    torch.manual_seed(0)
    namespace = {}
    exec(MODULE, namespace)  # noqa: S102
    layout, rows = fastws.Layout.from_checkpoint(namespace["build"]()), []
    for _ in range(8):
        network = namespace["build"]()
        for name in ("weight", "running_mean", "running_var"):
            getattr(network[1], name).data.uniform_(0.5, 1.5)
        rows.append(layout.flatten(network))
    names = [f"n{n}" for n in range(8)]
    with ZooWriter(path / "zoo", layout, splits={"train": names[:6], "val": names[6:], "test": []}) as writer:
        writer.append(torch.stack(rows), {"model": names})
    return Zoo.open(path / "zoo")


@pytest.fixture(scope="module")
def models(normed, tmp_path_factory):
    """Checkpoints of SANEs of that zoo, whose norms have tokens or have none."""
    out, found = tmp_path_factory.mktemp("models"), {}
    torch.set_num_threads(1)
    for norm in ("keep", "skip"):
        options = {"size": "tiny", "steps": 2, "batch_size": 4, "window": 10, "permute": "none", "device": "cpu"}
        sane.train(sane.Config(zoo=str(normed.path), out=str(out / norm), norm=norm, **options), normed, CPU)
        found[norm] = str(out / norm / "checkpoint.pt")
    return found


@pytest.fixture
def importable(normed, monkeypatch):
    monkeypatch.syspath_prepend(normed.path.parent)


def config(zoo, out, **options):
    return sample.Config(zoo=str(zoo.path), out=str(out), **{"count": 5, "device": "cpu", "method": "kde"} | options)


def norm_entries(zoo):
    return [entry for entry in zoo.layout.entries if entry.name.startswith("1.") and entry.offset >= 0]


# --- windows


class Transparent(nn.Module):
    """A model that embeds tokens as themselves and decodes each window by itself."""

    def __init__(self, window, size):
        super().__init__()
        self.config = SANEConfig(token_size=size, max_positions=(999, 9, 999), window=window, width=8, heads=2)

    def encode(self, values, positions):
        return values

    def decode(self, z, positions):
        assert z.shape[:2] == positions.shape[:2] and (positions[:, 1:, 0] == positions[:, :-1, 0] + 1).all()
        return z


@pytest.mark.parametrize("window, halo", [(8, 2), (8, 0), (9, 4), (256, 64)])
def test_networks_of_every_length_come_back(window, halo):
    """Published code asserts on most remainders; here every number of tokens from 1 on is one batch of windows."""
    for count in [*range(1, 40), 127, 128, 129, 300, 383, 384, 385]:
        layout = fastws.Layout.from_checkpoint({"weight": torch.empty(count, 3)})
        encoder = encoders.Encoder(Transparent(window, 3), layout, torch.tensor([2.0]), torch.tensor([0.5]))
        flat = torch.randn(2, 3 * count)
        z = encoders.encode(encoder, flat, halo=halo)
        torch.testing.assert_close(z.flatten(1), 2 * flat + 0.5)
        torch.testing.assert_close(encoders.decode(encoder, z, halo=halo, batch_size=3), flat)


def haloify_as_published(z, content, halo):
    """Windows of the published code, whose first begins and whose last ends with the sequence."""
    count = z.shape[1]
    windows = []
    for begin in range(0, count, content):
        first = max(0, min(begin - halo, count - content - 2 * halo))
        windows.append(z[:, first : first + content + 2 * halo])
    return windows


@pytest.mark.parametrize("halo", [None, 0, 3])
def test_decoding_is_the_model_on_every_window(halo):
    torch.manual_seed(0)
    zoo_layout = fastws.Layout.from_checkpoint({"a.weight": torch.empty(7, 9), "b.weight": torch.empty(13, 4)})
    layout = zoo_layout.with_tokens(5)
    sizes = {"window": 8, "width": 16, "heads": 2, "depth": 1, "latent": 6}
    model = SANE(SANEConfig(token_size=5, max_positions=(80, 4, 20), **sizes)).eval()
    encoder = encoders.Encoder(model, layout, torch.rand(2) + 0.5, torch.randn(2))
    z, count = torch.randn(3, layout.num_tokens, 6), layout.num_tokens
    content = count if halo is None else 8 - 2 * halo
    windows = [z] if halo is None else haloify_as_published(z, content, halo)
    expected = []
    for first, part in zip(range(0, count, content), windows, strict=True):
        begin = 0 if halo is None else min(max(first - halo, 0), count - 8)
        decoded = model.decode(part, layout.positions[begin : begin + part.shape[1]])
        expected.append(decoded[:, first - begin : min(first + content, count) - begin])
    values = torch.cat(expected, 1)
    layer = layout.positions[:, 1].long()
    flat = layout.detokenize((values - encoder.shift[layer, None]) / encoder.scale[layer, None])
    for batch_size in (1, 4, 64):
        found = encoders.decode(encoder, z, halo=halo, batch_size=batch_size)
        torch.testing.assert_close(found, flat, rtol=1e-4, atol=1e-5)


# --- norms


def test_what_has_no_token_comes_from_anchors(normed, models, tmp_path):
    """The scales and statistics of norms, without which a network that was decoded computes nothing."""
    entries = norm_entries(normed)
    train = normed.rows(normed.split("train"))
    made = {
        name: sample.sample(config(normed, tmp_path / name, model=models["skip"], **options))
        for name, options in {
            "direct": {"method": "direct"},
            "average": {"method": "average", "together": 2},
            "kde": {},
        }.items()
    }
    for entry in entries:
        place = slice(entry.offset, entry.offset + entry.numel)
        torch.testing.assert_close(made["direct"].weights[:, place], train[:5, place])
        torch.testing.assert_close(made["kde"].weights[:, place], train[:, place].mean(0).expand(5, -1))
        pairs = [
            [int(name[1]) for name in names.split()] for names in made["average"].properties["anchors"].to_pylist()
        ]
        torch.testing.assert_close(
            made["average"].weights[:, place], torch.stack([normed.rows(pair)[:, place].mean(0) for pair in pairs])
        )
    assert not torch.equal(made["direct"].weights[:, :9], train[:5, :9])


@pytest.mark.parametrize("options", [{"model": "keep"}, {"method": "noise", "noise": 5.0}])
def test_no_variance_is_below_those_of_anchors(normed, models, tmp_path, options):
    model = {"model": models[options["model"]]} if "model" in options else {}
    made = sample.sample(config(normed, tmp_path / "made", **options | model, bandwidth=50.0))
    (entry,) = (entry for entry in norm_entries(normed) if entry.name.endswith("running_var"))
    place = slice(entry.offset, entry.offset + entry.numel)
    assert (made.weights[:, place] >= normed.rows(normed.split("train"))[:, place].amin(0)).all()


def test_statistics_are_computed_anew_before_candidates_are_judged(normed, models, tmp_path, importable):
    known = {"data": "digits", "architecture": "sampled_network:build"}
    options = {"model": models["skip"], "candidates": 12, "judged_on": "train", **known}
    made = sample.sample(config(normed, tmp_path / "made", condition=60, **options))
    plain = sample.sample(config(normed, tmp_path / "plain", **options))
    job = evaluate.job_of(made, device="cpu", **known)
    images = evaluate.conditioning_images(made, job, 60)
    again = populations.condition_norms(plain.weights, job.plan, ["relu"] * 5, images)
    conditioned = populations.condition_norms(made.weights, job.plan, ["relu"] * 5, images)
    torch.testing.assert_close(conditioned, made.weights)  # nothing is left to do
    assert not torch.allclose(again, plain.weights)
    found = populations.measure(made.weights, job.plan, ["relu"] * 5, job.data.train, progress=False).accuracy
    torch.testing.assert_close(torch.from_numpy(made.numbers("candidate_train_accuracy")), found)


def test_candidates_need_images_to_be_judged_on(normed, tmp_path, importable, monkeypatch):
    known = {"data": "digits", "architecture": "sampled_network:build"}
    job = evaluate.job_of(normed, device="cpu", **known)
    without = job._replace(data=job.data._replace(val=None))
    monkeypatch.setattr("fastws.downstream.sampling.judged.job_of", lambda *args, **options: without)
    with pytest.raises(ValueError, match="judged_on must be train for .*, which was made without validation images"):
        sample.sample(config(normed, tmp_path / "out", candidates=9, **known))
    with pytest.raises(ValueError, match="data must be given with architecture, got none"):
        config(normed, tmp_path / "out", architecture="sampled_network:build")
    assert not (tmp_path / "out").exists()


# --- other architectures


def test_another_depth_is_sampled_around_its_own_networks(tmp_path):
    trained, deep = make_small_zoo(tmp_path / "zoo"), make_small_zoo(tmp_path / "deep", widths=(6, 8, 7, 5, 3))
    options = {"size": "tiny", "steps": 1, "batch_size": 4, "window": 8, "device": "cpu", "permute": "none"}
    path = tmp_path / "run"
    sane.train(sane.Config(zoo=str(trained.path), out=str(path), max_positions=(60, 6, 12), **options), trained, CPU)
    made = sample.sample(config(deep, tmp_path / "made", method="direct", model=str(path / "checkpoint.pt")))
    assert made.layout.fingerprint == deep.layout.fingerprint and made.weights.isfinite().all()
    representation = load(path / "checkpoint.pt").suit(deep, "sample")
    expected = representation.decode(representation.encode(deep.rows(deep.split("train")[1::2][:5])))
    torch.testing.assert_close(made.weights, expected)
    with pytest.raises(ValueError, match=r"sample: zoo .* must have at most \(60, 6, 12\) tokens, layers"):
        wide = make_small_zoo(tmp_path / "wide", widths=(6, 30, 3))
        sample.sample(config(wide, tmp_path / "none", model=str(path / "checkpoint.pt")))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("tokens", [5, 500])
def test_halos_are_not_negative_however_long_the_network(tokens):
    with pytest.raises(ValueError, match="halo must be in .* got -1"):
        encoders.chunk(tokens, 8, -1)
    with pytest.raises(ValueError, match="halo must be at least 0, got -1"):
        sample.Config(zoo="z", out="o", method="kde", model="m", halo=-1)
    with pytest.raises(ValueError, match="halo must be at least 0, got -1"):
        Embedding(model="m", hub="h", out="o.safetensors", halo=-1)
