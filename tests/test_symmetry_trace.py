"""Traces of modules that pick entries, compute in dtypes of their own, cannot be copied, or must be refused."""

import architectures
import pytest
import torch
from architectures import unsigned_axes
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fastws.symmetry import influence
from fastws.symmetry.copies import Example
from fastws.symmetry.symmetry import Symmetry
from fastws.symmetry.verify import Check


class Net(nn.Module):
    """A forward given as a function of the module and its inputs, and parts by name."""

    def __init__(self, rule, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.rule = rule

    def forward(self, *args, **kwargs):
        return self.rule(self, *args, **kwargs)


def table(*shape):
    return nn.Parameter(torch.randn(shape))


def hidden(operation, width=6, after=None):
    """An operation between two dense layers."""
    parts = {"enter": nn.Linear(3, width), "leave": nn.Linear(after or width, 2)}
    return Net(lambda net, x: net.leave(operation(torch.relu(net.enter(x)))), **parts)


def traced(net, *examples):
    symmetry = Symmetry.trace(net, *(examples or (torch.randn(4, 3),)))
    for seed, example in enumerate(examples or (torch.randn(4, 3),)):
        assert not symmetry.sizes or symmetry.verify(net, example, 3, seed=seed + 5) < 1e-9
    return symmetry


# --- picked entries


def fusion(net, x):
    return net.leave(torch.relu(net.w[0] * net.a(x) + net.w[1] * net.b(x)))


def experts(net, x):
    return sum(torch.relu(x @ w) for w in net.w.unbind(0))


def modulated(net, x):
    shift, scale, gate = net.w.chunk(3, 0)
    return net.leave(torch.relu(net.a(x) * (1 + scale) + shift) * gate)


PICKED = {
    "fusion weights": (Net(fusion, a=nn.Linear(3, 6), b=nn.Linear(3, 6), w=table(2), leave=nn.Linear(6, 2)), (6,)),
    "stacked experts": (Net(experts, w=table(4, 3, 5)), ()),
    "scale and shift": (Net(modulated, a=nn.Linear(3, 6), w=table(3, 6), leave=nn.Linear(6, 2)), (6,)),
    "one unit gates the others": (hidden(lambda h: h * h[:, :1]), (5,)),
    "the last unit": (hidden(lambda h: h + h[:, -1, None]), (5,)),
    "two units apart": (hidden(lambda h: h * h[:, 2:4].sum(1, keepdim=True)), (4, 2)),
}


@pytest.mark.parametrize("case", PICKED)
def test_picked_entries_stay(case):
    net, sizes = PICKED[case]
    symmetry = traced(net)
    assert sorted(symmetry.sizes) == sorted(sizes)
    assert len(sizes) == 2 or any("picks entries of it" in sentence for sentence in symmetry.unpermuted)


@pytest.mark.parametrize("count, place", [(n, i) for n in (2, 3, 5, 8) for i in {0, n // 2, n - 1}])
def test_one_of_several_heads(count, place):
    net = Net(lambda net, x: torch.relu(net.a(x)) @ net.w[place], a=nn.Linear(3, 7), w=table(count, 7, 2))
    assert traced(net).sizes == (7,)


# --- what examples do not reach


def positions(net, tokens):
    return net.leave(torch.relu(net.middle(net.words(tokens) + net.places[:, : tokens.shape[1]].to(net.words.weight))))


def test_rows_behind_the_input_stay():
    parts = {
        "words": nn.Embedding(7, 6),
        "places": table(1, 16, 6),
        "middle": nn.Linear(6, 9),
        "leave": nn.Linear(9, 7),
    }
    net, long = Net(positions, **parts), torch.arange(16)[None] % 7
    symmetry = traced(net, long[:, :3])
    assert symmetry.sizes == (6, 9) and symmetry.verify(net, long) < 1e-12
    assert symmetry.axes["places"][1] is None and "places axis 1 stays" in symmetry.unpermuted[0]
    assert traced(net, long[:, :3], long).unpermuted == []


def by_task(net, x, task):
    return net.heads[task](torch.relu(net.enter(x)))


def test_several_examples_reach_all_heads():
    net = Net(by_task, enter=nn.Linear(3, 6), heads=nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 4)]))
    x = torch.randn(2, 3)
    first = traced(net, (x, 0))
    assert unsigned_axes(first, "heads.1.weight") == (None, None)
    assert any("heads.1.weight axis 1 stays: function kept only" in sentence for sentence in first.unpermuted)
    both = traced(net, (x, 0), {"x": x, "task": 1})
    assert unsigned_axes(both, "heads.1.weight") == (None, ((0, 6, 1),)) and both.unpermuted == []


@pytest.mark.parametrize(
    "rule, example",
    [
        (
            lambda net, x, scale: net.leave(torch.relu(net.enter(x)) * scale),
            {"scale": torch.ones(1), "x": torch.randn(2, 3)},
        ),
        (lambda net, batch: net.leave(torch.relu(net.enter(batch["x"]))), {"x": torch.randn(2, 3)}),
        (
            lambda net, parts: net.leave(torch.relu(net.enter(parts[0] + parts[1]))),
            [torch.randn(2, 3), torch.randn(2, 3)],
        ),
        (lambda net, x: net.leave(torch.relu(net.enter(x["a"][0]))), ({"a": [torch.randn(2, 3)]},)),
    ],
)
def test_kinds_of_inputs(rule, example):
    class Named(Net):
        forward = rule

    assert traced(Named(None, enter=nn.Linear(3, 6), leave=nn.Linear(6, 2)), example).sizes == (6,)


# --- dtypes


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.leave = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.leave(self.layer(x, (torch.zeros(1, len(x), 6), torch.zeros(1, len(x), 6)))[0])


def test_dtypes_of_their_own():
    assert traced(ByHand(), torch.randn(2, 4, 3)).sizes == (6,)
    assert traced(hidden(lambda h: h.float().pow(2).to(torch.float32))).sizes == (6,)
    net = hidden(lambda h: h)
    net.register_buffer("turn", torch.randn(6, dtype=torch.complex64), persistent=False)
    net.rule = lambda net, x: net.leave(net.enter(x) * net.turn.imag)
    assert traced(net).sizes == ()
    assert traced(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).bfloat16(), torch.randn(4, 3)).sizes == (
        6,
    )
    empty = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    empty.spare = nn.Parameter(torch.empty(0, 4))
    assert traced(empty).sizes == (6,)


def only_single(net, x):
    if x.dtype != torch.float32:
        raise TypeError("x must be float32")
    return net.leave(torch.relu(net.enter(x)))


def test_modules_that_refuse_float64_are_checked_in_their_own_dtype():
    net = Net(only_single, enter=nn.Linear(3, 6), leave=nn.Linear(6, 2))
    symmetry = Symmetry.trace(net, torch.randn(4, 3))
    assert symmetry.sizes == (6,) and symmetry.verify(net, torch.randn(4, 3)) < 1e-4
    assert Check(net, Example((torch.randn(4, 3),), {})).tolerance < 1e-4
    with pytest.raises(ValueError, match="module must run on the example inputs in eval mode, got RuntimeError"):
        Symmetry.trace(net, torch.randn(4, 5))


# --- copies


def test_modules_that_deepcopy_refuses():
    for wrap in (nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5)):
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        wrap(net[0])
        net(torch.randn(2, 3)).sum().backward()
        assert traced(net).sizes == (8,)
    net.stream = (x for x in ())
    with pytest.raises(ValueError, match="module must be one that copy.deepcopy copies, got TypeError"):
        Symmetry.trace(net, torch.randn(2, 3))


def cached(net, x):
    if net.kept is None:
        net.kept = net.enter.weight * 2
    return net.leave(torch.relu(x @ net.kept.t()))


def test_modules_that_keep_results():
    net = Net(cached, enter=nn.Linear(3, 6, bias=False), leave=nn.Linear(6, 2), kept=None)
    assert traced(net).sizes == (6,) and net.kept is None


# --- what the check sees


def test_random_modules_are_told_so():
    for noise in (lambda h: F.dropout(h, 0.5), lambda h: h + 0.1 * torch.randn_like(h), lambda h: h * torch.rand(1)):
        with pytest.raises(ValueError, match="same outputs of the same inputs in eval mode, got random ones"):
            Symmetry.trace(hidden(noise), torch.randn(4, 3))
    assert Symmetry.trace(hidden(lambda h: h + 0 * torch.rand(1)), torch.randn(4, 3)).sizes == (6,)


def test_outputs_that_do_not_depend_on_weights_certify_nothing():
    symmetry, blind = Symmetry.trace(hidden(torch.tanh), torch.randn(4, 3)), hidden(torch.tanh)
    blind.rule = lambda net, x: x
    with pytest.raises(ValueError, match="outputs must depend on the weights to be checked"):
        symmetry.verify(blind, torch.randn(4, 3))
    with pytest.raises(ValueError, match="outputs must depend on the weights to be checked"):
        symmetry.check(blind, torch.randn(4, 3))


def branches(join):
    """Two hidden layers, side by side; ``join`` makes the output of what they give."""
    parts = {"a": nn.Linear(3, 6), "b": nn.Linear(3, 5), "after_a": nn.Linear(6, 2), "after_b": nn.Linear(5, 2)}
    return Net(lambda net, x: join(net.after_a(torch.relu(net.a(x))), net.after_b(torch.relu(net.b(x)))), **parts)


BLIND = {
    "times zero": lambda a, b: a + 0 * b,
    "far below rounding": lambda a, b: a + 1e-12 * b,
    "clamped": lambda a, b: a + b.clamp(1e9, 1e10),
    "the other branch of where": lambda a, b: torch.where(a > 1e9, b, a),
    "not returned": lambda a, b: a,
    "places only": lambda a, b: (a, b.argmax(-1)),
    "a decision only": lambda a, b: a if b.sum() > -1e9 else b,
    "without gradients": torch.no_grad()(lambda a, b: a + 0 * b),
}


@pytest.mark.parametrize("case", BLIND)
def test_groups_that_outputs_do_not_depend_on_stay(case):
    net = branches(BLIND[case])
    symmetry = traced(net)
    assert symmetry.sizes == (6,)
    (reason,) = {sentence.partition(" stays: ")[2] for sentence in symmetry.unpermuted if "b.bias" in sentence[:6]}
    assert "outputs do not depend on it" in reason
    whole = Symmetry.trace(branches(torch.add), torch.randn(4, 3))
    assert whole.sizes == (6, 5) and whole.unpermuted == []
    with pytest.raises(ValueError, match="outputs must depend on group 1, b.weight to be checked"):
        whole.check(net, torch.randn(4, 3))
    with pytest.raises(ValueError, match="outputs must depend on group 1, b.weight to be checked"):
        whole.verify(net, torch.randn(4, 3), only=1)
    assert whole.verify(net, torch.randn(4, 3), only=0) < 1e-12


def test_gradients_of_batch_norms_show_what_counts(monkeypatch):
    """Without changing weights group after group, which takes two runs for each: a minute for deep networks."""
    monkeypatch.setattr(influence, "moves", None)
    assert len(Symmetry.trace(*architectures.resnet((1, 1), width=4)).sizes) == 4
    assert len(Symmetry.trace(*architectures.densenet()).sizes) == 12


def attention(net, x):
    return net.leave((net.q(x) @ net.k(x).mT).softmax(-1) @ net.v(x))


def test_one_token_shows_nothing_of_queries_and_keys():
    net = Net(attention, q=nn.Linear(3, 6), k=nn.Linear(3, 6), v=nn.Linear(3, 5), leave=nn.Linear(5, 2))
    one, two = torch.randn(1, 1, 3), torch.randn(1, 2, 3)
    assert traced(net, one).sizes == (5,) and traced(net, two).sizes == traced(net, one, two).sizes == (6, 5)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_that_begin_at_zero_hide_nothing(shape):
    def rule(net, x):
        return net.leave(x + net.scale * net.down(torch.relu(net.up(x))))

    parts = {"up": nn.Linear(3, 6), "down": nn.Linear(6, 3), "leave": nn.Linear(3, 2)}
    assert traced(Net(rule, scale=nn.Parameter(torch.zeros(shape)), **parts)).sizes == (6,)


def test_small_silent_layers_are_seen():
    """Both units of a layer are zero behind a ReLU for a quarter of all weights."""
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        assert Symmetry.trace(net, torch.randn(1, 3)).sizes == (2, 2)


def test_groups_are_seen_where_gradients_are_not():
    net = branches(lambda a, b: a + b)
    net.rule = torch.no_grad()(net.rule)
    assert traced(net).sizes == (6, 5)
    assert traced(branches(lambda a, b: a + (8 * b).round()), torch.randn(64, 3)).sizes == (6, 5)


def test_large_outputs_do_not_hide_small_ones():
    symmetry, wrong = Symmetry.trace(hidden(torch.tanh), torch.randn(4, 3)), hidden(lambda h: h.cumsum(-1))
    wrong.rule = lambda net, x: F.pad(net.leave(net.enter(x).cumsum(-1)), (0, 1), value=-1e9)
    assert symmetry.verify(wrong, torch.randn(4, 3)) > 1e-3


def test_trials_move_most_units():
    symmetry = Symmetry.trace(
        nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 2)), torch.randn(1, 3)
    )
    still = symmetry.identity()[0, : sum(symmetry.sizes)]
    for seed in range(20):
        rows = symmetry._trials(4, seed, range(2))[:, : sum(symmetry.sizes)]
        assert (rows[0] != still).all() and ((rows == still)[:, :2].sum(1) * 2 < 2).all()
        assert ((rows == still)[:, 2:].sum(1) * 2 < 9).all()


def test_leaving_torch_is_listed():
    net = hidden(lambda h: torch.from_numpy(h.tanh().numpy()))
    symmetry = traced(net)
    assert symmetry.sizes == () and all("takes it out of torch" in sentence for sentence in symmetry.unpermuted[:2])


# --- symmetry that was missed


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers, both", [(1, False), (2, False), (2, True)])
def test_layers_and_directions_have_groups(kind, layers, both):
    parts = {"layer": kind(3, 5, layers, bidirectional=both), "leave": nn.Linear(5 * (1 + both), 2)}
    symmetry = traced(Net(lambda net, x: net.leave(net.layer(x)[0]), **parts), torch.randn(4, 2, 3))
    assert symmetry.sizes == (5,) * layers * (1 + both) and symmetry.unpermuted == []


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind):
    def rule(net, x):
        state = torch.zeros(2, 5), torch.zeros(2, 5)
        for step in x:
            state = net.cell(step, state) if kind is nn.LSTMCell else (net.cell(step, state[0]),)
        return net.leave(state[0])

    symmetry = traced(Net(rule, cell=kind(3, 5), leave=nn.Linear(5, 2)), torch.randn(4, 2, 3))
    assert symmetry.sizes == (5,) and symmetry.unpermuted == []


SHUFFLED = torch.tensor([3, 1, 5, 0, 2, 4])


def images(h):
    return h[:, :, None, None].expand(-1, -1, 4, 4)


@pytest.mark.parametrize(
    "operation",
    [
        lambda h: F.adaptive_avg_pool2d(images(h).contiguous(memory_format=torch.channels_last), 1).flatten(1),
        lambda h: h[:, :, None].repeat(1, 1, 3).max(2)[0],
        lambda h: h[:, :, None].repeat(1, 1, 3).sort(2)[0].sum(2),
        lambda h: h.index_select(1, SHUFFLED)[:, SHUFFLED.argsort()],
        lambda h: h[:, :, None].repeat(1, 1, 3).gather(2, torch.tensor([2, 0]).expand(len(h), 6, 2)).sum(2),
        lambda h: torch.zeros_like(h).index_add(0, torch.tensor([1, 0, 1, 2]), h),
        lambda h: torch.zeros_like(h).scatter_add(0, torch.zeros(4, 6, dtype=torch.int64), h),
        lambda h: F.fold(F.unfold(images(h), 3, padding=1), 4, 3, padding=1).mean((2, 3)),
        lambda h: h[:, :, None, None].squeeze_((2, 3)),
        lambda h: h.max(h.tanh()),
        lambda h: torch.cdist(h[:, :, None], h[:, :, None] * 2).sum(2),
    ],
)
def test_operations_that_let_all_units_move(operation):
    symmetry = traced(hidden(operation))
    assert symmetry.sizes == (6,) and symmetry.unpermuted == []


def test_bags_and_bilinear_layers():
    ids = torch.tensor([[1, 2], [3, 4]])
    assert traced(Net(lambda net, x: net.b(net.a(x)), a=nn.EmbeddingBag(9, 6), b=nn.Linear(6, 2)), ids).sizes == (6,)
    parts = {"a": nn.Linear(3, 5), "b": nn.Linear(3, 4), "mix": nn.Bilinear(5, 4, 6), "leave": nn.Linear(6, 2)}
    symmetry = traced(Net(lambda net, x: net.leave(torch.relu(net.mix(net.a(x), net.b(x)))), **parts))
    assert len(symmetry.sizes) == 2 and symmetry.unpermuted == [
        "mix.weight axis 2 stays: a table holds one permuted axis beside the rows"
    ]


def shuffle(x, groups):
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("groups", [2, 3])
def test_channel_shuffles(groups):
    """Channels move inside their groups, those that come from different groups for themselves."""

    def rule(net, x):
        x = torch.relu(net.enter(x))
        for first, deep, second in net.blocks:
            x = torch.relu(x + second(deep(shuffle(torch.relu(first(x)), groups))))
        return net.leave(x.mean((2, 3)))

    def block():
        wide = nn.Conv2d(24, 24, 1, groups=groups), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        return nn.ModuleList([*wide, nn.Conv2d(24, 24, 1, groups=groups)])

    parts = {"enter": nn.Conv2d(3, 24, 1), "blocks": nn.ModuleList([block(), block()]), "leave": nn.Linear(24, 2)}
    symmetry = traced(Net(rule, **parts), torch.randn(1, 3, 4, 4))
    assert sum(symmetry.sizes) >= 24 and symmetry.axes["blocks.0.0.weight"][0] is not None


@pytest.mark.parametrize(
    "operation", [lambda h: h + h.flip(1) + h.index_select(1, SHUFFLED), lambda h: h.index_select(1, SHUFFLED)]
)
def test_what_stays_for_its_order_is_listed(operation):
    symmetry = traced(hidden(operation))
    assert symmetry.sizes == () and any("order" in sentence for sentence in symmetry.unpermuted)


def test_whatever_stays_is_listed_with_its_reason():
    parts = {"words": nn.Embedding(7, 6), "middle": nn.Conv1d(6, 9, 3), "leave": nn.Linear(9, 4)}
    net = Net(lambda net, ids: net.leave(net.middle(net.words(ids).mT).relu().mean(2).cumsum(1)), **parts)
    symmetry = traced(net, torch.arange(5)[None])
    assert symmetry.sizes == (6,)
    assert symmetry.unpermuted == [f"middle.{part} axis 0 stays: cumsum counts along it" for part in ("weight", "bias")]
    assert symmetry.fixed == [
        "words.weight axis 0 stays: inputs name its rows by number",
        "middle.weight axis 2 stays: neighbours along it belong together",
        "leave.weight axis 0 stays: the outputs have an order",
        "leave.weight axis 1 stays: inputs, constants or others that stay go along with it",
        "leave.bias axis 0 stays: the outputs have an order",
    ]
    lines = symmetry.describe().splitlines()
    assert "leave.weight axis 0, leave.bias axis 0 stay: the outputs have an order" in lines
    assert lines[-2:] == symmetry.unpermuted


@pytest.mark.parametrize("name", ["gpt", "encoder", "densenet", "mixer"])
def test_every_axis_moves_or_is_listed(name):
    symmetry = Symmetry.trace(*getattr(architectures, name)())
    listed = {sentence.partition(" stays: ")[0] for sentence in symmetry.unpermuted + symmetry.fixed}
    for tensor, axes in symmetry.axes.items():
        for axis, segments in enumerate(axes):
            stays = segments is None or any(group is None for group, *_ in segments)
            assert symmetry.shapes[tensor][axis] == 1 or stays == (f"{tensor} axis {axis}" in listed)


def split_attention(net, x):
    """ResNeSt: halves of the channels of a grouped convolution, weighed against each other."""
    halves = torch.relu(net.split(torch.relu(net.enter(x)))).unflatten(1, (2, 12))
    weights = net.expand(torch.relu(net.squeeze(halves.sum(1).mean((2, 3))))).unflatten(1, (2, 12)).softmax(1)
    return net.leave((halves * weights[..., None, None]).sum(1).mean((2, 3)))


def test_channels_of_few_wide_groups_move_inside_them():
    parts = {"enter": nn.Conv2d(3, 12, 1), "split": nn.Conv2d(12, 24, 3, padding=1, groups=2)}
    parts |= {"squeeze": nn.Linear(12, 5), "expand": nn.Linear(5, 24), "leave": nn.Linear(12, 2)}
    symmetry = traced(Net(split_attention, **parts), torch.randn(1, 3, 4, 4))
    # inputs move alike in both groups, because they have one axis of the weight; halves of the outputs are summed
    assert sorted(symmetry.sizes) == [5, 6, 12] and symmetry.unpermuted == []


@pytest.mark.parametrize("operation", [lambda h: h.unflatten(1, (2, 6)).sum(1), lambda h: h.unflatten(1, (2, 6))[:, 1]])
def test_the_larger_of_two_axes_moves(operation):
    symmetry = traced(hidden(operation, width=12, after=6))
    assert 6 in symmetry.sizes


def test_images_read_at_places_of_a_grid():
    def rule(net, x):
        x = torch.relu(net.enter(x))
        return net.leave(F.grid_sample(x, net.where(x).movedim(1, -1).tanh(), align_corners=False))

    parts = {"enter": nn.Conv2d(3, 6, 1), "where": nn.Conv2d(6, 2, 3, padding=1), "leave": nn.Conv2d(6, 2, 1)}
    symmetry = traced(Net(rule, **parts), torch.randn(2, 3, 4, 4))
    assert symmetry.sizes == (6,) and symmetry.unpermuted == []


def test_memory_that_a_module_lets_go_of():
    def rule(net, x):
        h = net.enter(x)
        y = net.leave(torch.relu(h))
        h.set_()
        return y

    symmetry = traced(Net(rule, enter=nn.Linear(3, 6), leave=nn.Linear(6, 2)))
    assert symmetry.sizes == (6,) and symmetry.unpermuted == []
