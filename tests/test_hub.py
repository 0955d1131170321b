"""Folders of files of any architectures: their windows, what is trained on them, and what is embedded."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastws.cli import main
from fastws.layout.layout import Layout
from fastws.runs import processes
from fastws.symmetry.symmetry import Symmetry
from fastws.train.sane import batches
from fastws.train.sane import train as sane
from fastws.windows import measured
from fastws.windows.hub import open_hub
from fastws.windows.population import cut, random_permutations

pytestmark = pytest.mark.usefixtures("in_one_thread")
CPU = torch.device("cpu")
CONFIG = sane.Config(
    out="unset", hub="unset", size="tiny", window=8, batch_size=8, steps=4, lr=3e-3, log_every=1, eval_every=2,
    val_batches=2, device="cpu", token_size=6,
)  # fmt: skip


def convolutional(width, dtype=torch.float32, norm=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape, dtype=dtype):
        return (3 + 2 * torch.randn(shape, generator=draw)).to(dtype)

    state = {"fc.weight": tensor(width, 5), "fc.bias": tensor(width), "conv.weight": tensor(3, width, 3, 3)}
    return state | {"bn.weight": tensor(width, dtype=norm), "bn.num_batches_tracked": torch.tensor(seed)}


def fill(folder):
    """Several architectures and dtypes, in folders, one of them in two files."""
    states = {f"some/m{seed}": convolutional(4, seed=seed) for seed in range(4)}
    states |= {"half": convolutional(7, torch.bfloat16), "other/half": convolutional(7, torch.float16)}
    states |= {"one": {"x": torch.arange(7.0)}, "double": convolutional(7, torch.float64, seed=9)}
    states["bias"] = {"a.weight": torch.randn(4, 3).bfloat16(), "a.bias": torch.randn(4), "b": torch.tensor(2.0)}
    for name, state in states.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        save_file(state, folder / f"{name}.safetensors")
    whole = {"a.weight": torch.randn(5, 8), "a.bias": torch.randn(5), "z.weight": torch.randn(2, 9)}
    parts = {"model-00001-of-00002.safetensors": ["z.weight"]}
    parts["model-00002-of-00002.safetensors"] = ["a.weight", "a.bias"]
    (folder / "parts").mkdir()
    for file, names in parts.items():
        save_file({name: whole[name] for name in names}, folder / "parts" / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "parts/model.safetensors.index.json").write_text(json.dumps(index))
    states["parts/model.safetensors.index.json"] = whole
    return {name if name.endswith("json") else f"{name}.safetensors": state for name, state in states.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def states(folder):
    return fill(folder)


def expected_tokens(layout, state):
    """Numbers of each token one by one, from the names of the layout."""
    rows = []
    for weight, bias in layout.layers:
        for number, row in enumerate(state[weight].reshape(len(state[weight]) if state[weight].dim() else 1, -1)):
            numbers = row.tolist() + ([] if bias is None else [state[bias][number].item()])
            rows += [numbers[i : i + layout.token_size] for i in range(0, len(numbers), layout.token_size)]
    return [numbers + [0.0] * (layout.token_size - len(numbers)) for numbers in rows]


@pytest.mark.parametrize("norm", ["skip", "keep"])
def test_windows_are_those_of_each_file_whatever_its_dtype(folder, states, norm):
    hub = open_hub(folder, token_size=6, norm=norm, standardize=False)
    assert sorted(hub.models) == sorted(states) and not hub.left_out
    assert len({kind.layout.fingerprint for kind in hub.population.kinds}) == 6
    window, rows = 5, torch.arange(len(hub.models)).flip(0).repeat(2)
    start = (hub.population.num_tokens[rows] - window).clamp(min=0)
    start[: len(hub.models)] = 0
    found = cut(hub.population, rows, start, window)
    for b, row in enumerate(rows.tolist()):
        layout = hub.population.kinds[int(hub.population.kind[row])].layout
        tokens = torch.tensor(expected_tokens(layout, states[hub.models[row]]))
        tokens = torch.cat([tokens, torch.zeros(window, 6)])[start[b] : start[b] + window]
        assert torch.equal(found.values[b], tokens)
        count = min(window, layout.num_tokens)
        assert torch.equal(found.positions[b, :count], layout.positions[start[b] : start[b] + count])


def test_layouts_are_those_of_the_files(folder, states):
    hub = open_hub(folder, norm="keep")
    for row, name in enumerate(hub.models):
        layout = hub.population.kinds[int(hub.population.kind[row])].layout
        if name not in ("bias.safetensors",):
            assert layout.fingerprint == Layout.from_checkpoint(folder / name).fingerprint
        assert layout.token_size == 288


def test_layers_of_each_network_are_standardised_by_themselves(folder, states):
    hub = open_hub(folder, token_size=6)
    raw = open_hub(folder, token_size=6, standardize=False)
    rows = torch.tensor([hub.models.index(f"some/m{seed}.safetensors") for seed in (2, 0)])
    values = cut(hub.population, rows, rows * 0, 13).values
    plain = cut(raw.population, rows, rows * 0, 13)
    for b, seed in enumerate((2, 0)):
        state = states[f"some/m{seed}.safetensors"]
        layout = hub.population.kinds[int(hub.population.kind[rows[b]])].layout
        for number, (weight, bias) in enumerate(layout.layers):
            numbers = torch.cat([state[weight].flatten(), *([] if bias is None else [state[bias]])]).double()
            here = plain.positions[b, :, 1] == number
            expected = (plain.values[b, here] - numbers.mean()) / numbers.std()
            there = torch.arange(6) < plain.lengths[b, here, None]
            torch.testing.assert_close(values[b, here], (expected * there).float(), rtol=1e-5, atol=1e-5)


def test_large_layers_are_measured_by_a_sample(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file({"w": torch.randn(300, 400) * 5 + 1, "deg": torch.full((9, 9), 2.0)}, tmp_path / "a.safetensors")
    read = []
    hub = open_hub(tmp_path)
    monkeypatch.setattr(type(hub.population.arena), "prefetch", lambda self, begin, size: read.append(sum(size)))
    for _ in range(2):
        values = cut(hub.population, torch.tensor([0]), torch.tensor([0]), 609).values
    row = 4 * (measured.PIECES * measured.PIECE)
    assert read == [4 * (120_000 + 81), row + 4 * 81, 4 * (120_000 + 81)]
    layout = hub.population.kinds[0].layout
    large = values[0, layout.positions[:, 1] == [name for name, _ in layout.layers].index("w")].flatten()
    large = large[large != 0]
    assert large.std().item() == pytest.approx(1, abs=0.03) and abs(large.mean().item()) < 0.05
    assert values.isfinite().all() and (values[0, layout.positions[:, 1] == 0] == 0).all()


# --- what cannot be read


def test_bad_files_are_named_once_and_the_rest_goes_on(folder, states, tmp_path, capsys):
    fill(tmp_path)
    good = (tmp_path / "one.safetensors").read_bytes()
    bad = {
        "empty": b"",
        "truncated": good[:-3],
        "encrypted": bytes(range(7, 200)) * 9,
        "page": b"<!doctype html><html></html>",
        "no numbers": None,
        "quantised": None,
        "eight bits": None,
        "norms": None,
        "complex": None,
    }
    made = {
        "no numbers": {"n": torch.tensor([1, 2])},
        "quantised": {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.scale": torch.ones(4)},
        "eight bits": {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)},
        "norms": {"a.weight": torch.ones(4), "a.bias": torch.ones(4)},
        "complex": {"a.weight": torch.ones(4, 4, dtype=torch.complex64)},
    }
    for name, content in bad.items():
        if content is None:
            save_file(made[name], tmp_path / f"{name}.safetensors")
        else:
            (tmp_path / f"{name}.safetensors").write_bytes(content)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-(len(header) + 8) % 4 + 1)
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (tmp_path / "z copy.safetensors").write_bytes((tmp_path / "some/m1.safetensors").read_bytes())
    (tmp_path / "z link.safetensors").symlink_to(tmp_path / "half.safetensors")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost/lost-00001-of-00002.safetensors").write_bytes(good)
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt")
    (tmp_path / "broken.safetensors.index.json").write_text('{"weight_map": {"a": "../one.safetensors"}}')
    hub = open_hub(tmp_path, token_size=6)
    assert sorted(hub.models) == sorted(states)
    reasons = {name.removesuffix(".safetensors"): reason for name, reason in hub.left_out.items()}
    expected = {
        "empty": "the file is empty",
        "truncated": "truncated or damaged",
        "encrypted": "header must fit into the file",
        "page": "a web page",
        "no numbers": "must hold a floating tensor",
        "quantised": "weights must not be quantised, got 'a.weight' of torch.int8; dequantise it",
        "eight bits": "weights must not be quantised, got 'a.weight' of torch.float8_e4m3fn",
        "norms": "must have a layer beside norm layers",
        "complex": "must be real numbers",
        "odd": "numbers of 'x' must begin at a multiple of 4 bytes, got byte",
        "z copy": "holds the same numbers as some/m1.safetensors",
        "z link": "holds the same numbers as half.safetensors",
        "lost/lost-00001-of-00002": "must lie beside its index",
        "old.pt": "must be a safetensors file",
        "broken.safetensors.index.json": "must lie beside the index",
    }
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name] and "\n" not in reasons[name], (name, reasons[name])
    main(["train", "sane", "--hub", str(tmp_path), *options(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert all(printed.count(f"left out: {name}: ") == 1 for name in hub.left_out)
    assert f"hub: {len(states)} models of 6 architectures; permutations are known for 0 of them, none for" in printed


def options(out):
    return ["--size", "tiny", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--out", str(out)]


def test_numbers_that_are_not_finite_count_as_0_and_are_told_of(tmp_path, capsys):
    state = {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)}
    save_file(state, tmp_path / "good.safetensors")
    state["a.weight"][3, 4] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    hub = open_hub(tmp_path)
    values = cut(hub.population, torch.tensor([0, 1]), torch.tensor([0, 0]), 16).values
    cut(hub.population, torch.tensor([0, 1]), torch.tensor([0, 0]), 16)
    assert values.isfinite().all() and values[1, 3, 4] == 0 and (values[1, 4:, :8] != 0).all()
    assert capsys.readouterr().out == "note: weights of nan.safetensors must be finite, got others, which count as 0\n"


def test_folders_without_models_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="hub must be a folder of safetensors files, got nothing"):
        open_hub(tmp_path / "away")
    with pytest.raises(ValueError, match="hub must hold a safetensors file that can be read, got none"):
        open_hub(tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"zoo": ("a",)}, "hub must be left out where there are zoos, got unset and a"),
        ({"hub": None}, "zoo must be folders, each once, got none"),
        ({"aligned": True}, "aligned must be left out for a hub, got True"),
        ({"behaviour": 0.5}, "behaviour must be left out for a hub, got 0.5"),
        ({"statistic": "l2"}, "statistic std or none, for a hub, got row and l2"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)


# --- permutations


def perceptron():
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))


def test_models_with_a_config_are_permuted_and_others_stay(tmp_path, capsys):
    for name, config in {"a": {"deep": 1}, "b": {"deep": 1, "dtype": "x"}, "c": {"deep": 2}, "d": None}.items():
        (tmp_path / name).mkdir()
        save_file(perceptron().state_dict(), tmp_path / name / "model.safetensors")
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    asked = []

    def trace(config, layout):
        asked.append(json.loads(config))
        if asked[-1] == {"deep": 2}:
            raise ValueError("not known")
        return Symmetry.trace(perceptron(), torch.randn(2, 3))

    hub = open_hub(tmp_path, token_size=7, standardize=False, trace=trace)
    assert asked == [{"deep": 1}, {"deep": 2}] and not hub.left_out
    assert "permutations are known for 2 of them, none for 2" in hub.describe()[0]
    assert capsys.readouterr().out.startswith("note: permutations of c/model.safetensors and those like it are not")
    rows = torch.arange(4)
    permutations = random_permutations(hub.population, rows, 0, 5)
    count = int(hub.population.num_tokens.max())
    values = cut(hub.population, rows, rows * 0, count, permutations).values
    for row, name in enumerate(hub.models):
        kind = hub.population.kinds[int(hub.population.kind[row])]
        flat = kind.layout.flatten(tmp_path / name)
        moved = flat
        if kind.symmetry is not None:
            moved = kind.symmetry.permute(flat, permutations[row, : kind.symmetry.num_indices], kind.layout)
            assert not torch.equal(moved, flat)
        assert torch.equal(values[row], kind.layout.tokenize(moved).values)


# --- training


def source_of(config, folder):
    return batches.make_hub_source(config, sane.find_hub(replace(config, hub=str(folder))))


def test_processes_cut_the_batch_of_one_and_read_their_share(folder, states, monkeypatch):
    config = replace(CONFIG, noise=0.2, erase=0.1, rectangle=0.5, target="clean")
    whole = batches.draw(config, source_of(config, folder), "train", 3)
    parts, opened = [], []
    for rank in range(2):
        monkeypatch.setattr(processes, "world", lambda: 2)
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        source = source_of(config, folder)
        parts.append(batches.draw(config, source, "train", 3))
        read = source.population.measured.known.nonzero().flatten()
        opened.append(set((torch.searchsorted(source.population.measured.first, read, right=True) - 1).tolist()))
    for field in ("values", "target", "lengths", "positions"):
        dim = 1 if field in ("values", "target") else 0
        assert torch.equal(torch.cat([getattr(part, field) for part in parts], dim), getattr(whole, field))
    assert opened[0] != opened[1]


def test_runs_resume_bit_for_bit_and_only_on_the_same_models(folder, states, tmp_path):
    config = replace(CONFIG, hub=str(folder), out=str(tmp_path / "whole"))
    metrics = sane.train(config, sane.find_hub(config), CPU)
    assert {"train/loss", "val/r2"} <= metrics.keys()

    parted = replace(config, out=str(tmp_path / "parted"), save_every=2)
    evaluate = sane.evaluate_group
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sane, "evaluate_group", interrupted)
        sane.train(parted, sane.find_hub(parted), CPU)
    sane.train(parted, sane.find_hub(parted), CPU)
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parted")
    )
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in ("some/m0", "some/m1", "some/m2"):
        save_file(load_file(folder / f"{name}.safetensors"), fewer / f"{name[-2:]}.safetensors")
    changed = replace(config, hub=str(folder))
    with pytest.raises(ValueError, match="hub must be what it was to resume"):
        sane.train(changed, sane.find_hub(replace(changed, hub=str(fewer))), CPU)


# --- embeddings


@pytest.fixture(scope="module")
def run(folder, states, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    main(["train", "sane", "--hub", str(folder), *options(out)])
    return out / "checkpoint.pt"


def embed(run, folder, out, *more):
    main(["embed", "--model", str(run), "--hub", str(folder), "--out", str(out), "--device", "cpu", *more])
    return out


def test_embeddings_have_a_row_for_each_model_whatever_lies_beside_it(run, folder, states, tmp_path):
    found = load_file(embed(run, folder, tmp_path / "all.safetensors"))["embeddings"]
    assert len(found) == len(states) and found.isfinite().all()
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(states["some/m2.safetensors"], alone / "x.safetensors")
    save_file({"a.weight": torch.full((4, 4), torch.nan)}, alone / "nan.safetensors")
    one = load_file(embed(run, alone, tmp_path / "one.safetensors"))["embeddings"]
    row = sorted(states).index("some/m2.safetensors")
    torch.testing.assert_close(one, found[row : row + 1])


def test_neighbors_are_named_by_path(run, folder, states, tmp_path, capsys):
    out = str(embed(run, folder, tmp_path / "all.safetensors"))
    capsys.readouterr()
    arguments = ["neighbors", "--embeddings", out, "--count", "2", "--json", "--model", "some/m1.safetensors"]
    main([*arguments, "--hub", str(folder)])
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["model"] == "some/m1.safetensors" and len(network["neighbors"]) == 2
    assert {near["model"] for near in network["neighbors"]} <= set(states) - {"some/m1.safetensors"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="must be of the models of hub .*, got 'bias.safetensors'"):
        main([*arguments, "--hub", str(tmp_path / "empty")])


@pytest.mark.parametrize("pool", ["layers", "tokens", "spread"])
def test_parquet_has_a_row_for_each_vector(run, folder, states, tmp_path, pool, capsys):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.read_table(embed(run, folder, tmp_path / "all.parquet", "--pool", pool)).to_pydict()
    assert sorted(set(table["model"])) == sorted(states)
    own = [layer for model, layer in zip(table["model"], table["layer"], strict=True) if model == "one.safetensors"]
    assert own == ["x"] * (len(own) if pool == "tokens" else 1)
    with pytest.raises(SystemExit):
        embed(run, folder, tmp_path / "all.safetensors", "--pool", pool)
    assert "out must end in .parquet" in capsys.readouterr().err
