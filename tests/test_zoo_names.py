"""Which tensor of a file is which of an architecture: equal rows, or a state that is left out with its reason."""

import collections
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastws.cli import main
from fastws.zoo import Zoo, read_checkpoints, read_hub
from fastws.zoo.readers import reasons as reasons_of
from fastws.zoo.readers.reasons import REASONS, BadState
from fastws.zoo.readers.record import read_report


def save(state, path):
    path.parent.mkdir(exist_ok=True)
    save_file(dict(state), path) if path.suffix == ".safetensors" else torch.save(state, path)


def reasons(zoo):
    return [entry.reason for entry in read_report(zoo.path).bad]


def attention(seed=0):
    """Four tensors of one shape, in an order that is not the one of their names."""
    generator = torch.Generator().manual_seed(seed)
    return collections.OrderedDict((f"attn.{n}_proj.weight", torch.randn(4, 4, generator=generator)) for n in "qkvo")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "model.", "encoder.layers.0."])
def test_prefix_that_all_names_share_is_set_aside(tmp_path, prefix, suffix):
    save(attention(), tmp_path / "nets/a.pt")
    save({prefix + name: tensor for name, tensor in attention().items()}, tmp_path / f"nets/b.{suffix}")
    for number, like in enumerate((None, tmp_path / f"nets/b.{suffix}")):
        zoo = read_checkpoints(tmp_path / "nets", tmp_path / f"zoo{number}", like=like)
        assert len(zoo) == 2 and torch.equal(zoo.weights[0], zoo.weights[1])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_numbers_of_modules_are_ranked(tmp_path, suffix):
    """Dropout shifts them; in a file that is sorted by name, module 10 stands before module 2."""
    numbers = {"plain": range(0, 16, 2), "dropout": range(0, 24, 3)}
    weights = torch.randn(8, 2, 3, 3)
    for file, name in (("a", "plain"), ("b", "dropout")):
        state = {f"net.{i}.0.weight": weight[0] for i, weight in zip(numbers[name], weights, strict=True)}
        state |= {f"net.{i}.{2 + (file == 'b')}.weight": w[1] for i, w in zip(numbers[name], weights, strict=True)}
        save(state, tmp_path / f"nets/{file}.{suffix}")
    zoo = read_checkpoints(tmp_path / "nets", tmp_path / "zoo")
    assert len(zoo) == 2 and torch.equal(zoo.weights[0], zoo.weights[1])
    assert torch.equal(zoo.checkpoint(1)["net.14.2.weight"], weights[7, 1])


def test_names_that_say_no_order_are_refused(tmp_path):
    save(attention(), tmp_path / "nets/a.pt")
    renamed = dict(zip(("first", "second", "third", "fourth"), attention().values(), strict=True))
    save({f"attn.{name}.weight": tensor for name, tensor in renamed.items()}, tmp_path / "nets/b.pt")
    with pytest.warns(UserWarning, match="1 of 2 states left out: 1 other names"):
        zoo = read_checkpoints(tmp_path / "nets", tmp_path / "zoo")
    where = f"{tmp_path}/nets/a.pt"
    named = "'attn.first.weight' must have the name that it has in"
    assert reasons(zoo) == [f"other names: {named} {where}, perhaps 'attn.q_proj.weight'"]


CHANGES = {  # how another network differs, and what is said of it
    "shape": ({"fc.weight": torch.ones(3, 5)}, "other architecture: 'fc.weight' must be [3, 2] as in {}, got [3, 5]"),
    "missing": ({"fc.bias": None}, "tensors missing: 'fc.bias' must be [3] as in {}, got nothing"),
    "more": ({"fc.scale": torch.ones(7)}, "other architecture: 'fc.scale' must not be there, as in {}, got [7]"),
    "integers": ({"fc.bias": torch.arange(3)}, "tensors missing: 'fc.bias' must be [3] as in {}, got nothing"),
    "complex": ({"z": torch.ones(2) * 1j}, "other architecture: 'z' must not be there, as in {}, got [2]"),
    "not finite": ({"fc.bias": torch.full((3,), torch.nan)}, "not finite: weights must be finite, got 3 that are not"),
    "complex in place of real": (
        {"fc.bias": torch.ones(3) * 1j},
        "other architecture: 'fc.bias' must be of real numbers as in {}, got torch.complex64",
    ),
    "other dtype": (
        {"fc.bias": torch.ones(3).double()},
        "other dtype: 'fc.bias' must be torch.float32 or narrower as in {}, got torch.float64;"
        " say --like <a checkpoint of wider dtypes>",
    ),
}


@pytest.mark.parametrize("change, reason", CHANGES.values(), ids=CHANGES)
def test_reason_says_what_was_expected_what_is_there_and_which_file_says_so(tmp_path, change, reason):
    state = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3), "out.weight": torch.ones(2, 3)}
    save(state, tmp_path / "nets/a.pt")
    save({name: tensor for name, tensor in (state | change).items() if tensor is not None}, tmp_path / "nets/b.pt")
    with pytest.warns(UserWarning, match="1 of 2 states left out"):
        zoo = read_checkpoints(tmp_path / "nets", tmp_path / "zoo")
    assert reasons(zoo) == [reason.format(f"{tmp_path}/nets/a.pt")]


# --- tied tensors


def tied_network(tie):
    net = nn.ModuleDict({"embed": nn.Embedding(6, 3), "head": nn.Linear(3, 6, bias=False)})
    if tie:
        net["head"].weight = net["embed"].weight
    return net.state_dict()


def test_ties_of_the_first_are_compared(tmp_path):
    states = [tied_network(True), tied_network(False), {}, {}]
    states[2] = {name: tensor.clone() for name, tensor in states[0].items()}  # equal, though not one
    states[3] = {"embed.weight": states[0]["embed.weight"]}  # as safetensors files are saved
    for number, state in enumerate(states):
        save(state, tmp_path / f"nets/m{number}.pt")
    save(states[3], tmp_path / "nets/m4.safetensors")
    with pytest.warns(UserWarning, match="1 of 5 states left out: 1 ties differ"):
        zoo = read_checkpoints(tmp_path / "nets", tmp_path / "zoo")
    assert zoo.properties["file"].to_pylist() == ["m0.pt", "m2.pt", "m3.pt", "m4.safetensors"]
    where, fix = f"{tmp_path}/nets/m0.pt", "say --like <a checkpoint in which they are two>"
    expected = f"'head.weight' must be equal to 'embed.weight' as in {where}, got other numbers; {fix}"
    assert reasons(zoo) == [f"ties differ: {expected}"]
    assert (zoo.weights == zoo.weights[0]).all()
    assert zoo.checkpoint(1).keys() == states[0].keys()
    zoo = read_checkpoints([tmp_path / f"nets/m{i}.pt" for i in (0, 1)], tmp_path / "two", like=tmp_path / "nets/m1.pt")
    for row, state in enumerate(states[:2]):
        assert all(torch.equal(zoo.checkpoint(row)[name], tensor) for name, tensor in state.items())


def test_second_names_of_what_is_there_are_no_other_architecture(tmp_path):
    """The first file holds the body alone, under its own names; the second has a tied head outside of the body."""
    tied = tied_network(True)
    body = {"wte.weight": tied["embed.weight"], "ln.weight": torch.ones(3)}
    save(body, tmp_path / "nets/a.safetensors")
    whole = {f"transformer.{name}": tensor for name, tensor in body.items()}
    save(whole | {"lm_head.weight": whole["transformer.wte.weight"]}, tmp_path / "nets/b.pt")
    save(whole | {"lm_head.weight": torch.ones(6, 3)}, tmp_path / "nets/c.pt")
    with pytest.warns(UserWarning, match="1 of 3 states left out: 1 other architecture"):
        zoo = read_checkpoints(tmp_path / "nets", tmp_path / "zoo")
    assert len(zoo) == 2 and torch.equal(zoo.weights[0], zoo.weights[1])


# --- variances


def test_log_sigma_is_a_parameter_unless_it_has_the_shape_of_a_weight_beside_it(tmp_path):
    for seed in range(2):  # a policy with a spread of its own
        state = {"fc.weight": torch.randn(3, 2), "fc.bias": torch.randn(3), "log_sigma": torch.randn(3)}
        save(state | {"fc.log_sigma": torch.randn(3)}, tmp_path / f"nets/m{seed}.pt")
    zoo = read_checkpoints(tmp_path / "nets", tmp_path / "zoo")
    assert zoo.layout.num_weights == 15 and "log_sigma" in zoo.layout.describe()
    state["fc.log_sigma2"], state["fc.log_sigma2_bias"] = torch.ones(3, 2), torch.ones(1)
    save(state, tmp_path / "twin/m.pt")
    with pytest.warns(UserWarning, match="states with 2 tensors named log_sigma.* are not in the zoo: 1"):
        zoo = read_checkpoints(tmp_path / "twin", tmp_path / "twin-zoo")
    assert zoo.layout.num_weights == 12
    assert json.loads((zoo.path / "read.json").read_text())["aside"][0][2] == 1


# --- what is skipped


def skipped(zoo):
    return [(entry.path.removeprefix(f"{zoo.path.parent}/"), entry.reason) for entry in read_report(zoo.path).skipped]


def test_files_that_no_suffix_named_are_counted(tmp_path, capsys):
    save(attention(), tmp_path / "nets/a.pt")
    for name in ("notes.txt", "log.txt", "README", "weights.gguf"):
        (tmp_path / "nets" / name).write_bytes(b"GGUF" if name.endswith("gguf") else b"text")
    save(attention(), tmp_path / "nets/b-00001-of-00002.safetensors")
    main(["zoo", "read", "--paths", str(tmp_path / "nets"), "--out", str(tmp_path / "zoo")])
    suffixes = ".pt, .pth, .th, .ckpt, .bin, .safetensors"
    counted = f"files must have one of the suffixes {suffixes}, got 4 with others (2 .txt, 1 without, 1 .gguf)"
    (part, why), (folder, reason) = skipped(Zoo.open(tmp_path / "zoo"))
    assert part == "nets/b-00001-of-00002.safetensors" and why.startswith(
        "part of a checkpoint must lie beside its index"
    )
    assert folder == "nets" and reason.startswith(
        f"{counted}; weights.gguf is a GGUF file of llama.cpp; let transformers"
    )
    printed = capsys.readouterr().out
    assert f"  skipped: {tmp_path}/nets: {counted}" in printed and "  skipped: " + str(tmp_path / part) in printed


EMPTY = {  # what lies in a folder without checkpoints, and what is said of it
    "flax": (
        ["config.json", "flax_model.msgpack"],
        "flax_model.msgpack is a msgpack file, as Flax writes; read it with",
    ),
    "distributed": ([".metadata", "__0_0.distcp"], "got a folder of torch.distributed.checkpoint; convert it with"),
    "DeepSpeed": (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "got a DeepSpeed"),
    "text": (["notes.txt"], r"got 1 with others \(1 .txt\)$"),
}


@pytest.mark.parametrize("names, sentence", EMPTY.values(), ids=EMPTY)
def test_folder_without_checkpoints_says_what_it_has(tmp_path, names, sentence):
    (tmp_path / "nets").mkdir()
    for name in names:
        (tmp_path / "nets" / name).write_bytes(b"\x81\xa6params\x80" if name.endswith("msgpack") else b"{}")
    with pytest.raises(SystemExit, match=rf"source must hold checkpoints, got none; {tmp_path}/nets: .*{sentence}"):
        main(["zoo", "read", "--paths", str(tmp_path / "nets"), "--out", str(tmp_path / "zoo")])
    assert not (tmp_path / "zoo").exists()


def test_repositories_that_are_skipped_are_listed(tmp_path):
    held = {"a": ["config.json"], "b": ["config.json", "tf_model.h5"], "c": ["adapter.pt"], "d": ["config.json"]}
    for name, files in held.items():
        (tmp_path / "hub" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "hub" / name / file).write_text("{}")
    save(attention(), tmp_path / "hub/a/model.safetensors")
    zoo = read_hub(tmp_path / "hub", tmp_path / "zoo")
    repository = "repository must hold safetensors files or pytorch_model.bin"
    assert skipped(zoo) == [
        ("hub/b", f"{repository}, got tf_model.h5"),
        ("hub/c", "repository must hold config.json, got adapter.pt without it"),
        ("hub/d", f"{repository}, got no weights"),
    ]


def test_reasons_stand_in_one_list():
    source = "".join(path.read_text() for path in Path(reasons_of.__file__).parent.glob("*.py"))
    assert set(re.findall(r'BadState\(\s*"([^"]+)"', source)) == REASONS.keys()
    with pytest.raises(KeyError):
        BadState("bad weather")


def test_command_explains_what_it_left_out(tmp_path, capsys):
    save(attention(), tmp_path / "nets/a.pt")
    for number in range(5):
        save({"attn.q_proj.weight": torch.ones(4, 5)}, tmp_path / f"nets/b{number}.pt")
    with pytest.warns(UserWarning, match="5 of 6 states left out: 5 other architecture"):
        main(["zoo", "read", "--paths", str(tmp_path / "nets"), "--out", str(tmp_path / "zoo")])
    lines = capsys.readouterr().out.splitlines()
    details = f"'attn.q_proj.weight' must be [4, 4] as in {tmp_path}/nets/a.pt, got [4, 5]"
    assert lines[-4:] == [
        f"  5 other architecture: {REASONS['other architecture']}",
        *(f"    {tmp_path}/nets/b{number}.pt: {details}" for number in range(3)),
    ]
