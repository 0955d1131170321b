import hashlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import compile_for_host, numbers, pointers

import fastws
from fastws import _native
from fastws.ops.kernel_order import kernel_order_reference, unit_rows
from fastws.testing import assert_equal, devices, implementations

CHECKPOINTS = Path(__file__).parents[2] / "shared/data/resnets_cifar10"
compiled = pytest.mark.skipif("kernel_order" not in _native.COMPILED["cpu"], reason="the reference would take minutes")


def random_kernels(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def published(kernels):
    """The published search, with lists, in float32 numpy; zero kernels are similar to nothing."""
    x = kernels.numpy()
    norms = (x * x).sum(1, keepdims=True) ** 0.5
    x = x / norms.clip(min=1e-30)
    order, left = [0], list(range(1, len(x)))
    while left:
        similarities = x[left] @ x[order[-1]]
        order.append(left.pop(int(similarities.argmax())))
    return order


def mean_similarity(kernels, order):
    rows = unit_rows(kernels)[order].double()
    return (rows[1:] * rows[:-1]).sum(1).mean().item()


# n, d: one leaf, several, several nodes, more rows than one block of a GPU walks; kernels of 1x1, 3x3, 5x5; flat and
# curved
SHAPES = [(1, 9), (2, 9), (63, 9), (65, 9), (700, 9), (2300, 9), (5000, 9), (300, 25), (500, 2), (300, 1), (40, 130)]


@pytest.mark.parametrize("name, function, device", implementations("kernel_order"))
@pytest.mark.parametrize("n, d", SHAPES)
def test_kernel_order_is_the_reference(name, function, device, n, d):
    rows = unit_rows(random_kernels(n, d)).to(device)[None]
    assert_equal(function(rows, False), kernel_order_reference, rows, False)


def walked_on_host(rows, blocks):
    """The device code of CUDA, threads of which are fibers; several blocks wait for each other."""
    batch, count, d = rows.shape
    order = torch.full((batch, count), -1)
    taken, found = torch.zeros(batch, count, dtype=torch.uint8), torch.full((2 * blocks, 2), torch.nan).double()
    function = compile_for_host("kernel_order").kernel_order
    function(numbers(batch, count, d, blocks), pointers(rows.contiguous(), order, taken, found))
    return order


@pytest.mark.parametrize("batch, n, d, blocks", [(2, 600, 9, 1), (2, 30, 25, 1), (2, 60, 9, 3), (1, 1200, 9, 2)])
def test_kernel_order_on_host_is_the_reference(batch, n, d, blocks):
    kernels = random_kernels(batch * n, d).view(batch, n, d)
    kernels[:, 10:20], kernels[:, 20:25] = kernels[:, 5:6], 0  # of equals the first
    rows = unit_rows(kernels)
    assert torch.equal(walked_on_host(rows, blocks), kernel_order_reference(rows, False))


@pytest.mark.parametrize("n, d", [(1, 9), (30, 9), (300, 9), (100, 25), (100, 1)])
def test_kernel_order_is_the_published_search(n, d):
    kernels = random_kernels(n, d)
    assert fastws.kernel_order(kernels).tolist() == published(kernels)


@pytest.mark.parametrize("name, function, device", implementations("kernel_order"))
def test_kernel_order_of_equal_zero_and_opposite_kernels(name, function, device):
    kernels = random_kernels(1500, 9).round()  # many are equally similar
    kernels[10:200] = kernels[5]
    kernels[300:340] = 0
    kernels[400:420] = -kernels[500:520]
    kernels[600:650] = kernels[700:750] * 3
    rows = unit_rows(kernels).to(device)[None]
    assert_equal(function(rows, False), kernel_order_reference, rows, False)


def test_kernel_order_by_hand():
    one = torch.tensor([[2.0], [-1.0], [3.0], [0.0], [-5.0], [1.0]])
    assert fastws.kernel_order(one).tolist() == [0, 2, 5, 3, 1, 4]  # after the zero the first that is left
    zeros = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.0, -0.0]])
    assert fastws.kernel_order(zeros).tolist() == [0, 1, 2, 3, 5, 4]  # zero is nearer than what points away
    assert fastws.kernel_order(torch.zeros(4, 9)).tolist() == [0, 1, 2, 3]
    assert fastws.kernel_order(torch.ones(4, 9)).tolist() == [0, 1, 2, 3]
    assert fastws.kernel_order(torch.zeros(0, 9)).tolist() == []
    assert fastws.kernel_order(torch.tensor([[-3.0]]), improve=True).tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kernel_order_of_few_values(data):
    """Ties everywhere."""
    n, d = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 2**20))
    kernels = torch.randint(-2, 3, (2, n, d), generator=torch.Generator().manual_seed(seed))
    rows = unit_rows(kernels.float())
    assert_equal(torch.ops.fastws.kernel_order(rows, False), kernel_order_reference, rows, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_kernel_order_of_other_dtypes(dtype):
    kernels = random_kernels(200, 9).to(dtype)
    assert torch.equal(fastws.kernel_order(kernels), fastws.kernel_order(kernels.float()))
    assert torch.equal(fastws.kernel_order(kernels.T.contiguous().T), fastws.kernel_order(kernels))


def test_kernel_order_depends_on_directions_alone():
    kernels = random_kernels(100, 9)
    lengths = 2.0 ** torch.arange(100).remainder(40)[:, None]
    assert torch.equal(fastws.kernel_order(kernels * lengths), fastws.kernel_order(kernels))
    turned = torch.cat([kernels[:1], kernels[1:].flip(0)])  # other numbers, the same path
    assert torch.equal(turned[fastws.kernel_order(turned)], kernels[fastws.kernel_order(kernels)])
    assert not torch.equal(fastws.kernel_order(kernels**3), fastws.kernel_order(kernels))


def load(name):
    if not (CHECKPOINTS / name).exists():
        pytest.skip(f"needs {name} of akamaster/pytorch_resnet_cifar10")
    state = torch.load(CHECKPOINTS / name, map_location="cpu", weights_only=True)["state_dict"]
    return [weight.flatten(0, 1).flatten(1) for weight in state.values() if weight.dim() == 4]


@pytest.mark.parametrize(
    "name, digest, mean",
    [
        ("resnet20-12fca82f.th", "1b6d211809e4a8205248cf795a512ce666b1e287116374f23f020c315d1cde76", 0.8855),
        ("resnet56-4bfd9763.th", "c6ba5c47eab70cb9171e8c2fb615cd21341b7e7e697a2255c1e244a59ce55340", 0.8896),
    ],
)
@compiled
def test_kernel_order_of_trained_networks_is_published(name, digest, mean):
    layers = load(name)
    orders = [fastws.kernel_order(kernels) for kernels in layers]
    assert hashlib.sha256(torch.cat(orders).int().numpy().astype("<i4").tobytes()).hexdigest() == digest
    sums = [mean_similarity(kernels, order) * (len(order) - 1) for kernels, order in zip(layers, orders, strict=True)]
    assert sum(sums) / sum(len(order) - 1 for order in orders) == pytest.approx(mean, abs=5e-5)


@compiled
def test_kernel_order_improved_of_a_trained_layer():
    kernels = load("resnet20-12fca82f.th")[1]
    assert mean_similarity(kernels, fastws.kernel_order(kernels)) == pytest.approx(0.7845, abs=5e-5)
    assert mean_similarity(kernels, fastws.kernel_order(kernels, improve=True)) > 0.806  # LKH finds 0.8092


# duplicates and zeros, too few rows for kicks, a line, a circle
IMPROVED = [(1, 9), (2, 9), (3, 9), (8, 9), (40, 9), (30, 1), (25, 2), (20, 25)]


@pytest.mark.parametrize("n, d", IMPROVED)
def test_kernel_order_improved_is_the_reference(n, d):
    kernels = random_kernels(n, d, seed=n)
    kernels[12:16], kernels[20:22] = kernels[:1], 0
    rows = unit_rows(kernels)[None]
    assert_equal(torch.ops.fastws.kernel_order(rows, True), kernel_order_reference, rows, True)


@compiled
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.sampled_from([1, 2, 3, 9]), st.integers(0, 2**20))
def test_kernel_order_improved_is_a_path_and_never_worse(n, d, seed):
    kernels = random_kernels(n, d, seed).round(decimals=seed % 3)
    greedy, improved = fastws.kernel_order(kernels), fastws.kernel_order(kernels, improve=True)
    assert improved[0] == 0 and improved.sort().values.tolist() == list(range(n))
    # as good a path of other pairs may differ in the last digit of its sum
    assert n == 1 or mean_similarity(kernels, improved) >= mean_similarity(kernels, greedy) - 1e-12
    assert torch.equal(improved, fastws.kernel_order(kernels, improve=True))


@compiled
def test_kernel_order_improved_is_near_the_best_of_all():
    """Against dynamic programming over sets of visited rows (Held and Karp, 1962)."""
    for seed in range(5):
        kernels = random_kernels(11, 3, seed)
        similarity = (unit_rows(kernels).double() @ unit_rows(kernels).double().T).tolist()
        best = {(1, 0): 0.0}
        for _ in range(10):
            reached = {}
            for (visited, last), value in best.items():
                for row in range(11):
                    if not visited >> row & 1:
                        key = visited | 1 << row, row
                        reached[key] = max(reached.get(key, -99), value + similarity[last][row])
            best = reached
        path = fastws.kernel_order(kernels, improve=True).tolist()
        assert sum(similarity[a][b] for a, b in pairwise(path)) == pytest.approx(max(best.values()), abs=0.01)


@compiled
def test_kernel_order_does_not_depend_on_the_threads():
    rows, threads = unit_rows(random_kernels(5 * 200, 9).view(5, 200, 9)), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append([torch.ops.fastws.kernel_order(rows, improve) for improve in (False, True)])
    torch.set_num_threads(threads)
    for greedy, improved in found[1:]:
        assert torch.equal(greedy, found[0][0]) and torch.equal(improved, found[0][1])
    assert torch.equal(found[0][1][3], torch.ops.fastws.kernel_order(rows[3:4], True)[0])


@pytest.mark.parametrize(
    "kernels, message",
    [
        (torch.ones(3), r"kernels must be \[n, d\] floating point with d >= 1, got \[3\]"),
        (torch.ones(3, 0), r"kernels must be \[n, d\] floating point with d >= 1, got \[3, 0\]"),
        (torch.ones(3, 2, dtype=torch.int64), r"got \[3, 2\] torch.int64"),
        (torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, torch.nan]]), "got NaN or infinity in 2 of 3"),
    ],
)
def test_kernel_order_refuses(kernels, message):
    with pytest.raises(ValueError, match=f"kernel_order: .*{message}"):
        fastws.kernel_order(kernels)


@pytest.mark.parametrize("device", devices())
def test_kernel_order_opcheck(device):
    rows = unit_rows(random_kernels(2 * 9, 3)).view(2, 9, 3).to(device)
    torch.library.opcheck(torch.ops.fastws.kernel_order.default, (rows, False))
    torch.library.opcheck(torch.ops.fastws.kernel_order.default, (rows[:, :0].cpu(), True))


def test_kernel_order_has_no_gradient():
    kernels = random_kernels(5, 3).requires_grad_()
    assert not fastws.kernel_order(kernels).requires_grad
