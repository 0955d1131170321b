import copy
import doctest
import functools
import json
from collections import Counter

import architectures
import pytest
import torch
from architectures import unsigned_axes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastws
from fastws.layout.layout import Layout
from fastws.symmetry import symmetry as symmetry_module
from fastws.symmetry.rules import RULES
from fastws.symmetry.symmetry import Symmetry
from fastws.symmetry.verify import randomise

R18 = [64, 128, 256, 512]  # widths of the stages
R34 = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3  # widths of the blocks

# architecture, its options, sizes of its groups in any order, and why
CASES = {
    # one group per hidden layer
    "mlp": (architectures.mlp, {}, [20, 12]),
    "mlp tetris": (architectures.mlp, dict(widths=(16, 5, 4), bias=False), [5]),
    # one group per convolution, one for the hidden dense layer
    "CNN-s": (architectures.zoo_cnn, {}, [8, 6, 4, 20]),
    "CNN2": (architectures.zoo_cnn, dict(channels=(3, 6, 9, 6), dropout=0.5), [6, 9, 6, 20]),
    "CNN-l": (architectures.zoo_cnn_large, {}, [16, 32, 15, 20]),
    # the 1x1 convolution beside each convolution shares its group
    "ResCNN": (architectures.zoo_res_cnn, {}, [8, 6, 4, 20]),
    # 8 or 13 convolutions and 2 hidden dense layers
    "VGG-11": (architectures.vgg, dict(width=4), [4, 8, 16, 16, 32, 32, 32, 32, 64, 64]),
    "VGG-16": (architectures.vgg, dict(depth=16, width=4), [4] * 2 + [8] * 2 + [16] * 3 + [32] * 6 + [64] * 2),
    # a group per stage (the stem shares that of the first) and one inside each of the two blocks of a stage, here of
    # a quarter of the width: 12, 720
    "ResNet-18": (architectures.resnet, dict(width=16), [w // 4 for w in R18 + R18 + R18]),
    # 4 stages and 3 + 4 + 6 + 3 blocks
    "ResNet-34": (architectures.resnet, dict(blocks=(3, 4, 6, 3), width=4), [w // 16 for w in R18 + R34]),
    # a quarter of the width; the first block widens, so the stem is alone; 4 stages of 4 times the width; two groups
    # inside each block
    "ResNet-50": (
        architectures.resnet,
        dict(blocks=(3, 4, 6, 3), bottleneck=True, width=16),
        [w // 4 for w in [64] + [4 * w for w in R18] + R34 + R34],
    ),
    # stem 8; block 1: 8 channels in 4 groups move as 4 pairs on both sides of the convolution; block 2: 16 as 4 fours
    "ResNeXt": (architectures.resnet, dict(blocks=(1, 1), width=8, bottleneck=True, groups=4), [8, 4, 32, 4, 64]),
    # stages of 8 and 16, inner 8 and 16, and the hidden units of the gates, 2 and 4; gates share the group of the stage
    "SE-ResNet": (architectures.resnet, dict(blocks=(1, 1), width=8, excite=True), [8, 8, 2, 16, 16, 4]),
    # option B: 3 stages and 3n inner; option A: a stage of 2C channels is the C that were carried over, which move with
    # the stage before, and C new ones, which move among themselves on both sides: 16, 16, 32 and 3n inner
    "CIFAR ResNet-20 B": (architectures.cifar_resnet, dict(option="B"), 4 * [16, 32, 64]),
    "CIFAR ResNet-20 A": (architectures.cifar_resnet, {}, [16, 16, 32] + 3 * [16, 32, 64]),
    "CIFAR ResNet-32 A": (architectures.cifar_resnet, dict(depth=32, width=4), [4, 4, 8] + 5 * [4, 8, 16]),
    "CIFAR ResNet-56 A": (architectures.cifar_resnet, dict(depth=56, width=4), [4, 4, 8] + 9 * [4, 8, 16]),
    # stem 8; each of 5 layers a bottleneck of 16 and 4 new channels; transition of (8 + 2 * 4) / 2
    "DenseNet small": (architectures.densenet, {}, [8] + 5 * [16, 4] + [8]),
    # stem 64; 58 layers of 128 and 32; transitions (64 + 6 * 32) / 2, (128 + 12 * 32) / 2, (256 + 24 * 32) / 2; of all
    # a quarter
    "DenseNet-121": (
        architectures.densenet,
        dict(blocks=(6, 12, 24, 16), growth=8, first=16),
        [w // 4 for w in [64] + 58 * [128, 32] + [128, 256, 512]],
    ),
    # a quarter of the width: stem 8, which is also the first depthwise layer; one group per stage, whose blocks share a
    # residual stream; 6 times its input inside every other block; 1280 / 4 at the end
    "MobileNetV2": (
        architectures.mobilenet,
        {},
        [8, 4, 6, 8, 16, 24, 40, 80, 320] + [6 * w for w in [4] + 2 * [6] + 3 * [8] + 4 * [16] + 3 * [24] + 3 * [40]],
    ),
    # stem; squeeze and both expansions of 8 fires; the last convolution gives the classes
    "SqueezeNet": (
        architectures.squeezenet,
        {},
        [16] + [w for s in (4, 8, 12, 16) for w in 2 * [s, 4 * s, 4 * s]],
    ),
    # two convolutions at each of 3 scales going down, a transposed one and two more at each of 2 going up
    "U-Net": (architectures.unet, {}, [4, 4, 8, 8, 16, 16, 8, 8, 8, 4, 4, 4]),
    # 2 norm groups of 4 channels, in each of which channels move; 6 channels of the second convolution
    "group norm": (architectures.group_norm_cnn, {}, [4, 4, 6]),
    # 4 norm groups of 2 channels: whole groups have more permutations, 4! > 2!^4
    "group norm, small groups": (architectures.group_norm_cnn, dict(groups=4), [4, 6]),
    # the norm of single channels forbids nothing
    "instance norm": (architectures.group_norm_cnn, dict(groups=8), [8, 6]),
    # the stream, and the hidden units of each block
    "ConvNeXt": (architectures.convnext, {}, [8, 32, 32]),
    # the residual stream; heads and hidden units of each of 2 blocks
    "ViT fused": (architectures.vit, {}, [12] + 2 * [3, 36]),
    "ViT separate": (architectures.vit, dict(fused=False), [12] + 2 * [3, 36]),
    # with one head its entries are free: those of query and key together, those of the value
    "ViT one head": (architectures.vit, dict(heads=1), [12] + 2 * [12, 12, 36]),
    "GPT tied": (architectures.gpt, {}, [12] + 2 * [3, 36]),
    "GPT separate": (architectures.gpt, dict(tied=False, fused=False), [12] + 2 * [3, 36]),
    # 4 query heads share 2 key heads: pairs of query heads move with their key head
    "GPT grouped queries": (architectures.gpt, dict(heads=4, key_heads=2, gated=True), [12] + 2 * [2, 36]),
    "GPT root mean square norm": (architectures.gpt, dict(norm=nn.RMSNorm, gated=True), [12] + 2 * [3, 36]),
    # the stream, 2 heads, 16 hidden units
    "encoder layer": (architectures.encoder, {}, [8, 2, 16]),
    "encoder layer, norm first": (architectures.encoder, dict(norm_first=True, batch_first=True), [8, 2, 16]),
    # queries of width 8, the other sequence of width 6, 2 heads; the 8 outputs of the attention
    "cross attention": (architectures.cross_attention, {}, [8, 6, 2, 8]),
    # stream 6, hidden units over tokens 7 and over the width 9; the tokens stay, for they come from pixels
    "MLP mixer": (architectures.mixer, {}, [6, 7, 9]),
}
SMALL = sorted(CASES.keys() - {"ResNet-18", "ResNet-50", "DenseNet-121"})


def build(case):
    function, options, _ = CASES[case]
    torch.manual_seed(0)
    return function(**options)


@functools.cache
def traced(case):
    return Symmetry.trace(*build(case))


class Wrapped(nn.Module):
    """An operation on the output of a hidden layer."""

    def __init__(self, operation):
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.operation = operation

    def forward(self, x):
        return self.leave(torch.relu(self.middle(self.operation(self.enter(x)))))


@pytest.mark.parametrize("case", CASES)
def test_trace_finds_the_full_group(case):
    module, inputs = build(case)
    symmetry = traced(case)
    assert Counter(symmetry.sizes) == Counter(CASES[case][2])
    assert symmetry.unpermuted == []
    assert symmetry.verify(module, inputs, trials=1, seed=5) < 1e-10
    assert Symmetry.from_dict(json.loads(json.dumps(symmetry.to_dict()))) == symmetry


def test_trace_of_resnet18():
    symmetry = traced("ResNet-18")
    assert len(symmetry.sizes) == 12 and symmetry.num_indices == sum(symmetry.sizes) == 2880 // 4
    assert symmetry.names[:2] == ("0.0.weight", "1.body.0.0.weight")
    assert unsigned_axes(symmetry, "1.body.0.0.weight") == (((1, 16, 1),), ((0, 16, 1),), None, None)
    assert unsigned_axes(symmetry, "0.1.running_var") == (((0, 16, 1),),)
    assert unsigned_axes(symmetry, "0.0.weight") == (((0, 16, 1),), None, None, None)
    (stage,) = unsigned_axes(symmetry, "11.weight")[1]
    assert unsigned_axes(symmetry, "11.weight") == (None, (stage,)) and stage[1:] == (128, 1)


def test_axes_as_segments():
    flattened = traced("CNN-s")
    (weight,) = (name for name, shape in flattened.shapes.items() if shape == (20, 36))
    assert unsigned_axes(flattened, weight) == (
        ((3, 20, 1),),
        ((2, 4, 9),),
    )  # a 3 x 3 image of each of 4 channels
    heads = traced("encoder layer")
    assert unsigned_axes(heads, "layer.self_attn.in_proj_weight") == (((1, 2, 4),) * 3, ((0, 8, 1),))
    dense = traced("DenseNet small")
    first, *new = (g for g, size in enumerate(dense.sizes) if size in (8, 4))
    assert unsigned_axes(dense, "2.bodies.0.0.2.weight")[1] == ((first, 8, 1), (new[0], 4, 1))
    padded = traced("CIFAR ResNet-20 A")
    old, new = 0, padded.names.index("4.body.1.0.weight")
    assert unsigned_axes(padded, "4.body.1.0.weight")[0] == ((new, 8, 1), (old, 16, 1), (new, 8, 1))
    assert padded.sizes[new] == 16  # both sides together


def test_composites_share_storage():
    dense = Symmetry.trace(*architectures.densenet(blocks=(3, 4), growth=4, first=8))
    # one vector per block: 8 + 3 * 4 channels, and half of that + 4 * 4
    assert dense.num_indices == sum(dense.sizes) + 20 + 26


@pytest.mark.parametrize(
    "operation",
    [
        nn.Hardswish(),
        nn.LogSigmoid(),
        nn.PReLU(6),
        nn.Softmax(-1),
        F.normalize,
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.einsum("bi,bj->bi", x, x),
        lambda x: x * torch.full((6,), 2.0),
        lambda x: x.view(1, -1, 6, 1).expand(2, -1, -1, 3).mean((0, 3)),
        lambda x: torch.stack([x, x * x], 2).unbind(2)[1],
        lambda x: x[:, None].repeat(1, 3, 1).amax(1),
        lambda x: F.dropout(x.clone().add_(1), 0.5, training=False),
    ],
)
def test_operations_that_forbid_nothing(operation):
    symmetry = Symmetry.trace(Wrapped(operation), torch.randn(2, 3))
    assert symmetry.sizes == (6, 5) and symmetry.unpermuted == []


@pytest.mark.parametrize("kind, gates", [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers(kind, gates):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.layer, self.leave = nn.Linear(3, 4), kind(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.leave(self.layer(self.enter(x))[0])

    symmetry = Symmetry.trace(Recurrent(), torch.randn(4, 2, 3))
    assert unsigned_axes(symmetry, "layer.weight_hh_l0") == (((1, 5, 1),) * gates, ((1, 5, 1),))
    assert symmetry.sizes == (4, 5) and symmetry.unpermuted == []


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_parametrized_weights(norm):
    module = nn.Sequential(norm(nn.Linear(3, 6)), nn.Tanh(), norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 2))
    assert Symmetry.trace(module, torch.randn(2, 3)).sizes == (6, 4)


# --- what permutations do


@pytest.mark.parametrize("case", SMALL)
def test_permute_is_permute_state_bit_for_bit(case):
    module, inputs = build(case)
    symmetry, layout = traced(case), Layout.from_checkpoint(module)
    with torch.no_grad():
        randomise(module, 1)
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    rows = symmetry.random(3, seed=2)
    flat = layout.flatten(state)
    permuted = symmetry.permute(flat, rows, layout)
    for row, actual in zip(rows, permuted, strict=True):
        expected = layout.flatten(symmetry.permute_state(state, row))
        assert torch.equal(actual, expected)
        assert not torch.equal(actual, flat)
    assert torch.equal(symmetry.permute(permuted, symmetry.inverse(rows), layout), flat.expand(3, -1))


def same_function(module, inputs, symmetry, layout, state):
    """Whether a layout and a permutation give other weights and the same outputs."""
    flat = layout.flatten(state)
    permuted = symmetry.permute(flat, symmetry.random(1, seed=7)[0], layout)
    moved = copy.deepcopy(module)
    moved.load_state_dict(layout.unflatten(permuted, like=module), strict=False)
    with torch.no_grad():
        difference = (moved(inputs) - module(inputs)).abs().max()
    return not torch.equal(permuted, flat) and difference < 1e-9


@pytest.mark.parametrize("case", ["mlp", "SE-ResNet", "DenseNet small", "ViT fused"])
def test_order_of_tensors_does_not_matter(case, tmp_path):
    """A file lies in the order of names, a module in that of its layers."""
    module, inputs = build(case)
    symmetry, module = traced(case), module.double().eval()
    inputs = inputs.double()
    with torch.no_grad():
        randomise(module, 3)
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    of_module, of_file = Layout.from_checkpoint(module), Layout.from_checkpoint(tmp_path / "net.safetensors")
    backwards = Layout.from_checkpoint(dict(reversed(module.state_dict().items())))
    assert len({layout.fingerprint for layout in (of_module, of_file, backwards)}) > 1
    for layout in (of_module, of_file, backwards, of_module):
        assert same_function(module, inputs, symmetry, layout, module.state_dict())


def test_ties_may_be_known_to_one_side_only():
    module, inputs = build("GPT tied")
    symmetry, state = traced("GPT tied"), module.state_dict()
    (alias, name), *_ = symmetry.aliases.items()
    row = symmetry.random(1, seed=1)[0]
    apart = {key: tensor.clone() for key, tensor in state.items()}
    lacking = {key: tensor for key, tensor in state.items() if key != name}
    for held in (state, apart, lacking):
        layout = Layout.from_checkpoint(held)
        moved = layout.unflatten(symmetry.permute(layout.flatten(held), row, layout))
        expected = symmetry.permute_state(held, row)
        assert all(torch.equal(moved[key], expected[key]) for key in held)
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied = mlp.state_dict()
    tied["2.weight"] = tied["0.weight"]  # one is permuted along its rows, the other along its columns
    with pytest.raises(ValueError, match="layout must hold 2.weight untied, got it tied to 0.weight"):
        Symmetry.trace(mlp, torch.randn(1, 4)).table(Layout.from_checkpoint(tied))


def tokens_by_formula(flat, table, row, token_size):
    """docs/design.md, entry by entry."""
    tokens = []
    for weight, bias, rows, length, block, units, chunks, _, out, into, bias_out in table.tolist():
        for c in range(rows):
            source = int(row[out + c]) if out >= 0 else c
            period = units * block
            for f in range(chunks * token_size):
                if f < length:
                    unit = f % period // block
                    unit = int(row[into + unit]) if into >= 0 else unit
                    place = weight + source * length + f // period * period + unit * block + f % block
                    tokens.append(flat[place].item())
                elif f == length and bias >= 0:
                    tokens.append(flat[bias + (int(row[bias_out + c]) if bias_out >= 0 else c)].item())
                else:
                    tokens.append(0.0)
    return torch.tensor(tokens, dtype=flat.dtype).view(-1, token_size)


@pytest.mark.parametrize(
    "case", ["CNN-s", "DenseNet small", "U-Net", "ResNeXt", "ViT fused", "GPT tied", "cross attention", "MLP mixer"]
)
def test_table_tokenizes_the_permuted_checkpoint(case):
    module, inputs = build(case)
    symmetry, layout = traced(case), Layout.from_checkpoint(module, token_size=13)
    flat, (row,) = torch.randn(layout.num_weights), symmetry.random(1, seed=3)
    expected = layout.tokenize(symmetry.permute(flat, row, layout)).values
    assert torch.equal(tokens_by_formula(flat, symmetry.table(layout), row, 13), expected)


@pytest.mark.parametrize("case", ["CNN-s", "CIFAR ResNet-20 A", "ViT fused", "GPT grouped queries"])
def test_algebra_of_permutations(case):
    symmetry = traced(case)
    a, b = symmetry.random(4, seed=0), symmetry.random(4, seed=0, offset=1)
    identity = symmetry.identity(4)
    assert a.shape == (4, symmetry.num_indices) and a.dtype == torch.int32 and not torch.equal(a, b)
    assert torch.equal(a, symmetry.random(4, seed=0)) and torch.equal(a, symmetry.expand(a[:, : sum(symmetry.sizes)]))
    for start, size in zip(symmetry.starts, symmetry.sizes, strict=False):
        assert torch.equal(a[:, start : start + size].sort(1).values, identity[:, start : start + size])
    assert torch.equal(symmetry.compose(a, symmetry.inverse(a)), identity)
    assert torch.equal(symmetry.compose(symmetry.compose(a, b), symmetry.inverse(b)), a)


def test_compose_is_first_then_second():
    module, inputs = build("DenseNet small")
    symmetry = traced("DenseNet small")
    layout = Layout.from_checkpoint(module)
    flat = torch.randn(2, layout.num_weights)
    first, second = symmetry.random(2, seed=0), symmetry.random(2, seed=1)
    one_by_one = symmetry.permute(symmetry.permute(flat, first, layout), second, layout)
    assert torch.equal(symmetry.permute(flat, symmetry.compose(first, second), layout), one_by_one)
    assert not torch.equal(symmetry.permute(flat, symmetry.compose(second, first), layout), one_by_one)


def test_permute_accepts_single_rows_and_groups_only():
    module, inputs = build("ViT fused")
    symmetry = traced("ViT fused")
    layout = Layout.from_checkpoint(module)
    flat = torch.randn(2, layout.num_weights)
    rows = symmetry.random(2)
    groups = rows[:, : sum(symmetry.sizes)]
    expected = symmetry.permute(flat, rows, layout)
    assert torch.equal(symmetry.permute(flat, groups, layout), expected)
    assert torch.equal(symmetry.permute(flat[1], groups[1], layout), expected[1])
    assert torch.equal(symmetry.permute(flat[1], rows, layout)[1], expected[1])
    assert torch.equal(symmetry.permute(flat, rows[1], layout)[1], expected[1])


def test_permute_gradients():
    module, inputs = build("group norm")
    symmetry = traced("group norm")
    layout = Layout.from_checkpoint(module)
    flat = torch.randn(layout.num_weights, dtype=torch.float64, requires_grad=True)
    row = symmetry.random(1, seed=4)[0]
    weights = torch.randn_like(flat)
    (grad,) = torch.autograd.grad((symmetry.permute(flat, row, layout) * weights).sum(), flat)
    assert torch.equal(grad, symmetry.permute(weights, symmetry.inverse(row), layout))


@pytest.mark.parametrize("method", ["permute", "random", "inverse", "compose", "identity"])
def test_symmetry_compiles_at_first_use(method):
    module, inputs = build("DenseNet small")
    symmetry, layout = traced("DenseNet small"), Layout.from_checkpoint(module)
    flat, rows = torch.randn(2, layout.num_weights), symmetry.random(2)
    call = {
        "permute": lambda symmetry: symmetry.permute(flat, rows, layout),
        "random": lambda symmetry: symmetry.permute(flat, symmetry.random(2, 0, 5), layout),
        "inverse": lambda symmetry: symmetry.inverse(rows),
        "compose": lambda symmetry: symmetry.compose(rows, rows),
        "identity": lambda symmetry: symmetry.identity(2) + rows,
    }[method]
    torch.compiler.reset()
    fresh = Symmetry.from_dict(symmetry.to_dict())
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(fresh)
    assert torch.equal(actual, call(symmetry))


def test_json_round_trip():
    module, inputs = build("DenseNet small")
    symmetry = traced("DenseNet small")
    restored = Symmetry.from_dict(json.loads(json.dumps(symmetry.to_dict())))
    assert restored == symmetry and restored != traced("CNN-s")
    layout, rows = Layout.from_checkpoint(module), symmetry.random(2)
    flat = torch.randn(2, layout.num_weights)
    assert torch.equal(restored.permute(flat, restored.random(2), layout), symmetry.permute(flat, rows, layout))


# --- what may go wrong


@pytest.mark.parametrize(
    "operation, reason",
    [
        (lambda x: x.cumsum(-1), "cumsum counts along it"),
        (lambda x: torch.fft.fft(x).real, "rfft is not understood"),
        (lambda x: x[:, torch.tensor([0, 0, 1, 2, 3, 4])], "a list of indices picks entries of it"),
        (lambda x: x + x.argmax(-1, keepdim=True), "argmax counts along it"),
    ],
)
def test_what_stays_is_listed(operation, reason):
    symmetry = Symmetry.trace(Wrapped(operation), torch.randn(2, 3))
    assert symmetry.sizes == (5,)
    places = ["enter.weight axis 0", "enter.bias axis 0"]
    assert symmetry.unpermuted == [f"{place} stays: {reason}" for place in places]
    assert symmetry.describe().endswith("\n".join(symmetry.unpermuted))


def test_constants_hold_their_axis_still():
    scale = torch.linspace(1, 2, 6)
    assert Symmetry.trace(Wrapped(lambda x: x * scale), torch.randn(2, 3)).sizes == (5,)


@pytest.mark.parametrize(
    "change, sizes",
    [
        (lambda x: x[:, 0].zero_(), (5,)),
        (lambda x: x[:, ::2].mul_(3), (5,)),
        (lambda x: x[:, :2].copy_(x[:, 2:4].sigmoid()), (5,)),
        (lambda x: x.view(-1).relu_(), (6, 5)),
        (lambda x: x.relu_(), (6, 5)),
        (lambda x: torch.sigmoid(x[:, :2], out=torch.empty(len(x), 2, dtype=x.dtype)), (2, 4, 5)),  # only read
    ],
)
def test_changing_a_part_in_place_holds_the_whole(change, sizes):
    def operation(x):
        x = x.clone()
        change(x)
        return x

    assert Symmetry.trace(Wrapped(operation), torch.randn(2, 3)).sizes == sizes


def test_slices_split_a_group():
    gate = Wrapped(lambda x: F.pad(x[:, :3].sigmoid() * x[:, 3:], (0, 3)))
    symmetry = Symmetry.trace(gate, torch.randn(2, 3))
    assert unsigned_axes(symmetry, "enter.weight")[0] == (
        (0, 3, 1),
        (0, 3, 1),
    )  # a value moves with its gate
    assert unsigned_axes(symmetry, "middle.weight")[1] == ((0, 3, 1), (None, 3, 1))
    (dead,) = symmetry.unpermuted  # what meets the padding
    assert dead.startswith("middle.weight axis 1 stays: 3 of 6 entries: outputs do not depend on it")


def test_tensors_that_share_storage_move_alike():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    module[3].weight.data = module[1].weight.data
    symmetry = Symmetry.trace(module, torch.randn(2, 3))
    assert symmetry.aliases == {"3.weight": "1.weight"} and unsigned_axes(symmetry, "3.weight") == unsigned_axes(
        symmetry, "1.weight"
    )
    # the rows of the first use are the columns of the second
    assert symmetry.sizes == (4,)
    layout = Layout.from_checkpoint(module)
    permuted = layout.unflatten(symmetry.permute(layout.flatten(module), symmetry.random(1)[0], layout))
    inputs = torch.randn(5, 3)
    torch.testing.assert_close(torch.func.functional_call(module, permuted, inputs), module(inputs))


class Folded(nn.Module):
    """A weight of three axes, as attention is written with einsum."""

    def __init__(self):
        super().__init__()
        self.enter, self.heads = nn.Linear(3, 8), nn.Parameter(torch.randn(8, 3, 4))
        self.back = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x):
        return torch.einsum("bhk,hko->bo", torch.einsum("bi,ihk->bhk", self.enter(x), self.heads).relu(), self.back)


def test_a_table_holds_one_axis_beside_the_rows():
    symmetry = Symmetry.trace(Folded(), torch.randn(2, 3))
    assert unsigned_axes(symmetry, "heads") == (((0, 8, 1),), None, ((1, 4, 1),))
    assert symmetry.unpermuted == ["heads axis 1 stays: a table holds one permuted axis beside the rows"]


def test_unused_weights_stay():
    module = Wrapped(torch.relu)
    module.spare = nn.Linear(4, 4)
    symmetry = Symmetry.trace(module, torch.randn(2, 3))
    assert symmetry.sizes == (6, 5)
    assert len(symmetry.unpermuted) == 3 and all(note.endswith("do not reach it") for note in symmetry.unpermuted)


def test_tied_and_recurrent_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.step = nn.Linear(3, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = self.step(self.step(self.enter(x)).tanh()).tanh()
            return F.linear(x, self.enter.weight.t())

    symmetry = Symmetry.trace(Recurrent(), torch.randn(2, 3))
    assert symmetry.sizes == (6,) and unsigned_axes(symmetry, "step.weight") == (
        ((0, 6, 1),),
        ((0, 6, 1),),
    )
    tied = traced("GPT tied")
    assert tied.aliases == {"head.weight": "tokens.weight"} and unsigned_axes(tied, "head.weight") == unsigned_axes(
        tied, "tokens.weight"
    )


def test_trace_refuses_what_changes_the_function(monkeypatch):
    monkeypatch.setitem(RULES, "cumsum", RULES["pointwise"])  # a rule that is wrong
    message = "outputs must survive permutations, got relative error .* from group 0, enter.weight"
    with pytest.raises(ValueError, match=message):
        Symmetry.trace(Wrapped(lambda x: x.cumsum(-1)), torch.randn(2, 3))


def test_cycles_of_channels():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.enter(x)
            x = x + 2 * x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1)  # entry i from 0, 4, 1, 5, 2, 6, 3, 7
            return self.leave(x.tanh())

    # cycles (1 4 2) and (3 5 6) in the order of their entries turn in different ways; 0 and 7 stay where they are, and
    # may change places; each cycle may change its sign as a whole
    symmetry = Symmetry.trace(Mixed(), torch.randn(2, 3))
    assert symmetry.sizes == (2, 1, 1) and symmetry.flips == (True, True, True)
    assert unsigned_axes(symmetry, "enter.bias")[0][0] == unsigned_axes(symmetry, "enter.bias")[0][-1] == (0, 1, 1)


def wrong(symmetry, name, axis, segments):
    fields = copy.deepcopy(symmetry.to_dict())
    axes = list(fields["axes"][name])
    axes[axis] = segments
    fields["axes"][name] = tuple(axes)
    return Symmetry.from_dict(fields)


@pytest.mark.parametrize("case", ["CNN-s", "ViT fused", "DenseNet small", "group norm"])
def test_verify_notices_every_forgotten_axis(case):
    module, inputs = build(case)
    symmetry = traced(case)
    for name, axes in symmetry.axes.items():
        for axis, segments in enumerate(axes):
            if segments is not None and len(axes) - (axis == 0) > 0:
                assert wrong(symmetry, name, axis, None).verify(module, inputs, trials=1) > 1e-6, (name, axis)


def test_verify_notices_a_wrong_group():
    module, inputs = build("CNN-s")
    symmetry = traced("CNN-s")
    forged = wrong(symmetry, "9.weight", 0, ((0, 8, 1), (None, 12, 1)))
    assert forged.verify(module, inputs) > 1e-3
    with pytest.raises(ValueError, match="from group 0"):
        forged.check(module, inputs)


def test_modules_are_left_alone():
    module, inputs = build("encoder layer")
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    Symmetry.trace(module, inputs)
    assert module.training and torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_other_layouts_are_refused():
    symmetry = traced("CNN-s")
    with pytest.raises(ValueError, match=r"layout must hold 0.weight \[8, 1, 5, 5\], got 0.weight \[6, 3, 5, 5\]"):
        symmetry.table(Layout.from_checkpoint(build("CNN2")[0]))
    with pytest.raises(ValueError, match="layout must hold 11.bias .10., got no tensor of this name"):
        state = build("CNN-s")[0].state_dict()
        symmetry.tensor_table(Layout.from_checkpoint({k: v for k, v in state.items() if k != "11.bias"}))
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    symmetry = Symmetry.trace(module, torch.randn(1, 3))
    renamed = Layout.from_checkpoint({f"network.{name}": tensor for name, tensor in module.state_dict().items()})
    for call in (symmetry.table, lambda x: symmetry.permute(torch.zeros(31), symmetry.identity(), x)):
        with pytest.raises(
            ValueError, match=r"layout must hold no tensor network.0.weight, got network.0.weight \[4, 3\]"
        ):
            call(renamed)


def test_wrong_arguments_are_named():
    module, inputs = build("CNN-s")
    symmetry = traced("CNN-s")
    layout = Layout.from_checkpoint(module)
    flat = layout.flatten(module)
    with pytest.raises(ValueError, match=r"permutations must be \[.., 38\] or \[.., 38\] int32, got \[1, 7\]"):
        symmetry.permute(flat, symmetry.identity()[:, :7], layout)
    with pytest.raises(
        ValueError, match=r"permutations must be \[S\] or \[B, S\] on cpu, got \[3, 38\] on cpu for flat"
    ):
        symmetry.permute(flat.expand(2, -1), symmetry.identity(3), layout)
    with pytest.raises(ValueError, match=r"flat must be \[2464\] or \[B, 2464\] floating point, got \[2463\]"):
        symmetry.permute(flat[1:], symmetry.identity(), layout)
    with pytest.raises(ValueError, match="module must return tensors, got int"):
        Symmetry.trace(nn.Sequential(nn.Linear(3, 2), Count()), torch.randn(1, 3))


class Count(nn.Module):
    def forward(self, x):
        return len(x)


# --- random networks


WIDE, PLAIN = (
    ["conv", "dense", "residual", "pad"],
    ["norm", "depthwise", "excite", "group norm", "flip", "double", "shuffle"],
)
LAYERS = st.lists(st.tuples(st.sampled_from(WIDE + PLAIN), st.integers(2, 5)), min_size=1, max_size=6)


class Drawn(nn.Module):
    """A chain of layers on feature maps, drawn by name and width."""

    def __init__(self, names):
        super().__init__()
        self.names, self.layers, channels = names, nn.ModuleList(), 3
        for name, width in names:
            self.layers.append(self.layer(name, channels, width))
            if name in ("dense", "pad"):
                channels += width
            channels *= 2 if name in ("depthwise", "double") else 1
            channels = width if name == "conv" else channels
        self.head = nn.Linear(4 * channels, 3)

    @staticmethod
    def layer(name, channels, width):
        if name in ("conv", "dense"):
            return nn.Conv2d(channels, width, 3, padding=1)
        if name == "residual":
            return nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1))
        if name == "norm":
            return nn.BatchNorm2d(channels)
        if name == "group_norm":
            return nn.GroupNorm(2 - channels % 2, channels)
        if name == "depthwise":
            return nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels)
        return architectures.Excite(channels, 3) if name == "excite" else nn.Identity()

    def forward(self, x):
        for (name, width), layer in zip(self.names, self.layers, strict=True):
            y = layer(x)
            if name == "dense":
                x = torch.cat([x, y], 1)
            elif name == "residual":
                x = x + y
            elif name == "pad":
                x = F.pad(x, (0, 0, 0, 0, 1, width - 1))
            elif name == "flip":
                x = x + x.flip(1)
            elif name == "double":
                x = torch.stack([x, x.tanh()], 2).flatten(1, 2)
            elif name == "shuffle" and x.shape[1] % 2 == 0:
                x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
            else:
                x = y.tanh()
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def check_drawn(module, inputs):
    symmetry = Symmetry.trace(module, inputs)
    assert symmetry.verify(module, inputs, trials=1, seed=1) < 1e-10
    layout = Layout.from_checkpoint(module)
    flat, rows = torch.randn(2, layout.num_weights), symmetry.random(2, seed=1)
    permuted = symmetry.permute(flat, rows, layout)
    assert torch.equal(symmetry.permute(permuted, symmetry.inverse(rows), layout), flat)
    state = symmetry.permute_state(layout.unflatten(flat[0]), rows[0])
    assert torch.equal(layout.flatten(state), permuted[0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(LAYERS)
def test_random_convolutional_networks(names):
    check_drawn(Drawn(names), torch.randn(1, 3, 4, 4))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=3, max_size=6), st.booleans())
def test_random_mlps_have_all_their_permutations(widths, bias):
    module, inputs = architectures.mlp(tuple(widths), bias=bias)
    expected = sorted(widths[1:-1], key=lambda width: width == 1)  # single units, of which tanh has signs, come last
    assert Symmetry.trace(module, inputs).sizes == tuple(expected)
    check_drawn(module, inputs)


def test_docstring_examples_run():
    result = doctest.testmod(symmetry_module, extraglobs={"fastws": fastws, "torch": torch})
    assert result.attempted > 0 and result.failed == 0


def perceptron(inputs, *hidden):
    widths = inputs, *hidden, 2
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


def test_permutations_of_a_small_network_are_enumerated():
    """120 of an MLP 16-5-4: all different, the first moves nothing, and each keeps the function."""
    module = nn.Sequential(nn.Linear(16, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))
    layout, symmetry = Layout.from_checkpoint(module), Symmetry.trace(module, torch.randn(1, 16))
    rows = symmetry.enumerate()
    assert rows.shape == (120, symmetry.num_indices) and rows.dtype == torch.int32 and (rows >= 0).all()
    assert len(rows.unique(dim=0)) == 120 and torch.equal(rows[:1], symmetry.identity())
    x, flat = torch.randn(3, 16), layout.flatten(module)
    networks = symmetry.permute(flat, rows, layout)
    assert len(networks.unique(dim=0)) == 120
    for network in networks:
        outputs = torch.func.functional_call(module, layout.unflatten(network), x)
        torch.testing.assert_close(outputs, module(x))


def test_permutations_of_several_groups_are_enumerated_unless_they_are_too_many():
    symmetry = Symmetry.trace(perceptron(3, 2, 3), torch.zeros(1, 3))
    assert symmetry.enumerate().tolist()[:3] == [[0, 1, 0, 1, 2], [0, 1, 0, 2, 1], [0, 1, 1, 0, 2]]
    assert len(symmetry.enumerate()) == 12
    large = Symmetry.trace(perceptron(3, 8, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"permutations must be at most 100,000 to be enumerated, got 10\*\*5.4"):
        large.enumerate()
