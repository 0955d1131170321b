import json
import struct

import pytest
import torch
from checkpoints import checkpoints, small_checkpoint
from hypothesis import given, settings
from running import finish, run_code, start
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastws
from fastws.layout.layout import Layout
from fastws.zoo.making.architectures import build


def test_roles_of_a_module():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Scale(8), nn.Flatten(), nn.Linear(32, 5))
    roles = [(entry.name, entry.role) for entry in Layout.from_checkpoint(module).entries]
    assert roles == [
        ("0.weight", "weight"),
        ("0.bias", "bias"),
        ("1.weight", "norm weight"),
        ("1.bias", "norm bias"),
        ("1.running_mean", "norm statistic"),
        ("1.running_var", "norm statistic"),
        ("1.num_batches_tracked", "other"),
        ("2.gamma", "other"),
        ("4.weight", "weight"),
        ("4.bias", "bias"),
    ]


class Scale(nn.Module):
    """One tensor."""

    def __init__(self, size, name="gamma"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(size)))


ODD = {  # modules with tensors that are no weights of layers
    "layer scale": lambda: nn.Sequential(nn.Linear(4, 8), Scale(8), nn.Linear(8, 2)),
    "scalar": lambda: nn.Sequential(nn.Linear(4, 8), Scale((), "logit_scale")),
    "gate": lambda: nn.Sequential(nn.Linear(4, 8), Scale(3, "D"), nn.Linear(8, 2, bias=False)),
    "PReLU": lambda: nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2), nn.PReLU()),
    "norm by another name": lambda: nn.Sequential(nn.Linear(4, 8), Scale(8, "weight"), nn.Linear(8, 2)),
    "norm of maps": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 4, 4])),
    "norms": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)),
    "bias of another shape": lambda: nn.Sequential(Scale((4, 2), "weight"), nn.Bilinear(2, 3, 4)),
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.ReLU(), spectral_norm(nn.Linear(8, 2))),
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "attention": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=6),
}


@pytest.mark.parametrize("token_size", [None, 3])
@pytest.mark.parametrize("case", ODD)
def test_tokens_hold_every_number(case, token_size):
    module = ODD[case]()
    layout = Layout.from_checkpoint(module, token_size)
    flat = torch.randn(2, layout.num_weights)
    tokens = layout.tokenize(flat)
    assert torch.equal(layout.detokenize(tokens.values), flat)
    assert int(tokens.lengths.sum()) == layout.num_weights
    assert "no token" not in layout.describe()


@pytest.mark.parametrize("case", ODD)
def test_module_and_its_state_dict_and_its_file_are_taken_alike(case, tmp_path):
    module = ODD[case]()
    layout = Layout.from_checkpoint(module)
    torch.save(module.state_dict(), tmp_path / "net.pt")
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    assert layout == Layout.from_checkpoint(module.state_dict()) == Layout.from_checkpoint(tmp_path / "net.pt")
    roles = {entry.name: entry.role for entry in Layout.from_checkpoint(tmp_path / "net.safetensors").entries}
    assert roles == {entry.name: entry.role for entry in layout.entries}


def test_one_bias_is_the_last_entry_of_one_weight():
    state = {"a.weightbias": torch.randn(3, 2), "a.biasweight": torch.randn(3, 4), "a.biasbias": torch.randn(3)}
    layout = Layout.from_checkpoint(state)
    assert layout.layers == (("a.weightbias", "a.biasbias"), ("a.biasweight", None))


@pytest.mark.parametrize(
    "name, image, weights, tokens, size",
    [("cnn-s", (1, 28, 28), 2464, 48, 201), ("cnn-l", (3, 32, 32), 10853, 93, 289)],
)
def test_layout_has_the_published_sizes(name, image, weights, tokens, size):  # specs of SANE, table of token sizes
    layout = Layout.from_checkpoint(build(name, image))
    assert (layout.num_weights, layout.num_tokens, layout.token_size) == (weights, tokens, size)
    assert len(layout.layers) == 5 and layout.positions[-1].tolist()[:2] == [tokens - 1, 4]


def test_layout_finds_the_longest_row_also_without_biases():
    assert Layout.from_checkpoint({"conv.weight": torch.zeros(4, 64, 3, 3)}).token_size == 576


@settings(max_examples=60, deadline=None)
@given(state=checkpoints())
def test_flatten_and_unflatten_restore_every_byte(state):
    layout = Layout.from_checkpoint(state)
    restored = layout.unflatten(layout.flatten(state), like=state)
    assert list(restored) == list(state)
    for name, tensor in state.items():
        assert restored[name].dtype == tensor.dtype and torch.equal(restored[name], tensor)


@pytest.mark.parametrize(
    "dtypes, flat_dtype",
    [
        ([torch.float16], torch.float16),
        ([torch.bfloat16], torch.bfloat16),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float64, torch.float16], torch.float64),
        ([torch.float8_e4m3fn], torch.float32),
    ],
)
def test_mixed_dtypes_come_back(dtypes, flat_dtype):
    state = {f"{i}.weight": torch.randn(3, 4).to(dtype) for i, dtype in enumerate(dtypes)}
    layout = Layout.from_checkpoint(state)
    flat = layout.flatten(state)
    assert flat.dtype == layout.dtype == flat_dtype
    for name, tensor in layout.unflatten(flat).items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor.float(), state[name].float())


def test_a_flat_vector_of_another_dtype_keeps_it():
    layout = Layout.from_checkpoint(small_checkpoint())
    flat = layout.flatten(small_checkpoint()).bfloat16()
    assert {tensor.dtype for tensor in layout.unflatten(flat).values()} == {torch.bfloat16, torch.int64}


def test_strides_ties_and_batches():
    linear = nn.Linear(4, 4)
    tied = nn.ModuleDict({"a": linear, "b": linear, "c": nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)})
    layout = Layout.from_checkpoint(tied)
    assert layout.aliases == {"b.weight": "a.weight", "b.bias": "a.bias"}
    flat = layout.flatten(tied)
    assert len(flat) == layout.num_weights == 20 + 57
    restored = layout.unflatten(flat)
    tied.load_state_dict(restored)  # strict
    assert torch.equal(restored["b.weight"], linear.weight)
    batch = layout.unflatten(torch.stack([flat, 2 * flat]))
    assert torch.equal(batch["c.weight"][1], 2 * tied["c"].weight)
    assert torch.equal(layout.flatten({name: value[1] for name, value in batch.items()}), 2 * flat)


def test_tied_tensors_that_differ_are_refused():
    linear = nn.Linear(4, 4)
    layout = Layout.from_checkpoint(tied := nn.ModuleDict({"a": linear, "b": linear}))
    state = {name: tensor.detach().clone() for name, tensor in tied.state_dict().items()}
    state["a.bias"][0] = state["b.bias"][0] = torch.nan
    assert len(layout.flatten(state)) == 20
    state["b.weight"][3, 3] += 1
    with pytest.raises(ValueError, match="flatten: 'b.weight' must be 'a.weight', to which it is tied, got"):
        layout.flatten(state)


@pytest.mark.parametrize(
    "state, message",
    [
        ({1: torch.ones(2, 2)}, "names of tensors must be strings, got 1"),
        ({"a": torch.eye(2).to_sparse()}, "'a' must be a dense tensor, got (torch.sparse_coo|a sparse one)"),
        ({"a": torch.ones(2, 2, dtype=torch.complex64)}, "'a' must be of real numbers, got torch.complex64"),
    ],
)
def test_tensors_of_no_layout_are_refused(state, message, tmp_path):
    for source in (state, str(tmp_path / "a.pt")):
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=message):
            Layout.from_checkpoint(source)


def test_unflatten_gives_views_and_gradients_flow():
    layout = Layout.from_checkpoint(small_checkpoint())
    flat = layout.flatten(small_checkpoint()).requires_grad_()
    state = layout.unflatten(flat)
    assert state["fc.weight"].data_ptr() == flat[layout.entries[8].offset :].data_ptr()
    state["fc.bias"].sum().backward()
    assert flat.grad.sum() == 6


def test_unflatten_without_like_is_loud_about_what_is_missing():
    state = small_checkpoint() | {"index": torch.arange(3)}
    layout = Layout.from_checkpoint(state)
    restored = layout.unflatten(layout.flatten(state))
    assert restored["bn.num_batches_tracked"] == 0 and "index" not in restored
    assert torch.equal(layout.unflatten(layout.flatten(state), like=state)["index"], torch.arange(3))


def test_detokenize_takes_the_rest_from_like():
    state = small_checkpoint()
    layout = Layout.from_checkpoint(state, token_size=16, norm="skip")
    flat = layout.flatten(state)
    tokens = layout.tokenize(flat).values
    assert torch.equal(layout.detokenize(tokens, like=flat), flat)
    assert not torch.equal(layout.detokenize(tokens), flat)


COMPILED = {  # of a layout, a checkpoint, flat vectors and tokens
    "tokenize": lambda layout, state, flat, values: layout.tokenize(2 * flat),
    "detokenize": lambda layout, state, flat, values: layout.detokenize(2 * values),
    "detokenize, like": lambda layout, state, flat, values: layout.detokenize(2 * values, like=flat),
    "flatten": lambda layout, state, flat, values: 2 * layout.flatten(state),
    "unflatten": lambda layout, state, flat, values: layout.unflatten(2 * flat),
    "mask": lambda layout, state, flat, values: values * layout.mask,
    "lengths and positions": lambda layout, state, flat, values: (flat.sum(), layout.lengths, layout.positions),
}


@pytest.mark.parametrize("norm", ["keep", "skip"])
@pytest.mark.parametrize("case", COMPILED)
def test_layout_compiles_at_first_use(case, norm):
    def new():
        layout = Layout.from_checkpoint(small_checkpoint(), 16, norm)
        return layout, torch.randn(2, layout.num_weights), torch.randn(2, layout.num_tokens, 16)

    layout, flat, values = new()
    torch.compiler.reset()
    compiled = torch.compile(COMPILED[case], fullgraph=True, backend="aot_eager")
    actual = compiled(layout, small_checkpoint(), flat, values)
    torch.testing.assert_close(actual, COMPILED[case](new()[0], small_checkpoint(), flat, values), rtol=0, atol=0)


def test_compiled_function_tells_layouts_apart():
    """Of two layouts of equal sizes, each is tokenized by its own table."""
    a, b = torch.randn(2, 3), torch.randn(3)
    layouts = [Layout.from_checkpoint(state, 4) for state in ({"weight": a, "bias": b}, {"bias": b, "weight": a})]
    torch.compiler.reset()
    compiled = torch.compile(lambda layout, x: layout.tokenize(x), fullgraph=True, backend="aot_eager")
    flat = torch.randn(9)
    for layout in (*layouts, *layouts):
        torch.testing.assert_close(compiled(layout, flat), layout.tokenize(flat), rtol=0, atol=0)


def test_layout_is_saved_and_loaded(tmp_path):
    layout = Layout.from_checkpoint(small_checkpoint(), 16, "skip")
    layout.save(tmp_path / "layout.json")
    loaded = Layout.load(tmp_path / "layout.json")
    assert loaded == layout and loaded.fingerprint == layout.fingerprint and torch.equal(loaded.table, layout.table)
    spanning = layout.with_tokens(span="layer")
    assert Layout.from_dict(spanning.to_dict()) == spanning != layout and layout.to_dict()["format"] == 1
    (tmp_path / "layout.json").write_text("{}")
    with pytest.raises(ValueError, match="layout: format must be 1 or 2, got None"):
        Layout.load(tmp_path / "layout.json")
    (tmp_path / "layout.json").write_text("{")
    with pytest.raises(ValueError, match=r"layout.json: file must be a layout that Layout.save wrote"):
        Layout.load(tmp_path / "layout.json")


def test_describe_tells_every_decision():
    text = Layout.from_checkpoint(small_checkpoint()).describe()
    assert "conv.bias  [4] float32  bias  flat 108  last entry of each row of conv.weight" in text
    assert "bn.num_batches_tracked  [] int64  other  not in flat  kept aside" in text
    assert "scale  [3] float32  other" in text


def test_another_architecture_is_refused_by_name():
    ours = Layout.from_checkpoint(small_checkpoint())
    other = small_checkpoint() | {"fc.weight": torch.zeros(6, 17)}
    with pytest.raises(ValueError, match=r"zoo: architecture must be the same, but 'fc.weight' \[6, 16\]"):
        ours.require_same(Layout.from_checkpoint(other), "zoo")
    with pytest.raises(ValueError, match=r"flatten: 'fc.weight' must be a tensor \[6, 16\], got \[6, 17\]"):
        ours.flatten(other)
    missing = small_checkpoint()
    del missing["bn.bias"]
    with pytest.raises(ValueError, match="flatten: 'bn.bias' must be a tensor .4., got nothing"):
        ours.flatten(missing)
    with pytest.raises(ValueError, match="only one of them has 'extra.weight'"):
        ours.require_same(Layout.from_checkpoint(small_checkpoint() | {"extra.weight": torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match="flatten: 'extra.weight' must be in the layout"):
        ours.flatten(small_checkpoint() | {"extra.weight": torch.zeros(2, 2)})


def test_bad_arguments_get_one_sentence():
    for token_size in (0, -5, 2.5, True):
        with pytest.raises(ValueError, match="layout: token_size must be a whole number from 1, got"):
            Layout.from_checkpoint(small_checkpoint(), token_size)
    with pytest.raises(ValueError, match="layout: norm must be 'keep' or 'skip', got 'drop'"):
        Layout.from_checkpoint(small_checkpoint(), norm="drop")
    with pytest.raises(ValueError, match="layout: checkpoint must hold a floating tensor"):
        Layout.from_checkpoint({"a": torch.arange(3)})
    with pytest.raises(ValueError, match="layout: checkpoint must hold a floating tensor"):
        Layout.from_checkpoint({"a": 3})
    layout = Layout.from_checkpoint(small_checkpoint())
    integers = small_checkpoint() | {"fc.weight": torch.zeros(6, 16, dtype=torch.int32)}
    with pytest.raises(ValueError, match="flatten: 'fc.weight' must be floating point, got torch.int32"):
        layout.flatten(integers)
    with pytest.raises(ValueError, match=r"unflatten: flat must be \[.., 333\] floating point, got \[7\]"):
        layout.unflatten(torch.zeros(7))


def test_nonfinite_weights_are_counted_and_named():
    state = small_checkpoint()
    layout = Layout.from_checkpoint(state)
    assert layout.count_nonfinite(layout.flatten(state)) == {}
    state["conv.weight"][0, 0, 0] = torch.nan
    state["fc.bias"][2] = -torch.inf
    assert layout.count_nonfinite(layout.flatten(state)) == {"conv.weight": 3, "fc.bias": 1}


# --- files


def write_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_layout_of_safetensors_reads_the_header_only(tmp_path):
    state = small_checkpoint(torch.bfloat16)
    save_file(state, tmp_path / "a.safetensors")
    layout = Layout.from_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(layout.flatten(tmp_path / "a.safetensors"), layout.flatten(state))
    restored = layout.unflatten(layout.flatten(state), like=state)
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())


def test_layout_of_a_sharded_checkpoint(tmp_path):
    state = {name: tensor for name, tensor in small_checkpoint().items()}
    names = list(state)
    save_file({name: state[name] for name in names[:4]}, tmp_path / "model-1.safetensors")
    save_file({name: state[name] for name in names[4:]}, tmp_path / "model-2.safetensors")
    places = {name: f"model-{1 if name in names[:4] else 2}.safetensors" for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    layout = Layout.from_checkpoint(index)
    assert layout == Layout.from_checkpoint(state)
    assert torch.equal(layout.flatten(index), layout.flatten(state))
    for broken in ("{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "model-1.safetensors"}}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match="index.json: .* must"):
            Layout.from_checkpoint(index)


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
def test_layout_of_a_folder(name, tmp_path):
    """Folders of transformers and diffusers hold configurations beside the weights."""
    state = small_checkpoint()
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    layout = Layout.from_checkpoint(tmp_path)
    assert layout == Layout.from_checkpoint(tmp_path / name) == Layout.from_checkpoint(str(tmp_path))
    assert torch.equal(layout.flatten(tmp_path), layout.flatten(state))


def test_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint must be a file, or a folder with one of model.safetensors"):
        Layout.from_checkpoint(tmp_path)


def test_layout_of_a_sharded_torch_checkpoint(tmp_path):
    state, index = small_checkpoint(), tmp_path / "pytorch_model.bin.index.json"
    whole = Layout.from_checkpoint(state)
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    places = {name: f"pytorch_model-{1 + number % 2:05}-of-00002.bin" for number, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: state[name] for name in places if places[name] == file}, tmp_path / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    layout = Layout.from_checkpoint(index)
    assert layout == whole
    assert torch.equal(layout.flatten(index), whole.flatten(small_checkpoint()))
    for broken in ("{}", {"a": "../b.bin"}, {"a": next(iter(places.values()))}, {"a": index.name}):
        index.write_text(json.dumps({"weight_map": broken}))
        with pytest.raises(ValueError, match="index.json: .* must"):
            Layout.from_checkpoint(index)
    torch.save([1], tmp_path / "list.bin")
    index.write_text(json.dumps({"weight_map": {"a": "list.bin"}}))
    with pytest.raises(ValueError, match="list.bin: part of a checkpoint must be a dictionary of tensors, got list"):
        Layout.from_checkpoint(index)
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-00003-of-00003.bin"}}))
    with pytest.raises(FileNotFoundError, match="pytorch_model-00003-of-00003.bin"):
        Layout.from_checkpoint(index)


def test_layout_of_a_pickled_checkpoint_unwraps_it_and_runs_nothing(tmp_path):
    state = small_checkpoint()
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "a.pt")
    layout = Layout.from_checkpoint(tmp_path / "a.pt")
    assert layout == Layout.from_checkpoint(state)
    assert torch.equal(layout.flatten(tmp_path / "a.pt"), layout.flatten(state))
    torch.save({"weight": nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module.pt: file must hold .*, got torch.nn.modules.linear.Linear; "):
        Layout.from_checkpoint(tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(
        ValueError,
        match=r"text.pt: file must be a whole torch file, got a pickle",
    ):
        Layout.from_checkpoint(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError, match="nothing.pt: checkpoint must be a file, got nothing"):
        Layout.from_checkpoint(tmp_path / "nothing.pt")


TWO = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "header, size, sentence",
    [
        (TWO | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12, "'b' overlaps 'a'"),
        (TWO | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}, 20, "'b' leaves a gap after 'a'"),
        (TWO, 4, "it is truncated or damaged"),
        (TWO, 12, "it is truncated or damaged"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8, "'a' must take 12 bytes, got 8"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, "must have whole numbers from 0"),
        ({"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, 8, "must have a dtype of BOOL, "),
        ({"a": {"dtype": "F32"}}, 8, "must have shape, dtype and data_offsets"),
        (["a"], 8, "header must be that of a safetensors file"),
    ],
)
def test_damaged_safetensors_get_one_sentence(tmp_path, header, size, sentence):
    write_header(tmp_path / "a.safetensors", header, b"\0" * size)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{sentence}") as error:
        Layout.from_checkpoint(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


def test_truncated_headers_get_one_sentence(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (b"\x01\x02", struct.pack("<Q", 1000) + b"{}", struct.pack("<Q", 2**63) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.safetensors: header must fit into the file"):
            Layout.from_checkpoint(path)
    path.write_bytes(struct.pack("<Q", 4) + b"{x}}")
    with pytest.raises(ValueError, match="a.safetensors: header must be JSON"):
        Layout.from_checkpoint(path)


def test_import_is_light(tmp_path):
    """Neither Triton nor anything that only commands need is imported with the package."""
    code = "import sys; before = set(sys.modules); import fastws; print(*(set(sys.modules) - before))"
    assert finish(start(run_code, code, said=tmp_path / "said")) == [0]
    output = (tmp_path / "said").read_text().split()
    heavy = {name.split(".")[0] for name in output} & {"triton", "tyro", "matplotlib", "sklearn", "scipy", "pyarrow"}
    assert not heavy and "fastws" in output


def test_public_names_are_there():
    assert all(hasattr(fastws, name) for name in fastws.__all__)
