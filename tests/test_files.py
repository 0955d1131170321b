"""Checkpoint files as others write them: names, keys, dtypes, and what is no checkpoint."""

import bz2
import copy
import gzip
import io
import json
import lzma
import tarfile
import warnings
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import fastws
from fastws.cli import main
from fastws.files.checkpoints import load_checkpoint, open_checkpoint
from fastws.files.names import plain_names
from fastws.nern.teachers import load_teacher, make_architecture
from fastws.zoo import ReadOptions, Zoo, read_checkpoints
from fastws.zoo.readers.record import read_report


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def save(state, path):
    save_file(dict(state), path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


# --- names

NAMES = {
    "parallel": (["module.a.weight", "module.b"], ["a.weight", "b"]),
    "compiled": (["_orig_mod.a.weight", "_orig_mod.b"], ["a.weight", "b"]),
    "both": (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
    "both, otherwise": (["_orig_mod.module.module._orig_mod.a", "_orig_mod.module.module._orig_mod.b"], ["a", "b"]),
    "compiled inside": (["layers.0._orig_mod.weight", "head.weight"], ["layers.0.weight", "head.weight"]),
    "averaged": (["n_averaged", "module.a", "module.b"], ["n_averaged", "a", "b"]),
    "not around all": (["module.a", "b"], ["module.a", "b"]),
    "not in front": (["a.module.b", "a.module.c"], ["a.module.b", "a.module.c"]),
    "two would become one": (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),
    "a tensor of this name": (["_orig_mod", "a"], ["_orig_mod", "a"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("names, plain", NAMES.values(), ids=NAMES)
def test_plain_names(names, plain):
    assert plain_names(names) == dict(zip(names, plain, strict=True))


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_are_dropped_in_every_format(tmp_path, prefix):
    net = network()
    layout, state = fastws.Layout.from_checkpoint(net), net.state_dict()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    files = [save(wrapped, tmp_path / f"a.{suffix}") for suffix in ("pt", "safetensors")]
    torch.save({"state_dict": wrapped}, tmp_path / "key.pt")
    torch.save(wrapped, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for suffix, index in (("safetensors", "a.safetensors.index.json"), ("pt", "a.bin.index.json")):
        (tmp_path / index).write_text(json.dumps({"weight_map": dict.fromkeys(wrapped, f"a.{suffix}")}))
        files.append(tmp_path / index)
    for source in (wrapped, tmp_path / "key.pt", tmp_path / "legacy.pt", *files):
        assert torch.equal(layout.flatten(source), layout.flatten(net))
        other = fastws.Layout.from_checkpoint(source)
        assert {entry.name: entry.shape for entry in other.entries} == {k: tuple(v.shape) for k, v in state.items()}
    zoo = read_checkpoints([*files[:2], tmp_path / "legacy.pt"], tmp_path / "zoo", like=layout)
    assert torch.equal(zoo.weights, layout.flatten(net).expand(3, -1))


def wrapped_networks(net):
    inner = copy.deepcopy(net)
    inner[0] = torch.compile(inner[0], backend="eager")
    compiled = torch.compile(net, backend="eager")
    return {
        "parallel": nn.DataParallel(net),
        "compiled": compiled,
        "one layer": inner,
        "both": nn.DataParallel(compiled),
    }


@pytest.mark.parametrize("name", ["parallel", "compiled", "one layer", "both"])
def test_wrapped_modules_have_the_layout_and_the_symmetry_of_what_they_wrap(name):
    net, x = network(), torch.randn(1, 4)
    layout, wrapped = fastws.Layout.from_checkpoint(net), wrapped_networks(net)[name]
    assert fastws.Layout.from_checkpoint(wrapped) == layout
    assert torch.equal(layout.flatten(wrapped), layout.flatten(net))
    symmetry = fastws.Symmetry.trace(wrapped, x)
    assert symmetry == fastws.Symmetry.trace(net, x) and symmetry.sizes == (8,)
    permutations, state = symmetry.random(1, 3)[0], wrapped.state_dict()
    permuted = symmetry.permute_state(state, permutations)
    assert permuted.keys() == state.keys()
    assert torch.equal(layout.flatten(permuted), symmetry.permute(layout.flatten(net), permutations, layout))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_teachers_may_be_saved_with_wrappers(tmp_path, suffix):
    state = make_architecture("cifar-resnet20-a", 10).state_dict()
    path = save({f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}, tmp_path / f"a.{suffix}")
    assert load_checkpoint(path).keys() == state.keys()
    loaded = load_teacher("cifar-resnet20-a", path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    if suffix == "pt":
        torch.save({"model": make_architecture("cifar-resnet20-a", 10).state_dict(), "ema": state}, path)
        loaded = load_teacher("cifar-resnet20-a", path, key="ema").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


# --- keys

WEIGHTS, AVERAGE = {"fc.weight": torch.ones(2, 3)}, {"fc.weight": torch.zeros(2, 3)}
STATES = {0: {"step": torch.tensor(4.0), "exp_avg": torch.ones(2, 3)}}  # of an optimizer
KEYS = {  # what a file holds, and the keys of the network that is taken and of the others
    "alone": (WEIGHTS, "", ()),
    "usual": ({"state_dict": WEIGHTS, "epoch": torch.tensor(3), "optimizer": {"state": STATES}}, "state_dict", ()),
    "the only one": ({"weights": WEIGHTS, "loss": 0.5, "scale": torch.tensor(2.0)}, "weights", ()),
    "key in key": ({"checkpoint": {"student": {"model": WEIGHTS}}}, "checkpoint.student.model", ()),
    "average": ({"ema": AVERAGE, "model": WEIGHTS}, "model", ("ema",)),
    "average of unusual names": ({"params_ema": AVERAGE, "params": WEIGHTS}, "params", ("params_ema",)),
    "average in it": ({"ema": {"model": AVERAGE}, "model": WEIGHTS}, "model", ("ema.model",)),
    "average beside": (WEIGHTS | {"ema": AVERAGE}, "", ("ema",)),
    "losses": ({"losses": torch.ones(100), "model": WEIGHTS}, "model", ("",)),
    "named optimizer": ({"model": WEIGHTS, "optimizer": {"fc.weight": {"exp_avg": torch.ones(2, 3)}}}, "model", ()),
    "extra state": (WEIGHTS | {"fc._extra_state": {"amax": torch.ones(3)}}, "", ()),
    "two usual ones": ({"net": AVERAGE, "state_dict": WEIGHTS}, "state_dict", ("net",)),
}


@pytest.mark.parametrize("content, key, others", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("legacy", [False, True])
def test_key_of_the_network_is_found(tmp_path, content, key, others, legacy):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    state = open_checkpoint(tmp_path / "a.pt")
    assert (state.key, set(state.others)) == (key, set(others))
    assert state.tensors.keys() == WEIGHTS.keys() and torch.equal(state.tensors["fc.weight"], WEIGHTS["fc.weight"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_checkpoint(tmp_path / "a.pt"), load_checkpoint(tmp_path / "a.pt", key)
    told = [f"{tmp_path}/a.pt: checkpoint holds several networks; that under {key!r} was taken"] if others else []
    assert [str(warning.message).partition(", not ")[0] for warning in caught] == told
    for other in others:
        assert other == "" or torch.equal(load_checkpoint(tmp_path / "a.pt", other)["fc.weight"], AVERAGE["fc.weight"])


@pytest.mark.parametrize("content, key, others", KEYS.values(), ids=KEYS)
def test_dictionaries_of_networks_are_read_as_their_files_are(tmp_path, content, key, others):
    torch.save(content, tmp_path / "a.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layout = fastws.Layout.from_checkpoint(content)
    told = [f"layout: checkpoint holds several networks; that under {key!r} was taken"] if others else []
    assert [str(warning.message).partition(", not ")[0] for warning in caught] == told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert layout == fastws.Layout.from_checkpoint(tmp_path / "a.pt")
        assert torch.equal(layout.flatten(content), layout.flatten(tmp_path / "a.pt"))
        state = layout.unflatten(layout.flatten(content), like=content)
    assert state.keys() >= WEIGHTS.keys()


def test_dictionaries_of_several_networks_are_told_so():
    with pytest.raises(ValueError, match="layout: .* got several under 'student', 'teacher'; .* give that one alone"):
        fastws.Layout.from_checkpoint({"student": WEIGHTS, "teacher": AVERAGE})


def test_key_that_is_wrong_or_wanted_is_told(tmp_path):
    save({"student": WEIGHTS, "teacher": AVERAGE}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must hold one network, got several under 'student', 'teacher'; say"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="--key must name a network .*, got 'x' where there are networks under 'st"):
        load_checkpoint(tmp_path / "a.pt", "x")
    save(WEIGHTS, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="--key must be left out for a safetensors file, which has none, got 'x'"):
        load_checkpoint(tmp_path / "a.safetensors", "x")
    main(["layout", str(tmp_path / "a.pt"), "--key", "teacher"])


def test_key_is_of_torch_files_alone(tmp_path):
    save({"model": AVERAGE, "ema": WEIGHTS}, tmp_path / "a.pt")
    save(WEIGHTS, tmp_path / "b.safetensors")
    for like in (None, tmp_path / "b.safetensors"):
        files, out = [tmp_path / "a.pt", tmp_path / "b.safetensors"], tmp_path / f"zoo-{like is None}"
        with pytest.warns(UserWarning, match="further networks under 'model'"):
            zoo = read_checkpoints(files, out, like=like, options=ReadOptions(key="ema"))
        assert (zoo.weights == 1).all() and len(zoo) == 2


def test_zoo_read_takes_a_key_and_says_which_it_took(tmp_path):
    for number in range(2):
        content = {"model": {"fc.weight": torch.full((2, 3), number)}, "ema": {"fc.weight": torch.full((2, 3), 7.0)}}
        content["model"]["fc.weight"] = content["model"]["fc.weight"].float()
        save(content, tmp_path / f"{number}.pt")
    command = ["zoo", "read", "--paths", str(tmp_path / "0.pt"), str(tmp_path / "1.pt"), "--out"]
    with pytest.warns(
        UserWarning, match="with further networks under 'ema' beside the one under 'model' .see --key., .*: 2"
    ):
        main([*command, str(tmp_path / "zoo")])
    assert Zoo.open(tmp_path / "zoo").weights[:, 0].tolist() == [0, 1]
    with pytest.warns(UserWarning, match="with further networks under 'model' beside the one under 'ema'"):
        main([*command, str(tmp_path / "average"), "--key", "ema"])
    assert (Zoo.open(tmp_path / "average").weights == 7).all()


NOTHING = {
    "tensor": (torch.ones(3), "a tensor without a name"),
    "list": ([torch.ones(3)], "list"),
    "none": (None, "NoneType"),
    "empty": ({}, "an empty one"),
    "counters": ({"epoch": 3, "args": {"lr": 0.1}}, "a dictionary of 'epoch', 'args'"),
}


@pytest.mark.parametrize("content, got", NOTHING.values(), ids=NOTHING)
def test_file_without_named_tensors_says_what_it_holds(tmp_path, content, got):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt: checkpoint must hold a dictionary of tensors, got {got}$"):
        load_checkpoint(tmp_path / "a.pt")


# --- tied names


def tied_module():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.embed = nn.Linear(3, 6, bias=False), nn.Embedding(6, 3)
            self.head.weight = self.embed.weight

    return Tied()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_tied_names_come_back(tmp_path, suffix):
    net = tied_module()
    file = tmp_path / f"a.{suffix}"
    save_model(net, file) if suffix == "safetensors" else torch.save(net.state_dict(), file)
    layout = fastws.Layout.from_checkpoint(file)
    assert layout.num_weights == 18 and layout.aliases
    state = layout.unflatten(layout.flatten(file))
    net.load_state_dict(state)
    assert torch.equal(layout.flatten(net), layout.flatten(file))
    zoo = read_checkpoints(file, tmp_path / "zoo")
    assert zoo.checkpoint(0).keys() == net.state_dict().keys()


# --- dtypes, and what is no tensor of numbers

EXACT = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@pytest.mark.parametrize("dtype", EXACT)
def test_small_floats_are_read_exactly(tmp_path, dtype):
    dtype = getattr(torch, dtype)
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = numbers.float().nan_to_num(1, 1, 1).to(dtype).view(16, 16)
    state = {"w": numbers, "b": torch.ones(3)}
    for suffix in ("pt", "safetensors"):
        file = save(state, tmp_path / f"a.{suffix}")
        layout = fastws.Layout.from_checkpoint(file)
        assert layout.dtype == torch.float32 and layout.entries[0].dtype == dtype or layout.entries[1].dtype == dtype
        back = layout.unflatten(layout.flatten(file))["w"]
        assert back.dtype == dtype and torch.equal(back.view(torch.uint8), numbers.view(torch.uint8))
        zoo = read_checkpoints(file, tmp_path / suffix)
        assert torch.equal(zoo.checkpoint(0)["w"].view(torch.uint8), numbers.view(torch.uint8))


@pytest.mark.parametrize("dtype, bits", [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_dtypes_that_torch_has_not_are_named(tmp_path, dtype, bits):
    header = json.dumps({"w": {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, 4 * bits]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * bits))
    for read in (fastws.Layout.from_checkpoint, load_checkpoint):
        with pytest.raises(ValueError, match=f"'w' must be of a dtype that torch converts, got {dtype}; dequantise it"):
            read(tmp_path / "a.safetensors")


def test_float4_of_torch_is_named(tmp_path):
    state = {"w": torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "b": torch.ones(3)}
    for source in (state, save(state, tmp_path / "a.pt"), save(state, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match="'w' must be of a dtype that torch converts, got .*; dequantise it"):
            fastws.Layout.from_checkpoint(source)


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def get_extra_state(self):
        return {"amax": torch.ones(3)}

    def set_extra_state(self, state):
        self.amax = state["amax"]


def test_extra_states_are_kept_aside_and_counted(tmp_path, recwarn):
    net = Extra()
    file = save(net.state_dict(), tmp_path / "a.pt")
    for source in (net, net.state_dict(), file):
        layout = fastws.Layout.from_checkpoint(source)
        assert layout.num_weights == 9 and layout.aside == {"_extra_state": 3} and layout.lost == 0
        assert "1 tensors, kept aside: 1 (3 numbers)" in layout.describe()
    assert not recwarn.list
    assert layout == fastws.Layout.from_checkpoint({"w": net.w})
    net.load_state_dict(layout.unflatten(torch.ones(9), like=net))
    assert (net.w == 1).all() and (net.amax == 1).all()
    assert fastws.Symmetry.trace(ExtraRun(), torch.ones(1, 3)).sizes == ()
    with pytest.warns(
        UserWarning, match="values that are no tensors of numbers .1: '_extra_state', with 3 numbers., .*: 1"
    ):
        read_checkpoints(file, tmp_path / "zoo")


class ExtraRun(Extra):
    def forward(self, x):
        return x @ self.w


def test_quantised_networks_say_how_many_numbers_are_not_in_the_layout(tmp_path):
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has other plans for quantisation
        net = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
        file = save(net.state_dict(), tmp_path / "a.pt")
    for source in (net, file):
        with pytest.warns(UserWarning, match="layout: 67 quantised numbers of the checkpoint are not in it"):
            layout = fastws.Layout.from_checkpoint(source)
        assert layout.lost == 67
    quantised = torch.quantize_per_tensor(torch.ones(4, 5), 0.1, 0, torch.qint8)
    state = {"fc.weight": quantised, "fc.bias": torch.ones(4)}
    for source in (state, save(state, tmp_path / "b.pt")):
        with pytest.warns(UserWarning, match="layout: 20 quantised numbers"):
            assert fastws.Layout.from_checkpoint(source).num_weights == 4


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_integers_are_counted(tmp_path, suffix):
    """Packed by bitsandbytes, GPTQ and their like; masks and positions are no weights."""
    state = {"fc.weight": torch.zeros(40, 1, dtype=torch.uint8), "fc.qweight": torch.zeros(2, 4, dtype=torch.int32)}
    state |= {"fc.scales": torch.ones(4), "mask": torch.ones(9, 9, dtype=torch.bool), "position_ids": torch.arange(9)}
    file = save(state, tmp_path / f"a.{suffix}")
    with pytest.warns(UserWarning, match="layout: 48 quantised numbers of the checkpoint are not in it"):
        layout = fastws.Layout.from_checkpoint(file)
    assert (layout.num_weights, layout.lost) == (4, 48) and "not in it: 48 quantised numbers" in repr(layout)
    with pytest.warns(UserWarning, match="states with 48 quantised numbers in 'fc.*, which are not in the zoo: 1"):
        read_checkpoints(file, tmp_path / "zoo")


def test_extra_state_in_a_buffer_of_bytes_is_left_aside(tmp_path):
    file = save({"w": torch.ones(3), "_extra_state": io.BytesIO(b"amax")}, tmp_path / "a.pt")
    assert fastws.Layout.from_checkpoint(file).aside == {"_extra_state": 0}


def nested_tensor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


NOT_DENSE = {
    "nested": (nested_tensor, "must be a dense tensor, got a nested one"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "must be a dense tensor, got "),
    "meta": (lambda: torch.ones(2, 2, device="meta"), "must (be a dense|hold numbers).*got a meta"),
}


@pytest.mark.parametrize("make, sentence", NOT_DENSE.values(), ids=NOT_DENSE)
def test_tensors_without_numbers_of_their_own_are_refused(tmp_path, make, sentence):
    state = {"a": make(), "b": torch.ones(3)}
    layout = fastws.Layout.from_checkpoint({"a": torch.ones(2, 2), "b": torch.ones(3)})
    file = save(state, tmp_path / "a.pt")
    for call in (lambda: load_checkpoint(file), lambda: layout.flatten(state), lambda: layout.flatten(file)):
        with pytest.raises(ValueError, match=f"'a' {sentence}"):
            call()
    save({"a": torch.ones(2, 2), "b": torch.ones(3)}, tmp_path / "b.pt")
    with pytest.warns(UserWarning, match="1 of 2 states left out: 1 unreadable"):
        read_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "zoo")


# --- files of other kinds


def archive(*names):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(name, "{}")

    return write


def packed(pack):
    return lambda path: path.write_bytes(pack(b"weights" * 100))


def tarred(path):
    (path.parent / "inner").write_text("weights")
    with tarfile.open(path, "w") as file:
        file.add(path.parent / "inner", "inner")


def exported(path):
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, path.with_suffix(".pt2"))  # which insists on the suffix
    path.with_suffix(".pt2").rename(path)


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts are of another time
        torch.jit.script(nn.Linear(3, 2)).save(path)


def save_npz(path):
    with open(path, "wb") as file:
        numpy.savez(file, w=numpy.ones(3))


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 44669845\n"
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:\xa3\x01\n"  # version 8, producer, its version, graph
SHARED = {  # what neither a torch file nor a safetensors file is: how it begins, and what is said of it
    "LFS": (lambda path: path.write_text(LFS), "a Git LFS pointer, .*; fetch that with git lfs pull"),
    "annex": (lambda path: path.write_text("/annex/objects/MD5E-s5--0.pt\n"), "a git-annex pointer, .* git annex get"),
    "page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html>login</html>"),
        "a web page; download the file again",
    ),
    "error": (lambda path: path.write_text('<?xml version="1.0"?><Error/>'), "an XML document, as servers answer"),
    "JSON": (lambda path: path.write_text('{"error": "not found, or private"}'), "a JSON file; name"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(100)), "a GGUF file of llama.cpp; .*gguf_file="),
    "HDF5": (
        lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
        "an HDF5 file, as Keras writes; load",
    ),
    "Keras": (archive("metadata.json", "config.json", "model.weights.h5"), "a Keras archive; load it with Keras"),
    "ONNX": (lambda path: path.write_bytes(ONNX + bytes(100)), "an ONNX model; read its initializers"),
    "Flax": (lambda path: path.write_bytes(b"\x82\xa6params\x81\xa5Dense\xc0"), "a msgpack file, as Flax writes; read"),
    "npz": (save_npz, "an npz archive of numpy; read it with numpy.load"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY\1\0v\0{}"), "an array of numpy"),
    "export": (exported, "a torch.export program; save torch.export.load.<file>..state_dict"),
    "script": (scripted, "a TorchScript program; save torch.jit.load.<file>..state_dict"),
    "gzip": (packed(gzip.compress), "a file that is packed with gzip; unpack it with gunzip"),
    "bzip2": (packed(bz2.compress), "a file that is packed with bzip2"),
    "xz": (packed(lzma.compress), "a file that is packed with xz"),
    "tar": (tarred, "a tar archive; unpack it with tar -xf"),
    "Lite": (lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(40)), "a TensorFlow Lite model"),
    "empty": (lambda path: path.write_bytes(b""), "nothing, for the file is empty; copy it again"),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("write, sentence", SHARED.values(), ids=SHARED)
def test_files_of_other_kinds_are_called_by_their_names(tmp_path, write, sentence, suffix):
    file = tmp_path / f"a.{suffix}"
    write(file)
    for read in (load_checkpoint, fastws.Layout.from_checkpoint):
        with pytest.raises(
            ValueError, match=rf"a.{suffix}: file must be a (whole torch|safetensors) file, got {sentence}"
        ):
            read(file)
    save(WEIGHTS, tmp_path / "b.pt")
    with pytest.warns(UserWarning, match="1 of 2 states left out: 1 unreadable"):
        zoo = read_checkpoints([file, tmp_path / "b.pt"], tmp_path / "zoo")
    assert [entry.state for entry in read_report(zoo.path).bad] == [str(file)]


@pytest.mark.parametrize("name", ["LFS", "annex", "page", "gzip", "npy", "empty"])
def test_json_files_of_other_kinds_are_called_by_their_names(tmp_path, name):
    write, sentence = SHARED[name]
    for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json", "layout.json"):
        write(tmp_path / file)
        read = fastws.Layout.load if file == "layout.json" else fastws.Layout.from_checkpoint
        with pytest.raises(ValueError, match=rf"{file}: file must be JSON, got {sentence}"):
            read(tmp_path / file)


def test_files_with_the_suffix_of_the_other_format_are_told_so(tmp_path):
    save(WEIGHTS, tmp_path / "a.pt").rename(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="got a torch file; give it a name that ends in .pt"):
        load_checkpoint(tmp_path / "b.safetensors")
    save(WEIGHTS, tmp_path / "a.safetensors").rename(tmp_path / "b.pt")
    with pytest.raises(ValueError, match="got a safetensors file; give it a name that ends in .safetensors"):
        load_checkpoint(tmp_path / "b.pt")


FOLDERS = {
    "distributed": ([".metadata", "__0_0.distcp"], "a folder of torch.distributed.checkpoint; .*dcp_to_torch"),
    "DeepSpeed": (["mp_rank_00_model_states.pt"], "a DeepSpeed checkpoint; convert it with python zero_to_fp32.py"),
    "DeepSpeed, whole": (["latest", "zero_to_fp32.py"], "a DeepSpeed checkpoint; convert it with"),
    "SavedModel": (["saved_model.pb", "fingerprint.pb"], "a SavedModel of TensorFlow"),
    "Orbax": (["_CHECKPOINT_METADATA", "manifest.ocdbt"], "an Orbax checkpoint"),
}


@pytest.mark.parametrize("names, sentence", FOLDERS.values(), ids=FOLDERS)
def test_folders_of_other_libraries_are_called_by_their_names(tmp_path, names, sentence):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    for read in (load_checkpoint, fastws.Layout.from_checkpoint):
        with pytest.raises(ValueError, match=f"checkpoint must be a file, got {sentence}"):
            read(tmp_path)
