"""What of a network is stored, in which batches it is learned, and how predictions come back into it."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from fastws.nern.batching import KernelBatches, learn_from
from fastws.nern.folding import fold
from fastws.nern.layers import StoredLayer, StoredLayers, find_layers, rows_of
from fastws.nern.orders import Infilter, network_orders
from fastws.nern.presets import PRESETS, fields_of
from fastws.nn.nern import NeRN, NeRNConfig
from fastws.nn.resnet import CIFARResNet, ResNet

SIZES = [  # network, sizes of kernels, and layers, kernels and weights of the published code
    (lambda: CIFARResNet(20, "a"), (), 19, 29_744, 267_696),
    (lambda: CIFARResNet(20, "b"), (), 21, 32_304, 270_256),
    (lambda: CIFARResNet(56, "a"), (), 55, 94_256, 848_304),
    (lambda: CIFARResNet(56, "b"), (), 57, 96_816, 850_864),
    (lambda: ResNet(18, stem="imagenet"), (3,), 16, 1_220_608, 10_985_472),
]


@pytest.mark.parametrize("make, sizes, layers, kernels, weights", SIZES)
def test_networks_have_the_published_sizes(make, sizes, layers, kernels, weights):
    with torch.device("cpu"):
        network = make()
    found = find_layers(network, sizes=sizes)
    stored = StoredLayers(tuple(found), 3, "center", torch.empty(0))
    assert (len(found), sum(layer.kernels for layer in found), stored.num_weights) == (layers, kernels, weights)


def test_shortcuts_come_behind_their_block():
    found = find_layers(CIFARResNet(20, "b"))
    assert [i for i, layer in enumerate(found) if layer.kernel == (1, 1)] == [9, 16]
    assert found[0].name == "conv1.weight" and found[9].name == "layer2.0.shortcut.0.weight"


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, (1, 3), groups=2), nn.Flatten(), nn.Linear(9, 5)
    )


def test_layers_are_chosen():
    network = small_network()
    names = {"0.weight": (4, 3, 3, 3), "2.weight": (6, 2, 1, 3), "4.weight": (5, 9)}
    assert find_layers(network, linear=True) == [StoredLayer(*pair) for pair in names.items()]
    assert [layer.name for layer in find_layers(network)] == ["0.weight", "2.weight"]
    assert [layer.name for layer in find_layers(network, sizes=(3,))] == ["0.weight"]
    assert [layer.name for layer in find_layers(network, exclude=("0",))] == ["2.weight"]
    network.append(nn.Conv2d(3, 4, 3)).get_submodule("5").weight = network[0].weight
    assert [layer.name for layer in find_layers(network)] == ["0.weight", "2.weight"]  # tied weights are stored once


@pytest.mark.parametrize(
    "network, message",
    [
        (nn.Sequential(nn.Linear(3, 4)), "network must have 2-d convolutions, got none; linear layers are stored if"),
        (nn.Sequential(nn.Conv2d(1, 2, 5)), "sizes and exclude must leave a layer to store, got none of 1"),
    ],
)
def test_networks_with_nothing_to_store(network, message):
    with pytest.raises(ValueError, match=message):
        find_layers(network, sizes=(3,))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_that_cannot_be_stored():
    with pytest.raises(ValueError, match=r"0.weight must have kernels, got shape \[4, 3, 0, 0\]"):
        find_layers(nn.Sequential(nn.Conv2d(3, 4, 0)))
    network = small_network()
    with torch.no_grad():
        network[2].weight[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ValueError, match="nern: 2.weight must be finite, got 2 values that are NaN or infinite"):
        find_layers(network)
    with pytest.raises(ValueError, match="weight of 0 must be a parameter, got one that is computed"):
        find_layers(nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3))))
    with pytest.raises(ValueError, match="nern: kernel must be at least 3, that of 0.weight, got 1"):
        StoredLayers(tuple(find_layers(small_network())), 1, "center", torch.empty(0))


# --- predictions


def test_predictions_become_weights():
    layers = tuple(find_layers(small_network(), linear=True))
    predictions = torch.randn(12 + 12 + 45, 9)
    square = predictions.view(-1, 3, 3)
    weights = {
        kind: StoredLayers(layers, 3, kind, torch.empty(0)).weights(predictions)
        for kind in ("center", "average", "max")
    }
    for found in weights.values():
        assert torch.equal(found["0.weight"], square[:12].view(4, 3, 3, 3))
        assert [tuple(x.shape) for x in found.values()] == [layer.shape for layer in layers]
    assert torch.equal(weights["center"]["2.weight"].flatten(0, 2), square[12:24, 1])
    assert torch.equal(weights["center"]["4.weight"].flatten(), square[24:, 1, 1])
    torch.testing.assert_close(weights["average"]["2.weight"].flatten(0, 2), square[12:24].mean(1))
    torch.testing.assert_close(weights["average"]["4.weight"].flatten(), square[24:].mean((1, 2)))
    assert torch.equal(weights["max"]["2.weight"].flatten(0, 2), square[12:24].amax(1))
    assert torch.equal(weights["max"]["4.weight"].flatten(), square[24:].amax((1, 2)))


def test_two_by_two_kernels_are_pooled():
    layers = (StoredLayer("w", (2, 1, 2, 2)),)
    predictions = torch.randn(2, 9)
    square = predictions.view(2, 1, 3, 3)
    pooled = {"average": F.avg_pool2d(square, 2, 1), "max": F.max_pool2d(square, 2, 1), "center": square[:, :, :2, :2]}
    for kind, expected in pooled.items():
        assert torch.equal(StoredLayers(layers, 3, kind, torch.empty(0)).weights(predictions)["w"], expected)


def test_originals_and_norms():
    network = small_network()
    stored = StoredLayers(tuple(find_layers(network, linear=True)), 3, "center", torch.arange(69))
    originals = stored.originals(network)
    assert originals["2.weight"].data_ptr() == network[2].weight.data_ptr()
    norms = stored.norms(network)
    assert norms[13].item() == pytest.approx(network[2].weight[0, 1].norm().item(), rel=1e-6)
    assert norms[24 + 9 * 2 + 7].item() == pytest.approx(network[4].weight[2, 7].abs().item(), rel=1e-6)
    again = StoredLayers.from_dict(stored.to_dict(), stored.rows)
    assert again.layers == stored.layers and again.kernel == 3


def test_kernels_get_the_coordinates_of_their_places_on_the_path():
    layers = [StoredLayer("a", (2, 3, 3, 3)), StoredLayer("b", (2, 2, 1, 1))]
    path = torch.tensor([0, 4, 2, 5, 1, 3])
    rows = rows_of(layers, [path, torch.arange(4)])
    assert all(rows[kernel] == place for place, kernel in enumerate(path.tolist()))
    assert rows[6:].tolist() == [6, 7, 8, 9]
    channels = torch.tensor([[0, 2, 1], [1, 0, 2]])
    rows = rows_of(layers[:1], [Infilter(torch.tensor([1, 0]), channels)])
    assert rows.tolist() == [3 + 0, 3 + 2, 3 + 1, 0 + 1, 0 + 0, 0 + 2]
    assert rows_of(layers, None).tolist() == list(range(10))


def test_orders_of_a_network_are_permutations_within_layers():
    network = CIFARResNet(20, "b")
    layers = find_layers(network)
    weights = list(StoredLayers(tuple(layers), 3, "center", torch.empty(0)).originals(network).values())
    for mode in ("crossfilter", "infilter"):
        first = 0
        for layer, rows in zip(
            layers, rows_of(layers, network_orders(weights, mode)).split([x.kernels for x in layers]), strict=True
        ):
            assert torch.equal(rows.sort().values, torch.arange(first, first + layer.kernels))
            first += layer.kernels


# --- batches

KERNELS = [12, 30, 8]
NORMS = torch.linspace(0, 3, 50).double()


def batches(method, size=10, seed=1):
    return KernelBatches(method, size, KERNELS, NORMS, seed)


def test_layers_take_turns():
    assert batches("all").draw(0) is None
    ranges = [list(range(12)), list(range(12, 42)), list(range(42, 50))]
    assert [batches("sequential_layer").draw(step).tolist() for step in range(4)] == [*ranges, ranges[0]]
    drawn = Counter(tuple(batches("random_layer").draw(step).tolist()) for step in range(300))
    assert set(drawn) == {tuple(x) for x in ranges} and min(drawn.values()) > 70


def test_random_batches():
    draws = [batches("random_batch").draw(step) for step in range(400)]
    assert all(len(draw.unique()) == 10 for draw in draws)
    counts = torch.cat(draws).bincount(minlength=50)
    assert ((counts - 80).square() / 80).sum() < 90  # 49 degrees of freedom: 4 standard deviations
    assert torch.equal(batches("random_batch").draw(7), draws[7])
    assert not torch.equal(batches("random_batch", seed=2).draw(7), draws[7])
    assert len(batches("random_batch", size=1000).draw(0)) == 50


def test_no_kernel_comes_twice_in_an_epoch():
    source = batches("random_batch_without_replacement", size=16)
    parts = [source.draw(step) for step in range(12)]
    assert [len(part) for part in parts] == [16, 16, 16, 2] * 3
    epochs = [torch.cat(parts[i : i + 4]) for i in (0, 4, 8)]
    assert all(torch.equal(epoch.sort().values, torch.arange(50)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and torch.equal(source.draw(5), parts[5])


def test_one_batch_in_five_is_drawn_by_norm_with_replacement():
    draws = [batches("random_weighted_batch", size=40).draw(step) for step in range(2000)]
    weighted = [draw for draw in draws if len(draw.unique()) < 40]  # 40 of 50 with replacement: always some twice
    assert len(weighted) / 2000 == pytest.approx(0.2, abs=0.04)
    counts = torch.cat(weighted).bincount(minlength=50)
    expected = NORMS / NORMS.sum() * counts.sum()
    assert counts[0] == 0
    assert ((counts - expected)[1:].square() / expected[1:]).sum() < 90


def test_batches_need_sizes():
    with pytest.raises(ValueError, match="nern: kernel_batch must be at least 1, got 0"):
        batches("random_batch", size=0)


def published_gradient(predictions, rows, chosen, loss):
    """The published way: the batch is written into all predictions, whose gradients then go into the batch."""
    everything = torch.zeros_like(predictions)
    everything[chosen] = rows
    rest = torch.ones(len(predictions), dtype=torch.bool).index_fill(0, chosen, False)
    everything[rest] = predictions[rest]
    weights = everything.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(weights), weights)
    return grad[chosen]


def test_duplicates_count_each_time():
    torch.manual_seed(0)
    nern = NeRN(NeRNConfig(hidden=16), [(5, 10)])
    target, chosen = torch.randn(50, 9), torch.tensor([3, 7, 3, 49, 3])

    def loss(x):
        return (x - target).square().mean().sqrt()

    predictions = nern().detach()
    batch = nern(chosen)
    batch.retain_grad()
    loss(learn_from(predictions, batch, chosen)).backward()
    torch.testing.assert_close(batch.grad, published_gradient(predictions, batch.detach(), chosen, loss))
    ours = [p.grad.clone() for p in nern.parameters()]
    grad = torch.autograd.grad(loss(x := predictions.requires_grad_()), x)[0]
    multiplicity = torch.zeros(50).index_add(0, chosen, torch.ones(5))
    expected = torch.autograd.grad(nern(), list(nern.parameters()), grad * multiplicity[:, None])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_mse_does_not_need_the_rest():
    torch.manual_seed(0)
    nern = NeRN(NeRNConfig(hidden=16), [(5, 10)])
    target, chosen = torch.randn(50, 9), torch.tensor([3, 7, 49])
    whole = (learn_from(nern().detach(), nern(chosen), chosen) - target).square().mean()
    part = (nern(chosen) - target[chosen]).square().sum() / target.numel()
    for one, other in zip(*(torch.autograd.grad(x, list(nern.parameters())) for x in (whole, part)), strict=True):
        torch.testing.assert_close(one, other)


# --- folding


def test_folded_network_computes_the_same_and_has_the_same_gradients():
    torch.manual_seed(0)
    network = CIFARResNet(20, "b").double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    folded, factors = fold(network)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 0
    assert set(factors) == {layer.name for layer in find_layers(network)}
    images = torch.randn(2, 3, 32, 32).double()
    torch.testing.assert_close(folded(images), network(images))
    weights = {name: torch.randn_like(network.get_parameter(name)) / 10 for name in factors}
    grads = []
    for one, factor in ((network, {}), (folded, factors)):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        put = {name: leaf * factor.get(name, 1) for name, leaf in leaves.items()}
        grads.append(torch.autograd.grad(functional_call(one, put, images).square().sum(), list(leaves.values())))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


class Branches(nn.Module):
    """Norms that must stay: one whose convolution is used twice, one that is called twice, one that values decide."""

    def __init__(self, decide=False):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.decide = decide

    def forward(self, x):
        y = self.first(x)
        y = y + self.norms[0](y)
        y = self.norms[1](self.second(y)) + self.norms[1](y)
        if self.decide and y.sum() > 0:
            return y
        return self.norms[2](self.third(y))


def test_only_norms_of_one_convolution_are_folded():
    torch.manual_seed(0)
    network = Branches().eval()
    folded, factors = fold(network)
    assert list(factors) == ["third.weight"]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(folded(x), network(x))
    network.third.weight = network.first.weight  # tied
    assert fold(network)[1] == {}
    assert fold(Branches(decide=True).eval())[1] == {}


# --- presets


def test_presets_are_the_published_ones():
    assert len(PRESETS) == 41
    preset = fields_of("cifar10-resnet20-180-crossfilter")
    assert (preset["steps"], preset["feature_weight"], preset["warmup"], preset["hidden"]) == (68_600, 1e-4, 0, 180)
    preset = fields_of("cifar100-resnet56-400-none")
    assert (preset["steps"], preset["distillation_weight"], preset["warmup"]) == (88_200, 1e-5, 10_000)
    preset = fields_of("imagenet-resnet18-1256-infilter")
    assert (preset["batch_size"], preset["kernel_batch"], preset["sizes"]) == (32, 65_536, (3,))
    with pytest.raises(ValueError, match="preset must be one of cifar10-resnet20-140|160"):
        fields_of("cifar10-resnet20-181-crossfilter")


class ReadTwice(nn.Module):
    """Its convolution's weight is read beside the call, or the type of its input is checked."""

    def __init__(self, check=False):
        super().__init__()
        self.conv, self.norm, self.check = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), check

    def forward(self, x):
        assert not self.check or isinstance(x, torch.Tensor)
        y = self.norm(self.conv(x))
        return y if self.check else y + F.conv2d(x, self.conv.weight)


def hooked():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network[0].register_forward_hook(lambda module, arguments, output: 2 * output)
    return network


@pytest.mark.parametrize("make", [ReadTwice, lambda: ReadTwice(check=True), hooked])
def test_convolutions_that_are_more_than_called_are_not_folded(make):
    network = make().eval()
    network.get_submodule("norm" if isinstance(network, ReadTwice) else "1").running_mean.normal_()
    folded, factors = fold(network)
    x = torch.randn(2, 3, 8, 8)
    assert factors == {}
    torch.testing.assert_close(folded(x), network(x))
