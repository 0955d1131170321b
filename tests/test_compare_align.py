"""fastws align: the same functions in the coordinates of a base, in files like those that came."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from compared import moved, network, save, train
from safetensors.torch import load_file, save_file

from fastws.compare.align import Config, align, run
from fastws.compare.aligning import Aligned, Aligner
from fastws.compare.states import Distance
from fastws.files.checkpoints import load_checkpoint
from fastws.files.safetensors import read_description
from fastws.group.group import Group
from fastws.symmetry.symmetry import Symmetry
from fastws.zoo.making.architectures import build

CONFIG = partial(Config, architecture="digits-cnn", activation="relu")


@pytest.fixture
def pair(tmp_path):
    """A base and the same network with its units in another order."""
    base = network()
    return save(base.state_dict(), tmp_path / "base.safetensors"), save(moved(base), tmp_path / "other.safetensors")


def test_moved_copy_becomes_its_base_bit_by_bit(pair, tmp_path):
    base, other = pair
    (place, report), *_ = align(CONFIG(models=(other,), to=base, out=str(tmp_path / "out"))).items()
    assert place == str(tmp_path / "out" / "other.safetensors")
    assert all(torch.equal(tensor, load_file(base)[name]) for name, tensor in load_file(place).items())
    assert report["raw"]["cosine"] < 0.9 and report["aligned"] == {"relative": 0.0, "cosine": pytest.approx(1)}
    assert report["exact"] and report["error"] < 1e-12 and 0.5 < report["moved"] <= 1
    end = read_description(Path(other))[1]
    assert Path(place).read_bytes()[:end] == Path(other).read_bytes()[:end]


def test_signs_of_odd_units(tmp_path):
    module = network(activation="tanh")
    base = save(module.state_dict(), tmp_path / "base.safetensors")
    other = save(moved(module, flips=True), tmp_path / "other.safetensors")
    options = {"models": (other,), "to": base, "architecture": "digits-cnn", "activation": "tanh"}
    (report,) = align(Config(**options, out=str(tmp_path / "signed"))).values()
    assert report["aligned"]["relative"] == 0
    (report,) = align(Config(**options, out=str(tmp_path / "unsigned"), signs=False)).values()
    assert report["aligned"]["relative"] > 0.1


def sharded(folder, state, dtype=torch.bfloat16):
    """A folder as save_pretrained writes it, in two shards, with files beside them."""
    folder.mkdir()
    parts = {f"model-0000{k}-of-00002.safetensors": list(state)[k - 1 :: 2] for k in (1, 2)}
    for file, names in parts.items():
        tensors = {name: state[name].detach().to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in parts for name in parts[file]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words.txt").write_text("some words")
    (folder / "original" / "tables").mkdir(parents=True)
    (folder / "original" / "consolidated.00.pth").write_bytes(b"weights of before")
    (folder / "original" / "tables" / "numbers.txt").write_text("some numbers")
    (folder / "README.md").write_text("a card")
    (folder / "pytorch_model.bin").write_bytes(b"weights of before")
    return str(folder)


def test_folder_keeps_shards_names_dtypes_and_other_files(tmp_path):
    module = network()
    base, other = sharded(tmp_path / "base", module.state_dict()), sharded(tmp_path / "other", moved(module))
    (report,) = align(CONFIG(models=(other,), to=base, out=str(tmp_path / "out"))).values()
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    kept = {str(p.relative_to(tmp_path / "other")) for p in (tmp_path / "other").rglob("*") if p.is_file()}
    left_out = ["original/consolidated.00.pth", "pytorch_model.bin"]
    assert files == sorted(kept - {*left_out} | {"aligned.json"})
    assert report["left_out"] == left_out
    for file in ("README.md", "model.safetensors.index.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    ours, theirs = load_checkpoint(tmp_path / "out"), load_checkpoint(base)
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_tensor_of_a_shard_that_the_index_does_not_have_is_one_sentence(tmp_path):
    module = network()
    base, other = sharded(tmp_path / "base", module.state_dict()), sharded(tmp_path / "other", moved(module))
    shard = tmp_path / "other" / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {"old.weight": torch.ones(3)}, shard)
    with pytest.raises(ValueError, match="00001-of-00002.safetensors: 'old.weight' must be in the index beside it"):
        align(CONFIG(models=(other,), to=base, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_shards_of_torch_files_keep_their_names(tmp_path):
    module = network()
    for folder, state in ((tmp_path / "base", module.state_dict()), (tmp_path / "other", moved(module))):
        folder.mkdir()
        parts = {f"pytorch_model-0000{k}-of-00002.bin": list(state)[k - 1 :: 2] for k in (1, 2)}
        for file, names in parts.items():
            torch.save({f"module.{name}": state[name] for name in names}, folder / file)
        places = {f"module.{name}": file for file in parts for name in parts[file]}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    align(CONFIG(models=(str(tmp_path / "other"),), to=str(tmp_path / "base"), out=str(tmp_path / "out")))
    for file in parts:
        ours, theirs = (torch.load(tmp_path / name / file, weights_only=True) for name in ("out", "base"))
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_torch_files_stay_torch_files(pair, tmp_path):
    base, other = pair
    wrapped = {f"module.{name}": tensor for name, tensor in load_file(other).items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "other.pt")
    (place,) = align(CONFIG(models=(str(tmp_path / "other.pt"),), to=base, out=str(tmp_path / "out")))
    found = torch.load(place, weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(base).items())


def test_two_class_counts_align_what_fits(tmp_path):
    module, wide = network(), network(seed=3, classes=7).state_dict()
    state = moved(module)
    last = [name for name, tensor in wide.items() if tensor.shape != state[name].shape]
    state |= {name: wide[name] for name in last}
    base, other = save(module.state_dict(), tmp_path / "base.safetensors"), save(state, tmp_path / "other.safetensors")
    (place, report), *_ = align(CONFIG(models=(other,), to=base, out=str(tmp_path / "out"))).items()
    found = load_file(place)
    assert all(torch.equal(found[name], x) for name, x in module.state_dict().items() if name not in last)
    assert len(report["unmatched"]) == 2 == len(last)
    assert "is [7, 16] here and [10, 16] in the base" in report["unmatched"][1]


def test_several_models_meet_in_the_coordinates_of_the_first(tmp_path):
    module = network()
    states = [module.state_dict(), moved(module, 1), moved(module, 2)]
    models = tuple(save(state, tmp_path / f"{k}.safetensors") for k, state in enumerate(states))
    for place in align(CONFIG(models=models, out=str(tmp_path / "out"))):
        found = load_file(place)
        assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())


def test_module_with_a_name_is_traced_once_for_all_models_that_it_fits(tmp_path, monkeypatch):
    module, traced, trace = network(), [], Symmetry.trace
    monkeypatch.setattr(Symmetry, "trace", lambda *given: traced.append(given) or trace(*given))
    base = save(module.state_dict(), tmp_path / "base.safetensors")
    models = [save(moved(module, seed), tmp_path / f"{seed}.safetensors") for seed in range(3)]
    traced.clear()
    for place in align(CONFIG(models=tuple(models), to=base, out=str(tmp_path / "out"))):
        assert all(torch.equal(tensor, load_file(base)[name]) for name, tensor in load_file(place).items())
    assert len(traced) == 1


def test_folder_of_models_without_the_base(pair, tmp_path):
    done = align(CONFIG(models=(str(tmp_path),), to=pair[0], out=str(tmp_path / "out")))
    assert [Path(place).name for place in done] == ["other.safetensors"]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_by_activations(activation, tmp_path):
    module = train(network(activation=activation), steps=60)
    base = save(module.state_dict(), tmp_path / "base.safetensors")
    other = save(moved(module, flips=True), tmp_path / "other.safetensors")
    options = {"architecture": "digits-cnn", "activation": activation, "by": "activations"}
    config = Config(models=(other,), to=base, data="digits", statistics=300, out=str(tmp_path / "out"), **options)
    ((place, report),) = align(config).items()
    assert report["aligned"]["cosine"] > 0.99  # units that are dead on these images may lie in any order
    with pytest.raises(ValueError, match="--data must be given to match by activations"):
        align(Config(models=(other,), to=base, out=str(tmp_path / "none"), **options))


def test_continuous_takes_the_whole_group(tmp_path):
    module = train(network(), steps=60)
    group = Group.trace(module, torch.randn(1, 1, 8, 8))
    base = save(module.state_dict(), tmp_path / "base.safetensors")
    scaled = save(group.apply(group.random(1), module.state_dict()), tmp_path / "scaled.safetensors")
    options = {"models": (scaled,), "to": base}
    (permuted,) = align(CONFIG(**options, out=str(tmp_path / "permuted"))).values()
    ((place, whole),) = align(CONFIG(**options, continuous=True, out=str(tmp_path / "whole"))).items()
    assert permuted["exact"] and permuted["aligned"]["relative"] > 0.1
    assert not whole["exact"] and whole["aligned"]["relative"] < 1e-5 and whole["canonical"]["cosine"] > 1 - 1e-9
    assert 0 < whole["error"] < 4 * whole["rounding"] < 1e-4
    for name, tensor in load_file(place).items():
        torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="--continuous must be left out with --by activations"):
        align(CONFIG(**options, continuous=True, by="activations", data="digits", out=str(tmp_path / "none")))
    models = (base, scaled, save(group.apply(group.random(2), module.state_dict()), tmp_path / "third.safetensors"))
    for place in align(CONFIG(models=models, continuous=True, out=str(tmp_path / "mean"))):
        for name, tensor in load_file(place).items():
            torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-4, atol=1e-6)


# --- begin, resume, refuse


def test_the_same_command_again_does_nothing_and_another_is_refused(pair, tmp_path):
    base, other = pair
    config = CONFIG(models=(other,), to=base, out=str(tmp_path / "out"))
    (place, report), *_ = align(config).items()
    before = Path(place).stat().st_mtime_ns
    assert align(config) == {place: report} and Path(place).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="restarts must be 1, with which .* was begun, got 2; give another --out"):
        align(CONFIG(models=(other,), to=base, out=str(tmp_path / "out"), restarts=2))
    Path(place).with_name("other.safetensors.aligned.json").unlink()
    with pytest.raises(OSError, match="must be new, got one that is there; give another --out"):
        align(config)


def test_a_record_of_another_version_is_one_sentence(pair, tmp_path):
    base, other = pair
    config = CONFIG(models=(other,), to=base, out=str(tmp_path / "out"))
    align(config)
    record = tmp_path / "out/other.safetensors.aligned.json"
    fields = json.loads(record.read_text())
    del fields["report"]["canonical"]
    record.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="aligned.json: file must be the record that this version of fastws align"):
        run(config)


def test_what_a_killed_run_left_is_written_anew(tmp_path):
    module = network()
    base, other = sharded(tmp_path / "base", module.state_dict()), sharded(tmp_path / "other", moved(module))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    align(CONFIG(models=(other,), to=base, out=str(tmp_path / "out")))
    assert not (tmp_path / "out.partial").exists() and load_checkpoint(tmp_path / "out")


def test_nothing_is_written_if_the_function_changed(pair, tmp_path, monkeypatch):
    base, other = pair

    def wrong(aligner, base, state):
        changed = dict(state) | {"module_list.0.weight": state["module_list.0.weight"].flip(0)}
        return Aligned(changed, Distance(0, 1), Distance(0, 1), 1.0, [], True)

    monkeypatch.setattr(Aligner, "pair", wrong)
    with pytest.raises(ValueError, match="outputs must stay what they are, got relative error .*; nothing was written"):
        align(CONFIG(models=(other,), to=base, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_sentence(pair, tmp_path):
    base, other = pair
    out = str(tmp_path / "out")
    mlp = build("mlp", (1, 8, 8))
    stranger = save(mlp.state_dict(), tmp_path / "mlp.safetensors")
    for config, said in (
        (CONFIG(models=(other,), to=stranger, out=out), "networks must be of one architecture, but 'module_list"),
        (CONFIG(models=(stranger,), to=base, out=out), "checkpoint must fit digits-cnn, but 'module_list"),
        (CONFIG(models=(other,), out=out), "--to must be given where there is one model"),
        (CONFIG(models=(other,), to=base, out=str(tmp_path)), "out must be another folder than that of"),
        (CONFIG(models=(other, other), to=str(tmp_path / "none"), out=out), "checkpoint must be a file, got nothing"),
        (Config(models=(other,), to=base, out=out), "--architecture must say"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            align(config)
    (tmp_path / "loop").symlink_to("loop")
    for config, said in (
        (CONFIG(models=(str(tmp_path / "loop"),), to=base, out=out), "checkpoint must be a file, got nothing"),
        (CONFIG(models=(other,), to=base, out=str(tmp_path / "loop")), "."),
    ):
        with pytest.raises(OSError, match=said):
            align(config)
    zeros = save({name: 0 * tensor for name, tensor in load_file(other).items()}, tmp_path / "zeros.safetensors")
    for _ in range(2):  # the second time it is read
        (report,) = align(CONFIG(models=(zeros,), to=base, out=str(tmp_path / "zero"))).values()
        assert report["aligned"] == {"relative": float("inf"), "cosine": 0}
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(OSError, match="must be a checkpoint or hold some, got none beside .*one.safetensors"):
        align(CONFIG(models=(str(alone),), to=save(mlp.state_dict(), alone / "one.safetensors"), out=out))
    state = load_file(other)
    state["module_list.0.bias"][0] = torch.nan
    with pytest.raises(ValueError, match="flat must be finite"):
        align(CONFIG(models=(save(state, tmp_path / "nan.safetensors"),), to=base, out=out))
    with pytest.warns(UserWarning, match="quantised"), pytest.raises(ValueError, match="as floats, got .* quantised"):
        integers = {name: x.to(torch.int8) if x.dim() > 1 else x for name, x in load_file(other).items()}
        align(CONFIG(models=(save(integers, tmp_path / "int8.safetensors"),), to=base, out=out))
    assert not Path(out).exists()
