"""Populations of several zoos, in memory and in files, and what SANE makes of them."""

from dataclasses import replace

import pytest
import torch
from small_zoo import make_small_zoo

from fastws.cli import main
from fastws.downstream.encoder import encode, suit
from fastws.downstream.representation import load
from fastws.layout.layout import Layout
from fastws.layout.moments import layer_scales
from fastws.nn.sane import PRESETS, SANE, SANEConfig, SinusoidalPositions
from fastws.train.sane import batches
from fastws.train.sane import train as sane
from fastws.windows.places import places_of
from fastws.windows.population import cut, random_permutations, rows_of_tokens
from fastws.zoo import Zoo
from fastws.zoo.align import Config as AlignConfig
from fastws.zoo.align import align
from fastws.zoo.format.writer import ZooWriter

pytestmark = pytest.mark.usefixtures("in_one_thread")
CPU = torch.device("cpu")
CONFIG = sane.Config(
    out="unset", zoo=("a", "b"), size="tiny", window=8, batch_size=8, steps=4, lr=3e-3, log_every=1, eval_every=2,
    val_batches=2, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoos")
    return [make_small_zoo(folder / "wide"), make_small_zoo(folder / "deep", widths=(4, 5, 6, 5, 3))]


def rows_used(config, source, step=0):
    return batches.choose(config, source, source.rows("train"), step, step)


@pytest.mark.parametrize("span", ["row", "layer"])
@pytest.mark.parametrize("memory", [None, 0.0])
def test_windows_of_two_architectures_are_those_of_each_network(zoos, memory, span):
    config = replace(CONFIG, noise=0.0, batch_size=32, memory=memory, span=span, window=3)
    source = sane.make_source(config, zoos, CPU)
    assert (source.population.arena is None) == (memory is None)
    batch = sane.draw(config, source, "train", 0)
    model, start = rows_used(config, source)
    seen = set()
    permutations = random_permutations(source.population, model.repeat(2), 0, batches.PERMUTATION, still=32)[32:]
    for b, (row, first) in enumerate(zip(model.tolist(), start.tolist(), strict=True)):
        kind = source.population.kinds[number := int(source.population.kind[row])]
        zoo, chosen = zoos[number], torch.cat([zoos[number].split(split) for split in ("train", "val")])
        flat = zoo.rows([chosen[row - int((source.population.kind < number).sum())]])[0]
        permuted = zoo.symmetry.permute(flat, permutations[b, : zoo.symmetry.num_indices], zoo.layout)
        for view, weights in enumerate((flat, permuted)):
            tokens = kind.layout.tokenize(weights)
            layer = tokens.positions[:, 1].long()
            scaled = (tokens.values - kind.mean[layer, None]) / kind.std[layer, None] * kind.layout.mask
            torch.testing.assert_close(batch.values[view, b], scaled[first : first + 3], rtol=1e-5, atol=1e-6)
        assert torch.equal(batch.positions[b], kind.layout.positions[first : first + 3])
        seen.add(number)
    assert seen == {0, 1}


def test_batches_from_files_are_those_from_memory_bit_for_bit(zoos):
    for config in (CONFIG, replace(CONFIG, permute="none"), replace(CONFIG, target="clean", rectangle=0.5)):
        resident, streamed = (sane.make_source(replace(config, memory=m), zoos, CPU) for m in (None, 0.0))
        for step in range(3):
            pair = (sane.draw(config, source, "train", step) for source in (resident, streamed))
            assert all(torch.equal(*both) for both in zip(*(batch[:4] for batch in pair), strict=True))


def test_aligned_networks_are_read_from_files_in_their_order(tmp_path):
    zoo = make_small_zoo(tmp_path / "zoo")
    align(AlignConfig(zoo=str(zoo.path)))
    for permute in ("none", "second"):
        config = replace(CONFIG, zoo=("zoo",), aligned=True, permute=permute)
        sources = [sane.make_source(replace(config, memory=memory), zoo, CPU) for memory in (None, 0.0)]
        pair = [sane.draw(config, source, "train", 1).values for source in sources]
        torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_zoos_of_other_dtypes_share_a_batch(zoos, tmp_path):
    half = zoos[0].weights.to(torch.bfloat16)
    with ZooWriter(tmp_path / "half", zoos[0].layout, zoos[0].symmetry, dtype=torch.bfloat16) as writer:
        writer.append(half, {"model": [str(row) for row in range(len(half))]})
    pair = [Zoo.open(tmp_path / "half"), zoos[1]]
    config = replace(CONFIG, batch_size=32, standardize=False, permute="none", noise=0.0)
    for memory in (None, 0.0):
        source = sane.make_source(replace(config, memory=memory), pair, CPU)
        assert {weights.dtype for weights in source.population.weights} == {torch.float32, torch.bfloat16}
        batch = sane.draw(config, source, "train", 0)
        model, start = rows_used(config, source)
        for b in (source.population.kind[model] == 0).nonzero().flatten().tolist():
            rows = torch.cat([pair[0].split(split) for split in ("train", "val")])
            tokens = source.population.kinds[0].layout.tokenize(half[rows[model[b]]].float()).values
            assert torch.equal(batch.values[0, b], tokens[start[b] : start[b] + 8])


def test_training_on_two_zoos_validates_each_and_resumes(zoos, tmp_path):
    folders = tuple(str(zoo.path) for zoo in zoos)
    config = replace(CONFIG, zoo=folders, out=str(tmp_path / "run"), keep_every=2)
    metrics = sane.train(config, zoos, CPU)
    assert {"val/loss", "val/wide/r2", "val/deep/loss"} <= metrics.keys()
    middle = (metrics["val/wide/loss"] + metrics["val/deep/loss"]) / 2
    assert metrics["val/loss"] == pytest.approx(middle, rel=1e-5)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert Layout.from_dict(state["extra"]["others"][0]["layout"]).fingerprint == zoos[1].layout.fingerprint
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*.pt"))
    assert kept == ["checkpoint-2.pt", "checkpoint-4.pt"]
    assert torch.load(tmp_path / "run/checkpoint-2.pt", weights_only=True)["step"] == 2
    assert sane.train(config, zoos, CPU) == {}
    streamed = replace(config, out=str(tmp_path / "streamed"), memory=0.0)
    sane.train(streamed, zoos, CPU)
    again = torch.load(tmp_path / "streamed/checkpoint.pt", weights_only=True)["model"]
    torch.testing.assert_close(again, state["model"], rtol=0, atol=0)


def test_command_takes_several_zoos(zoos, tmp_path, capsys):
    options = ["--size", "tiny", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--positions", "sinusoidal"]
    options += ["--relative", "--layer-types", "--normalize", "window", "--windows", "covering", "--dropout", "0.1"]
    folders = [str(zoo.path) for zoo in zoos]
    main(["train", "sane", "--zoo", *folders, *options, "--out", str(tmp_path / "run")])
    assert "val/deep/r2" in capsys.readouterr().out
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["config"]["zoo"] == folders and "pe.pe1.weight" not in state["model"]


def test_a_run_of_one_zoo_that_named_it_alone_goes_on(zoos, tmp_path):
    config = replace(CONFIG, zoo="a", out=str(tmp_path))
    sane.train(config, zoos[0], CPU)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": state["config"] | {"zoo": "a"}}, path)
    assert sane.train(config, zoos[0], CPU) == {}


# --- what the model is told


def test_axes_of_positions_have_entries_of_their_own():
    swapped = torch.tensor([[1, 2, 3], [3, 2, 1]])
    own, summed = (SinusoidalPositions(64, summed)(swapped) for summed in (False, True))
    assert own.shape == summed.shape == (2, 64)
    assert (own[0] - own[1]).abs().max() > 0.5
    torch.testing.assert_close(summed[0], summed[1])
    rate = 10_000 ** (-2 * torch.arange(32) / 64)
    torch.testing.assert_close(summed[0, ::2], sum((n * rate).sin() for n in (1, 2, 3)))


def test_relative_positions_and_kinds_of_layers():
    state = {"conv.weight": torch.zeros(4, 3, 3, 3), "bn.weight": torch.zeros(4), "bn.running_var": torch.zeros(4)}
    layout = Layout.from_checkpoint(state | {"fc.weight": torch.zeros(2, 4)}, token_size=9)
    places = places_of(layout)
    layer = layout.positions[:, 1]
    told = places.describe(layout.positions, layer, relative=True, layer_types=True)
    assert told[:, 3].unique_consecutive().tolist() == [1, 2, 3, 0]
    count = layout.num_tokens
    assert told[:, 0].tolist() == [n * 1024 // count for n in range(count)]
    assert told[-1, 1:3].tolist() == [768, 512] and told[:, :3].max() < 1024


def test_dropout_is_drawn_from_the_step_and_off_in_evaluation(zoos):
    config = replace(CONFIG, dropout=0.3)
    source = sane.make_source(config, zoos, CPU)
    torch.manual_seed(0)
    model = SANE(sane.model_config(config, source))
    batch = sane.draw(config, source, "train", 1)
    first, second = (sane.losses(config, model, batch)["loss"] for _ in range(2))
    assert first == second
    assert sane.losses(config, model, batch._replace(seed=batch.seed + 1))["loss"] != first
    model.eval()
    quiet = sane.losses(config, model, batch)["loss"]
    assert quiet == sane.losses(config, model, batch._replace(seed=5))["loss"] != first


@pytest.mark.parametrize("normalize, axes", [("window", (1, 2)), ("token", (0, 1))])
def test_losses_divide_by_the_variance_of_what_is_there(normalize, axes):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, generator=generator).unbind(0)
    lengths = torch.tensor([[5, 3, 2, 4], [1, 5, 5, 0], [2, 2, 2, 2]], dtype=torch.int32)
    found = sane.reconstruction_loss(prediction, target, lengths, normalize)
    there = torch.arange(5) < lengths[..., None]
    total = 0.0
    groups = range(3) if normalize == "window" else range(5)
    for group in groups:
        own = (group, ...) if normalize == "window" else (..., group)
        error, kept = (prediction - target)[own][there[own]], target[own][there[own]]
        total += float((error**2).sum() / kept.var(correction=0))
    assert found.item() == pytest.approx(total / int(there.sum()), rel=1e-5)


@pytest.mark.parametrize("statistic", ["std", "minmax", "l2"])
def test_layers_are_scaled_by_statistics_of_the_training_split(zoos, statistic):
    zoo = zoos[0]
    rows = zoo.rows(zoo.split("train")).double()
    center, scale = layer_scales(rows, zoo.layout, statistic)
    layers = [torch.cat([rows[:, 0:48], rows[:, 48:56]], 1), rows[:, 56:101], rows[:, 101:119]]
    for layer, own in enumerate(layers):
        expected = {
            "std": (own.mean(), own.var(1).mean().sqrt()),
            "minmax": ((own.max() + own.min()) / 2, (own.max() - own.min()) / 2),
            "l2": (torch.tensor(0.0), own.square().sum(1).mean().sqrt()),
        }[statistic]
        assert (center[layer].item(), scale[layer].item()) == pytest.approx([x.item() for x in expected], rel=1e-5)


def test_coverage_sees_every_token_of_every_network_once_in_a_pass(zoos):
    config = replace(CONFIG, windows="covering", window=4, batch_size=4)
    source = sane.make_source(config, zoos, CPU)
    rows = source.rows("train")
    steps = int(sane.count_windows(source, rows).sum()) // 4
    chosen = [rows_used(config, source, step) for step in range(steps)]
    pairs = list(zip(*(torch.cat(column).tolist() for column in zip(*chosen, strict=True)), strict=True))
    assert len(set(pairs)) == len(pairs)
    firsts = {start for model, start in pairs if model == pairs[0][0]}
    count = int(source.population.num_tokens[pairs[0][0]])
    assert {token for first in firsts for token in range(first, first + 4)} <= set(range(count))


def test_rectangles_are_erased_from_each_view(zoos):
    config = replace(CONFIG, rectangle=1.0, noise=0.0, standardize=False, batch_size=16, permute="none")
    source = sane.make_source(config, zoos, CPU)
    batch = sane.draw(config, source, "train", 0)
    clean = sane.draw(replace(config, rectangle=0.0), source, "train", 0)
    erased = (batch.values == 0) & (clean.values != 0)
    assert erased.flatten(2).any(-1).all() and not torch.equal(*batch.values)
    area = batches.outside_rectangle(config, torch.zeros(200, 20, 30), 3).eq(0).float().mean((1, 2))
    assert area.min() > 0.01 and area.max() < 0.36


# --- sizes and sentences


def test_published_sizes_have_their_options():
    config = sane.Config(zoo="a", out="b", size="weightclip")
    assert (config.lr, config.clip, config.precision, config.gamma, config.passes) == (1e-3, 1.0, "bf16", 0.0, 100)
    first, last = (sane.rates.one_cycle(config.lr, step, 100 * 5000)[0] for step in (0, 4999))
    assert first == pytest.approx(4e-5, rel=0.01) and last == pytest.approx(4.3e-5, rel=0.01)
    config = sane.Config(zoo="a", out="b", size="multizoo", lr=1e-4)
    assert (config.lr, config.normalize, config.permute, config.statistic) == (1e-4, "batch", "second", "none")
    blocks = 2 * 12 * 12 * 1600**2
    with torch.device("meta"):
        model = SANE(SANEConfig(token_size=288, **PRESETS["weightclip"]))
    assert sum(p.numel() for name, p in model.named_parameters() if "c_" in name) == blocks
    assert blocks == pytest.approx(737e6, rel=1e-3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"zoo": ("a", "a")}, "zoo must be folders, each once, got a, a"),
        ({"span": "network"}, "span must be row or layer for 2 zoos, got network"),
        ({"cycle": 0.5}, "cycle must be at least 1 and memory at least 0, got 0.5 and None"),
        ({"rectangle": 1.5}, "rectangle must be in \\[0, 1\\], got 1.5"),
        ({"keep_every": 0}, "keep_every must be positive, got 0"),
        ({"steps": None, "passes": 0}, "passes must be at least 1, got 0"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)


def test_windows_that_are_longer_than_a_network_are_padded_and_said(zoos, tmp_path, capsys):
    counts = [zoo.layout.with_tokens(9).num_tokens for zoo in zoos]
    config = replace(CONFIG, out=str(tmp_path), window=max(counts), steps=1)
    sane.train(config, zoos, CPU)
    small = ("wide", "deep")[counts.index(min(counts))]
    assert f"note: networks of {small} have {min(counts)} tokens, fewer than a window" in capsys.readouterr().out


# --- what is done with such models


@pytest.mark.parametrize("options", [{}, {"positions": "sinusoidal", "layer_types": True}, {"relative": True}])
def test_models_of_two_zoos_embed_both_and_rebuild_the_first(zoos, tmp_path, options):
    config = replace(CONFIG, zoo=tuple(str(zoo.path) for zoo in zoos), out=str(tmp_path / "run"), **options)
    sane.train(config, zoos, CPU)
    model = load(tmp_path / "run/checkpoint.pt")
    assert torch.equal(suit(model.encoder, zoos[1]).layout.table, model.encoder.others[0].layout.table)
    for zoo, encoder in zip(zoos, (model.encoder, *model.encoder.others), strict=True):
        out = tmp_path / f"{zoo.path.name}.safetensors"
        main(["embed", "--model", str(tmp_path / "run/checkpoint.pt"), "--zoo", str(zoo.path), "--out", str(out)])
        source = sane.make_source(config, zoos, CPU)
        count = encoder.layout.num_tokens
        kind = zoos.index(zoo)
        row = (source.population.kind == kind).nonzero()[0]
        tokens = cut(source.population, row, row * 0, count)
        chosen = torch.cat([zoo.split(split) for split in ("train", "val")])
        z = encode(encoder, zoo.rows(chosen[:1]), halo=None)
        positions = tokens.positions
        if source.places:
            layer = rows_of_tokens(source.population, row, positions)
            told = {"relative": config.relative, "layer_types": config.layer_types}
            positions = source.places.describe(positions, layer, **told)
        with torch.no_grad():
            torch.testing.assert_close(z, encoder.model.encode(tokens.values, positions), rtol=1e-4, atol=1e-5)
    decoded = model.decode(model.encode(zoos[0].rows([0])))
    assert decoded.shape == (1, zoos[0].layout.num_weights) and decoded.isfinite().all()
